"""What can be set about a δ-mem adapter: `DeltaMemConfig`.

Every field carries its own help text (`field.metadata["help"]`), which the command line shows.
The mechanism that the fields shape is written down in `memory.py` and `ops/naive.py`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Write = Literal["token", "message", "sentence"]
Update = Literal["standard", "decay_outside", "no_decay"]
Init = Literal["base_slice", "zero", "random"]
Scale = Literal["layer", "head"]

HEADS = ("q", "k", "v", "o")


def _field(default, help):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DeltaMemConfig:
    """Settings of a δ-mem adapter (arXiv 2605.12357). The defaults are the published adapter's.

    Raises:
        ValueError: a value out of range, or fields that contradict each other, named.
        TypeError: a value of the wrong type, named.

    Example:
        >>> DeltaMemConfig(rank=16, heads=("q", "k", "v", "o"), write="message")
    """

    rank: int = _field(8, "r: each state is an r x r matrix.")
    alpha: float = _field(16.0, "Corrections are scaled by alpha / rank.")
    num_states: int = _field(1, "Parallel states per layer; more than one is the paper's MSW.")
    heads: tuple[str, ...] = _field(("q", "o"), "Projections that get a correction: of q, k, v, o.")
    write: Write = _field(
        "token", "What is written: every token (TSW), or the mean of a message or sentence (SSW)."
    )
    update: Update = _field(
        "standard",
        "Write rule: standard; decay_outside (erase scaled by the keep gate); no_decay (keep = 1).",
    )
    tied_gates: bool = _field(True, "Keep gate = 1 - write gate; otherwise it has its own weights.")
    per_row_gates: bool = _field(True, "One gate per row of a state; otherwise one per state.")
    gate_bias: float = _field(-1.5, "Initial bias of the write gate (the keep gate's is its negative).")
    init: Init = _field(
        "base_slice",
        "Initial corrections: columns of the backbone's own projections, zero, or random columns.",
    )
    init_gain: float = _field(0.05, "Length of each column of the initial corrections.")
    layers: tuple[int, ...] | None = _field(
        None, "Layers with a memory; none given: every softmax-attention layer."
    )
    trainable_scale: Scale | None = _field(
        None, "Learn a factor on the corrections: one per layer, or one per head."
    )
    scale_init: float = _field(1.0, "Initial value of the learned factor.")
    scale_max: float = _field(2.0, "Upper bound of the learned factor.")
    o_norm: bool = _field(False, "Pass the correction of the o projection through an RMSNorm.")
    o_norm_eps: float = _field(1e-6, "Epsilon of that RMSNorm.")

    def __post_init__(self):
        for name in ("rank", "num_states"):
            _require(_is_int(getattr(self, name)), TypeError, name, "an integer", self)
            _require(getattr(self, name) >= 1, ValueError, name, "at least 1", self)
        for name in ("alpha", "gate_bias", "init_gain", "scale_init", "scale_max", "o_norm_eps"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            _require(number, TypeError, name, "a number", self)
            finite = abs(value) <= sys.float_info.max  # an integer may be too large to ask math.isfinite
            _require(finite, ValueError, name, "a finite number", self)
            object.__setattr__(self, name, float(value))
        for name in ("tied_gates", "per_row_gates", "o_norm"):
            _require(isinstance(getattr(self, name), bool), TypeError, name, "True or False", self)
        for name, choices in (
            ("write", get_args(Write)),
            ("update", get_args(Update)),
            ("init", get_args(Init)),
            ("trainable_scale", (None, *get_args(Scale))),
        ):
            known = ", ".join(repr(choice) for choice in choices)
            _require(getattr(self, name) in choices, ValueError, name, f"one of {known}", self)

        heads = _as_tuple(self, "heads")
        fits = bool(heads) and all(head in HEADS for head in heads) and len(set(heads)) == len(heads)
        _require(fits, ValueError, "heads", "a non-empty choice of 'q', 'k', 'v', 'o'", self)
        object.__setattr__(self, "heads", tuple(head for head in HEADS if head in heads))
        if self.layers is not None:
            layers = _as_tuple(self, "layers")
            fits = bool(layers) and all(_is_int(layer) and layer >= 0 for layer in layers)
            _require(fits, ValueError, "layers", "None or a non-empty list of layer indices", self)
            object.__setattr__(self, "layers", tuple(sorted(set(layers))))

        _require(0 < self.scale_init < self.scale_max, ValueError, "scale_init",
                 f"between 0 and scale_max={self.scale_max}", self)  # fmt: skip
        if self.o_norm and "o" not in self.heads:
            raise ValueError("o_norm=True needs 'o' among heads: it norms the correction of o.")
        if self.update == "no_decay" and not self.tied_gates:
            raise ValueError(
                "update='no_decay' keeps everything, so tied_gates=False would train a gate that "
                "nothing reads; leave tied_gates=True."
            )

    @property
    def width(self) -> int:
        """Numbers in one reading: `num_states * rank` (D in the paper)."""
        return self.num_states * self.rank

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        values = dataclasses.asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeltaMemConfig:
        """The config of `to_dict`'s values. Missing fields take their defaults.

        Raises:
            ValueError: a field that does not exist, named.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown field(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**values)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_tuple(config, name) -> tuple:
    value = getattr(config, name)
    fits = isinstance(value, (tuple, list, str)) and not (isinstance(value, str) and name != "heads")
    _require(fits, TypeError, name, "a list or tuple", config)
    return tuple(value)


def _require(fits, error, name, wanted, config):
    if not fits:
        raise error(f"{name} must be {wanted}, got {getattr(config, name)!r}.")
