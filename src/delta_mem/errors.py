"""The errors that callers may want to tell apart. All of them are `ValueError`s."""


class IncompatibleMemoryError(ValueError):
    """A memory of another adapter, or of a shape or device that does not fit the call."""


class AdapterFormatError(ValueError):
    """A file that is broken or not what it should be. The message names file and field."""


class UnsupportedBackboneError(ValueError):
    """A model whose attention layers cannot carry a memory. Names the classes looked at."""
