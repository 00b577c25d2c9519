"""The recurrence on GPUs: the torch side of `triton_kernels.py`, where the mathematics is.

`delta_rule` is differentiable: two launches for each pass. `advance` is three launches from a layer's
projections to its reads, `step` and `step_segments` are one from one token's hidden state to its read. All
may be captured in a CUDA graph; under torch.compile each is one operator of the graph.

Triton comes with PyTorch for CUDA. With TRITON_INTERPRET=1 in the environment before it is
imported, the kernels run on the CPU, slowly: that is how they are tested without a GPU.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .activation import Rule
from .segments import SegmentPlan

try:
    from . import triton_kernels as kernels
except Exception as error:  # triton missing, or too old for these kernels
    kernels, _problem = None, error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

MAX_RANK = 64

_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def usable(tensors: Sequence[Tensor], rank: int) -> bool:
    """Whether `backend="auto"` may take this backend: on GPUs, unless torch wants derivatives of its own."""
    return (
        kernels is not None
        and _runs_on(tensors[0])
        and rank <= MAX_RANK
        and (torch.compiler.is_compiling() or (_PLAIN.issuperset(map(type, tensors)) and not _transformed()))
    )


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """See `delta_mem.ops.delta_rule`; inputs as `delta_mem.ops.BACKENDS` promises them.

    Gradients are of the first order only; `backend="chunked"` has them of any.

    Raises:
        ImportError: triton is missing, or does not work here.
        ValueError: the tensors are not on a GPU; or the rank is above `MAX_RANK`.
    """
    if kernels is None:
        raise ImportError(
            f"backend 'triton' needs triton, which cannot be imported: {_problem}"
        ) from _problem
    if not _runs_on(q):
        raise ValueError(f"backend 'triton' cannot compute on {q.device}; use 'auto' or 'chunked'")
    if q.shape[-1] > MAX_RANK:
        raise ValueError(
            f"backend 'triton' goes up to rank {MAX_RANK}, not {q.shape[-1]}; use 'auto' or 'chunked'"
        )
    inputs = [x.contiguous() for x in (q, k, v, keep, erase, write)]
    state = state.contiguous()
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, state)):
        return _DeltaRule.apply(state, *inputs)
    return _replay(inputs, state)


def advance(
    z: Tensor, gate_bias: Tensor, state: Tensor, rule: Rule, writes: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """See `delta_mem.ops.FUSED`."""
    if (
        not usable((z, gate_bias, state), rule.rank)
        or z.ndim != 3
        or z.numel() == 0
        or z.dtype != torch.float32
        or z.shape[2] != sum(rule.sections.values())
        or not _fit(z, gate_bias, state, rule, writes, mask)
    ):
        return None
    flags = [None if x is None else x.contiguous() for x in (writes, mask)]
    return _advance(z.contiguous(), gate_bias.contiguous(), state.contiguous(), *rule, *flags)


def step(
    hidden: Tensor,
    in_proj: Tensor,
    gate_bias: Tensor,
    state: Tensor,
    rule: Rule,
    writes: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """See `delta_mem.ops.step`; None for what it does not take, as in `delta_mem.ops.FUSED`."""
    if not _runs_on(hidden):
        return None
    tensors = hidden, in_proj, gate_bias, state, writes, mask
    if torch.compiler.is_compiling() or _watched():
        if _step_fits(tensors, rule):
            return torch.ops.delta_mem.step(*tensors[:4], *rule, writes, mask)
        return None
    # Decoding calls this once per layer and token: all that only depends on shapes is looked up.
    key = rule, hidden.device, *[x if x is None else (type(x), x.dtype, x.shape) for x in tensors]
    fits = _known_steps.get(key)
    if fits is None:
        fits = _known_steps[key] = _step_fits(tensors, rule)
    return _launch_step(*tensors, rule) if fits and not _transformed() else None


_known_steps: dict[tuple, bool] = {}


def step_segments(
    hidden: Tensor,
    in_proj: Tensor,
    gate_bias: Tensor,
    state: Tensor,
    open_sum: Tensor,
    rule: Rule,
    plan: SegmentPlan,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """See `delta_mem.ops.step_segments`; None for what it does not take, as in `delta_mem.ops.FUSED`."""
    if not _runs_on(hidden) or not _step_fits((hidden, in_proj, gate_bias, state, mask), rule):
        return None
    width = in_proj.shape[0] - rule.num_states * rule.rank
    if open_sum.shape != (hidden.shape[0], width) or open_sum.dtype != torch.float32:
        return None
    planned = (plan.index, plan.member, plan.ends, plan.closes, plan.open_before, plan.stays_open)
    return _step_segments(hidden, in_proj, gate_bias, state, open_sum, planned, *rule, mask)


def _step_fits(tensors: tuple[Tensor | None, ...], rule: Rule) -> bool:
    hidden, in_proj, gate_bias, state, *flags = tensors
    return (
        usable(tensors[:4], rule.rank)
        and hidden.ndim == 3
        and hidden.shape[1] == 1
        and hidden.numel() > 0
        and in_proj.device == hidden.device
        and in_proj.shape == (sum(rule.sections.values()), hidden.shape[2])
        and _fit(hidden, gate_bias, state, rule, *flags)
    )


def _fit(x: Tensor, gate_bias: Tensor, state: Tensor, rule: Rule, *flags: Tensor | None) -> bool:
    """Whether what comes with x [batch, tokens, …] is as a kernel believes. Others say what is wrong."""
    states, rank, sections = rule.num_states, rule.rank, rule.sections
    return (
        gate_bias.shape == (sections["beta"] + sections.get("lambda", 0),)
        and state.shape == (x.shape[0], states, rank, rank)
        and gate_bias.dtype == state.dtype == torch.float32
        and gate_bias.device == state.device == x.device
        and all(
            flag is None
            or (flag.dtype == torch.bool and flag.shape == x.shape[:2] and flag.device == x.device)
            for flag in flags
        )
    )


def _runs_on(x: Tensor) -> bool:
    return x.is_cuda or (INTERPRETED and x.is_cpu)


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, state: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        reads, after, kept = _replay_and_keep(inputs, state)
        ctx.save_for_backward(kept, *inputs)
        return reads, after

    @staticmethod
    @once_differentiable
    def backward(ctx, d_reads: Tensor, d_after: Tensor) -> tuple[Tensor, ...]:
        kept, *inputs = ctx.saved_tensors
        *d_inputs, d_state = _replay_backward(inputs, kept, d_reads.contiguous(), d_after.contiguous())
        return d_state, *d_inputs


# ---- how the work is cut -------------------------------------------------------------------------


class Cut:
    """How a state [batch, states, rank, rank] is cut into programs.

    Attributes:
        padded: the rank, padded to a power of two.
        lanes: rows of all states, those of padding included.
        width: lanes per program. Where there are many, each is one thread's; else several threads share one.
        blocks: programs per chunk.
        unroll: tokens that are loaded together.
        pairs: pairs of maps that are loaded together.
    """

    def __init__(self, batch: int, states: int, rank: int):
        self.padded = max(4, 1 << (rank - 1).bit_length())
        self.lanes = batch * states * self.padded
        if self.padded <= 8:
            self.width = 32 if self.lanes >= 512 else 8
        else:
            self.width = 4 if self.padded == 16 else 8
        self.blocks = _ceil(self.lanes, self.width)
        self.unroll = 8 if self.padded <= 16 else 4
        self.pairs = min(4, max(1, 2048 // (self.width * self.padded**2)))

    def chunk(self, tokens: int) -> int:
        """Tokens in a chunk: the least estimate of the time that the launches take; `tokens` or more for one.

        In nanoseconds, from measurements on an H200. Up to about 1,000 warps it takes no longer than for one.
        """
        if self.padded > 16:
            return tokens
        token, step = (95, 430 if self.width == 32 else 125) if self.padded <= 8 else (97, 410)

        def time(chunk: int) -> float:
            chunks = _ceil(tokens, chunk)
            replay = token * chunk * max(1, chunks * self.blocks / 1000)
            if chunks == 1:
                return replay
            compose = token * chunk * max(1, chunks * (self.padded + 1) * self.lanes / 32 / 1000)
            return 3000 + compose + step * chunks * max(1, chunks * self.blocks / 2 / 1000) + replay

        return min((1 << i for i in range(5, max(6, (tokens - 1).bit_length() + 1))), key=time)


@functools.lru_cache(maxsize=64)
def _cut(batch: int, states: int, rank: int) -> Cut:
    return Cut(batch, states, rank)


@functools.lru_cache(maxsize=1024)
def _chunk_of(tokens: int, batch: int, states: int, rank: int) -> int:
    return _cut(batch, states, rank).chunk(tokens)


def _chunk(inputs: Sequence[Tensor]) -> int:
    batch, tokens, states, rank = inputs[0].shape
    return _chunk_of(int(tokens), int(batch), states, rank)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


# ---- launches ------------------------------------------------------------------------------------

# One warp, and all the registers that there are: the compiler spends them on loads before the first use.
_WARP = {"num_warps": 1, "maxnreg": 255}


def _launch(inputs: tuple, state: Tensor, keep: bool = False):
    """The reads, the state after all tokens, and if `keep` the state at the start of every chunk."""
    batch, tokens, states, rank = inputs[0].shape
    cut, chunk = _cut(batch, states, rank), _chunk(inputs)
    chunks = _ceil(tokens, chunk)
    R, L, unroll = cut.padded, cut.width, cut.unroll
    reads = state.new_empty(batch, tokens, states, rank)
    after = torch.empty_like(state)
    kept = state.new_empty(chunks, cut.blocks, rank, L) if keep else None
    maps = None
    if chunks > 1:
        maps = state.new_empty(chunks - 1, cut.blocks, rank + 1, rank, L)
        _run(
            kernels.compose,
            (_ceil((rank + 1) * cut.lanes, 32), chunks - 1, 1),
            (inputs, None, maps),
            (tokens, states, cut.lanes, chunk),
            (rank, R, 32, L, unroll),
            _WARP,
        )
    _run(
        kernels.replay,
        (cut.blocks, chunks, 1),
        (inputs, state, maps, reads, kept, after),
        (tokens, states, cut.lanes, chunk, chunks),
        (rank, R, L, unroll, cut.pairs),
        _WARP,
    )
    return reads, after, kept


def _launch_backward(inputs: tuple, kept: Tensor, d_reads: Tensor, d_after: Tensor):
    """The gradients of `inputs` and of the state before all tokens."""
    batch, tokens, states, rank = inputs[0].shape
    cut, chunk = _cut(batch, states, rank), _chunk(inputs)
    chunks = _ceil(tokens, chunk)
    R, L, unroll = cut.padded, cut.width, cut.unroll
    scratch = kept.new_empty(chunks, cut.blocks, _ceil(chunk, unroll), rank, L)
    sums = [kept.new_empty(R // min(R, L), *inputs[0].shape) for _ in range(2)]
    d_inputs = [torch.empty_like(x) for x in inputs[2:]]
    d_state = torch.empty_like(d_after)
    maps = None
    if chunks > 1:
        maps = kept.new_empty(chunks, cut.blocks, rank + 1, rank, L)
        _run(
            kernels.compose,
            (_ceil((rank + 1) * cut.lanes, 32), chunks - 1, 1),
            (inputs, d_reads, maps),
            (tokens, states, cut.lanes, chunk),
            (rank, R, 32, L, unroll),
            _WARP,
        )
    _run(
        kernels.replay_backward,
        (cut.blocks, chunks, 1),
        (inputs, kept, maps, scratch, d_reads, d_after, (*sums, *d_inputs), d_state),
        (tokens, states, cut.lanes, chunk, chunks),
        (rank, R, L, unroll, cut.pairs),
        _WARP,
    )
    return [x[0] if len(x) == 1 else x.sum(0) for x in sums] + [*d_inputs, d_state]


def _activated(z: Tensor, gate_bias: Tensor, rule: Rule, writes: Tensor | None, mask: Tensor | None):
    """q, k, v, keep, erase, write [batch, tokens, states, rank] of projections z."""
    batch, tokens, _ = z.shape
    states, rank = rule.num_states, rule.rank
    outputs = z.new_empty(6, batch, tokens, states, rank).unbind()
    R = _cut(batch, states, rank).padded
    block = 1024 // R
    _run(
        kernels.activate,
        (_ceil(batch * tokens, block), states, 1),
        (z, gate_bias, writes, mask, outputs),
        (batch * tokens, states),
        (rank, R, block, *rule[2:]),
        {"num_warps": 4},
    )
    return outputs


def _launch_step(hidden, in_proj, gate_bias, state, writes, mask, rule: Rule) -> tuple[Tensor, Tensor]:
    """The read of one token, and the state after it."""
    batch, _, size = hidden.shape
    states, rank = rule.num_states, rule.rank
    R = _cut(batch, states, rank).padded
    reads = hidden.new_empty(batch, 1, states, rank)
    state = state.contiguous()
    after = torch.empty_like(state)
    flags = [x if x is None else x.contiguous() for x in (writes, mask)]
    _run(
        kernels.step,
        (states, batch, 1),
        (hidden.contiguous(), in_proj.contiguous(), gate_bias.contiguous(), state, *flags, reads, after),
        (),
        (states, size, rank, R, max(16, 2048 // R), 1, *rule[2:]),
        {"num_warps": 16},
    )
    return reads, after


def _launch_step_segments(hidden, in_proj, gate_bias, state, open_sum, planned, mask, rule: Rule):
    """The read of one token, the state after it, and the sums of the segments that are open then."""
    batch, _, size = hidden.shape
    states, rank = rule.num_states, rule.rank
    R = _cut(batch, states, rank).padded
    reads = hidden.new_empty(batch, 1, states, rank)
    state, open_sum = state.contiguous(), open_sum.contiguous()
    after, open_after = torch.empty_like(state), torch.empty_like(open_sum)
    given = [
        x if x is None else x.contiguous()
        for x in (hidden, in_proj, gate_bias, state, open_sum, *planned, mask)
    ]
    _run(
        kernels.step_segments,
        (states, batch, 1),
        (*given, reads, after, open_after),
        (),
        (states, size, rank, R, max(16, 2048 // R), 1, *rule[2:]),
        {"num_warps": 16},
    )
    return reads, after, open_after


def _run(kernel, grid: tuple, tensors: tuple, sizes: tuple, constants: tuple, options: dict) -> None:
    """kernel[grid](*tensors, *sizes, *constants, **options), in about half the time.

    What Triton finds out about its arguments at every launch takes longer than the launch. Here it is
    looked up by the tensors' dtypes; the kernels are not specialised on `sizes`.

    Args:
        tensors: each a tensor, a tuple of tensors, or None.
    """
    if INTERPRETED:
        kernel[grid](*tensors, *sizes, *constants, **options)
        return
    addresses, dtypes, bits = [], [], 0
    for x in tensors:
        if x is None:
            address = dtype = None
        elif type(x) is tuple:
            dtype, device = x[0].dtype, x[0].device
            address = tuple([y.data_ptr() for y in x])
            for each in address:
                bits |= each
        else:
            dtype, device = x.dtype, x.device
            address = x.data_ptr()
            bits |= address
        addresses.append(address)
        dtypes.append(dtype)
    key = kernel.__name__, device, bits % 16 == 0, constants, *dtypes
    with _on(device):
        compiled = _compiled.get(key)
        if compiled is None:
            compiled = kernel.warmup(*tensors, *sizes, *constants, grid=grid, **options)
            if bits % 16 == 0:  # else the next tensors may be as odd in another place
                _compiled[key] = compiled
        compiled[grid](*addresses, *sizes, *constants)


_compiled: dict[tuple, Callable] = {}


def _on(device: torch.device):
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


# ---- operators -----------------------------------------------------------------------------------

_library = torch.library.Library("delta_mem", "FRAGMENT")


def _operator(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Makes of a function an operator of PyTorch, for those who want to see every operation.

    Who calls it while nobody does, calls the function itself, which takes half the time.

    Args:
        schema: `name(arguments) -> results`.
        fake: called like the function, returns tensors of its results' shapes.
    """
    name = schema.split("(")[0]

    def operator(function: Callable) -> Callable:
        _library.define(schema)
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"delta_mem::{name}", fake, lib=_library)
        seen = getattr(torch.ops.delta_mem, name).default

        @functools.wraps(function)
        def call(*args):
            return seen(*args) if torch.compiler.is_compiling() or _watched() else function(*args)

        return call

    return operator


@_operator(
    "replay(Tensor[] inputs, Tensor state) -> (Tensor, Tensor)",
    lambda inputs, state: (torch.empty_like(inputs[0]), torch.empty_like(state)),
)
def _replay(inputs, state):
    return _launch(tuple(inputs), state)[:2]


def _like_replay_and_keep(inputs, state):
    batch, tokens, states, rank = inputs[0].shape
    cut = _cut(int(batch), states, rank)
    kept = state.new_empty(_ceil(tokens, _chunk(inputs)), cut.blocks, rank, cut.width)
    return torch.empty_like(inputs[0]), torch.empty_like(state), kept


@_operator(
    "replay_and_keep(Tensor[] inputs, Tensor state) -> (Tensor, Tensor, Tensor)", _like_replay_and_keep
)
def _replay_and_keep(inputs, state):
    return _launch(tuple(inputs), state, keep=True)


@_operator(
    "replay_backward(Tensor[] inputs, Tensor kept, Tensor d_reads, Tensor d_after) -> Tensor[]",
    lambda inputs, kept, d_reads, d_after: [torch.empty_like(x) for x in (*inputs, d_after)],
)
def _replay_backward(inputs, kept, d_reads, d_after):
    return _launch_backward(tuple(inputs), kept, d_reads, d_after)


_RULE = (
    "int num_states, int rank, str update, bool tied_gates, bool per_row_gates, Tensor? writes, Tensor? mask"
)


@_operator(
    f"advance(Tensor z, Tensor gate_bias, Tensor state, {_RULE}) -> (Tensor, Tensor)",
    lambda z, gate_bias, state, *_: (z.new_empty(*z.shape[:2], *state.shape[1:3]), torch.empty_like(state)),
)
def _advance(z, gate_bias, state, num_states, rank, update, tied_gates, per_row_gates, writes, mask):
    inputs = _activated(z, gate_bias, Rule(num_states, rank, update, tied_gates, per_row_gates), writes, mask)
    return _launch(inputs, state)[:2]


@_operator(
    f"step(Tensor hidden, Tensor in_proj, Tensor gate_bias, Tensor state, {_RULE}) -> (Tensor, Tensor)",
    lambda hidden, in_proj, gate_bias, state, *_: (
        hidden.new_empty(*hidden.shape[:2], *state.shape[1:3]),
        torch.empty_like(state),
    ),
)
def _step(
    hidden, in_proj, gate_bias, state, num_states, rank, update, tied_gates, per_row_gates, writes, mask
):
    rule = Rule(num_states, rank, update, tied_gates, per_row_gates)
    return _launch_step(hidden, in_proj, gate_bias, state, writes, mask, rule)


@_operator(
    "step_segments(Tensor hidden, Tensor in_proj, Tensor gate_bias, Tensor state, Tensor open_sum, "
    "Tensor[] planned, int num_states, int rank, str update, bool tied_gates, bool per_row_gates, "
    "Tensor? mask) -> (Tensor, Tensor, Tensor)",
    lambda hidden, in_proj, gate_bias, state, open_sum, *_: (
        hidden.new_empty(*hidden.shape[:2], *state.shape[1:3]),
        torch.empty_like(state),
        torch.empty_like(open_sum),
    ),
)
def _step_segments(
    hidden, in_proj, gate_bias, state, open_sum, planned,
    num_states, rank, update, tied_gates, per_row_gates, mask,
):  # fmt: skip
    rule = Rule(num_states, rank, update, tied_gates, per_row_gates)
    return _launch_step_segments(hidden, in_proj, gate_bias, state, open_sum, tuple(planned), mask, rule)


def _transformed() -> bool:
    """Whether torch differentiates, or maps over a dimension, in a way that these operators do not know."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _watched() -> bool:
    """Whether torch wants to see every operation, other than to compile."""
    return torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0
