"""The recurrence of δ-mem on tensors: every token reads the state, then is written into it.

`delta_rule` is the public function. It checks its inputs, turns masks and packed sequences into plain
dense tensors, and hands them to a backend: one file per way to compute the same function.

A layer calls what stands around it: `project` (its input to projections), `advance` (projections to reads,
and the state after), `advance_segments` (under segment writes), `read` (nothing is written) and `correct`
(reads to a projection's output). Where a compiled backend can do one of these in one go, and can be
differentiated if gradients are wanted, it does. In decoding one token goes through all layers as a `Token`.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from . import chunked, cpu, naive, segments, triton
from .activation import Rule, activate, direction
from .segments import SegmentPlan
from .steps import Step, Steps, Token, alike

__all__ = [
    "BACKENDS",
    "Rule",
    "SegmentPlan",
    "Step",
    "Steps",
    "Token",
    "advance",
    "advance_segments",
    "alike",
    "begin_token",
    "close_segment",
    "correct",
    "delta_rule",
    "hold",
    "plan_segments",
    "project",
    "read",
    "recorded_token",
    "settle",
]

# Called as backend(q, k, v, keep, erase, write, state), a backend returns (reads, state). It gets
# six tensors [batch, tokens, states, rank], none empty, not necessarily contiguous, and the state
# [batch, states, rank, rank], all of one dtype (float32 or float64) on one device. Tokens that
# shall not count come with q = k = v = erase = write = 0 and keep = 1. It modifies none of them.
BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "naive": naive.delta_rule,
    "chunked": chunked.delta_rule,
    "cpu": cpu.delta_rule,
    "triton": triton.delta_rule,
}

# Ways to compute `advance` in one go where no gradient is wanted, by the name of their backend. Called as
# fused(z, gate_bias, state, rule, writes, mask), with whatever the caller of `advance` gave; returns None for
# what it does not take: other devices, and all that the backend's own function would complain about.
FUSED: dict[str, Callable[..., tuple[Tensor, Tensor] | None]] = {
    "cpu": cpu.advance,
    "triton": triton.advance,
}

# Those of them that can be differentiated: these are taken where gradients are wanted.
DIFFERENTIABLE = {"triton": triton.advance}

# Up to here the loop beats the fixed cost of the chunked backend.
SHORT = 16


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    erase: Tensor,
    write: Tensor,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Read every token from the memory, then write it by the gated delta rule.

    Per batch row and state, for t = 1, 2, …:

        m_t = S_{t-1} q_t
        S_t = diag(keep_t) S_{t-1} − diag(erase_t) (S_{t-1} k_t) k_tᵀ + diag(write_t) v_t k_tᵀ

    The paper's update rules are choices of gates. With write gate β and keep gate λ, `standard` has
    keep, erase, write = λ, β, β; `decay_outside` has λ, λβ, β; `no_decay` has 1, β, β.

    Inputs may have any floating dtype. The arithmetic and both results are float32, or float64 if
    any input is float64, also under autocast. Differentiable in all floating inputs.

    Args:
        q: queries [batch, tokens, states, rank].
        k: keys, like q; the rule is stable for keys of at most unit length.
        v: values, like q.
        keep: keep gates, like q or broadcastable to it: one per row of the state (last dim rank) or
            one for all its rows (last dim 1). Likewise erase and write.
        erase: erase gates.
        write: write gates.
        state: [batch, states, rank, rank] before the first token; None means zeros. Not modified.
        mask: bool, or integers 0 and 1, [batch, tokens]. A token with 0 neither reads (its read is
            0) nor writes, whatever its other inputs hold.
        cu_seqlens: int32 or int64 [n + 1], rising from 0 to tokens: n sequences, some perhaps
            empty, packed along tokens with batch = 1. Each has its own state, in and out:
            [n, states, rank, rank]. Inside they are padded to the longest, so that work and memory
            grow with n × longest.
        backend: "auto", or a name in `BACKENDS`. "auto" takes compiled code where there is some; else it
            loops over few tokens, as in decoding, and computes longer inputs in chunks.

    Returns:
        The reads [batch, tokens, states, rank], and the state after the last token.

    Raises:
        ValueError: for a wrong shape, device, cu_seqlens or backend.
        TypeError: for a wrong type or dtype.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {['auto', *BACKENDS]}")
    floats = dict(q=q, k=k, v=v, keep=keep, erase=erase, write=write, state=state)
    _check_tensors(floats, mask, cu_seqlens)
    bounds = None if cu_seqlens is None else _checked_bounds(cu_seqlens, q)
    batch, tokens, states, rank = q.shape
    _check_shape("state", state, (batch if bounds is None else len(bounds) - 1, states, rank, rank))

    wide = any(x is not None and x.dtype == torch.float64 for x in floats.values())
    dtype = torch.float64 if wide else torch.float32
    inputs = [x.to(dtype) for x in (q, k, v, keep, erase, write)]
    # Only where it does something: an expand takes as long as a product of the one-token step.
    inputs = [x if x.shape == q.shape else x.expand(q.shape) for x in inputs]

    if bounds is not None:
        # Each packed token's place in a batch of n padded sequences.
        longest = max((end - start for start, end in pairwise(bounds)), default=0)
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        sequence = torch.repeat_interleave(lengths, output_size=tokens)
        place = sequence, torch.arange(tokens, device=q.device) - starts[sequence]
        padded = len(bounds) - 1, longest
        inputs = [x.new_zeros(*padded, states, rank).index_put(place, x[0]) for x in inputs]
        inside = torch.ones_like(sequence, dtype=torch.bool) if mask is None else mask[0].bool()
        mask = torch.zeros(padded, dtype=torch.bool, device=q.device).index_put(place, inside)
    if mask is not None:
        # All inputs, not only the gates: what lies under a padded token may be NaN.
        off = ~mask.bool()[..., None, None]
        neutral = (0.0, 0.0, 0.0, 1.0, 0.0, 0.0)
        inputs = [x.masked_fill(off, value) for x, value in zip(inputs, neutral, strict=True)]

    q = inputs[0]
    state = q.new_zeros(q.shape[0], states, rank, rank) if state is None else state.to(dtype)
    if q.numel() == 0:
        reads, state = torch.zeros_like(q), state.clone()
    else:
        if backend == "auto":
            if cpu.usable((*inputs, state), rank):
                backend = "cpu"
            elif triton.usable((*inputs, state), rank):
                backend = "triton"
            else:
                backend = "naive" if q.shape[1] <= SHORT else "chunked"
        with torch.autocast(q.device.type, enabled=False):
            reads, state = BACKENDS[backend](*inputs, state)
    if bounds is not None:
        reads = reads[place].unsqueeze(0)
    return reads, state


def advance(
    z: Tensor,
    gate_bias: Tensor,
    state: Tensor,
    rule: Rule,
    writes: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`delta_rule` from a layer's projections on: activate, read, write.

    Args:
        z: float32 [batch, tokens, features], laid out as `rule.sections`.
        gate_bias: float32, see `activation.activate`.
        state: float32 [batch, states, rank, rank]. Not modified.
        rule: the gates' settings.
        writes: bool [batch, tokens]: tokens that write; the others only read. None: all do.
        mask: bool [batch, tokens]: False where a token neither reads (its read is 0) nor writes.
        backend: as in `delta_rule`.

    Returns:
        The reads [batch, tokens, states, rank], and the state after the last token.
    """
    if (results := _fused(z, gate_bias, state, rule, writes, mask, backend)) is not None:
        return results
    inputs = activate(z, gate_bias, rule)
    if writes is not None:
        held = ~writes[..., None, None]
        inputs = inputs._replace(
            keep=inputs.keep.masked_fill(held, 1),
            erase=inputs.erase.masked_fill(held, 0),
            write=inputs.write.masked_fill(held, 0),
        )
    return delta_rule(*inputs, state, mask, backend=backend)


def _fused(
    z: Tensor,
    gate_bias: Tensor,
    state: Tensor,
    rule: Rule,
    writes: Tensor | None,
    mask: Tensor | None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor] | None:
    """`advance` in one go, or None where nothing does it."""
    ways = DIFFERENTIABLE if _learns(z, gate_bias, state) else FUSED
    for name, fused in ways.items():
        if backend in ("auto", name):
            results = fused(z, gate_bias, state, rule, writes, mask)
            if results is not None:
                return results
    return None


def begin_token(hidden: Tensor, *args, **kwargs) -> Token:
    """One token's way through the layers, for inference: see `steps.Token`, also for the arguments."""
    backend = triton if triton.kernels is not None and triton.runs_on(hidden) else cpu
    return backend.Token(hidden, *args, **kwargs)


def recorded_token(
    hidden: Tensor,
    step: Step,
    state: Tensor,
    writes: Tensor | None = None,
    mask: Tensor | None = None,
    segments: SegmentPlan | None = None,
    open_sum: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]] | None:
    """One token of one layer, where torch wants to see every operation, as under torch.compile.

    In a CUDA graph it runs beside what follows, until it is settled.

    Args:
        hidden, step, state, writes, mask, segments, open_sum: as in `steps.Token`, of one layer.

    Returns:
        The results, to be passed to `settle` before anybody looks at them: the corrections, the state after
        the token, the sums of the segments left open if there are any, and the token's projections. And what
        they are made of, for `settle`, too. None outside torch.compile and dispatch modes, and on CPUs, where
        there is no such operation.
    """
    if triton.kernels is None or not triton.runs_on(hidden):
        return None
    return triton.recorded_token(hidden, step, state, writes, mask, segments, open_sum)


def settle(results: list[Tensor], others: list[Tensor]) -> None:
    """Ends a `recorded_token`: from now on its results are there.

    Args:
        results, others: what it returned; and to others may be added what it is to run beside.
    """
    torch.ops.delta_mem.settle(results, others)


def project(hidden: Tensor, in_proj: Tensor) -> Tensor:
    """z float32 [batch, tokens, features] of a layer's input.

    Args:
        hidden: [batch, tokens, size], any floating dtype.
        in_proj: [features, size]; used in hidden's dtype.
    """
    return F.linear(hidden, in_proj.to(hidden.dtype)).float()


def correct(output: Tensor, reads: Tensor, weight: Tensor, scale: float, in_place: bool) -> Tensor:
    """output + scale * reads weightᵀ, in output's dtype.

    Args:
        output: [..., size].
        reads: [..., D], of output's dtype, as is weight.
        weight: [size, D].
        in_place: may write to `output`: a second tensor of its size would double what it takes.
    """
    if in_place and triton.correct(output, reads, weight, scale):
        return output
    reads, flat = reads.flatten(0, -2), output.flatten(0, -2)
    product = flat.addmm_ if in_place else flat.addmm
    return product(reads, weight.t(), alpha=scale).view(output.shape)


def read(z: Tensor, gate_bias: Tensor, state: Tensor, rule: Rule, mask: Tensor | None = None) -> Tensor:
    """The reads of `advance`, where no token writes."""
    nobody = torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device)
    if (results := _fused(z, gate_bias, state, rule, nobody, mask)) is not None:
        return results[0]
    with torch.autocast(z.device.type, enabled=False):
        query = direction(z[..., : rule.num_states * rule.rank], rule)
        reads = torch.einsum("bhij,bthj->bthi", state, query)
    return reads if mask is None else reads.masked_fill(~mask[..., None, None], 0)


def plan_segments(
    shape: tuple[int, int],
    ids: Tensor | None,
    writes: Tensor | None,
    present: Tensor | None,
    open_count: Tensor,
    open_ids: Tensor,
    keep_open: Tensor | bool,
) -> SegmentPlan:
    """Where the segments of one call begin and end.

    Args:
        shape: (batch, tokens).
        ids, writes, present: see `segments.plan`; None: all tokens are of one segment, write, are present. A
            token that is not present does not write, whatever `writes` says.
        open_count, open_ids, keep_open: see `segments.plan`; one bool is for all rows.
    """
    by_row, keep = (None, keep_open) if isinstance(keep_open, bool) else (keep_open, False)
    for plan in (triton.plan_segments, cpu.plan_segments):
        planned = plan(shape, ids, writes, present, open_count, open_ids, by_row, keep)
        if planned is not None:
            return planned
    everyone = torch.ones((), dtype=torch.bool, device=open_count.device)
    ids = torch.zeros_like(everyone, dtype=torch.int64).expand(shape) if ids is None else ids
    writes = everyone.expand(shape) if writes is None else writes
    if present is None:
        present = everyone.expand(shape)
    else:
        writes = writes & present
    keep_open = (everyone & keep_open).expand(shape[0])
    return segments.plan(ids, writes, present, open_count, open_ids, keep_open)


def advance_segments(
    z: Tensor,
    gate_bias: Tensor,
    state: Tensor,
    open_sum: Tensor,
    rule: Rule,
    plan: SegmentPlan,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`advance` where the mean of each segment is written at its end.

    Args:
        z, gate_bias, state, rule, mask: as in `advance`.
        open_sum: float32 [batch, features - D]: sums over the segments left open of what will be written, the
            part of z behind the queries. Not modified.
        plan: of the call.

    Returns:
        The reads, the state, and the sums of the segments left open now.
    """
    if not _learns(z, gate_bias, state, open_sum):
        results = cpu.advance_segments(z, gate_bias, state, open_sum, rule, plan, mask)
        if results is not None:
            return results
    held, writes, open_sum = hold(z, open_sum, plan)
    mask = None if mask is None else F.pad(mask, (1, 0), value=True)
    reads, state = advance(held, gate_bias, state, rule, writes, mask)
    return reads[:, 1:], state, open_sum


def hold(z: Tensor, open_sum: Tensor, plan: SegmentPlan) -> tuple[Tensor, Tensor, Tensor]:
    """See `segments.hold`."""
    results = triton.hold(z, open_sum, plan)
    return segments.hold(z, open_sum, plan) if results is None else results


def close_segment(gate_bias: Tensor, state: Tensor, open_sum: Tensor, count: Tensor, rule: Rule) -> Tensor:
    """The state after the open segments are written, in the rows that have one: count int64 [batch] > 0."""
    mean = open_sum / count.clamp(min=1).unsqueeze(1)
    z = F.pad(mean, (rule.num_states * rule.rank, 0)).unsqueeze(1)  # nobody reads
    return advance(z, gate_bias, state, rule, (count > 0).unsqueeze(1))[1]


def _learns(*tensors: Tensor) -> bool:
    """Whether gradients are wanted of a computation with these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _check_tensors(floats: dict, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Types, dtypes, devices, and the shapes that follow from q's."""
    optional = dict(state=floats["state"], mask=mask, cu_seqlens=cu_seqlens)
    for name, x in (floats | optional).items():
        if x is None and name in optional:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}, expected a tensor")
        if name == "mask":
            right, expected = not (x.is_floating_point() or x.is_complex()), "bool or integers"
        elif name == "cu_seqlens":
            right, expected = x.dtype in (torch.int32, torch.int64), "int32 or int64"
        else:
            right, expected = x.is_floating_point(), "a floating dtype"
        if not right:
            raise TypeError(f"{name} has dtype {x.dtype}, expected {expected}")
        if x.device != floats["q"].device:
            raise ValueError(f"{name} is on {x.device}, expected {floats['q'].device} like q")

    shape = floats["q"].shape
    if len(shape) != 4:
        raise ValueError(f"q has shape {tuple(shape)}, expected [batch, tokens, states, rank]")
    _check_shape("k", floats["k"], shape)
    _check_shape("v", floats["v"], shape)
    for name in ("keep", "erase", "write"):
        gate = floats[name].shape
        if len(gate) > 4 or any(n not in (1, shape[i - len(gate)]) for i, n in enumerate(gate)):
            got, full = tuple(gate), tuple(shape)
            raise ValueError(f"{name} has shape {got}, expected one broadcastable to {full}")
    _check_shape("mask", mask, shape[:2])


def _check_shape(name: str, x: Tensor | None, expected: tuple[int, ...]) -> None:
    if x is not None and x.shape != expected:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(expected)}")


def _checked_bounds(cu_seqlens: Tensor, q: Tensor) -> list[int]:
    """cu_seqlens as Python numbers (one wait for the device)."""
    if q.shape[0] != 1:
        raise ValueError(f"q has batch {q.shape[0]}, expected 1 with cu_seqlens")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected [n + 1]")
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != q.shape[1] or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens is {bounds}, expected numbers rising from 0 to {q.shape[1]}")
    return bounds
