"""The recurrence compiled for CPUs: the torch side of `cpu_kernels.py`, where the loops are.

One token after the other, with the rows of a state as the lanes of vector instructions: at rank 8 a token
takes 13 ns. States (of all batch rows) are independent of each other; where there are several, and enough
to do, they are shared out to as many threads as torch may use. One state is not: its rows fill the
vectors, and half of them take a thread as long as all.

The backward pass computes the states again, from marks that the forward pass leaves every 64 tokens.

For inference there is a compiled call for each thing that a layer does: `advance` and `advance_segments`
take it from its projections to its reads, a `Token` from the layer's input to the corrections of its
projections. In decoding the processor's caches are full of the model's weights, and what costs is not
arithmetic but to start an operation: several times what it takes when nothing else runs. So few calls, few
checks.

The threads are Python's, in kernels that release the GIL. numba's own parallel loops would not do: the
threads that it always has abort the process when two Python threads enter at once, and those of OpenMP
abort a forked child.

numba is an extra (`pip install -e ".[cpu]"`), imported when it is first needed.
"""

import contextlib
import functools
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import ModuleType

import numpy as np
import torch

# By themselves, not as attributes: each is asked several times a layer.
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from . import steps
from .activation import Rule
from .segments import SegmentPlan, plan_room, plannable

# To compile for rank 64 takes seconds, for rank 128 a minute.
MAX_RANK = 64

# Entries of states times tokens that are worth another thread. They take 0.2 ms, to wake one 0.05 ms.
WORTH_A_THREAD = 1 << 20

# Rows up to which one token's projections in a plain loop beat a matrix product's start.
FEW = 4

# Corrected projections of one layer, at most: q, k, v, o.
MAX_HEADS = 4


def usable(tensors: Sequence[Tensor], rank: int) -> bool:
    """Whether `backend="auto"` may take this backend.

    The kernels read and write memory behind torch's back. So not while torch wants to see every operation
    (`torch.compile`, `torch.export`, `torch.jit.trace`, `torch.func`, dispatch modes, forward-mode
    derivatives), and not for tensors that may have no memory of their own.
    """
    return (
        not is_compiling()
        and tensors[0].is_cpu
        and rank <= MAX_RANK
        and steps.PLAIN.issuperset(map(type, tensors))
        and not _watched()
        and isinstance(_load(), ModuleType)
    )


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """See `delta_mem.ops.delta_rule`; inputs as `delta_mem.ops.BACKENDS` promises them.

    Gradients are of the first order only; `backend="chunked"` has them of any.

    Raises:
        ImportError: numba is missing, or does not work here.
        ValueError: the tensors are not on the CPU, or not such that memory is all there is to them; or
            the rank is above `MAX_RANK`.
    """
    _kernels()
    inputs = (q, k, v, keep, erase, write, state)
    if not q.is_cpu:
        raise ValueError(f"backend 'cpu' cannot compute on {q.device}; use 'auto' or 'chunked'")
    if q.shape[-1] > MAX_RANK:
        raise ValueError(
            f"backend 'cpu' goes up to rank {MAX_RANK}, not {q.shape[-1]}; use 'auto' or 'chunked'"
        )
    if not usable(inputs, q.shape[-1]):
        raise ValueError("backend 'cpu' cannot be traced or transformed by torch; use 'auto' or 'chunked'")
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _DeltaRule.apply(*inputs)
    return _forward(inputs)


def advance(
    z: Tensor, gate_bias: Tensor, state: Tensor, rule: Rule, writes: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """See `delta_mem.ops.FUSED`."""
    if not usable((z, gate_bias, state), rule.rank) or not _fit(z, gate_bias, state, rule, writes, mask):
        return None
    return _advance(z, gate_bias, state, rule, writes, mask)


def advance_segments(
    z: Tensor,
    gate_bias: Tensor,
    state: Tensor,
    open_sum: Tensor,
    rule: Rule,
    plan: SegmentPlan,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """See `delta_mem.ops.advance_segments`; None for what it does not take, as in `delta_mem.ops.FUSED`."""
    tensors = (z, gate_bias, state, open_sum)
    if not usable(tensors, rule.rank) or not _fit(z, gate_bias, state, rule, plan.ends, mask):
        return None
    planned = _planned(plan, z.shape[:2])
    if planned is None or open_sum.shape != (z.shape[0], rule.written) or not _is_plain_float32(open_sum):
        return None
    reads, final = _results(z, rule)
    new_sum = torch.empty_like(open_sum)
    own = new_sum.data_ptr(), open_sum.data_ptr(), *planned
    _run("advance_segments", z, gate_bias, state, mask, reads, final, rule, own, (new_sum, open_sum, plan))
    return reads, final, new_sum


class Token(steps.Token):
    """For few rows in float32."""

    def _begin(
        self, hidden: Tensor, writes: Tensor | None, mask: Tensor | None, segments: SegmentPlan | None
    ) -> tuple | None:
        batch = hidden.shape[0] if hidden.ndim == 3 else 0
        if (
            not usable((hidden,), 0)
            or not 0 < batch <= FEW
            or hidden.shape[1] != 1
            or hidden.dtype is not torch.float32
            or not (writes is None or _are_flags(writes, batch, 1))
            or not (mask is None or _are_flags(mask, batch, 1))
        ):
            return None
        self._name = "step"
        self._by_row = *_by_row(mask), *_by_row(writes)
        self._last = (batch,)
        if segments is not None:
            planned = _planned(segments, (batch, 1))
            if planned is None:
                return None
            self._name, self._by_row, self._last = "step_segments", _by_row(mask), (*planned, batch)
        return self._name, self.shape

    def _find_out(self, step: steps.Step) -> tuple | None:
        in_proj, gate_bias, *deltas = step.weights
        states, rank = step.rule[:2]
        if (
            rank > MAX_RANK
            or not 0 < len(deltas) <= MAX_HEADS
            or not all(_is_plain_float32(x) for x in step.weights)
            or not all(delta.shape == (len(delta), states * rank) for delta in deltas)
        ):
            return None
        features, gates, flags = _layout(step.rule)
        if in_proj.shape != (features, self.shape[2]) or gate_bias.shape != (gates,):
            return None
        absent = (0,) * (MAX_HEADS - len(deltas))
        heads = [number for delta in deltas for number in (delta.data_ptr(), len(delta))]
        fixed = in_proj.data_ptr(), gate_bias.data_ptr(), *flags, states, self.shape[2]
        layer = np.array((*fixed, *heads, *absent, *absent), dtype=np.int64)  # as the kernels take it
        sizes = tuple(len(delta) for delta in deltas)
        kernel = _kernels().kernel(self._name, rank)
        return kernel, (layer, step.scale), sizes, self.shape[0] * sizes[0]

    def _carry(self, before: list[steps.Carried], after: list[steps.Carried]) -> None:
        pairs = [list(zip(*carried, strict=True)) for carried in zip(before, after, strict=True)]
        self._states = [_addresses(states) for states, _ in pairs]
        self._sums = [() if sums[0] is None else _addresses(sums[::-1]) for _, sums in pairs]

    def _at(self, corrections: tuple[Tensor, ...]) -> tuple[int, ...]:
        return (*_addresses(corrections), *(0,) * (MAX_HEADS - len(corrections)))

    def __call__(self, layer: int, hidden: Tensor, output: Tensor | None) -> Sequence[Tensor | None] | None:
        taken = self._layers.get(layer)
        if taken is None or not _is_plain_float32(hidden) or hidden.shape != self.shape:
            return None
        place, (kernel, own, sizes, first) = taken
        corrections, to = self._room(sizes)
        in_place = output is not None and _is_plain_float32(output) and output.numel() == first
        if in_place:
            to = (output.data_ptr(), *to[1:])
        given = *self._states[place], *self._by_row, *self._sums[place], *self._last
        kernel(*own, hidden.data_ptr(), *given, in_place, to)
        return corrections[in_place]


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def plan_segments(
    shape: tuple[int, int],
    ids: Tensor | None,
    writes: Tensor | None,
    present: Tensor | None,
    open_count: Tensor,
    open_ids: Tensor,
    keep_open: Tensor | None,
    keep: bool,
) -> SegmentPlan | None:
    """See `delta_mem.ops.plan_segments`; without `keep_open`, `keep` is for all rows. None for what it does
    not take.
    """
    given = ids, writes, present, open_count, open_ids, keep_open
    there = [x for x in given if x is not None]
    if not usable(there, 0) or not plannable(shape, *given):
        return None
    given = [x if x is None else x.contiguous() for x in given]
    plan = plan_room(open_count, shape[1])
    addresses = tuple(0 if x is None else x.data_ptr() for x in (*given, *plan))
    _kernels().kernel("plan_segments", 0)(*addresses, keep, *shape)
    return SegmentPlan(*plan)


def _advance(
    z: Tensor, gate_bias: Tensor, state: Tensor, rule: Rule, writes: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    reads, final = _results(z, rule)
    own = _NONE if writes is None else _view(writes)
    _run("advance", z, gate_bias, state, mask, reads, final, rule, own, (writes,))
    return reads, final


def _fit(
    z: Tensor, gate_bias: Tensor, state: Tensor, rule: Rule, writes: Tensor | None, mask: Tensor | None
) -> bool:
    """Whether all is as the kernel believes; what is not is left to those who complain."""
    if z.ndim != 3:
        return False
    batch, tokens, width = z.shape
    features, gates, _ = _layout(rule)
    return (
        width == features
        and batch > 0
        and tokens > 0
        and gate_bias.shape == (gates,)
        and state.shape == (batch, rule.num_states, rule.rank, rule.rank)
        and z.dtype is gate_bias.dtype is state.dtype is torch.float32
        and gate_bias.is_cpu
        and state.is_cpu
        and (writes is None or _are_flags(writes, batch, tokens))
        and (mask is None or _are_flags(mask, batch, tokens))
    )


def _planned(plan: SegmentPlan, shape: tuple[int, int]) -> tuple[int, ...] | None:
    """The addresses of a plan for `shape` (batch, tokens); None if it is not as the kernels believe."""
    parts = plan.index, plan.member, plan.ends, plan.closes, plan.open_before, plan.stays_open
    if (
        not plan.index.shape == plan.member.shape == plan.ends.shape == shape
        or not plan.closes.shape == plan.open_before.shape == plan.stays_open.shape == shape[:1]
        or not all(x.is_cpu and x.is_contiguous() for x in parts)
    ):
        return None
    return tuple(x.data_ptr() for x in parts)


def _results(z: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Where the reads and the final state go."""
    batch, tokens, _ = z.shape
    states, rank = rule.num_states, rule.rank
    return z.new_empty(batch, tokens, states, rank), z.new_empty(batch, states, rank, rank)


def _run(
    name: str,
    z: Tensor,
    gate_bias: Tensor,
    state: Tensor,
    mask: Tensor | None,
    reads: Tensor,
    final: Tensor,
    rule: Rule,
    own: tuple[int, ...],
    of: tuple,
) -> None:
    """The kernel `advance` or `advance_segments`; `own` is the argument that the other one has not, addresses
    of the tensors `of`."""
    kernel = _kernels().kernel(name, rule.rank)
    if z.stride(2) != 1:
        z = z.contiguous()
    gate_bias = gate_bias.contiguous()
    by_batch, by_token, _ = z.stride()
    tensors = (
        (z.data_ptr(), by_batch, by_token),
        gate_bias.data_ptr(),
        _view(state),
        _NONE if mask is None else _view(mask),
        _view(reads),
        _view(final),
        own,
        _layout(rule)[2],
    )
    batch, tokens, states, rank = reads.shape
    lanes, work = batch * states, tokens * rank * rank
    if lanes * work < 2 * WORTH_A_THREAD:  # as in decoding, where a microsecond counts
        kernel(*tensors, (states, tokens, 0, lanes))
    else:
        # Ctrl-C leaves helpers at work: they must not be left without the tensors.
        alive = z, gate_bias, state, mask, reads, final, of

        def call(first: int, last: int) -> object:
            kernel(*tensors, (states, tokens, first, last))
            return alive

        _share_out(call, lanes, work)


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        batch, tokens, states, rank = inputs[0].shape
        blocks = -(-tokens // _kernels().BLOCK)
        marks = inputs[0].new_empty(batch * states, blocks, rank * rank)
        ctx.save_for_backward(*inputs, marks)
        return _forward(inputs, marks)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_reads: Tensor, d_final: Tensor) -> tuple[Tensor, ...]:
        *inputs, state, marks = ctx.saved_tensors
        q = inputs[0]
        batch, tokens, states, rank = q.shape
        kernel = _kernel("backward", q)
        *inputs, d_reads = (_side_by_side(x) for x in (*inputs, d_reads))
        d_inputs = tuple(q.new_empty(q.shape) for _ in range(6))
        d_state = q.new_empty(state.shape)

        def call(first: int, last: int) -> Tensor:
            history = q.new_empty(_kernels().BLOCK * rank * rank)
            kernel(
                tuple(map(_view, inputs)),
                _view(d_reads),
                _view(d_final),
                tuple(map(_view, d_inputs)),
                _view(d_state),
                marks.data_ptr(),
                history.data_ptr(),
                (states, tokens, first, last),
            )
            return history  # so that nobody (Dynamo, under compiled autograd) gives it back any earlier

        _share_out(call, batch * states, tokens * rank * rank)
        return *d_inputs, d_state


def _forward(tensors: Sequence[Tensor], marks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The reads and the final state; and the marks for the backward pass, into `marks`."""
    *inputs, state = tensors
    q = inputs[0]
    batch, tokens, states, rank = q.shape
    kernel = _kernel("forward", q)
    inputs = [_side_by_side(x) for x in inputs]
    reads, final = q.new_empty(q.shape), q.new_empty(state.shape)

    def call(first: int, last: int) -> None:
        kernel(
            tuple(map(_view, inputs)),
            _view(state),
            _view(reads),
            _view(final),
            0 if marks is None else marks.data_ptr(),
            (states, tokens, first, last),
        )

    _share_out(call, batch * states, tokens * rank * rank)
    return reads, final


# ---- tensors as kernels take them ----------------------------------------------------------------

_NONE = (0, 0, 0)


def _are_flags(x: Tensor, batch: int, tokens: int) -> bool:
    return x.dtype is torch.bool and x.shape == (batch, tokens) and x.is_cpu


def _by_row(flags: Tensor | None) -> tuple[int, int]:
    """The address of one token's flags, and their stride from row to row."""
    return (0, 0) if flags is None else (flags.data_ptr(), flags.stride(0))


def _is_plain_float32(x: Tensor) -> bool:
    return type(x) in steps.PLAIN and x.is_cpu and x.dtype is torch.float32 and x.is_contiguous()


def _view(x: Tensor) -> tuple[int, ...]:
    """(address, strides). Whoever passes it on keeps x until the kernel has returned."""
    return x.data_ptr(), *x.stride()


def _side_by_side(x: Tensor) -> Tensor:
    """x, or a copy, such that the entries of one token lie side by side or are one number."""
    return x if x.stride(-1) in (0, 1) else x.contiguous()


# ---- threads -------------------------------------------------------------------------------------


def _share_out(call: Callable[[int, int], object], lanes: int, work: int) -> None:
    """call(first, last) for all lanes, in several threads if that pays. `work` is that of one lane.

    The calling thread takes what no other has taken yet, so it never waits for a thread that has not
    begun. Ctrl-C leaves the others at what they have taken: `call` holds the tensors that it needs. A lane
    is computed by one thread from end to end: results do not depend on their number.
    """
    threads = min(lanes, lanes * work // WORTH_A_THREAD)
    if threads > 1:
        threads = min(threads, torch.get_num_threads())
    if threads <= 1:
        call(0, lanes)
        return
    bounds = [lanes * i // threads for i in range(threads + 1)]
    pieces = deque(pairwise(bounds))

    def work_off() -> None:
        while True:
            try:
                first, last = pieces.popleft()
            except IndexError:
                return
            call(first, last)

    helpers = []
    try:
        with contextlib.suppress(RuntimeError):  # there are no new threads when the interpreter is ending
            for _ in range(threads - 1):
                helpers.append(_pool().submit(work_off))
        work_off()
    finally:
        pieces.clear()
    for helper in helpers:
        if not helper.cancel():
            helper.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="delta-mem")


if hasattr(os, "register_at_fork"):
    # A forked child has the executor, and none of its threads.
    os.register_at_fork(after_in_child=_pool.cache_clear)


# ---- the kernels ---------------------------------------------------------------------------------


@functools.cache
def _load() -> ModuleType | Exception:
    """`cpu_kernels`, or why it cannot be had."""
    try:
        from . import cpu_kernels
    except Exception as error:  # numba missing, too old for this numpy, without its LLVM …
        return error
    return cpu_kernels


def _kernels() -> ModuleType:
    kernels = _load()
    if isinstance(kernels, Exception):
        raise ImportError(f"backend 'cpu' needs numba: pip install -e \".[cpu]\" ({kernels})") from kernels
    return kernels


def _kernel(name: str, like: Tensor) -> Callable[..., None]:
    dtype = np.float64 if like.dtype == torch.float64 else np.float32
    return _kernels().kernel(name, like.shape[-1], dtype)


@functools.cache
def _layout(rule: Rule) -> tuple[int, int, tuple[int, int, int]]:
    """What the kernels need to know of a rule: features in z, biases, and its flags."""
    sections = rule.sections
    gates = sections["beta"] + sections.get("lambda", 0)
    flags = (int(rule.tied_gates), int(rule.per_row_gates), _kernels().UPDATES.index(rule.update))
    return sum(sections.values()), gates, flags


def _watched() -> bool:
    """Whether torch wants to see every operation, other than to compile."""
    return (
        _is_tracing()
        or forward_ad._current_level >= 0
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack() > 0
    )
