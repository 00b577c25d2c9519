"""Segments of a stream, for memories that write once per segment: where they end, and their means.

A segment's tokens all read what the segments before have left; their mean is written when the segment ends.
So the recurrence is that of token writes, with every write held back but the one at a segment's last token,
and that one made of the segment's mean.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class SegmentPlan:
    """Segments of one call. Index 0 is the segment left open by the call before; others follow.

    Attributes:
        closes: bool [batch]: rows whose open segment ended before this call's first token.
        index: int64 [batch, tokens]: the segment a token belongs to.
        member: bool [batch, tokens]: tokens that count in their segment's mean.
        ends: bool [batch, tokens]: tokens at which a segment ends and is written.
        open_before: float32 [batch]: tokens in the segment left open by the call before.
        counts: float32 [batch, tokens + 1]: tokens in each segment.
        stays_open: bool [batch]: rows whose last segment stays open.
        open_count, open_ids: int64 [batch]: of the segments open when the call ends.
    """

    closes: Tensor
    index: Tensor
    member: Tensor
    ends: Tensor
    open_before: Tensor
    counts: Tensor
    stays_open: Tensor
    open_count: Tensor
    open_ids: Tensor

    @functools.cached_property
    def kind(self) -> tuple:
        """Equal for plans whose tensors are of the same types, dtypes, shapes and devices."""
        parts = [getattr(self, part.name) for part in fields(self)]
        return tuple([(type(x), x.dtype, x.shape, x.get_device()) for x in parts])


def plan_room(open_count: Tensor, tokens: int) -> list[Tensor]:
    """Tensors for the fields of a plan of so many tokens, in their order; what they hold is left open."""
    new, rows = open_count.new_empty, open_count.shape[0]  # not len(), which makes a symbol a number
    return [
        new(rows, dtype=torch.bool),
        new(rows, tokens),
        new(rows, tokens, dtype=torch.bool),
        new(rows, tokens, dtype=torch.bool),
        new(rows, dtype=torch.float32),
        new(rows, tokens + 1, dtype=torch.float32),
        new(rows, dtype=torch.bool),
        new(rows),
        new(rows),
    ]


def plannable(
    shape: tuple[int, int],
    ids: Tensor | None,
    writes: Tensor | None,
    present: Tensor | None,
    open_count: Tensor,
    open_ids: Tensor,
    keep_open: Tensor | None,
) -> bool:
    """Whether the arguments of `plan`, some perhaps None, are as it takes them for (batch, tokens)."""
    by_token = (ids, torch.int64), (writes, torch.bool), (present, torch.bool)
    by_row = (open_count, torch.int64), (open_ids, torch.int64), (keep_open, torch.bool)
    return all(
        x is None or (x.dtype is dtype and x.shape == size and x.device == open_count.device)
        for group, size in ((by_token, shape), (by_row, shape[:1]))
        for x, dtype in group
    )


def plan(
    ids: Tensor,
    writes: Tensor,
    present: Tensor,
    open_count: Tensor,
    open_ids: Tensor,
    keep_open: Tensor,
) -> SegmentPlan:
    """Where the segments of one call begin and end.

    A token that does not write belongs to the segment around it, and starts none; a segment ends at the last
    token before the next one starts, whether or not that token writes.

    Args:
        ids: int64 [batch, tokens]: a segment starts where the id of the writing tokens changes; tokens of
            id -1 count in no mean.
        writes: bool [batch, tokens]; never where a token is not present.
        present: bool [batch, tokens]: False for padding.
        open_count, open_ids: int64 [batch]: of the segments left open by the call before.
        keep_open: bool [batch]: rows whose last segment goes on in the next call.
    """
    device, shape = ids.device, ids.shape
    position = torch.arange(shape[1], device=device).expand(shape)
    # The id of the writing token before each token, over gaps of padding and of read-only tokens.
    seen = torch.where(writes, position, -1).cummax(1).values
    before_token = F.pad(seen[:, :-1], (1, 0), value=-1)
    open_id = torch.where(open_count > 0, open_ids, -1).unsqueeze(1)
    id_before = torch.where(before_token < 0, open_id, ids.gather(1, before_token.clamp(min=0)))
    index = (writes & (ids != id_before)).long().cumsum(1)
    member = writes & (ids >= 0)

    final = torch.full((shape[0], shape[1] + 1), -1, dtype=torch.int64, device=device)
    final = final.scatter_reduce(1, index, torch.where(present, position, -1), "amax")
    last = index[:, -1:]
    any_writes = writes.any(1)
    last_id = torch.where(any_writes, ids.gather(1, seen[:, -1:].clamp(min=0)).squeeze(1), open_id[:, 0])
    closes = any_writes & (open_count > 0) & (final[:, 0] < 0)

    open_before = open_count.float()
    counts = torch.zeros(final.shape, dtype=torch.float32, device=device)
    counts = counts.scatter_add(1, index, member.float())
    counts[:, 0] += open_before.masked_fill(closes, 0)
    ends = present & (position == final.gather(1, index)) & (counts.gather(1, index) > 0)
    # A row that nobody writes to in this call is left as it is, its open segment included.
    ends = ends & any_writes.unsqueeze(1) & ~(keep_open.unsqueeze(1) & (index == last))
    stays_open = ~any_writes | (keep_open & (last_id >= 0))
    count = counts.gather(1, last).squeeze(1).long() * stays_open
    return SegmentPlan(closes, index, member, ends, open_before, counts, stays_open, count, last_id)


def hold(z: Tensor, open_sum: Tensor, plan: SegmentPlan) -> tuple[Tensor, Tensor, Tensor]:
    """What `advance` is to do with a call, so that the mean of each segment is written at its end.

    Args:
        z: float32 [batch, tokens, features], laid out as `activation.Rule.sections`.
        open_sum: float32 [batch, features - D]: of the segments left open by the call before.
        plan: of the call.

    Returns:
        z [batch, 1 + tokens, features], where in the place of what tokens write are their segments' means at
        the ends, else zeros. Before the first token comes one that writes the segment left open by the call
        before, if it ended there. Who writes, bool [batch, 1 + tokens]; and the sums of segments left open.
    """
    query, written = z.split([z.shape[-1] - open_sum.shape[-1], open_sum.shape[-1]], -1)
    index = plan.index.unsqueeze(-1).expand_as(written)
    members = written.masked_fill(~plan.member.unsqueeze(-1), 0)
    sums = written.new_zeros(written.shape[0], written.shape[1] + 1, written.shape[2])
    sums = sums.scatter_add(1, index, members)
    sums[:, 0] += open_sum.masked_fill(plan.closes.unsqueeze(1), 0)
    left_open = sums.gather(1, index[:, -1:]).squeeze(1) * plan.stays_open.unsqueeze(1)

    counts = plan.counts.gather(1, plan.index).clamp(min=1)
    means = (sums.gather(1, index) / counts.unsqueeze(-1)).masked_fill(~plan.ends.unsqueeze(-1), 0)
    before = open_sum / plan.open_before.clamp(min=1).unsqueeze(1)
    written = torch.cat([before.unsqueeze(1), means], 1)
    held = torch.cat([F.pad(query, (0, 0, 1, 0)), written], -1)
    return held, torch.cat([plan.closes.unsqueeze(1), plan.ends], 1), left_open
