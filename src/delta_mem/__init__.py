"""δ-mem: an online memory for frozen language models (Lei et al., arXiv 2605.12357).

    import delta_mem as dm

    model = dm.DeltaMemModel(backbone, dm.DeltaMemConfig())
    memory = model.new_memory()
    model.write(memory, input_ids)
    answer = model.generate(prompt_ids, memory=memory)

Names are imported when they are first asked for, so that `delta-mem --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops
    from .chat import ChatSession
    from .config import DeltaMemConfig
    from .errors import AdapterFormatError, IncompatibleMemoryError, UnsupportedBackboneError
    from .memory import MemoryTrace
    from .model import DeltaMemModel
    from .offline import load_offline_model
    from .state import MemoryState

__version__ = "0.1.0"

__all__ = [
    "AdapterFormatError",
    "ChatSession",
    "DeltaMemConfig",
    "DeltaMemModel",
    "IncompatibleMemoryError",
    "MemoryState",
    "MemoryTrace",
    "UnsupportedBackboneError",
    "load_offline_model",
    "ops",
]

_HOMES = {
    "AdapterFormatError": "errors",
    "ChatSession": "chat",
    "DeltaMemConfig": "config",
    "DeltaMemModel": "model",
    "IncompatibleMemoryError": "errors",
    "MemoryState": "state",
    "MemoryTrace": "memory",
    "UnsupportedBackboneError": "errors",
    "load_offline_model": "offline",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module(".ops", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
