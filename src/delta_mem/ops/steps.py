"""One token through the layers of a model, for inference: what the backends' kernels for it have in common.

In decoding what costs is not arithmetic but to start an operation, and Python around it. So a layer's kernel
does all that there is to do for a token, and what can be found out for all layers at once, is. `Steps` are
the layers' weights, and what was found out about them once. A `Token` is one token's way through the layers,
of which each then does little more than start its kernel.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .activation import Rule
from .segments import SegmentPlan

Carried = tuple[Tensor, Tensor | None]  # from token to token: a state, and the sums of open segments

PLAIN = frozenset({Tensor, torch.nn.Parameter})  # types of tensors whose memory is all there is to them


class Step:
    """The weights that take one token through a layer.

    Args:
        in_proj: [features, size], the projections, laid out as `rule.sections`; used in hidden's dtype.
        gate_bias: see `activation.activate`.
        deltas: of each head [its size, states * rank]; used in hidden's dtype.
        scale: the correction of a head is scale * delta m, m being the token's read.
        rule: the gates' settings.
    """

    def __init__(
        self, in_proj: Tensor, gate_bias: Tensor, deltas: tuple[Tensor, ...], scale: float, rule: Rule
    ):
        self.packed, self.scale, self.rule = (in_proj, gate_bias, deltas), scale, rule
        self.weights = (in_proj, gate_bias, *deltas)


class Steps:
    """The layers' weights, and what backends have found out about them, as long as these are what they were.

    Args:
        layers: {layer: its `Step`}, all of one rule.
    """

    def __init__(self, layers: dict[int, Step]):
        self.layers = layers
        self.rule = next((step.rule for step in layers.values()), None)
        self._weights = [weight for step in layers.values() for weight in step.weights]
        self._found: tuple[tuple, dict] | None = None  # of the weights what is compared; facts

    def facts(self) -> dict:
        """Where backends note what they find out; empty once weights were moved or changed."""
        weights, found = self._weights, self._found
        now = (
            list(map(Tensor.data_ptr, weights)),
            list(map(Tensor.is_contiguous, weights)),
            [x.dtype for x in weights],
            [x.shape for x in weights],
        )
        if found is None or found[0] != now:
            found = self._found = now, {}  # at once: there may be threads
        return found[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_found": None}  # of these weights, not of a copy's


class Token(ABC):
    """One token's way through the layers of a model that are on one device, for inference.

    Begun at the first layer, then called with each layer's number. Until the last, weights and states must
    stay where they are. Each backend has a class of its own.

    Args:
        hidden: the first layer's input, [batch, 1, size], any floating dtype.
        steps: the layers' weights.
        states: {layer: its state}, as in `delta_mem.ops.advance`.
        writes, mask: as in `delta_mem.ops.advance`.
        segments, open_sums: under segment writes, instead of writes: the plan, and {layer: the sums that
            `delta_mem.ops.advance_segments` takes}.

    Attributes:
        after: {layer: (its state after the token, the sums of the segments left open or None)}. They are
            filled when the layer is called; one that no kernel takes is not there. All are missing if the
            kernels do not take one of the states.
    """

    def __init__(
        self,
        hidden: Tensor,
        steps: Steps,
        states: dict[int, Tensor],
        writes: Tensor | None = None,
        mask: Tensor | None = None,
        segments: SegmentPlan | None = None,
        open_sums: dict[int, Tensor] | None = None,
    ):
        self.after: dict[int, Carried] = {}
        self.shape, self.dtype, self.device = hidden.shape, hidden.dtype, hidden.get_device()
        self._layers: dict[int, tuple[int, Any]] = {}  # those that are taken: their place among them, facts
        self._rooms: dict[tuple[int, ...], tuple] = {}
        self._like = hidden
        self._given = states, writes, mask, segments, open_sums  # kernels know addresses: these must stay
        kind = None if torch.is_grad_enabled() else self._begin(hidden, writes, mask, segments)
        if kind is None:
            return
        facts = steps.facts()
        layers = facts.get(kind)
        if layers is None:
            found = {layer: self._find_out(step) for layer, step in steps.layers.items()}
            taken = [layer for layer, fact in found.items() if fact is not None]
            layers = facts[kind] = {layer: (place, found[layer]) for place, layer in enumerate(taken)}
        if not layers:
            return
        before = [(states[layer], None if segments is None else open_sums[layer]) for layer in layers]
        carried = list(zip(*before, strict=True))  # all states, all sums
        shapes = carried_shapes(self.shape[0], steps.rule)
        if not all(fit(tensors, shape, self.device) for tensors, shape in zip(carried, shapes, strict=True)):
            return
        after = list(zip(*map(_after, carried), strict=True))
        self._carry(before, after)
        self.after = dict(zip(layers, after, strict=True))
        self._layers = layers

    @abstractmethod
    def __call__(self, layer: int, hidden: Tensor, output: Tensor | None) -> Sequence[Tensor | None] | None:
        """The corrections of one layer.

        Args:
            layer: its number.
            hidden: its input, [batch, 1, size].
            output: [batch, 1, size of the first head], which its correction may be added to, in place. One
                that no kernel can add to is left as it is.

        Returns:
            The corrections [batch, 1, size of the head] in hidden's dtype, good until the next layer is
            called; the first of them None if it has been added to `output`. None for what no kernel takes.
        """

    @abstractmethod
    def _begin(
        self, hidden: Tensor, writes: Tensor | None, mask: Tensor | None, segments: SegmentPlan | None
    ) -> Hashable | None:
        """All that facts depend on but for the weights; None if the kernels do not take such a token."""

    @abstractmethod
    def _find_out(self, step: Step) -> Any:
        """What tokens of this kind need to know of a layer; None if the kernels do not take it."""

    @abstractmethod
    def _carry(self, before: list[Carried], after: list[Carried]) -> None:
        """Takes down where each layer's state and sums are, and where those after the token go."""

    def _room(self, sizes: tuple[int, ...]) -> tuple[tuple[Sequence[Tensor | None], ...], Any]:
        """Where the corrections of heads of these sizes go, for all layers that have such.

        Returns:
            They, and the same without the first, which is added to an output; what the kernels need of them.
        """
        room = self._rooms.get(sizes)
        if room is None:
            made = tuple([self._like.new_empty((*self.shape[:2], size)) for size in sizes])
            room = self._rooms[sizes] = (made, (None, *made[1:])), self._at(made)
        return room

    @abstractmethod
    def _at(self, corrections: tuple[Tensor, ...]) -> Any:
        """What the kernels need of the room for corrections."""


def carried_shapes(batch: int, rule: Rule) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a state, and of the sums of open segments."""
    states, rank = rule.num_states, rule.rank
    return (batch, states, rank, rank), (batch, rule.written)


def fit(tensors: Sequence[Tensor | None], shape: tuple[int, ...], device: int) -> bool:
    """Whether kernels find at their addresses what they believe: float32 of that shape. None will do, too."""
    return all(
        x is None
        or (
            type(x) in PLAIN
            and x.dtype is torch.float32
            and x.shape == shape
            and x.get_device() == device
            and x.is_contiguous()
        )
        for x in tensors
    )


def alike(count: int, shape: tuple[int, ...], device: torch.device) -> Sequence[Tensor]:
    """Room for so many float32 tensors of one shape [rows, …], each at a multiple of 16 bytes.

    Made at once, which is faster; to autograd they are tensors of their own, not views of one.
    """
    rows, *size = shape
    apart = rows + -rows % (4 // math.gcd(4, math.prod(size)))
    made = torch.empty(count * apart, *size, dtype=torch.float32, device=device)
    if apart == rows:
        return made.unsafe_split(rows)
    return made.unsafe_split_with_sizes([rows, apart - rows] * count)[::2]


def _after(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Room for what the layers carry from a token, of the tensors that they carry to it; or as many None."""
    first = tensors[0]
    return tensors if first is None else alike(len(tensors), first.shape, first.device)
