"""One token through the layers of a model, for inference: what the backends' kernels for it have in common.

In decoding what costs is not arithmetic but to start an operation, and Python around it. So a layer's kernel
does all that there is to do for a token, and what can be found out for all layers at once, is. `Steps` are
the layers' weights, and what was found out about them once. A `Token` is one token's way through the layers,
of which each then does little more than start its kernel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
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
        states, rank = rule.num_states, rule.rank
        self._carried = (states, rank, rank), (sum(rule.sections.values()) - states * rank,)

    def fits(self, carried: Carried, batch: int, device: int) -> bool:
        """Whether state and sums are as kernels believe, for a hidden of that batch on that device."""
        return all(
            x is None
            or (
                type(x) in PLAIN
                and x.dtype is torch.float32
                and x.shape == (batch, *shape)
                and x.get_device() == device
                and x.is_contiguous()
            )
            for x, shape in zip(carried, self._carried, strict=True)
        )


class Steps:
    """The layers' weights, and what backends have found out about them, as long as these are what they were.

    Args:
        layers: {layer: its `Step`}.
    """

    def __init__(self, layers: dict[int, Step]):
        self.layers = layers
        self._weights = [weight for step in layers.values() for weight in step.weights]
        self._found: tuple[tuple, dict[int, dict]] | None = None  # of the weights what is compared; facts

    def facts(self) -> dict[int, dict]:
        """{layer: where backends note what they find out}; all empty once weights were moved or changed."""
        weights, found = self._weights, self._found
        now = (
            [x.data_ptr() for x in weights],
            [x.dtype for x in weights],
            [x.shape for x in weights],
            [x.is_contiguous() for x in weights],
        )
        if found is None or found[0] != now:
            found = self._found = now, {layer: {} for layer in self.layers}  # at once: there may be threads
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
            filled when the layer is called; one that no kernel takes is not there.
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
        self._layers: dict[int, Any] = {}  # of each layer, what its call needs
        self._rooms: dict[tuple[int, ...], tuple] = {}
        self._like = hidden
        self._given = states, writes, mask, segments, open_sums  # kernels know addresses: these must stay
        if torch.is_grad_enabled() or not self._begin(hidden, writes, mask, segments):
            return
        facts = steps.facts()
        for layer, step in steps.layers.items():
            before = states[layer], None if segments is None else open_sums[layer]
            if not step.fits(before, self.shape[0], self.device):
                continue
            after = torch.empty_like(before[0]), None if segments is None else torch.empty_like(before[1])
            prepared = self._prepare(step, facts[layer], before, after)
            if prepared is not None:
                self._layers[layer], self.after[layer] = prepared, after

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
    ) -> bool:
        """Whether these, which all layers have in common, are what the kernels take."""

    @abstractmethod
    def _prepare(self, step: Step, facts: dict, before: Carried, after: Carried) -> Any:
        """What a layer's call needs; None if it is not taken."""

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
