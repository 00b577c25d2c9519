"""The recurrence on GPUs: the torch side of `triton_kernels.py`, where the mathematics is.

`delta_rule` is differentiable: two launches for each pass. `advance` is three launches from a layer's
projections to its reads, and four and a sum back; `hold`, which goes before under segment writes, is two, and
two back, of few tokens one. A layer of a `Token` is one, or of many queries two, from the layer's input to
the corrections of its projections. `plan_segments`, which says where segments end, is one. All may be
captured in a CUDA graph; under torch.compile each is one operator of the graph, but a token's layer two:
`step`, always two launches, which in a graph run beside what follows, and `settle`, which waits for them.

Triton comes with PyTorch for CUDA. With TRITON_INTERPRET=1 in the environment before it is
imported, the kernels run on the CPU, slowly: that is how they are tested without a GPU.
"""

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from . import capture, steps
from .activation import Rule
from .segments import SegmentPlan, plan_room, plannable

try:
    from . import triton_kernels as kernels
except Exception as error:  # triton missing, or too old for these kernels
    kernels, _problem = None, error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

MAX_RANK = 64

# Queries of all batch rows up to which a `Token` pays. It loads weights again for each row: beyond, matrix
# products do better.
MAX_QUERIES = 2048

# Queries up to which one launch does all of a layer of a `Token`.
ONE_LAUNCH = 512

# Outputs of a projection from which on its correction has a kernel of its own, which is as fast as the GPU's
# memory; torch's product, made for more columns than a read's eight, is not. And the longest reads it takes.
MANY_OUTPUTS, MAX_CORRECTION = 1 << 20, 64

# Tokens whose segments' sums one program takes.
SEGMENT_CHUNK = 64

# Queries of a row, at most, for a `Token`: each program holds the row's states as a whole.
MAX_WIDTH = 512


def usable(tensors: Sequence[Tensor], rank: int) -> bool:
    """Whether `backend="auto"` may take this backend: on GPUs, unless torch wants derivatives of its own."""
    return (
        kernels is not None
        and runs_on(tensors[0])
        and rank <= MAX_RANK
        and (is_compiling() or (steps.PLAIN.issuperset(map(type, tensors)) and not _transformed()))
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
    if not runs_on(q):
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
    """See `delta_mem.ops.FUSED`. Differentiable, as `delta_rule` is."""
    if (
        not usable((z, gate_bias, state), rule.rank)
        or z.ndim != 3
        or z.numel() == 0
        or z.dtype != torch.float32
        or gate_bias.dtype != torch.float32
        or z.shape[2] != sum(rule.sections.values())
        or state.shape != (len(z), rule.num_states, rule.rank, rule.rank)
        or state.dtype != torch.float32
        or state.device != z.device
        or not _fit(z, gate_bias, rule, writes, mask)
    ):
        return None
    tensors = z.contiguous(), gate_bias.contiguous(), state.contiguous()
    flags = [None if x is None else x.contiguous() for x in (writes, mask)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _Advance.apply(*tensors, rule, *flags)
    return _advance(*tensors, *rule, *flags)


def hold(z: Tensor, open_sum: Tensor, plan: SegmentPlan) -> tuple[Tensor, Tensor, Tensor] | None:
    """See `delta_mem.ops.segments.hold`; None for what the kernels do not take. Differentiable."""
    planned = [getattr(plan, field) for field in _HELD]
    if (
        not usable((z, open_sum, *planned), 0)
        or z.ndim != 3
        or z.numel() == 0
        or z.dtype != torch.float32
        or open_sum.ndim != 2
        or open_sum.dtype != torch.float32
        or len(open_sum) != len(z)
        or not 0 < open_sum.shape[1] <= z.shape[2]
        or plan.index.shape != z.shape[:2]
        or any(x.device != z.device for x in (open_sum, *planned))
    ):
        return None
    given = [x.contiguous() for x in (z, open_sum, *planned)]
    if torch.is_grad_enabled() and (z.requires_grad or open_sum.requires_grad):
        return _Hold.apply(*given)
    return _hold(*given[:2], given[2:])


# Fields of a plan that `hold`'s kernels take, in order.
_HELD = ("index", "member", "ends", "closes", "open_before", "counts", "stays_open")


def correct(output: Tensor, reads: Tensor, weight: Tensor, scale: float) -> bool:
    """See `delta_mem.ops.correct`, in place; False, and nothing done, for what the kernel does not take."""
    tensors = output, reads, weight
    if (
        not usable(tensors, 0)
        or is_compiling()
        or _watched()
        or torch.is_grad_enabled()
        or output.dtype not in (torch.bfloat16, torch.float16)
        or any(x.dtype is not output.dtype or x.device != output.device for x in tensors)
        or not all(x.is_contiguous() for x in tensors)
        or output.numel() < MANY_OUTPUTS
        or not 0 < weight.shape[1] <= MAX_CORRECTION
        or output.shape[:-1] != reads.shape[:-1]
        or weight.shape != (output.shape[-1], reads.shape[-1])
    ):
        return False
    size, width = weight.shape
    tokens, padded = output.numel() // size, max(16, 1 << (width - 1).bit_length())
    grid = _ceil(size, 128) * _ceil(tokens, 64), 1, 1
    _run(kernels.correct, grid, tensors, (tokens, scale), (width, size, padded, 64, 128), {"num_warps": 4})
    return True


class Token(steps.Token):
    """For up to `MAX_QUERIES` queries."""

    def _begin(
        self, hidden: Tensor, writes: Tensor | None, mask: Tensor | None, segments: SegmentPlan | None
    ) -> tuple | None:
        if is_compiling() or _watched() or _transformed():
            return None
        self._flags = _flags(segments, writes, mask)
        self._flags_at = _addresses(self._flags)
        self._z: dict[int, Tensor] = {}  # by the number of features: room that layers share, see _projections
        kind = None if segments is None else segments.kind
        # All that the kernels rely on, of what the layers have in common.
        return type(hidden), self.dtype, self.shape, self.device, _kind(writes), _kind(mask), kind

    def _find_out(self, step: steps.Step) -> "_Launch | None":
        numbers = self._like.new_empty(0, dtype=torch.float32)  # states and sums, as far as dtypes go
        open_sum = None if self._flags[0] is None else numbers  # a plan's fields come first
        tensors = self._like, *step.packed, numbers, open_sum, *self._flags
        return _Launch(tensors, step.rule, step.scale) if _step_fits(tensors, step.rule) else None

    def _carry(self, before: list[steps.Carried], after: list[steps.Carried]) -> None:
        self._carried = [tuple(map(_addresses, carried)) for carried in zip(before, after, strict=True)]
        self._bits = _bits((self._flags_at, *self._carried))

    def _at(self, corrections: tuple[Tensor, ...]) -> tuple:
        return _addresses(corrections)

    def __call__(self, layer: int, hidden: Tensor, output: Tensor | None) -> Sequence[Tensor | None] | None:
        taken = self._layers.get(layer)
        if (
            taken is None
            or hidden.dtype is not self.dtype
            or hidden.shape != self.shape
            or hidden.get_device() != self.device
        ):
            return None
        place, launch = taken
        corrections, to = self._room(launch.sizes)
        hidden = hidden.contiguous()
        start, z = _address(hidden), None
        in_place = (
            output is not None
            and type(output) is Tensor
            and output.dtype is self.dtype
            and output.numel() == launch.first
            and output.get_device() == self.device
            and output.is_contiguous()
        )
        if in_place:
            to = (_address(output), *to[1:])
        if launch.projection is not None:
            z = self._projections(launch)
            launch.project(start, z)
        before, after = self._carried[place]
        addresses = start, *launch.weights, *before, *self._flags_at, z, to, *after
        bits = launch.bits | self._bits | _bits((start, z, *to))
        launch.kernels[in_place].launch(launch.grid, addresses, launch.scale, bits)
        return corrections[in_place]

    def _projections(self, launch: "_Launch") -> Any:
        """The address of room for a layer's projections, which layers alike share."""
        if launch.features not in self._z:
            self._z[launch.features] = _room(self._like, launch.features)
        return _address(self._z[launch.features])


def recorded_token(
    hidden: Tensor,
    step: steps.Step,
    state: Tensor,
    writes: Tensor | None,
    mask: Tensor | None,
    segments: SegmentPlan | None,
    open_sum: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]] | None:
    """See `delta_mem.ops.recorded_token`."""
    if torch.is_grad_enabled() or _transformed() or not (is_compiling() or _watched()):
        return None
    flags = _flags(segments, writes, mask)
    fits = _step_fits((hidden, *step.packed, state, open_sum, *flags), step.rule)
    shapes = steps.carried_shapes(len(hidden), step.rule)
    if not fits or not all(
        steps.fit((x,), shape, hidden.get_device())
        for x, shape in zip((state, open_sum), shapes, strict=True)
    ):
        return None
    *planned, writes, mask = flags
    carried = state, open_sum, [x for x in planned if x is not None]
    # The model's projections, which read hidden, come after `step`, to be run beside it. What it reads itself
    # must live until it is settled, so it has a hidden of its own: one that changes may be given other room.
    own = hidden.clone()
    results = torch.ops.delta_mem.step(own, *step.packed, step.scale, *carried, *step.rule, writes, mask)
    torch.ops.delta_mem.order(hidden, results)
    return results, [own, state, *[x for x in (open_sum, *flags) if x is not None]]


def _flags(segments: SegmentPlan | None, writes: Tensor | None, mask: Tensor | None) -> tuple:
    """A segment plan as the kernel of a token takes it, then the flags."""
    planned = _NO_PLAN if segments is None else [getattr(segments, name) for name in kernels.PLAN]
    return tuple([x if x is None else x.contiguous() for x in (*planned, writes, mask)])


_NO_PLAN = (None,) * 6


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
    """As `cpu.plan_segments`, in one launch: the definition's sixty operations take a millisecond."""
    given = ids, writes, present, open_count, open_ids, keep_open
    there = [x for x in given if x is not None]
    if not usable(there, 0) or _transformed() or not plannable(shape, *given) or 0 in shape:
        return None
    return SegmentPlan(*_plan_segments(*given, keep, shape[1]))


def _kind(x: Tensor | None) -> tuple | None:
    """What a launch needs to know of a tensor, but for its address and strides."""
    return x if x is None else (type(x), x.dtype, x.shape, x.get_device())


def _step_fits(tensors: tuple, rule: Rule) -> bool:
    """Whether a `_Launch` takes these inputs of the kernel, but for what a layer carries: state and sums."""
    hidden, in_proj, gate_bias, deltas, _, _, *planned, writes, mask = tensors
    width, weights = rule.num_states * rule.rank, (in_proj, gate_bias, *deltas)
    return (
        usable((hidden, *weights), rule.rank)
        and hidden.ndim == 3
        and hidden.shape[1] == 1
        and 0 < hidden.shape[0] * width <= MAX_QUERIES
        and width <= MAX_WIDTH
        and hidden.shape[2] > 0
        and hidden.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and gate_bias.is_floating_point()
        and in_proj.shape == (sum(rule.sections.values()), hidden.shape[2])
        and len(deltas) > 0
        and all(x.dtype == deltas[0].dtype and x.ndim == 2 and x.shape[1] == width for x in deltas)
        and all(x.device == hidden.device and x.is_contiguous() for x in weights)
        and _fit(hidden, gate_bias, rule, writes, mask)
        and all(x is None or (x.device == hidden.device and x.numel() == hidden.shape[0]) for x in planned)
    )


def _fit(x: Tensor, gate_bias: Tensor, rule: Rule, *flags: Tensor | None) -> bool:
    """Whether what comes with x [batch, tokens, …] is as a kernel believes. Others say what is wrong."""
    sections = rule.sections
    return (
        gate_bias.shape == (sections["beta"] + sections.get("lambda", 0),)
        and gate_bias.device == x.device
        and all(
            flag is None
            or (flag.dtype == torch.bool and flag.shape == x.shape[:2] and flag.device == x.device)
            for flag in flags
        )
    )


def runs_on(x: Tensor) -> bool:
    """Whether x is where these kernels compute."""
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


class _Advance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        z: Tensor,
        gate_bias: Tensor,
        state: Tensor,
        rule: Rule,
        writes: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        reads, after, kept = _advance_and_keep(z, gate_bias, state, *rule, writes, mask)
        # Not the six tensors that z is made into: the way back through tanh and unit length needs z anyway,
        # and one launch makes them again. So a token keeps 32 numbers per layer at rank 8, not 80.
        ctx.save_for_backward(z, gate_bias, kept, writes, mask)
        ctx.rule = rule
        return reads, after

    @staticmethod
    @once_differentiable
    def backward(ctx, d_reads: Tensor, d_after: Tensor) -> tuple[Tensor | None, ...]:
        z, gate_bias, kept, writes, mask = ctx.saved_tensors
        given = z, gate_bias, kept, d_reads.contiguous(), d_after.contiguous()
        d_z, d_state = _advance_backward(*given, *ctx.rule, writes, mask)
        d_bias = d_z[..., 3 * ctx.rule.num_states * ctx.rule.rank :].sum((0, 1))
        return d_z, d_bias, d_state, None, None, None


class _Hold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, open_sum: Tensor, *planned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        results = _hold(z, open_sum, list(planned))
        ctx.save_for_backward(*planned)
        ctx.mark_non_differentiable(results[1])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, d_held: Tensor, _: Tensor | None, d_open: Tensor) -> tuple[Tensor | None, ...]:
        planned = list(ctx.saved_tensors)
        return *_hold_backward(d_held.contiguous(), d_open.contiguous(), planned), *(None for _ in planned)


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
    """The gradients of `inputs`, of q and k in parts [parts, …] to be added, and of the state before."""
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
    return (*sums, *d_inputs), d_state


def _hold_in_chunks(kernel, numbers: Tensor, planned: list[Tensor], given: Tensor, results: tuple) -> None:
    """Launches `kernels.hold`, or `kernels.hold_backward` over its gradients, and what goes before."""
    batch, tokens = planned[0].shape
    features, written = numbers.shape[2], given.shape[1]
    back, chunks, block = kernel is kernels.hold_backward, _ceil(tokens, SEGMENT_CHUNK), 32
    sizes, constants = (tokens, chunks, features, features - written), (SEGMENT_CHUNK, block, back)
    grid, edges = (chunks, _ceil(features, block), batch), None
    if chunks > 1:
        edges = numbers.new_empty(batch, chunks, features)
        _run(kernels.edges, grid, (numbers, *planned, edges), sizes, constants, {"num_warps": 4})
    _run(kernel, grid, (numbers, *planned, edges, given, *results), sizes, constants, {"num_warps": 4})


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


def _activated_backward(z, gate_bias, rule: Rule, writes, mask, grads: tuple) -> Tensor:
    """The gradient of z, of those of `_activated`'s tensors, as `_launch_backward` gives them."""
    batch, tokens, _ = z.shape
    states, rank = rule.num_states, rule.rank
    d_z = torch.empty_like(z)
    R = _cut(batch, states, rank).padded
    block = 512 // R
    _run(
        kernels.activate_backward,
        (_ceil(batch * tokens, block), states, 1),
        (z, gate_bias, writes, mask, grads, d_z),
        (batch * tokens, states),
        (rank, R, block, len(grads[0]), *rule[2:]),
        {"num_warps": 4},
    )
    return d_z


class _Launch:
    """One token's launches for one layer's weights, where they are now, and for a token like the one given.

    Args:
        tensors: the kernel's inputs: hidden, in_proj, gate_bias, deltas, state, open_sum, …
        rule, scale: see `steps.Step`.
        recorded: always two launches, of which the first projects.

    Attributes:
        projection: the kernel of the first launch, where there are two.
        kernels: two for the other launch, of which the second corrects the first head in place.
        sizes: of the heads; `first`: numbers in the first head's output; `features`: those of `in_proj`.
        weights: addresses of in_proj, gate_bias and deltas; `bits`: of these.
        scale: as the kernel takes it.
    """

    def __init__(self, tensors: tuple, rule: Rule, scale: float, recorded: bool = False):
        hidden, in_proj, gate_bias, deltas, state, open_sum, *_ = tensors
        batch, _, size = hidden.shape
        sizes = self.sizes = tuple(len(delta) for delta in deltas)
        self.first, self.features = batch * sizes[0], len(in_proj)
        R = _cut(batch, rule.num_states, rule.rank).padded
        padded = 1 << (rule.num_states - 1).bit_length()
        z, self.projection, overlap = None, None, False
        if recorded or batch * rule.num_states * rule.rank > ONE_LAUNCH:
            overlap, z = _overlaps(hidden), state  # of z's dtype
            rows, *cut, warps = _project_cut(batch, size)
            constants = size, self.features, rows, *cut, overlap
            self._grid = _ceil(self.features, rows), batch, 1
            self.projection = _kernel(kernels.project, (hidden, in_proj, z), constants, {"num_warps": warps})
        rows, block, span, unroll, warps = _step_cut(batch, padded * R, R, z is not None)
        constants = rule.num_states, size, rule.rank, R, *rule[2:], sizes
        cut = padded, rows, block, span, unroll, overlap
        blocks = sum(_ceil(n, block) for n in sizes)
        self.grid = rule.num_states * (R // rows) + blocks, batch, 1
        tensors = *tensors, z, (hidden,) * len(sizes), state, open_sum  # results are of inputs' dtypes
        options = {"num_warps": warps, **({"launch_pdl": True} if overlap else {})}
        self.kernels = [
            _kernel(kernels.step, tensors, (*constants, in_place, *cut), options)
            for in_place in (False, True)
        ]
        self.weights, self.scale = _addresses((in_proj, gate_bias, deltas)), (scale,)
        self.bits = _bits(self.weights)

    def project(self, hidden: Any, z: Any) -> None:
        """The first launch. Takes addresses."""
        addresses = hidden, self.weights[0], z
        self.projection.launch(self._grid, addresses, (), _bits(addresses))


def _room(hidden: Tensor, features: int) -> Tensor:
    """Where a token's projections go."""
    return hidden.new_empty(hidden.shape[0], features, dtype=torch.float32)


def _overlaps(x: Tensor) -> bool:
    """Whether a launch on the device of x can itself wait for the one before it, in a graph too."""
    return (
        x.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(x.device) == (9, 0)  # elsewhere nobody has looked
    )


def _step_cut(batch: int, queries: int, padded: int, projected: bool) -> tuple[int, int, int, int, int]:
    """How one token's work is cut: `step`'s ROWS, BLOCK, SLICE and UNROLL, and warps.

    From measurements on an H100.

    Args:
        queries: rows of all states, padded; `padded`: of one.
        projected: `project` went before. SLICE and UNROLL are then not used.
    """
    if projected:
        return 4, max(32, min(256, 4096 // queries)), 1, 1, 4 if queries * padded <= 4096 else 16
    if batch > 4:
        return 2, max(128, 8192 // queries), max(16, 4096 // queries), 1, 8
    if queries <= 8:
        return 1, 256, 2048, 2, 8
    return 1, 128, max(16, 32768 // queries), 2, 16


def _project_cut(batch: int, size: int) -> tuple[int, int, int, int]:
    """The same of `project`: ROWS, SLICE, UNROLL, and warps."""
    if batch > 8:
        return 2, 1024, 2, 4
    return 1, min(4096, 1 << (size - 1).bit_length()), 2, 8


def _run(kernel, grid: tuple, tensors: tuple, sizes: tuple, constants: tuple, options: dict) -> None:
    """kernel[grid](*tensors, *sizes, *constants, **options), in a fraction of the time: see `_Kernel`."""
    addresses = _addresses(tensors)
    _kernel(kernel, tensors, constants, options).launch(grid, addresses, sizes, _bits(addresses))


def _kernel(kernel, tensors: tuple, constants: tuple, options: dict) -> "_Kernel":
    """The `_Kernel` for tensors of these dtypes, on their device."""
    one = tensors[0][0] if type(tensors[0]) is tuple else tensors[0]
    device = one.get_device()
    dtypes = tuple([x if x is None else x[0].dtype if type(x) is tuple else x.dtype for x in tensors])
    key = kernel.__name__, device, constants, dtypes
    found = _kernels.get(key)
    if found is None:
        found = _kernels[key] = _Kernel(kernel, device, dtypes, constants, options)
    return found


_kernels: dict[tuple, "_Kernel"] = {}


class _Kernel:
    """A kernel, for one device, certain dtypes and constants.

    What Triton finds out about its arguments at every launch takes longer than the launch. Here it is known,
    but for the addresses, of which code for multiples of 16 is told apart; the kernels are not specialised on
    sizes. Triton's launch hooks, which its own profiler uses, are not called.
    """

    def __init__(self, kernel, device: int, dtypes: tuple, constants: tuple, options: dict):
        self.kernel, self.device, self.dtypes = kernel, device, dtypes
        self.constants, self.options = constants, options
        self.compiled: dict[tuple | int, Callable] = {}  # by `_odd` addresses; 0: all are multiples of 16

    def launch(self, grid: tuple, addresses: tuple, sizes: tuple, bits: int) -> None:
        """Launches.

        Args:
            grid: three numbers.
            addresses: of tensors that are contiguous, on the kernel's device, and of its dtypes.
            sizes: numbers, always of the same types.
            bits: `_bits` of the addresses.
        """
        if INTERPRETED:
            self.kernel[grid](*addresses, *sizes, *self.constants, **self.options)
            return
        if self.device != torch._C._cuda_getDevice():  # Triton launches on the current one
            with torch.cuda.device(self.device):
                return self.launch(grid, addresses, sizes, bits)
        odd = bits % 16 and _odd(addresses)
        start = self.compiled.get(odd) or self._compile(odd, grid, addresses, sizes)
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        start(*grid, stream, (*addresses, *sizes, *self.constants))

    def _compile(self, odd: tuple | int, grid: tuple, addresses: tuple, sizes: tuple) -> Callable:
        pointers = map(_pointer, self.dtypes, addresses)
        made = self.kernel.warmup(*pointers, *sizes, *self.constants, grid=grid, **self.options)
        self.compiled[odd] = _starter(made, len(addresses) + len(sizes) + len(self.constants))
        return self.compiled[odd]


def _starter(made, count: int) -> Callable:
    """What starts a kernel: called with the grid, a stream, and a tuple of the kernel's `count` arguments.

    At every launch Triton's launcher finds out anew what it hands on to its compiled part, where a fifth of
    the time goes. That is always the same but for what it was given, if the kernel needs no scratch memory.
    So it is asked once, and from then on its compiled part is called. One that hands on anything else than is
    known here is called itself.

    Args:
        made: Triton's `CompiledKernel`.
    """
    launcher, given = made.run, (made.function, made.packed_metadata, None, None, None)
    place, marks = [object() for _ in range(4)], [object() for _ in range(count)]
    compiled, seen = getattr(launcher, "launch", None), []
    scratch = any(getattr(launcher, f"{kind}_scratch_size", 0) for kind in ("global", "profile"))
    if compiled is not None and not scratch:
        with contextlib.suppress(AttributeError, TypeError):
            asked = copy.copy(launcher)  # others may be starting the kernel by this one
            asked.launch = lambda *handed_on: seen.extend(handed_on)
            asked(*place, *given, *marks)
    if seen[:4] == place and seen[-count:] == marks:
        fixed = seen[4:-count]
        return lambda x, y, z, stream, arguments: compiled(x, y, z, stream, *fixed, *arguments)
    if seen[:4] == place and seen[-1] == tuple(marks):  # Triton 3.7
        fixed = seen[4:-1]
        return lambda x, y, z, stream, arguments: compiled(x, y, z, stream, *fixed, arguments)
    return lambda x, y, z, stream, arguments: launcher(x, y, z, stream, *given, *arguments)


def _pointer(dtype: torch.dtype | None, address: Any) -> Any:
    """What Triton takes for a tensor at this address, or several for a tuple of addresses."""
    if type(address) is tuple:
        return tuple([_pointer(dtype, x) for x in address])
    return address if address is None else SimpleNamespace(dtype=dtype, data_ptr=lambda: address)


def _address(x: Tensor | tuple[Tensor, ...] | None) -> Any:
    """What a launch needs of a tensor, or of each of several; whoever passes it on keeps the tensor."""
    if x is None or INTERPRETED:
        return x
    return tuple([y.data_ptr() for y in x]) if type(x) is tuple else x.data_ptr()


def _addresses(tensors: Sequence) -> tuple:
    return tuple([_address(x) for x in tensors])


def _bits(addresses: Sequence) -> int:
    """All bits that are set in any of the addresses."""
    bits = 0
    if not INTERPRETED:
        for x in addresses:
            if type(x) is tuple:
                bits |= _bits(x)
            elif x is not None:
                bits |= x
    return bits


def _odd(addresses: Sequence) -> tuple:
    """Which of the addresses, some perhaps tuples of them, are no multiples of 16."""
    return tuple(_odd(x) if type(x) is tuple else x is not None and x % 16 > 0 for x in addresses)


# ---- operators -----------------------------------------------------------------------------------

_library = torch.library.Library("delta_mem", "FRAGMENT")


def _operator(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Makes of a function an operator of PyTorch, for those who want to see every operation.

    While nobody does, a call is one of the function itself, which takes half the time.

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
            return seen(*args) if is_compiling() or _watched() else function(*args)

        return call

    return operator


@_operator(
    "replay(Tensor[] inputs, Tensor state) -> (Tensor, Tensor)",
    lambda inputs, state: (torch.empty_like(inputs[0]), torch.empty_like(state)),
)
def _replay(inputs, state):
    return _launch(tuple(inputs), state)[:2]


def _like_replay_and_keep(inputs, state):
    return torch.empty_like(inputs[0]), torch.empty_like(state), _like_kept(inputs[0].shape[1], state)


def _like_kept(tokens, state):
    batch, states, rank, _ = map(int, state.shape)
    cut, chunk = _cut(batch, states, rank), _chunk_of(int(tokens), batch, states, rank)
    return state.new_empty(_ceil(tokens, chunk), cut.blocks, rank, cut.width)


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
    grads, d_state = _launch_backward(tuple(inputs), kept, d_reads, d_after)
    sums = [x[0] if len(x) == 1 else x.sum(0) for x in grads[:2]]
    return [*sums, *grads[2:], d_state]


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
    f"advance_and_keep(Tensor z, Tensor gate_bias, Tensor state, {_RULE}) -> (Tensor, Tensor, Tensor)",
    lambda z, gate_bias, state, *_: (
        z.new_empty(*z.shape[:2], *state.shape[1:3]),
        torch.empty_like(state),
        _like_kept(z.shape[1], state),
    ),
)
def _advance_and_keep(z, gate_bias, state, num_states, rank, update, tied_gates, per_row_gates, writes, mask):
    inputs = _activated(z, gate_bias, Rule(num_states, rank, update, tied_gates, per_row_gates), writes, mask)
    return _launch(inputs, state, keep=True)


@_operator(
    f"advance_backward(Tensor z, Tensor gate_bias, Tensor kept, Tensor d_reads, Tensor d_after, {_RULE}) "
    "-> (Tensor, Tensor)",
    lambda z, gate_bias, kept, d_reads, d_after, *_: (torch.empty_like(z), torch.empty_like(d_after)),
)
def _advance_backward(
    z, gate_bias, kept, d_reads, d_after, num_states, rank, update, tied_gates, per_row_gates, writes, mask
):
    rule = Rule(num_states, rank, update, tied_gates, per_row_gates)
    inputs = _activated(z, gate_bias, rule, writes, mask)
    grads, d_state = _launch_backward(inputs, kept, d_reads, d_after)
    return _activated_backward(z, gate_bias, rule, writes, mask, grads), d_state


@_operator(
    "hold(Tensor z, Tensor open_sum, Tensor[] planned) -> (Tensor, Tensor, Tensor)",
    lambda z, open_sum, planned: _like_held(z, open_sum),
)
def _hold(z, open_sum, planned):
    results = _like_held(z, open_sum)
    _hold_in_chunks(kernels.hold, z, planned, open_sum, results)
    return results


def _like_held(z, open_sum):
    batch, tokens, features = z.shape
    writes = z.new_empty(batch, 1 + tokens, dtype=torch.bool)
    return z.new_empty(batch, 1 + tokens, features), writes, torch.empty_like(open_sum)


@_operator(
    "hold_backward(Tensor d_held, Tensor d_open, Tensor[] planned) -> (Tensor, Tensor)",
    lambda d_held, d_open, planned: _like_unheld(d_held, d_open),
)
def _hold_backward(d_held, d_open, planned):
    results = _like_unheld(d_held, d_open)
    _hold_in_chunks(kernels.hold_backward, d_held, planned, d_open, results)
    return results


def _like_unheld(d_held, d_open):
    batch, tokens, features = d_held.shape
    return d_held.new_empty(batch, tokens - 1, features), torch.empty_like(d_open)


@_operator(
    "plan_segments(Tensor? ids, Tensor? writes, Tensor? present, Tensor open_count, Tensor open_ids, "
    "Tensor? keep_open, bool keep, SymInt tokens) -> Tensor[]",
    lambda ids, writes, present, open_count, open_ids, keep_open, keep, tokens: plan_room(open_count, tokens),
)
def _plan_segments(ids, writes, present, open_count, open_ids, keep_open, keep, tokens):
    given = open_count, open_ids, ids, writes, present, keep_open
    given = [x if x is None else x.contiguous() for x in given]
    plan, rows = plan_room(open_count, tokens), len(open_count)
    final = open_count.new_empty(rows, tokens + 1, dtype=torch.int32)
    block, warps = (32, 1) if tokens < 32 else (1024, 8)
    tensors, options = (*given, *plan, final), {"num_warps": warps}
    _run(kernels.plan_segments, (rows, 1, 1), tensors, (tokens,), (keep, block), options)
    return plan


def _like_step(hidden, in_proj, gate_bias, deltas, scale, state, open_sum, *_):
    corrections = [hidden.new_empty(hidden.shape[0], 1, len(delta)) for delta in deltas]
    after = [torch.empty_like(x) for x in (state, open_sum) if x is not None]
    return [*corrections, *after, _room(hidden, len(in_proj))]


@_operator(
    "step(Tensor hidden, Tensor in_proj, Tensor gate_bias, Tensor[] deltas, float scale, Tensor state, "
    f"Tensor? open_sum, Tensor[] planned, {_RULE}) -> Tensor[]",
    _like_step,
)
def _step(
    hidden, in_proj, gate_bias, deltas, scale, state, open_sum, planned,
    num_states, rank, update, tied_gates, per_row_gates, writes, mask,
):  # fmt: skip
    planned = planned or _NO_PLAN
    tensors = hidden, in_proj, gate_bias, tuple(deltas), state, open_sum, *planned, writes, mask
    rule = Rule(num_states, rank, update, tied_gates, per_row_gates)
    to = tuple(hidden.new_empty(hidden.shape[0], 1, len(delta)) for delta in deltas)
    after = torch.empty_like(state), None if open_sum is None else torch.empty_like(open_sum)
    launch, z = _Launch(tensors, rule, scale, recorded=True), _room(hidden, len(in_proj))
    results = [*to, *[x for x in after if x is not None], z]
    given = hidden, *tensors[4:]
    before = [x if x is None else x.contiguous() for x in given]
    # What the launches read and write lives until `settle`, which takes it all; a copy would not.
    same = all(x is y for x, y in zip(before, given, strict=True))
    with capture.branch(results, possible=same):
        start, *rest = _addresses((*before, z, to, *after))
        launch.project(start, _address(z))
        addresses = start, *launch.weights, *rest
        launch.kernels[False].launch(launch.grid, addresses, launch.scale, _bits(addresses))
    return results


# The two operators that follow do next to nothing. To torch.compile they change what they are given, so that
# who reads it comes after them.


@_operator("order(Tensor(a!) later, Tensor[] earlier) -> ()", lambda later, earlier: None)
def _order(later, earlier):
    """Who reads `later` from now on comes after those that make `earlier`."""


@_operator("settle(Tensor(a!)[] results, Tensor[] others) -> ()", lambda results, others: None)
def _settle(results, others):
    """Who reads results of `step` from now on comes after it, and after `others`, which live until then."""
    capture.join(results)


def _transformed() -> bool:
    """Whether torch differentiates, or maps over a dimension, in a way that these operators do not know."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _watched() -> bool:
    """Whether torch wants to see every operation, other than to compile."""
    return torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0
