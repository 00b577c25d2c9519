"""One token of one layer in one go, for inference: what the backends' kernels for it have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .activation import Rule
from .segments import SegmentPlan


class Step:
    """From a layer's input to the corrections of its projections, for one token; made once for a layer.

    In decoding it is called for every layer and token, and to ask what the weights are would take longer than
    the kernel. So that is found out once, and again when they have been moved, cast or reshaped. Each backend
    has a class of its own.

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
        self.first_size = deltas[0].shape[0] if deltas else 0
        self._found: tuple[list[tuple], Any] | None = None  # of the weights what `_facts` compares; the facts

    def __call__(
        self,
        hidden: Tensor,
        state: Tensor,
        writes: Tensor | None = None,
        mask: Tensor | None = None,
        output: Tensor | None = None,
        segments: SegmentPlan | None = None,
        open_sum: Tensor | None = None,
        room: dict | None = None,
    ) -> tuple[list[Tensor | None], Tensor, Tensor | None] | None:
        """One token.

        Args:
            hidden: [batch, 1, size], any floating dtype.
            state, writes, mask: as in `delta_mem.ops.advance`.
            output: [batch, 1, size of the first head], which its correction may be added to, in place. One
                that no kernel can add to is left as it is.
            segments, open_sum: under segment writes, instead of writes: the plan and the sums that
                `delta_mem.ops.advance_segments` takes.
            room: a dict to keep room for corrections in, which then are good until it is passed again; None:
                the caller may keep them.

        Returns:
            The corrections [batch, 1, size of the head] in hidden's dtype, the first of them None if it has
            been added to `output`; the state after the token; and the sums of the segments left open. None
            for what the kernel does not take.
        """
        raise NotImplementedError

    def _room(
        self, hidden: Tensor, sizes: tuple[int, ...], in_place: bool, room: dict | None
    ) -> list[Tensor]:
        """Where corrections go that are not added to an output, [batch, 1, size] each."""
        batch = hidden.shape[0]
        key = batch, sizes, in_place, hidden.dtype, hidden.get_device()
        found = None if room is None else room.get(key)
        if found is None:
            found = [hidden.new_empty((batch, 1, size)) for size in sizes[in_place:]]
            if room is not None:
                room[key] = found
        return found

    def _facts(self) -> Any:
        """What `_find_out` found out about the weights, as long as they are where and what they were."""
        if self._found is not None:
            for weight, address, dtype, shape, contiguous in self._found[0]:
                if (
                    weight.data_ptr() != address
                    or weight.dtype is not dtype
                    or weight.shape != shape
                    or weight.is_contiguous() is not contiguous
                ):
                    break
            else:
                return self._found[1]
        known = [(x, x.data_ptr(), x.dtype, x.shape, x.is_contiguous()) for x in self.weights]
        self._found = known, self._find_out()  # both at once: other threads may be here too
        return self._found[1]

    def _find_out(self) -> Any:
        """What the kernels need to know of the weights; None if they do not take them."""
        raise NotImplementedError

    def _learns(self, *tensors: Tensor | None) -> bool:
        """Whether gradients are wanted, which no kernel has."""
        return torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (*tensors, *self.weights)
        )
