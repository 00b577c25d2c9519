"""The kernels of `triton.py`. Needs triton to be imported.

Row i of a state has its own gates and never meets another row, so a row of one state of one batch row is a
recurrence of its own, a *lane*. What a token does to a lane s (a row vector) is affine:

    s_t = s_{t-1} A_t + write_t v_t k_t,    A_t = keep_t I − erase_t k_tᵀ k_t

and so is a chunk of tokens: one rank × rank map and one offset per lane. Hence two launches:

1. `compose`, for all chunks at once: each chunk's maps. A map's rows are what becomes of the unit
   vectors, its offset what becomes of the zero vector; all go through the chunk like lanes.
2. `replay`, for all chunks at once: each first applies the maps of the chunks before it to the state,
   one small step per chunk, then runs through its own tokens and reads.

The backward pass goes from the last token to the first by the same maps: with g_t the gradient of s_t,

    g_{t-1} = g_t A_t + dm_t q_t

so `compose` reversed gives the maps, and `replay_backward` applies those of the chunks behind it, computes
the lanes of its own chunk again, from the one state that the forward pass kept of it, and leaves every
token's gradients. A composed map costs rank + 1 lanes: at high ranks, and where the batch fills the GPU,
there is one chunk, no map, and the launch is a plain loop over the tokens.

`activate` comes before, from a layer's projections, and `activate_backward` leads back to them. Under segment
writes `hold` comes before that, and puts the segments' means in the places of what is written. `step` takes
one token, in one launch, from a layer's input to the corrections of its projections. Where launches cost
little, `project` goes before and does a part of it, once for all of `step`'s programs.

In the first three a program is one warp: nobody waits for another warp. A tile is [rank, lanes]; rank is
padded to a power of two, R, and what lies beyond it is masked. Every sum is taken in one fixed order: equal
inputs give equal bits. Arithmetic is that of the state's dtype, float32 or float64.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # Triton 3.4: older ones lack more

from .activation import NORM_EPS

_EPS = tl.constexpr(NORM_EPS)
# Sizes of inputs differ from call to call: no kernel is compiled again because one happens to be 1
# or a multiple of 16.
_SIZES = ["tokens", "states", "lanes", "chunk", "chunks"]
_SEGMENT_SIZES = ["tokens", "chunks", "features", "width"]


# ---- in all kernels: where a lane is, what a token brings, what it does -----------------------------------


@triton.jit
def _tanh(x):
    a = tl.abs(x)
    s = x * x
    small = -0.005905821453779936
    small = small * s + 0.020805343985557556
    small = small * s - 0.05378667265176773
    small = small * s + 0.13331958651542664
    small = small * s - 0.33333298563957214
    small = small * s * x + x  # to 1e-7, up to 0.6
    e = tl.exp(-2.0 * a)
    root = tl.rsqrt(1.0 + e)  # squared, the quotient's cheapest form
    large = (1.0 - e) * root * root
    return tl.where(a < 0.6, small, tl.where(x < 0.0, -large, large))


@triton.jit
def _direction(x, AXIS: tl.constexpr):
    x = _tanh(x)
    return x * tl.rsqrt(tl.maximum(tl.sum(x * x, axis=AXIS, keep_dims=True), _EPS * _EPS))


@triton.jit
def _direction_backward(x, grad, AXIS: tl.constexpr):
    """The gradient of x of that of `_direction(x, AXIS)`."""
    x = _tanh(x)
    square = tl.sum(x * x, axis=AXIS, keep_dims=True)
    inverse = tl.rsqrt(tl.maximum(square, _EPS * _EPS))
    unit = x * inverse
    along = tl.sum(unit * grad, axis=AXIS, keep_dims=True)
    along = tl.where(square >= _EPS * _EPS, along, 0.0)  # what is shorter is divided by a constant
    return (grad - along * unit) * inverse * (1.0 - x * x)


@triton.jit
def _gates(beta, decay, UPDATE: tl.constexpr, TIED: tl.constexpr):
    """keep, erase, write of the gates' projections, biases included."""
    write = tl.sigmoid(beta)
    if UPDATE == "no_decay":
        keep = tl.full(write.shape, 1.0, write.dtype)
    elif TIED:
        keep = 1.0 - write
    else:
        keep = tl.sigmoid(decay)
    erase = write
    if UPDATE == "decay_outside":
        erase = keep * write
    return keep, erase, write


@triton.jit
def _flat(L: tl.constexpr, R: tl.constexpr):
    """The lane and the column of every number of a tile [R, L], as [R × L].

    Memory is addressed by such flat tiles, so that the compiler, which lays a tile out as its addresses
    suggest, has no choice of an order. Reshaped, a lane's numbers are in one thread, or in few.
    """
    n = tl.arange(0, R * L)
    return n % L, n // L


@triton.jit
def _place(lane, first, tokens, states, RANK: tl.constexpr, R: tl.constexpr):
    """Where a lane's state begins in [batch, tokens, states, RANK], at token `first` of its batch row."""
    group = lane // R
    token = (group // states).to(tl.int64) * tokens + first
    return (token * states + group % states) * RANK


@triton.jit
def _load(
    inputs, numbers, vectors, ahead, count, counts, width, L: tl.constexpr, R: tl.constexpr, N: tl.constexpr
):
    """Tokens `ahead` … `ahead` + N − 1: a tuple of q, k [R, L] and v, keep, erase, write [L] for each.

    All loads come before the first use, so that they wait for memory together.

    Args:
        inputs: those six, [batch, tokens, states, rank] each.
        numbers, vectors: [L] and [R × L], where the lanes' own numbers, and the vectors that they share with
            the other rows of their state, are in the first token.
        count, counts: the same shapes, how many tokens there are; none for what is padding. A token beyond
            does nothing.
        width: numbers from one token to the next.
    """
    q, k, v, keep, erase, write = inputs
    loaded = ()
    for i in tl.static_range(N):
        known = count > ahead + i
        whole = counts > ahead + i
        on = (ahead + i) * width
        token = (
            tl.reshape(tl.load(q + vectors + on, mask=whole, other=0.0), (R, L)),
            tl.reshape(tl.load(k + vectors + on, mask=whole, other=0.0), (R, L)),
            tl.load(v + numbers + on, mask=known, other=0.0),
            tl.load(keep + numbers + on, mask=known, other=1.0),
            tl.load(erase + numbers + on, mask=known, other=0.0),
            tl.load(write + numbers + on, mask=known, other=0.0),
        )
        loaded = loaded + (token,)
    return loaded


@triton.jit
def _load_rows(x, numbers, ahead, count, width, N: tl.constexpr):
    """As `_load`, of one tensor, a tuple of [L]."""
    loaded = ()
    for i in tl.static_range(N):
        known = count > ahead + i
        loaded = loaded + (tl.load(x + numbers + (ahead + i) * width, mask=known, other=0.0),)
    return loaded


@triton.jit
def _apply(
    maps,
    s,
    lanes,
    chunk,
    step,
    count,
    block,
    blocks,
    RANK: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """s [R, L] after `count` chunks, of which `chunk` is the first and `chunk` + `step` the next.

    A sum over one of the first two axes of a tile [R, R, L] leaves s along the other one, where the next sum
    wants it along the first again. Instead of moving it, every other map is loaded transposed.

    Args:
        maps: [chunks, blocks, RANK + 1, RANK, L]: per lane of a block, a map and an offset.
        PAIRS: pairs of maps that are loaded together.
    """
    n = tl.arange(0, R * R * L)
    lane = _hidden(n % L)
    i = n // L // R
    j = n // L % R
    inside = (i < RANK) & (j < RANK) & (block * L + n % L < lanes) & ((block * L + n % L) % R < RANK)
    steps = tl.where(inside, count, 0)
    rows = (i * RANK + j) * L + lane
    columns = (j * RANK + i) * L + lane
    same = (i == j).to(s.dtype)
    lane, col = _flat(L, R)
    inside = (col < RANK) & (block * L + lane < lanes) & ((block * L + lane) % R < RANK)
    shift_steps = tl.where(inside, count, 0)
    offset = (RANK * RANK + col) * L + _hidden(lane)
    SIZE: tl.constexpr = (RANK + 1) * RANK * L
    jump = step.to(tl.int64) * blocks * SIZE
    maps += (chunk.to(tl.int64) * blocks + block) * SIZE
    for done in range(0, count, 2 * PAIRS):
        # Beyond the last chunk come maps that change nothing.
        loaded = ()
        for pair in tl.static_range(PAIRS):
            one = done + 2 * pair
            pair_of_maps = (
                tl.reshape(tl.load(maps + columns, mask=steps > one, other=same), (R, R, L)),
                tl.reshape(tl.load(maps + offset, mask=shift_steps > one, other=0.0), (R, L)),
                tl.reshape(tl.load(maps + jump + rows, mask=steps > one + 1, other=same), (R, R, L)),
                tl.reshape(tl.load(maps + jump + offset, mask=shift_steps > one + 1, other=0.0), (R, L)),
            )
            loaded = loaded + (pair_of_maps,)
            maps += 2 * jump
        for pair in tl.static_range(PAIRS):
            map_, shift, next_map, next_shift = loaded[pair]
            s = tl.sum(map_ * s[None, :, :], axis=1) + shift
            s = tl.sum(next_map * s[:, None, :], axis=0) + next_shift
    return s


@triton.jit
def _hidden(n):
    """n. The compiler does not see that neighbours in memory are neighbours here, see `_flat`."""
    return n * 3 // 3


@triton.jit
def _tokens(writes, mask, tokens, RANK: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """A block's tokens [BLOCK, 1], and what of a tile of theirs [BLOCK, R] exists, is seen, is written."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, R)[None, :]
    known = token < tokens
    seen = known
    if mask is not None:
        seen = seen & (tl.load(mask + token, mask=known, other=0) != 0)
    written = seen
    if writes is not None:
        written = written & (tl.load(writes + token, mask=known, other=0) != 0)
    rows = i < RANK
    return token[:, None], known[:, None] & rows, seen[:, None] & rows, written[:, None] & rows


@triton.jit
def _sections(states, RANK: tl.constexpr, R: tl.constexpr, TIED: tl.constexpr, PER_ROW: tl.constexpr):
    """Where a state's rows and their gates [1, R] are in a section of z; gates in a section, numbers in z."""
    state = tl.program_id(1)
    i = tl.arange(0, R)[None, :]
    at = state * RANK + i
    gate = at
    gates = states * RANK
    if not PER_ROW:
        gate = state + i * 0
        gates = states
    features = 3 * states * RANK + gates
    if not TIED:
        features += gates
    return at, gate, gates, features


@triton.jit
def _load_gates(
    z, gate_bias, gate, gates, width, written, RANK: tl.constexpr, R: tl.constexpr, TIED: tl.constexpr
):
    """beta and decay [BLOCK, R], biases included, of tokens' projections z [BLOCK, 1]."""
    rows = tl.arange(0, R)[None, :] < RANK
    beta = tl.load(z + 3 * width + gate, mask=written, other=0.0)
    beta += tl.load(gate_bias + gate, mask=rows, other=0.0)
    decay = beta
    if not TIED:
        decay = tl.load(z + 3 * width + gates + gate, mask=written, other=0.0)
        decay += tl.load(gate_bias + gates + gate, mask=rows, other=0.0)
    return beta, decay


# ---- the kernels -----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_SIZES)
def activate(
    z,
    gate_bias,
    writes,
    mask,
    outputs,
    tokens,
    states,
    RANK: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    UPDATE: tl.constexpr,
    TIED: tl.constexpr,
    PER_ROW: tl.constexpr,
):
    """`activation.activate`, and what `writes` and `mask` withhold. Grid: (blocks of tokens, states).

    Args:
        z, gate_bias, writes, mask: see `delta_mem.ops.advance`; the last two may be None.
        outputs: q, k, v, keep, erase, write, [tokens, states, RANK] each.
        tokens: of all batch rows.
    """
    token, inside, seen, written = _tokens(writes, mask, tokens, RANK, R, BLOCK)
    at, gate, gates, features = _sections(states, RANK, R, TIED, PER_ROW)
    width = states * RANK
    z += token * features
    q = _direction(tl.load(z + at, mask=seen, other=0.0), 1)
    k = _direction(tl.load(z + width + at, mask=seen, other=0.0), 1)
    v = tl.load(z + 2 * width + at, mask=seen, other=0.0)
    beta, decay = _load_gates(z, gate_bias, gate, gates, width, written, RANK, R, TIED)
    keep, erase, write = _gates(beta, decay, UPDATE, TIED)
    to_q, to_k, to_v, to_keep, to_erase, to_write = outputs
    to = token * width + at
    tl.store(to_q + to, q, mask=inside)
    tl.store(to_k + to, k, mask=inside)
    tl.store(to_v + to, v, mask=inside)
    tl.store(to_keep + to, tl.where(written, keep, 1.0), mask=inside)
    tl.store(to_erase + to, tl.where(written, erase, 0.0), mask=inside)
    tl.store(to_write + to, tl.where(written, write, 0.0), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def activate_backward(
    z,
    gate_bias,
    writes,
    mask,
    grads,
    grad_z,
    tokens,
    states,
    RANK: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    UPDATE: tl.constexpr,
    TIED: tl.constexpr,
    PER_ROW: tl.constexpr,
):
    """The gradient of z, of those of what `activate` makes of it. Grid: (blocks of tokens, states).

    Where something was withheld it is 0, selected and not multiplied: what lies under padding may be NaN.

    Args:
        z, gate_bias, writes, mask, tokens: as for `activate`.
        grads: of q, k, v, keep, erase, write, [tokens, states, RANK] each; those of q and k in PARTS parts,
            [PARTS, tokens, states, RANK], which are added here.
        grad_z: like z. Its columns of gates are the gradient of the gates' biases too, token by token.
    """
    token, inside, seen, written = _tokens(writes, mask, tokens, RANK, R, BLOCK)
    at, gate, gates, features = _sections(states, RANK, R, TIED, PER_ROW)
    width = states * RANK
    z += token * features
    query = tl.load(z + at, mask=seen, other=0.0)
    key = tl.load(z + width + at, mask=seen, other=0.0)
    beta, decay = _load_gates(z, gate_bias, gate, gates, width, written, RANK, R, TIED)
    from_q, from_k, from_v, from_keep, from_erase, from_write = grads
    on = token * width + at
    grad_q = tl.load(from_q + on, mask=seen, other=0.0)
    grad_k = tl.load(from_k + on, mask=seen, other=0.0)
    for part in tl.static_range(1, PARTS):
        more = (token + tokens.to(tl.int64) * part) * width + at
        grad_q += tl.load(from_q + more, mask=seen, other=0.0)
        grad_k += tl.load(from_k + more, mask=seen, other=0.0)
    grad_v = tl.load(from_v + on, mask=seen, other=0.0)
    grad_keep = tl.load(from_keep + on, mask=written, other=0.0)
    grad_erase = tl.load(from_erase + on, mask=written, other=0.0)
    grad_write = tl.load(from_write + on, mask=written, other=0.0)

    keep, _, write = _gates(beta, decay, UPDATE, TIED)
    if UPDATE == "decay_outside":
        grad_write += grad_erase * keep
        grad_keep += grad_erase * write
    else:
        grad_write += grad_erase
    grad_decay = tl.zeros((BLOCK, R), tl.float32)
    if UPDATE != "no_decay":
        if TIED:
            grad_write -= grad_keep
        else:
            grad_decay = tl.where(written, grad_keep * keep * (1.0 - keep), 0.0)
    grad_beta = tl.where(written, grad_write * write * (1.0 - write), 0.0)

    to = grad_z + token * features
    tl.store(to + at, tl.where(seen, _direction_backward(query, grad_q, 1), 0.0), mask=inside)
    tl.store(to + width + at, tl.where(seen, _direction_backward(key, grad_k, 1), 0.0), mask=inside)
    tl.store(to + 2 * width + at, grad_v, mask=inside)
    once = inside
    if not PER_ROW:
        once = inside & (tl.arange(0, R)[None, :] == 0)
        grad_beta = tl.zeros((BLOCK, R), tl.float32) + tl.sum(grad_beta, axis=1, keep_dims=True)
        grad_decay = tl.zeros((BLOCK, R), tl.float32) + tl.sum(grad_decay, axis=1, keep_dims=True)
    tl.store(to + 3 * width + gate, grad_beta, mask=once)
    if not TIED:
        tl.store(to + 3 * width + gates + gate, grad_decay, mask=once)


@triton.jit(do_not_specialize=_SIZES)
def compose(
    inputs,
    grad,
    maps,
    tokens,
    states,
    lanes,
    chunk,
    RANK: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Every chunk's maps, for `replay`, or from the last token to the first for `replay_backward`.

    Grid: (blocks of L vectors out of (RANK + 1) × lanes, chunks that need a map).

    Args:
        inputs: see `_load`.
        grad: None, or the gradient of the reads [batch, tokens, states, RANK]: then reversed.
        maps: [chunks, blocks of BLOCK lanes, RANK + 1, RANK, BLOCK].
        chunk: tokens in a chunk, a multiple of UNROLL.
    """
    index = tl.program_id(1)
    if grad is not None:
        index += 1  # the first chunk has none before it to carry a gradient to
    begin = index.to(tl.int64) * chunk
    length = tl.minimum(tokens - begin, chunk).to(tl.int32)
    width = states * RANK
    NUMBER: tl.constexpr = maps.dtype.element_ty

    vector = tl.program_id(0) * L + tl.arange(0, L)
    lane = vector % lanes
    numbers = _place(lane, begin, tokens, states, RANK, R) + lane % R
    count = tl.where((vector // lanes <= RANK) & (lane % R < RANK), length, 0)
    own = (vector // lanes == RANK).to(NUMBER)

    lane, col = _flat(L, R)
    vector = tl.program_id(0) * L + lane
    unit = vector // lanes  # which unit vector this is; RANK for the offset
    lane = vector % lanes
    vectors = _place(lane, begin, tokens, states, RANK, R) + col
    inside = (unit <= RANK) & (lane % R < RANK) & (col < RANK)
    counts = tl.where(inside, length, 0)

    s = tl.reshape((inside & (col == unit)).to(NUMBER), (R, L))
    for done in range(0, chunk, UNROLL):
        if grad is None:
            loaded = _load(inputs, numbers, vectors, done, count, counts, width, L, R, UNROLL)
            for i in tl.static_range(UNROLL):
                q, k, v, keep, erase, write = loaded[i]
                u = own * write * v - erase * tl.sum(s * k, axis=0)
                s = keep[None, :] * s + u[None, :] * k
        else:
            start = chunk - UNROLL - done
            loaded = _load(inputs, numbers, vectors, start, count, counts, width, L, R, UNROLL)
            grads = _load_rows(grad, numbers, start, count, width, UNROLL)
            for i in tl.static_range(UNROLL):
                q, k, v, keep, erase, write = loaded[UNROLL - 1 - i]
                m = own * grads[UNROLL - 1 - i]
                s = keep[None, :] * s - (erase * tl.sum(s * k, axis=0))[None, :] * k + m[None, :] * q
    block = index.to(tl.int64) * tl.cdiv(lanes, BLOCK) + lane // BLOCK
    to = ((block * (RANK + 1) + unit) * RANK + col) * BLOCK + lane % BLOCK
    tl.store(maps + to, tl.reshape(s, (R * L,)), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def replay(
    inputs,
    before,
    maps,
    reads,
    kept,
    after,
    tokens,
    states,
    lanes,
    chunk,
    chunks,
    RANK: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    UNROLL: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The reads of every chunk, and the state after the last one. Grid: (blocks of L lanes, chunks).

    Args:
        inputs: see `_load`.
        before, after: the state [batch, states, RANK, RANK] before and after all tokens.
        maps: from `compose`; None if there is one chunk.
        reads: [batch, tokens, states, RANK].
        kept: None, or [chunks, blocks, RANK, L] for the state at the start of every chunk.
        chunk: tokens in a chunk.
    """
    index = tl.program_id(1)
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    begin = index.to(tl.int64) * chunk
    length = tl.minimum(tokens - begin, chunk).to(tl.int32)
    width = states * RANK

    lane = block * L + tl.arange(0, L)
    numbers = _place(lane, begin, tokens, states, RANK, R) + lane % R
    count = tl.where((lane < lanes) & (lane % R < RANK), length, 0)

    in_block, col = _flat(L, R)
    lane = block * L + in_block
    vectors = _place(lane, begin, tokens, states, RANK, R) + col
    inside = (lane < lanes) & (lane % R < RANK) & (col < RANK)
    counts = tl.where(inside, length, 0)
    in_state = (lane // R * RANK + lane % R) * RANK + col

    s = tl.reshape(tl.load(before + in_state, mask=inside, other=0.0), (R, L))
    if maps is not None:
        s = _apply(maps, s, lanes, index * 0, index * 0 + 1, index, block, blocks, RANK, R, L, PAIRS)
    if kept is not None:
        to = ((index.to(tl.int64) * blocks + block) * RANK + col) * L + _hidden(in_block)
        tl.store(kept + to, tl.reshape(s, (R * L,)), mask=col < RANK)
    for start in range(0, length, UNROLL):
        loaded = _load(inputs, numbers, vectors, start, count, counts, width, L, R, UNROLL)
        for i in tl.static_range(UNROLL):
            q, k, v, keep, erase, write = loaded[i]
            read = tl.sum(s * q, axis=0)
            tl.store(reads + numbers + (start + i) * width, read, mask=count > start + i)
            u = write * v - erase * tl.sum(s * k, axis=0)
            s = keep[None, :] * s + u[None, :] * k
    if index == chunks - 1:
        tl.store(after + in_state, tl.reshape(s, (R * L,)), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def replay_backward(
    inputs,
    kept,
    maps,
    scratch,
    grad_reads,
    grad_after,
    grads,
    grad_before,
    tokens,
    states,
    lanes,
    chunk,
    chunks,
    RANK: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    UNROLL: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The gradients of all inputs. Grid: (blocks of L lanes, chunks).

    Args:
        inputs: see `_load`.
        kept: [chunks, blocks, RANK, L], from `replay`.
        maps: from `compose` with `grad`; None if there is one chunk.
        scratch: [chunks, blocks, chunk / UNROLL, RANK, L], for a state every UNROLL tokens.
        grad_reads, grad_after: gradients of what `replay` gives.
        grads: of q, k, v, keep, erase, write. Those of q and k, to which every row of a state adds, are
            [R / min(R, L), batch, tokens, states, RANK]: summed over the rows of a block.
        grad_before: of the state before all tokens.
    """
    index = tl.program_id(1)
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    begin = index.to(tl.int64) * chunk
    length = tl.minimum(tokens - begin, chunk).to(tl.int32)
    width = states * RANK

    lane = block * L + tl.arange(0, L)
    numbers = _place(lane, begin, tokens, states, RANK, R) + lane % R
    count = tl.where((lane < lanes) & (lane % R < RANK), length, 0)

    in_block, col = _flat(L, R)
    lane = block * L + in_block
    vectors = _place(lane, begin, tokens, states, RANK, R) + col
    inside = (lane < lanes) & (lane % R < RANK) & (col < RANK)
    counts = tl.where(inside, length, 0)
    in_state = (lane // R * RANK + lane % R) * RANK + col
    in_kept = col * L + _hidden(in_block)
    kept_too = col < RANK

    # The groups of ROWS lanes that share a state, and where their sums go.
    ROWS: tl.constexpr = min(R, L)
    group, to_col = _flat(L // ROWS, R)
    leader = block * L + group * ROWS
    part = (leader % R // ROWS).to(tl.int64) * (lanes // R) * tokens * RANK
    sums = part + _place(leader, begin, tokens, states, RANK, R) + to_col
    count_sums = tl.where((leader < lanes) & (to_col < RANK), length, 0)

    g = tl.reshape(tl.load(grad_after + in_state, mask=inside, other=0.0), (R, L))
    if maps is not None:
        behind = chunks - 1 - index
        g = _apply(maps, g, lanes, chunks - 1, index * 0 - 1, behind, block, blocks, RANK, R, L, PAIRS)

    # The states between, one every UNROLL tokens.
    own = index.to(tl.int64) * blocks + block
    s = tl.reshape(tl.load(kept + own * RANK * L + in_kept, mask=kept_too, other=0.0), (R, L))
    scratch += own * tl.cdiv(chunk, UNROLL) * RANK * L
    for start in range(0, length, UNROLL):
        tl.store(scratch + start // UNROLL * RANK * L + in_kept, tl.reshape(s, (R * L,)), mask=kept_too)
        loaded = _load(inputs, numbers, vectors, start, count, counts, width, L, R, UNROLL)
        for i in tl.static_range(UNROLL):
            q, k, v, keep, erase, write = loaded[i]
            u = write * v - erase * tl.sum(s * k, axis=0)
            s = keep[None, :] * s + u[None, :] * k
    tl.debug_barrier()

    grad_q, grad_k, grad_v, grad_keep, grad_erase, grad_write = grads
    last = (length - 1) // UNROLL * UNROLL
    for done in range(0, length, UNROLL):
        start = last - done
        loaded = _load(inputs, numbers, vectors, start, count, counts, width, L, R, UNROLL)
        loaded_grads = _load_rows(grad_reads, numbers, start, count, width, UNROLL)
        s = tl.load(scratch + start // UNROLL * RANK * L + in_kept, mask=kept_too, other=0.0)
        s = tl.reshape(s, (R, L))
        seen = ()
        for i in tl.static_range(UNROLL):
            q, k, v, keep, erase, write = loaded[i]
            recalled = tl.sum(s * k, axis=0)
            seen = seen + ((s, recalled),)
            s = keep[None, :] * s + (write * v - erase * recalled)[None, :] * k
        for i in tl.static_range(UNROLL):
            ahead = start + UNROLL - 1 - i
            q, k, v, keep, erase, write = loaded[UNROLL - 1 - i]
            grad = loaded_grads[UNROLL - 1 - i]
            s, recalled = seen[UNROLL - 1 - i]
            # s is s_{t-1} and g the gradient of s_t = keep s_{t-1} + u k.
            grad_u = tl.sum(g * k, axis=0)
            u = write * v - erase * recalled
            to = numbers + ahead * width
            known = count > ahead
            tl.store(grad_v + to, grad_u * write, mask=known)
            tl.store(grad_keep + to, tl.sum(g * s, axis=0), mask=known)
            tl.store(grad_erase + to, -grad_u * recalled, mask=known)
            tl.store(grad_write + to, grad_u * v, mask=known)
            to_k = u[None, :] * g - (erase * grad_u)[None, :] * s
            to = sums + ahead * width
            known = count_sums > ahead
            tl.store(grad_k + to, _over_rows(to_k, R, L, ROWS), mask=known)
            tl.store(grad_q + to, _over_rows(grad[None, :] * s, R, L, ROWS), mask=known)
            g = keep[None, :] * g - (erase * grad_u)[None, :] * k + grad[None, :] * q
    if index == 0:
        tl.store(grad_before + in_state, tl.reshape(g, (R * L,)), mask=inside)


@triton.jit
def _over_rows(x, R: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr):
    """[R × L / ROWS], flat, of x [R, L]: summed over every ROWS lanes."""
    return tl.reshape(tl.sum(tl.reshape(x, (R, L // ROWS, ROWS)), axis=2), (R * (L // ROWS),))


# ---- one token, from a layer's input to corrections --------------------------------------------------------
#
# Tiles have a dimension of states, then rows i of a state, then its columns j. The arguments `state`, `i` and
# `j` are the numbers along them.


@triton.jit
def _project(
    hidden, in_proj, at, inside,
    SIZE: tl.constexpr, N: tl.constexpr, SLICE: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Products [N] of one token's hidden and the rows `at` of in_proj; 0 where not `inside`."""
    x = tl.arange(0, SLICE)
    total = tl.zeros((N, SLICE), tl.float32)
    weights = in_proj + at.to(tl.int64)[:, None] * SIZE + x[None, :]
    for on in tl.range(0, SIZE, SLICE, loop_unroll_factor=UNROLL):
        within = on + x < SIZE
        h = tl.load(hidden + on + x, mask=within, other=0.0)[None, :]
        total += _product(tl.load(weights + on, mask=inside[:, None] & within[None, :], other=0.0), h)
    return tl.sum(total, axis=1)


@triton.jit
def _project_written(
    hidden, in_proj, at_key, known, at, gate, inside,
    WIDTH: tl.constexpr, GATES: tl.constexpr, SIZE: tl.constexpr, TIED: tl.constexpr,
    R: tl.constexpr, ROWS: tl.constexpr, SLICE: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """`_project` of what some rows of one state need: key [R], and value, beta and decay [ROWS]."""
    x = tl.arange(0, SLICE)
    key = tl.zeros((R, SLICE), tl.float32)
    value = tl.zeros((ROWS, SLICE), tl.float32)
    beta = tl.zeros((ROWS, SLICE), tl.float32)
    decay = tl.zeros((ROWS, SLICE), tl.float32)
    to_key = in_proj + (WIDTH + at_key).to(tl.int64)[:, None] * SIZE + x[None, :]
    to_value = in_proj + (2 * WIDTH + at).to(tl.int64)[:, None] * SIZE + x[None, :]
    to_gate = in_proj + (3 * WIDTH + gate).to(tl.int64)[:, None] * SIZE + x[None, :]
    for on in tl.range(0, SIZE, SLICE, loop_unroll_factor=UNROLL):
        within = on + x < SIZE
        own = inside[:, None] & within[None, :]
        h = tl.load(hidden + on + x, mask=within, other=0.0)[None, :]
        w_key = tl.load(to_key + on, mask=known[:, None] & within[None, :], other=0.0)
        w_value = tl.load(to_value + on, mask=own, other=0.0)
        w_beta = tl.load(to_gate + on, mask=own, other=0.0)
        key += _product(w_key, h)
        value += _product(w_value, h)
        beta += _product(w_beta, h)
        if not TIED:
            decay += _product(tl.load(to_gate + GATES * SIZE + on, mask=own, other=0.0), h)
    return tl.sum(key, axis=1), tl.sum(value, axis=1), tl.sum(beta, axis=1), tl.sum(decay, axis=1)


@triton.jit
def _product(weights, h):
    """Products, float32, of weights in h's dtype, as a matrix product of that dtype has them."""
    return weights.to(h.dtype).to(tl.float32) * h.to(tl.float32)


@triton.jit
def _written(s, key, value, beta, decay, biases, UPDATE: tl.constexpr, TIED: tl.constexpr):
    """States s [states, i, j] after a token, or a segment's mean: key [states, j], the others [states, i].

    Args:
        biases: what `_biases` returns.
    """
    k = _direction(key, 1)[:, None, :]
    keep, erase, write = _gates(beta + biases[0], decay + biases[1], UPDATE, TIED)
    u = write * value - erase * tl.sum(s * k, axis=2)
    return keep[:, :, None] * s + u[:, :, None] * k


@triton.jit
def _places(state, i, STATES: tl.constexpr, RANK: tl.constexpr, PER_ROW: tl.constexpr):
    """[states, i]: a row's place among those of all states, its gate's, and whether there is such a row."""
    at = state[:, None] * RANK + i[None, :]
    gate = at
    if not PER_ROW:
        gate = state[:, None] + i[None, :] * 0
    return at, gate, (state < STATES)[:, None] & (i < RANK)[None, :]


@triton.jit
def _load_written(
    x, state, i, j, STATES: tl.constexpr, RANK: tl.constexpr, TIED: tl.constexpr, PER_ROW: tl.constexpr
):
    """What is written, of a token's projections behind the queries or of their sums over a segment.

    Returns:
        key [states, j], and value, beta and decay [states, i].
    """
    at_key, _, known = _places(state, j, STATES, RANK, PER_ROW)
    at, gate, inside = _places(state, i, STATES, RANK, PER_ROW)
    width: tl.constexpr = STATES * RANK
    gates: tl.constexpr = STATES * RANK if PER_ROW else STATES
    key = tl.load(x + at_key, mask=known, other=0.0)
    value = tl.load(x + width + at, mask=inside, other=0.0)
    beta = tl.load(x + 2 * width + gate, mask=inside, other=0.0)
    decay = beta
    if not TIED:
        decay = tl.load(x + 2 * width + gates + gate, mask=inside, other=0.0)
    return key, value, beta, decay


@triton.jit
def _biases(
    gate_bias, state, i, STATES: tl.constexpr, RANK: tl.constexpr, TIED: tl.constexpr, PER_ROW: tl.constexpr
):
    """The biases of beta and of decay, [states, i]."""
    _, gate, inside = _places(state, i, STATES, RANK, PER_ROW)
    gates: tl.constexpr = STATES * RANK if PER_ROW else STATES
    beta = tl.load(gate_bias + gate, mask=inside, other=0.0)
    decay = beta
    if not TIED:
        decay = tl.load(gate_bias + gates + gate, mask=inside, other=0.0)
    return beta, decay


@triton.jit
def _found(
    before, sums, count, closes, biases, row, state, i, j,
    STATES: tl.constexpr, RANK: tl.constexpr, UPDATE: tl.constexpr, TIED: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """States [states, i, j] as a token finds them: with the segment written that ended before, if one did.

    Args:
        biases: what `_biases` returns; not used where sums are None.
    """
    at, _, inside = _places(state, i, STATES, RANK, PER_ROW)
    at_state = row.to(tl.int64) * (STATES * RANK * RANK) + at[:, :, None] * RANK + j[None, None, :]
    s = tl.load(before + at_state, mask=inside[:, :, None] & (j < RANK)[None, None, :], other=0.0)
    if sums is not None:
        n = tl.maximum(count, 1.0)
        key, value, beta, decay = _load_written(sums, state, i, j, STATES, RANK, TIED, PER_ROW)
        key, value, beta, decay = key / n, value / n, beta / n, decay / n
        closed = _written(s, key, value, beta, decay, biases, UPDATE, TIED)
        s = tl.where(closes, closed, s)
    return s


@triton.jit
def _is_set(flags, row):
    """Whether a row's flag is set; where there are none, all are."""
    if flags is None:
        return row == row
    else:
        return tl.load(flags + row) != 0


@triton.jit
def _write_rows(
    unit, row, hidden, in_proj, z, gate_bias, before,
    sums, count, close, index, member, ends, stays_open, writes, seen, after, sums_after,
    STATES: tl.constexpr, SIZE: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr,
    UPDATE: tl.constexpr, TIED: tl.constexpr, PER_ROW: tl.constexpr,
    ROWS: tl.constexpr, SLICE: tl.constexpr, UNROLL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a state after the token, and what they add to the open segment."""
    width: tl.constexpr = STATES * RANK
    gates: tl.constexpr = STATES * RANK if PER_ROW else STATES
    state = tl.zeros((1,), tl.int32) + unit // (R // ROWS)
    i = unit % (R // ROWS) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, R)
    at, gate, inside = _places(state, i, STATES, RANK, PER_ROW)
    at_key, _, known = _places(state, j, STATES, RANK, PER_ROW)
    biases = _biases(gate_bias, state, i, STATES, RANK, TIED, PER_ROW)
    s = _found(before, sums, count, close, biases, row, state, i, j, STATES, RANK, UPDATE, TIED, PER_ROW)
    if sums is None:
        written = seen & _is_set(writes, row)
    else:
        written = tl.load(ends + row) != 0
        goes_on = tl.load(index + row) == 0
        joins = tl.load(member + row) != 0
        still = tl.load(stays_open + row) != 0
        open_key, open_value, open_beta, open_decay = _load_written(
            sums, state, i, j, STATES, RANK, TIED, PER_ROW
        )
    if z is None:
        key, value, beta, decay = _project_written(
            hidden, in_proj, tl.reshape(at_key, (R,)), tl.reshape(known, (R,)), tl.reshape(at, (ROWS,)),
            tl.reshape(gate, (ROWS,)), tl.reshape(inside, (ROWS,)),
            width, gates, SIZE, TIED, R, ROWS, SLICE, UNROLL,
        )  # fmt: skip
        key, value, beta, decay = key[None, :], value[None, :], beta[None, :], decay[None, :]
    else:
        _wait(OVERLAP)
        key, value, beta, decay = _load_written(z + width, state, i, j, STATES, RANK, TIED, PER_ROW)
    if sums is not None:
        # Selected, not multiplied: what lies under padding may be NaN.
        key = tl.where(goes_on, open_key, 0.0) + tl.where(joins, key, 0.0)
        value = tl.where(goes_on, open_value, 0.0) + tl.where(joins, value, 0.0)
        beta = tl.where(goes_on, open_beta, 0.0) + tl.where(joins, beta, 0.0)
        decay = tl.where(goes_on, open_decay, 0.0) + tl.where(joins, decay, 0.0)
        tl.store(sums_after + at_key, tl.where(still, key, 0.0), mask=known & (unit % (R // ROWS) == 0))
        tl.store(sums_after + width + at, tl.where(still, value, 0.0), mask=inside)
        once = inside
        if not PER_ROW:
            once = inside & (i == 0)[None, :]
        tl.store(sums_after + 2 * width + gate, tl.where(still, beta, 0.0), mask=once)
        if not TIED:
            tl.store(sums_after + 2 * width + gates + gate, tl.where(still, decay, 0.0), mask=once)
        n = tl.maximum(tl.where(goes_on, count, 0.0) + tl.where(joins, 1.0, 0.0), 1.0)
        key, value, beta, decay = key / n, value / n, beta / n, decay / n
    new = _written(s, key, value, beta, decay, biases, UPDATE, TIED)
    at_state = row.to(tl.int64) * (width * RANK) + at[:, :, None] * RANK + j[None, None, :]
    whole = inside[:, :, None] & (j < RANK)[None, None, :]
    tl.store(after + at_state, tl.where(written, new, s), mask=whole)


@triton.jit
def _correct(
    block, row, hidden, in_proj, z, gate_bias, deltas, before, sums, count, close, seen, corrections, scale,
    STATES: tl.constexpr, SIZE: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr,
    UPDATE: tl.constexpr, TIED: tl.constexpr, PER_ROW: tl.constexpr,
    SIZES: tl.constexpr, IN_PLACE: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, SLICE: tl.constexpr, UNROLL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A block of the corrections, those of all heads one behind the other."""
    delta = deltas[0]
    to = corrections[0] + row.to(tl.int64) * SIZES[0]
    size = SIZES[0] + block * 0
    add = (block * BLOCK < size) & IN_PLACE
    for head in tl.static_range(1, len(SIZES)):
        if block * BLOCK >= size:
            block -= (size + BLOCK - 1) // BLOCK
            delta = deltas[head]
            to = corrections[head] + row.to(tl.int64) * SIZES[head]
            size = SIZES[head] + block * 0
    at = block * BLOCK + tl.arange(0, BLOCK)
    state, j = tl.arange(0, PADDED), tl.arange(0, R)
    if RANK == R:  # in such words that the compiler sees neighbours and loads several at once
        at_query = tl.arange(0, PADDED * R)
        known = at_query < STATES * RANK
    else:
        at_query, _, known = _places(state, j, STATES, RANK, PER_ROW)
        at_query, known = tl.reshape(at_query, (PADDED * R,)), tl.reshape(known, (PADDED * R,))
    output = tl.load(to + at, mask=(at < size) & add, other=0.0).to(tl.float32)
    weights = delta + at.to(tl.int64)[:, None] * (STATES * RANK) + at_query[None, :]
    weights = tl.load(weights, mask=(at < size)[:, None] & known[None, :], other=0.0)
    biases = 0.0, 0.0
    if sums is not None:
        biases = _biases(gate_bias, state, j, STATES, RANK, TIED, PER_ROW)
    s = _found(before, sums, count, close, biases, row, state, j, j, STATES, RANK, UPDATE, TIED, PER_ROW)
    if z is None:
        query = _project(hidden, in_proj, at_query, known, SIZE, PADDED * R, SLICE, UNROLL)
    else:
        _wait(OVERLAP)
        query = tl.load(z + at_query, mask=known, other=0.0)
    query = _direction(tl.reshape(query, (PADDED, R)), 1)
    read = tl.reshape(tl.sum(s * query[:, None, :], axis=2), (PADDED * R,))
    # Selected, not multiplied: what lies under padding may be NaN.
    read = tl.where(seen, read, 0.0).to(to.dtype.element_ty)
    correction = tl.sum(_product(weights, read[None, :]), axis=1)
    tl.store(to + at, (output + scale * correction).to(to.dtype.element_ty), mask=at < size)


@triton.jit
def _wait(OVERLAP: tl.constexpr):
    """Until the launch before is through, if this one has not waited for it."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def project(
    hidden,
    in_proj,
    z,
    SIZE: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
    UNROLL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The projections of one token, for a `step` that does not make them. Grid: (FEATURES / ROWS, batch).

    Args:
        hidden, in_proj: as in `step`, in_proj [FEATURES, SIZE].
        z: float32 [batch, FEATURES].
        ROWS: features of a program. SLICE, UNROLL: as in `step`.
        OVERLAP: `step` is launched without waiting for this one: it does so itself, before it reads z.
    """
    # This launch is not itself one that overlaps: when it begins, all before it is through. So `step` may
    # read all but z before it waits, and the z of the layer before is no longer read.
    if OVERLAP:
        gdc_launch_dependents()
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = at < FEATURES
    products = _project(hidden + row * SIZE, in_proj, at, inside, SIZE, ROWS, SLICE, UNROLL)
    tl.store(z + row * FEATURES + at, products, mask=inside)


@triton.jit
def step(
    hidden,
    in_proj,
    gate_bias,
    deltas,
    before,
    open_before,
    index,
    member,
    ends,
    closes,
    counts_before,
    stays_open,
    writes,
    mask,
    z,
    corrections,
    after,
    open_after,
    scale,
    STATES: tl.constexpr,
    SIZE: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    UPDATE: tl.constexpr,
    TIED: tl.constexpr,
    PER_ROW: tl.constexpr,
    SIZES: tl.constexpr,
    IN_PLACE: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
    UNROLL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One token from a layer's input to its corrections. Grid: (STATES * R / ROWS + blocks, batch).

    The first programs write: each has ROWS rows of a state. The others read: each has BLOCK numbers of a
    head's correction. They need the key of a whole state, or the queries of all. Without `z` each program
    computes these for itself, which takes less time than it takes a processor to launch `project` before.

    Args:
        hidden: [batch, SIZE].
        in_proj: [features, SIZE], the layer's projections, laid out as `Rule.sections`.
        gate_bias: see `activation.activate`.
        deltas: of each head [its size, STATES * RANK].
        before, after: the state [batch, STATES, RANK, RANK].
        open_before, open_after: under segment writes, the sums of the open segments [batch, features - D].
        index, member, ends, closes, counts_before, stays_open: [batch], of the `segments.SegmentPlan`, where
            `counts_before` is called `open_before`; None if tokens are written.
        writes, mask: bool [batch], or None. Segments have a plan instead of `writes`.
        z: float32 [batch, features], what `project` leaves; None: hidden is projected here.
        corrections: of each head [batch, its size].
        scale: of the corrections.
        SIZES: of the heads.
        IN_PLACE: the first head's correction is added to what is there.
        PADDED: STATES, padded to a power of two.
        ROWS, BLOCK: see above.
        SLICE: numbers of SIZE in a tile. UNROLL: tiles that are loaded together. Of no meaning with `z`.
        OVERLAP: as in `project`.
    """
    unit = tl.program_id(0)
    row = tl.program_id(1)
    gates: tl.constexpr = STATES * RANK if PER_ROW else STATES
    features: tl.constexpr = 2 * STATES * RANK + (gates if TIED else 2 * gates)  # that are written
    hidden += row.to(tl.int64) * SIZE
    if z is not None:
        z += row.to(tl.int64) * (features + STATES * RANK)
    seen = _is_set(mask, row)
    sums = None
    sums_after = None
    count = None
    close = None
    if open_before is not None:
        sums = open_before + row.to(tl.int64) * features
        sums_after = open_after + row.to(tl.int64) * features
        count = tl.load(counts_before + row)
        close = tl.load(closes + row) != 0
    writers: tl.constexpr = STATES * (R // ROWS)
    if unit < writers:
        _write_rows(
            unit, row, hidden, in_proj, z, gate_bias, before,
            sums, count, close, index, member, ends, stays_open, writes, seen, after, sums_after,
            STATES, SIZE, RANK, R, UPDATE, TIED, PER_ROW, ROWS, SLICE, UNROLL, OVERLAP,
        )  # fmt: skip
    else:
        _correct(
            unit - writers, row, hidden, in_proj, z, gate_bias, deltas,
            before, sums, count, close, seen, corrections, scale, STATES, SIZE, RANK, R,
            UPDATE, TIED, PER_ROW, SIZES, IN_PLACE, PADDED, BLOCK, SLICE, UNROLL, OVERLAP,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def correct(
    output,
    reads,
    weight,
    tokens,
    scale,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    W: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """output += scale * reads weightᵀ. Grid: blocks of outputs, for each block of tokens.

    Args:
        output: [tokens, SIZE], float16 or bfloat16 as the other two.
        reads: [tokens, WIDTH].
        weight: [SIZE, WIDTH].
        W: WIDTH, padded to a power of two that tensor cores take.
    """
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(0) // blocks * TOKENS + tl.arange(0, TOKENS)
    i = tl.arange(0, W)
    known, inside, there = (token < tokens)[:, None], column < SIZE, i < WIDTH
    to = output + token[:, None].to(tl.int64) * SIZE + column[None, :]
    before = tl.load(to, mask=known & inside[None, :], other=0.0).to(tl.float32)
    m = tl.load(reads + token[:, None] * WIDTH + i[None, :], mask=known & there[None, :], other=0.0)
    w = weight + column[None, :] * WIDTH + i[:, None]
    w = tl.load(w, mask=inside[None, :] & there[:, None], other=0.0)
    after = before + scale * tl.dot(m, w)
    tl.store(to, after.to(output.dtype.element_ty), mask=known & inside[None, :])


# Of segment writes. A segment's mean needs a sum over its tokens, and its gradient, which comes from the
# segment's end, goes to all of them: one sum, taken of what the tokens are (forward), or of what came to the
# ends (BACK). In a chunk of tokens it is a product with the matrix that says who is of whose segment. Only at
# a chunk's edge do segments go on: what chunks add to them, `edges` finds out before, for all chunks at once.
# The three kernels take the same plan and constants, of which each uses what it needs.


@triton.jit
def _cells(index_of, tokens, features, width, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """This program's chunk and batch row; the chunk's tokens [CHUNK], which of them there are, and their
    segments; columns [BLOCK] of z, and which of them are written."""
    chunk = tl.program_id(0)
    row = tl.program_id(2).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    known = token < tokens
    index = tl.load(index_of + row * tokens + token, mask=known, other=-1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return chunk, row, token, known, index, column, (column >= width) & (column < features)


@triton.jit
def _summands(
    x, flags, counts, row, token, known, index, column, written, tokens, features, BACK: tl.constexpr
):
    """What those of the tokens [CHUNK] with a flag add to their segments' sums; nothing in the queries."""
    place = row * tokens + token
    if BACK:  # of held, which has a token more
        place = row * (tokens + 1) + token + 1
    on = known & (tl.load(flags + row * tokens + token, mask=known, other=0) != 0)
    numbers = x + place[:, None] * features + column[None, :]
    numbers = tl.load(numbers, mask=on[:, None] & written[None, :], other=0.0)
    if BACK:
        numbers = numbers / _count(counts, row, index, known, tokens)[:, None]
    return numbers


@triton.jit
def _count(counts, row, index, known, tokens):
    """Tokens in the segments [CHUNK], one at least."""
    return tl.maximum(tl.load(counts + row * (tokens + 1) + index, mask=known, other=1.0), 1.0)


@triton.jit
def _segment_sums(
    x, index_of, flags, counts, edges, chunk, row, token, known, index, column, written,
    tokens, chunks, features, CHUNK: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """The sum over the whole segment of each token [CHUNK, BLOCK], the chunks that it comes from included."""
    own = _summands(x, flags, counts, row, token, known, index, column, written, tokens, features, BACK)
    same = (index[:, None] == index[None, :]).to(tl.float32)
    # A product with zeros would bring NaN into other segments: what is not finite is looked for apart.
    finite = tl.abs(own) < float("inf")
    sums = tl.dot(same, tl.where(finite, own, 0.0), input_precision="ieee")
    spoilt = tl.dot(same, tl.where(finite, 0.0, 1.0), input_precision="ieee")
    sums = tl.where(spoilt > 0, float("nan"), sums)
    if edges is not None:
        index_of += row * tokens
        # The segment that goes on beyond the chunk's edge, and the chunks beyond it.
        if BACK:
            beyond = tl.load(index_of + tl.minimum(chunk * CHUNK + CHUNK, tokens) - 1)
            first = chunk + 1
            last = chunks
        else:
            beyond = tl.load(index_of + chunk * CHUNK)
            first = chunk * 0  # of the other branch's type
            last = chunk
        added = tl.zeros((column.shape[0],), tl.float32)
        for start in range(first, last, 32):
            other = start + tl.arange(0, 32)
            there = other < last
            near = other * CHUNK if BACK else other * CHUNK + CHUNK - 1  # its token nearest to this chunk
            there = there & (tl.load(index_of + near, mask=there, other=-1) == beyond)
            place = (row * chunks + other)[:, None] * features + column[None, :]
            added += tl.sum(tl.load(edges + place, mask=there[:, None] & written[None, :], other=0.0), axis=0)
        sums += tl.where((index == beyond)[:, None], added[None, :], 0.0)
    return sums


@triton.jit(do_not_specialize=_SEGMENT_SIZES)
def edges(
    x, index_of, member, ends, closes, open_before, counts, stays_open, results,
    tokens, chunks, features, width, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the segment that goes on into the next, or if BACK into the one before.

    Args:
        x: `hold`'s z, or if BACK the gradient of held. The plan is as there.
        results: [batch, chunks, features]; nothing is put into the queries.
    """
    chunk, row, token, known, index, column, written = _cells(index_of, tokens, features, width, CHUNK, BLOCK)
    edge = chunk * CHUNK if BACK else tl.minimum(chunk * CHUNK + CHUNK, tokens) - 1
    on = known & (index == tl.load(index_of + row * tokens + edge))
    flags = member
    if BACK:
        flags = ends
    numbers = _summands(x, flags, counts, row, token, on, index, column, written, tokens, features, BACK)
    place = (row * chunks + chunk) * features + column
    tl.store(results + place, tl.sum(numbers, axis=0), mask=written)


@triton.jit(do_not_specialize=_SEGMENT_SIZES)
def hold(
    z, index_of, member, ends, closes, open_before, counts, stays_open, edges, open_sum,
    held, writes, open_after,
    tokens, chunks, features, width, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """`segments.hold`. Grid: (chunks, blocks of features, batch).

    Args:
        z: [batch, tokens, features].
        index_of and so on: of the `segments.SegmentPlan`, where `index_of` is called `index`.
        edges: what the kernel of that name leaves; None of one chunk.
        open_sum, open_after: [batch, features - width].
        held, writes: [batch, 1 + tokens, features] and [batch, 1 + tokens].
        width: of the queries, which come first in z.
    """
    chunk, row, token, known, index, column, written = _cells(index_of, tokens, features, width, CHUNK, BLOCK)
    inside = column < features
    sums = _segment_sums(
        z, index_of, member, counts, edges, chunk, row, token, known, index, column, written,
        tokens, chunks, features, CHUNK, BACK,
    )  # fmt: skip
    closed = tl.load(closes + row) != 0
    to_open = row * (features - width) + column - width
    before = tl.load(open_sum + to_open, mask=written, other=0.0)
    sums += tl.where((index == 0)[:, None] & (not closed), before[None, :], 0.0)

    ended = known & (tl.load(ends + row * tokens + token, mask=known, other=0) != 0)
    means = sums / _count(counts, row, index, known, tokens)[:, None]
    from_z = (row * tokens + token)[:, None] * features + column[None, :]
    queries = tl.load(z + from_z, mask=known[:, None] & (column < width)[None, :], other=0.0)
    to = row * (tokens + 1) + token + 1
    values = tl.where((column < width)[None, :], queries, tl.where(ended[:, None], means, 0.0))
    tl.store(held + to[:, None] * features + column[None, :], values, mask=known[:, None] & inside[None, :])
    if tl.program_id(1) == 0:
        tl.store(writes + to, ended, mask=known)
    if chunk == 0:
        mean = before / tl.maximum(tl.load(open_before + row), 1.0)
        tl.store(held + row * (tokens + 1) * features + column, mean, mask=inside)
        if tl.program_id(1) == 0:
            tl.store(writes + row * (tokens + 1), closed)
    if chunk == chunks - 1:
        left = tl.sum(tl.where((token == tokens - 1)[:, None], sums, 0.0), axis=0)
        stays = tl.load(stays_open + row) != 0
        tl.store(open_after + to_open, tl.where(stays, left, 0.0), mask=written)


@triton.jit(do_not_specialize=_SEGMENT_SIZES)
def hold_backward(
    grad_held, index_of, member, ends, closes, open_before, counts, stays_open, edges, grad_after,
    grad_z, grad_open,
    tokens, chunks, features, width, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """The gradients of `hold`'s z and open_sum, of those of held and open_after. Grid and shapes are its."""
    chunk, row, token, known, index, column, written = _cells(index_of, tokens, features, width, CHUNK, BLOCK)
    inside = column < features
    sums = _segment_sums(
        grad_held, index_of, ends, counts, edges, chunk, row, token, known, index, column, written,
        tokens, chunks, features, CHUNK, BACK,
    )  # fmt: skip
    to_open = row * (features - width) + column - width
    stays = tl.load(stays_open + row) != 0
    after = tl.load(grad_after + to_open, mask=written & stays, other=0.0)
    last = tl.load(index_of + row * tokens + tokens - 1)
    sums += tl.where((index == last)[:, None], after[None, :], 0.0)

    counted = known & (tl.load(member + row * tokens + token, mask=known, other=0) != 0)
    from_held = (row * (tokens + 1) + token + 1)[:, None] * features + column[None, :]
    queries = tl.load(grad_held + from_held, mask=known[:, None] & (column < width)[None, :], other=0.0)
    values = tl.where((column < width)[None, :], queries, tl.where(counted[:, None], sums, 0.0))
    to = (row * tokens + token)[:, None] * features + column[None, :]
    tl.store(grad_z + to, values, mask=known[:, None] & inside[None, :])
    if chunk == 0:
        # Held, it is written before the first token; else it is in the sum of the first segment.
        mean = tl.load(grad_held + row * (tokens + 1) * features + column, mask=written, other=0.0)
        grad = mean / tl.maximum(tl.load(open_before + row), 1.0)
        in_sum = tl.sum(tl.where(((token == 0) & (index == 0))[:, None], sums, 0.0), axis=0)
        grad += tl.where(tl.load(closes + row) != 0, 0.0, in_sum)
        tl.store(grad_open + to_open, grad, mask=written)


# Fields of a `segments.SegmentPlan` that `step` takes, in order.
PLAN = ("index", "member", "ends", "closes", "open_before", "stays_open")


@triton.jit(do_not_specialize=["tokens"])
def plan_segments(
    open_count,
    open_ids,
    ids,
    writes,
    present,
    keep_open,
    closes,
    index,
    member,
    ends,
    open_before,
    counts,
    stays_open,
    count_after,
    ids_after,
    final,
    tokens,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`segments.plan`. Grid: rows. What atomics add up are whole numbers, so that their order shows nowhere.

    Args:
        open_count, open_ids, ids, writes, present, keep_open: see there. None for ids are zeros, for writes
            and present True, for keep_open KEEP.
        closes and so on: the plan's fields in their order.
        final: int32 [rows, tokens + 1], room for the last token of each segment.
    """
    row = tl.program_id(0).to(tl.int64)
    one = row >= 0
    before = tl.load(open_count + row)
    open_id = tl.where(before > 0, tl.load(open_ids + row), -1)
    keeps = _flag(keep_open, row, one, KEEP)
    first = row * tokens
    counts += row * (tokens + 1)
    final += row * (tokens + 1)
    for start in range(0, tokens + 1, BLOCK):
        segment = start + tl.arange(0, BLOCK)
        tl.store(counts + segment, 0.0, mask=segment <= tokens)
        tl.store(final + segment, -1, mask=segment <= tokens)
    tl.debug_barrier()

    writer = -1  # the last token that wrote, and its segment
    last = 0
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        at = first + token
        known = token < tokens
        there = _flag(present, at, known, True)
        written = _flag(writes, at, known, True) & there
        earlier = known & (token > 0)
        wrote = _flag(writes, at - 1, earlier, True) & _flag(present, at - 1, earlier, True)
        wrote_last = tl.associative_scan(tl.where(wrote, token - 1, -1), 0, _larger)
        wrote_last = tl.maximum(wrote_last, writer)
        id_before = _id_of(ids, first + wrote_last, wrote_last >= 0, open_id)
        id_here = _id_of(ids, at, known, open_id)
        here = last + tl.cumsum((written & (id_here != id_before)).to(tl.int32), 0)
        counted = written & (id_here >= 0)
        tl.store(index + at, here.to(tl.int64), mask=known)
        tl.store(member + at, counted, mask=known)
        tl.atomic_add(counts + here, tl.full((BLOCK,), 1.0, tl.float32), mask=counted, sem="relaxed")
        tl.atomic_max(final + here, token, mask=there, sem="relaxed")
        writer = tl.maximum(writer, tl.max(tl.where(written, token, -1), 0))
        last = tl.max(here, 0)
    tl.debug_barrier()

    anybody = writer >= 0
    id_after = _id_of(ids, first + writer, anybody, open_id)
    closed = anybody & (before > 0) & (tl.load(final, cache_modifier=".cg") < 0)
    left = tl.where(closed, 0, before).to(tl.float32)
    tl.store(counts, tl.load(counts, cache_modifier=".cg") + left)
    tl.debug_barrier()
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        known = token < tokens
        here = tl.load(index + first + token, mask=known, other=0)
        ended = _flag(present, first + token, known, True) & anybody & ~(keeps & (here == last))
        ended = ended & (token == tl.load(final + here, mask=known, other=-1, cache_modifier=".cg"))
        ended = ended & (tl.load(counts + here, mask=known, other=0.0, cache_modifier=".cg") > 0)
        tl.store(ends + first + token, ended, mask=known)
    stays = (~anybody) | (keeps & (id_after >= 0))
    count = tl.load(counts + last, cache_modifier=".cg").to(tl.int64)
    tl.store(closes + row, closed)
    tl.store(open_before + row, before.to(tl.float32))
    tl.store(stays_open + row, stays)
    tl.store(count_after + row, tl.where(stays, count, 0))
    tl.store(ids_after + row, id_after)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _id_of(ids, at, inside, default):
    """The ids of tokens, zeros if none are given; `default` where there is no token."""
    found = tl.where(inside, default * 0, default)
    if ids is not None:
        found = tl.load(ids + at, mask=inside, other=0)
        found = tl.where(inside, found, default)
    return found


@triton.jit
def _flag(flags, at, inside, DEFAULT: tl.constexpr):
    """The flags there; DEFAULT if none are given."""
    flag = inside
    if flags is not None:
        flag = tl.load(flags + at, mask=inside, other=0) != 0
    elif not DEFAULT:
        flag = inside & (at < 0)
    return flag
