"""The loops of `cpu.py`, compiled by numba, which must be there to import this file.

One state is rank × rank numbers. Its rows never meet, so they are the lanes of the processor's vectors:
`Vector(rank × float)` is a type of this file, taught to numba below, and a state lies in memory
column after column, one vector per column j: S_j [rank]. A token then is, with products by entries,

    m = Σ_j S_j q_j,   u = write v − erase Σ_j S_j k_j,   S_j ← keep S_j + u k_j

LLVM does not find these vectors by itself in plain loops (3 to 20 times slower). For a rank known when
the code is compiled it keeps a whole state of rank 8 in registers. So there is one compiled function
per rank and dtype, made when first asked for and kept on disk by numba after that.

A lane is one state of one batch row; a kernel runs the lanes `first` to `last`, one after the other,
without the GIL and without threads of its own. Tensors come as tuples (address, strides in numbers):
nobody checks them here. The entries of one token (last dimension) lie side by side, or are all the
same number (stride 0). In the code, x_ points to the lane's first token of the tensor x, and `like` is
any vector of the rank and dtype: its type tells both to functions that serve all.
"""

import math
import operator
import threading

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from .activation import NORM_EPS

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

# Tokens between two states that `forward` keeps for `backward`, which computes those between again.
# At rank 8 these are 16 KiB of float32, so that they stay in the processor's nearest cache.
BLOCK = 64

# Of a gradient. Gates that forget half at every token leave 5e-20 of it after BLOCK tokens: a normal float32.
NEGLIGIBLE = 1e-18

# `contract` lets a product and a sum become one instruction. The other freedoms of fastmath would
# let NaN and infinity pass for numbers.
OPTIONS = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}

# Numbers of a layer in `step`, before those of its heads.
FIXED = 7

UPDATES = ("standard", "decay_outside", "no_decay")
DECAY_OUTSIDE, NO_DECAY = 1, 2


# ---- vectors -------------------------------------------------------------------------------------


class Vector(types.Type):
    """`count` numbers of numba's type `scalar`."""

    def __init__(self, count, scalar):
        self.count, self.scalar = count, scalar
        super().__init__(name=f"Vector({count} x {scalar})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        scalar = manager.lookup(vector.scalar).get_value_type()
        super().__init__(manager, vector, ir.VectorType(scalar, vector.count))


def _spread(context, builder, value, of, to):
    """A scalar in every lane; a vector as it is."""
    if isinstance(of, Vector):
        return value
    value = context.cast(builder, value, of, to.scalar)
    undefined = ir.Constant(context.get_value_type(to), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), to.count), [0] * to.count)
    return builder.shuffle_vector(first, undefined, lanes)


def _teach(operation, instruction):
    """`vector ∘ vector`, `vector ∘ number` and `number ∘ vector`."""

    @infer_global(operation)
    class _(AbstractTemplate):
        def generic(self, args, kws):
            vectors = [x for x in args if isinstance(x, Vector)]
            return signature(vectors[0], *args) if vectors else None

    def lower(context, builder, sig, args):
        pair = zip(args, sig.args, strict=True)
        left, right = (_spread(context, builder, x, of, sig.return_type) for x, of in pair)
        return getattr(builder, instruction)(left, right)

    for pair in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(operation, *pair)(lower)


_teach(operator.add, "fadd")
_teach(operator.sub, "fsub")
_teach(operator.mul, "fmul")
_teach(operator.truediv, "fdiv")


@intrinsic(prefer_literal=True)
def _zeros(typing, count, dtype):
    """A vector of zeros. `count` is a constant."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    vector = Vector(count.literal_value, dtype.dtype)

    def codegen(context, builder, sig, args):
        return ir.Constant(context.get_value_type(vector), None)

    return vector(count, dtype), codegen


@intrinsic
def _fill(typing, x, like):
    """A vector like `like` with x in every lane."""

    def codegen(context, builder, sig, args):
        return _spread(context, builder, args[0], x, like)

    return like(x, like), codegen


@intrinsic
def _where_less(typing, a, b, x, y):
    """x in the lanes where a < b, else y; so y where one of them is NaN."""
    vector = next(t for t in (a, b, x, y) if isinstance(t, Vector))

    def codegen(context, builder, sig, args):
        pair = zip(args, sig.args, strict=True)
        a, b, x, y = (_spread(context, builder, value, of, vector) for value, of in pair)
        return builder.select(builder.fcmp_ordered("<", a, b), x, y)

    return vector(a, b, x, y), codegen


@intrinsic
def _total(typing, x):
    """The sum of a vector's lanes, pairwise."""

    def codegen(context, builder, sig, args):
        scalar, vector = context.get_value_type(x.scalar), args[0].type
        bits = 32 if x.scalar == types.float32 else 64
        kind = ir.FunctionType(scalar, [scalar, vector])
        name = f"llvm.vector.reduce.fadd.v{x.count}f{bits}"
        add = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(add, [ir.Constant(scalar, -0.0), args[0]], fastmath=("reassoc",))

    return x.scalar(x), codegen


@intrinsic
def _first(typing, x):
    """The number in a vector's first lane."""

    def codegen(context, builder, sig, args):
        return builder.extract_element(args[0], ir.Constant(ir.IntType(32), 0))

    return x.scalar(x), codegen


@intrinsic
def _power_of_two(typing, x):
    """2^n of n + 1.5 · 2^23, whose low bits are the integer n, −126 ≤ n ≤ 127 (float32)."""

    def codegen(context, builder, sig, args):
        integers = ir.VectorType(ir.IntType(32), x.count)

        def constant(n):
            return ir.Constant(integers, [n] * x.count)

        exponent = builder.shl(builder.bitcast(args[0], integers), constant(23))
        return builder.bitcast(builder.add(exponent, constant(127 << 23)), args[0].type)

    return x(x), codegen


# ---- memory --------------------------------------------------------------------------------------


@intrinsic
def _pointer(typing, address, offset, like):
    """`offset` numbers behind an address."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], context.get_value_type(like.scalar).as_pointer())
        return builder.gep(pointer, [args[1]])

    return types.CPointer(like.scalar)(address, types.int64, like), codegen


def _read_as(kind):
    @intrinsic
    def pointer(typing, address):
        """A pointer to the numbers at an address."""

        def codegen(context, builder, sig, args):
            return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

        return types.CPointer(kind)(address), codegen

    return pointer


_bytes, _integers, _floats = (_read_as(kind) for kind in (types.uint8, types.int64, types.float32))


@intrinsic
def _rank(typing, like):
    def codegen(context, builder, sig, args):
        return ir.Constant(ir.IntType(64), like.count)

    return types.int64(like), codegen


def _local(like, size):
    """`size` numbers on the stack: LLVM sees that nobody else knows them, and may keep them in registers."""

    def codegen(context, builder, sig, args):
        scalar = context.get_value_type(like.scalar)
        place = cgutils.alloca_once(builder, ir.ArrayType(scalar, size))
        place.align = 64
        return builder.bitcast(place, scalar.as_pointer())

    return types.CPointer(like.scalar)(like), codegen


@intrinsic
def _local_vector(typing, like):
    return _local(like, like.count)


@intrinsic
def _local_state(typing, like):
    return _local(like, like.count**2)


@intrinsic
def _load(typing, pointer, index, like):
    """A vector like `like` of the numbers at pointer[index] and behind."""

    def codegen(context, builder, sig, args):
        kind = context.get_value_type(like)
        address = builder.bitcast(builder.gep(args[0], [args[1]]), kind.as_pointer())
        return builder.load(address, align=like.scalar.bitwidth // 8)

    return like(pointer, types.int64, like), codegen


@intrinsic
def _store(typing, pointer, index, x):
    """Writes a vector to pointer[index] and behind."""

    def codegen(context, builder, sig, args):
        address = builder.bitcast(builder.gep(args[0], [args[1]]), args[2].type.as_pointer())
        builder.store(args[2], address, align=x.scalar.bitwidth // 8)

    return types.void(pointer, types.int64, x), codegen


@njit(**OPTIONS)
def _lane(view, batch, h, like):
    """A pointer to the first token of state h of a batch row."""
    return _pointer(view[0], batch * view[1] + h * view[3], like)


@njit(**OPTIONS)
def _entries(x, view, t, like):
    """Token t's entries, as a vector."""
    return _load(x, t * view[2], like) if view[4] == 1 else _fill(x[t * view[2]], like)


@njit(**OPTIONS)
def _load_state(S, state, batch, h, like):
    source = _pointer(state[0], batch * state[1] + h * state[2], like)
    for j in range(_rank(like)):
        for i in range(_rank(like)):
            S[j * _rank(like) + i] = source[i * state[3] + j * state[4]]


@njit(**OPTIONS)
def _store_state(S, state, batch, h, like):
    target = _pointer(state[0], batch * state[1] + h * state[2], like)
    for i in range(_rank(like)):
        for j in range(_rank(like)):
            target[i * state[3] + j * state[4]] = S[j * _rank(like) + i]


@njit(**OPTIONS)
def _copy(target, source, like):
    """A state that lies column after column."""
    for j in range(_rank(like)):
        _store(target, j * _rank(like), _load(source, j * _rank(like), like))


# ---- the recurrence ------------------------------------------------------------------------------


@njit(**OPTIONS)
def _apply(S, x, view, t, like):
    """S x: what the state answers to token t's query or key."""
    answer = _fill(0.0, like)
    for j in range(_rank(like)):
        answer = answer + _load(S, j * _rank(like), like) * x[t * view[2] + j * view[4]]
    return answer


@njit(**OPTIONS)
def _update(S, keep, u, k, view, t, like):
    """S ← diag(keep) S + u kᵀ."""
    for j in range(_rank(like)):
        s = _load(S, j * _rank(like), like)
        _store(S, j * _rank(like), keep * s + u * k[t * view[2] + j * view[4]])


@njit(**OPTIONS)
def _forward(like, inputs, state, reads, final, marks, sizes):
    q, k, v, keep, erase, write = inputs
    states, tokens, first, last = sizes
    S = _local_state(like)
    blocks = (tokens + BLOCK - 1) // BLOCK
    for lane in range(first, last):
        batch, h = lane // states, lane % states
        q_, k_, v_ = _lane(q, batch, h, like), _lane(k, batch, h, like), _lane(v, batch, h, like)
        keep_, erase_ = _lane(keep, batch, h, like), _lane(erase, batch, h, like)
        write_, reads_ = _lane(write, batch, h, like), _lane(reads, batch, h, like)
        _load_state(S, state, batch, h, like)
        for t in range(tokens):
            if marks != 0 and t % BLOCK == 0:
                _copy(_pointer(marks, (lane * blocks + t // BLOCK) * _rank(like) ** 2, like), S, like)
            _store(reads_, t * reads[2], _apply(S, q_, q, t, like))
            recalled = _apply(S, k_, k, t, like)
            u = _entries(write_, write, t, like) * _entries(v_, v, t, like)
            u = u - _entries(erase_, erase, t, like) * recalled
            _update(S, _entries(keep_, keep, t, like), u, k_, k, t, like)
        _store_state(S, final, batch, h, like)


@njit(**OPTIONS)
def _drop_negligible(G, like):
    """Zeros in the place of gradients that have all but decayed.

    Further back they would become denormal numbers, with which processors compute a hundred times slower: not
    here alone, but in every matrix product that these gradients go into.
    """
    for j in range(_rank(like)):
        g = _load(G, j * _rank(like), like)
        size = _where_less(g, 0.0, 0.0 - g, g)
        _store(G, j * _rank(like), _where_less(size, NEGLIGIBLE, 0.0, g))


@njit(**OPTIONS)
def _backward(like, inputs, d_reads, d_final, d_inputs, d_state, marks, history, sizes):
    q, k, v, keep, erase, write = inputs
    d_q, d_k, d_v, d_keep, d_erase, d_write = d_inputs
    states, tokens, first, last = sizes
    size = _rank(like) ** 2
    S, G = _local_state(like), _local_state(like)  # G is the gradient of S
    blocks = (tokens + BLOCK - 1) // BLOCK
    for lane in range(first, last):
        batch, h = lane // states, lane % states
        q_, k_, v_ = _lane(q, batch, h, like), _lane(k, batch, h, like), _lane(v, batch, h, like)
        keep_, erase_ = _lane(keep, batch, h, like), _lane(erase, batch, h, like)
        write_, d_reads_ = _lane(write, batch, h, like), _lane(d_reads, batch, h, like)
        d_q_, d_k_, d_v_ = _lane(d_q, batch, h, like), _lane(d_k, batch, h, like), _lane(d_v, batch, h, like)
        d_keep_, d_erase_ = _lane(d_keep, batch, h, like), _lane(d_erase, batch, h, like)
        d_write_ = _lane(d_write, batch, h, like)
        _load_state(G, d_final, batch, h, like)
        for block in range(blocks - 1, -1, -1):
            start, end = block * BLOCK, min(tokens, (block + 1) * BLOCK)
            _copy(S, _pointer(marks, (lane * blocks + block) * size, like), like)
            for t in range(start, end):
                _copy(_pointer(history, (t - start) * size, like), S, like)
                u = _entries(write_, write, t, like) * _entries(v_, v, t, like)
                u = u - _entries(erase_, erase, t, like) * _apply(S, k_, k, t, like)
                _update(S, _entries(keep_, keep, t, like), u, k_, k, t, like)

            for t in range(end - 1, start - 1, -1):
                before = _pointer(history, (t - start) * size, like)
                v_t, keep_t = _entries(v_, v, t, like), _entries(keep_, keep, t, like)
                erase_t, write_t = _entries(erase_, erase, t, like), _entries(write_, write, t, like)
                d_read = _entries(d_reads_, d_reads, t, like)
                recalled = _apply(before, k_, k, t, like)
                u = write_t * v_t - erase_t * recalled
                d_u = _apply(G, k_, k, t, like)
                d_recalled = 0.0 - d_u * erase_t
                _store(d_write_, t * d_write[2], d_u * v_t)
                _store(d_v_, t * d_v[2], d_u * write_t)
                _store(d_erase_, t * d_erase[2], 0.0 - d_u * recalled)
                d_keep_t = _fill(0.0, like)
                for j in range(_rank(like)):
                    s, g = _load(before, j * _rank(like), like), _load(G, j * _rank(like), like)
                    d_keep_t = d_keep_t + g * s
                    d_q_[t * d_q[2] + j] = _total(s * d_read)
                    d_k_[t * d_k[2] + j] = _total(g * u + s * d_recalled)
                    g = keep_t * g + d_recalled * k_[t * k[2] + j * k[4]]
                    _store(G, j * _rank(like), g + d_read * q_[t * q[2] + j * q[4]])
                _store(d_keep_, t * d_keep[2], d_keep_t)
            _drop_negligible(G, like)
        _store_state(G, d_state, batch, h, like)


# ---- from projections on -------------------------------------------------------------------------


@njit(**OPTIONS)
def _exp(x):
    """Within an ulp or two for float32; 0 and infinity where it is due, NaN for NaN."""
    x = _where_less(x, -104.0, -104.0, _where_less(104.0, x, 104.0, x))
    n = x * 1.44269504088896341 + 12582912.0 - 12582912.0  # x / log 2, rounded by losing the low bits
    x = x - n * 0.693359375 - n * -2.12194440e-4
    p = x * 1.9875691500e-4 + 1.3981999507e-3
    p = p * x + 8.3334519073e-3
    p = p * x + 4.1665795894e-2
    p = p * x + 1.6666665459e-1
    p = p * x + 5.0000001201e-1
    # 2^n in two factors: n alone can leave the exponents that float32 has.
    half = n * 0.5 + 12582912.0
    rest = n - (half - 12582912.0) + 12582912.0
    return (p * (x * x) + x + 1.0) * _power_of_two(half) * _power_of_two(rest)


@njit(**OPTIONS)
def _sigmoid(x):
    return 1.0 / (1.0 + _exp(0.0 - x))


@njit(**OPTIONS)
def _tanh(x):
    """Of small numbers too the relative error is an ulp or two: `_direction` divides by their length."""
    size = _where_less(x, 0.0, 0.0 - x, x)
    large = 1.0 - 2.0 / (_exp(size * 2.0) + 1.0)
    z = x * x
    p = z * -5.70498872745e-3 + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    return _where_less(size, 0.625, p * z * x + x, _where_less(x, 0.0, 0.0 - large, large))


@njit(**OPTIONS)
def _direction(x):
    """See `activation.direction`."""
    x = _tanh(x)
    length = _fill(math.sqrt(_total(x * x)), x)
    return x / _where_less(length, NORM_EPS, NORM_EPS, length)


@njit(**OPTIONS)
def _gate(x, at, per_row, like):
    """A gate before its activation: one number per row of the state, or one for all of them."""
    return _load(x, at, like) if per_row else _fill(x[at], like)


@njit(**OPTIONS)
def _store_gate(x, at, per_row, gate):
    if per_row:
        _store(x, at, gate)
    else:
        x[at] = _first(gate)


@njit(**OPTIONS)
def _is_set(flags, batch, t):
    """Whether a token's flag is set; where there are none, all are."""
    return flags[0] == 0 or _bytes(flags[0])[batch * flags[1] + t * flags[2]] != 0


@njit(**OPTIONS)
def _read_token(S, x, query):
    _store(x, 0, _direction(query))
    return _apply(S, x, (0, 0, 0, 0, 1), 0, query)


@njit(**OPTIONS)
def _write_token(S, x, key, value, beta, kept, bias, at, gates, rule):
    """Writes a token, or a segment's mean, of these projections; `kept` is the keep gate's, unless tied."""
    tied, per_row, update = rule
    _store(x, 0, _direction(key))
    write = _sigmoid(beta + _gate(bias, at, per_row, key))
    keep, erase = 1.0 - write, write
    if update == NO_DECAY:
        keep = _fill(1.0, key)
    else:
        if not tied:
            keep = _sigmoid(kept + _gate(bias, gates + at, per_row, key))
        if update == DECAY_OUTSIDE:
            erase = keep * write
    one_token = (0, 0, 0, 0, 1)
    u = write * value - erase * _apply(S, x, one_token, 0, key)
    _update(S, keep, u, x, one_token, 0, key)


@njit(**OPTIONS)
def _advance(like, z, bias, state, mask, reads, final, writes, rule, sizes):
    tied, per_row, _ = rule
    states, tokens, first, last = sizes
    rank = _rank(like)
    width = states * rank
    gates = width if per_row else states
    S, x = _local_state(like), _local_vector(like)
    bias_ = _pointer(bias, 0, like)
    for lane in range(first, last):
        batch, h = lane // states, lane % states
        reads_, at = _lane(reads, batch, h, like), h * (rank if per_row else 1)
        _load_state(S, state, batch, h, like)
        for t in range(tokens):
            z_ = _pointer(z[0], batch * z[1] + t * z[2], like)
            if not _is_set(mask, batch, t):
                _store(reads_, t * reads[2], _fill(0.0, like))
                continue
            _store(reads_, t * reads[2], _read_token(S, x, _load(z_, h * rank, like)))
            if _is_set(writes, batch, t):
                key, value = _load(z_, width + h * rank, like), _load(z_, 2 * width + h * rank, like)
                beta = _gate(z_, 3 * width + at, per_row, like)
                kept = beta if tied else _gate(z_, 3 * width + gates + at, per_row, like)
                _write_token(S, x, key, value, beta, kept, bias_, at, gates, rule)
        _store_state(S, final, batch, h, like)


@njit(**OPTIONS)
def _advance_segments(like, z, bias, state, mask, reads, final, segments, rule, sizes):
    new_sum, open_sum, index, member, ends, closes, open_before, stays_open = segments
    tied, per_row, _ = rule
    states, tokens, first, last = sizes
    rank = _rank(like)
    width = states * rank
    gates = width if per_row else states
    features = 2 * width + (gates if tied else 2 * gates)  # that are written
    S, x = _local_state(like), _local_vector(like)
    bias_ = _pointer(bias, 0, like)
    zeros = _fill(0.0, like)
    for lane in range(first, last):
        batch, h = lane // states, lane % states
        reads_, at = _lane(reads, batch, h, like), h * (rank if per_row else 1)
        _load_state(S, state, batch, h, like)

        before = _pointer(open_sum, batch * features, like)
        count = _pointer(open_before, batch, like)[0]
        key, value = _load(before, h * rank, like), _load(before, width + h * rank, like)
        beta = _gate(before, 2 * width + at, per_row, like)
        kept = beta if tied else _gate(before, 2 * width + gates + at, per_row, like)
        if _bytes(closes)[batch] != 0:
            _write_token(S, x, key / count, value / count, beta / count, kept / count, bias_, at, gates, rule)
            key, value, beta, kept, count = zeros, zeros, zeros, zeros, 0.0
        here = np.int64(0)
        for t in range(tokens):
            place = batch * tokens + t
            if _integers(index)[place] != here:
                here = _integers(index)[place]
                key, value, beta, kept, count = zeros, zeros, zeros, zeros, 0.0
            if not _is_set(mask, batch, t):
                _store(reads_, t * reads[2], zeros)
                continue
            z_ = _pointer(z[0], batch * z[1] + t * z[2], like)
            _store(reads_, t * reads[2], _read_token(S, x, _load(z_, h * rank, like)))
            if _bytes(member)[place] != 0:
                key = key + _load(z_, width + h * rank, like)
                value = value + _load(z_, 2 * width + h * rank, like)
                beta = beta + _gate(z_, 3 * width + at, per_row, like)
                if not tied:
                    kept = kept + _gate(z_, 3 * width + gates + at, per_row, like)
                count += 1.0
            if _bytes(ends)[place] != 0:
                _write_token(
                    S, x, key / count, value / count, beta / count, kept / count, bias_, at, gates, rule
                )
        _store_state(S, final, batch, h, like)

        if _bytes(stays_open)[batch] == 0:
            key, value, beta, kept = zeros, zeros, zeros, zeros
        after = _pointer(new_sum, batch * features, like)
        _store(after, h * rank, key)
        _store(after, width + h * rank, value)
        _store_gate(after, 2 * width + at, per_row, beta)
        if not tied:
            _store_gate(after, 2 * width + gates + at, per_row, kept)


# ---- one token, from a layer's input on -----------------------------------------------------------


@njit(**OPTIONS)
def _project(like, z, hidden, weight, batch, features, size):
    """z [batch, features]: products of hidden [batch, size] and weight [features, size]; by addresses."""
    lanes = _rank(like)
    for row in range(batch):
        x, y = _pointer(hidden, row * size, like), _pointer(z, row * features, like)
        for i in range(features):
            w = _pointer(weight, i * size, like)
            # Two sums, so that one addition need not wait for the other.
            even, odd = _fill(0.0, like), _fill(0.0, like)
            j = 0
            while j + 2 * lanes <= size:
                even = even + _load(x, j, like) * _load(w, j, like)
                odd = odd + _load(x, j + lanes, like) * _load(w, j + lanes, like)
                j += 2 * lanes
            total = _total(even + odd)
            for rest in range(j, size):
                total += x[rest] * w[rest]
            y[i] = total


@njit(**OPTIONS)
def _one_token(like, layer, hidden, state, final, batch):
    """Projects one token a row. Returns what `_advance` wants of it: z, state, reads, final, flags, sizes."""
    weight, tied, per_row, update, states, size = layer[0], layer[2], layer[3], layer[4], layer[5], layer[6]
    rank = _rank(like)
    width = states * rank
    gates = width if per_row else states
    features = 3 * width + (gates if tied else 2 * gates)
    room = np.empty(batch * (features + width), np.float32)
    z = room.ctypes.data
    reads = z + 4 * batch * features
    _project(like, z, hidden, weight, batch, features, size)
    by_state = (width * rank, rank * rank, rank, 1)
    return (
        room,  # to be kept as long as its addresses are used
        (z, features, features),
        (state, *by_state),
        (reads, width, width, rank, 1),
        (final, *by_state),
        (tied, per_row, update),
        (states, 1, 0, batch * states),
    )


@njit(**OPTIONS)
def _correct(like, reads, width, batch, delta, to, size, scale, add):
    """scale * delta m of each row's reads m, written to `to` [batch, size], or added to what is there."""
    lanes = _rank(like)
    for row in range(batch):
        m, y = _pointer(reads, row * width, like), _pointer(to, row * size, like)
        for i in range(size):
            w = _pointer(delta, i * width, like)
            sums = _fill(0.0, like)
            for j in range(0, width, lanes):
                sums = sums + _load(w, j, like) * _load(m, j, like)
            correction = np.float32(scale) * _total(sums)
            y[i] = y[i] + correction if add else correction


@njit(**OPTIONS)
def _correct_all(like, layer, reads, batch, scale, add, to):
    """`_correct` of all heads; `add` is the first one's."""
    width = reads[1]
    for head in range(len(to)):
        delta, size = layer[FIXED + 2 * head], layer[FIXED + 2 * head + 1]
        if size > 0:
            _correct(like, reads[0], width, batch, delta, to[head], size, scale, add and head == 0)


# ---- one compiled function per rank and dtype ----------------------------------------------------

_INT = types.int64
_FLAGS = types.UniTuple(_INT, 3)
_SIZES = types.UniTuple(_INT, 4)
_TENSOR = types.UniTuple(_INT, 5)
_INPUTS = types.UniTuple(_TENSOR, 6)


def _make_forward(rank, dtype):
    def forward(inputs, state, reads, final, marks, sizes):
        """Reads and writes.

        Args:
            inputs: q, k, v, keep, erase, write [batch, tokens, states, rank].
            state, final: [batch, states, rank, rank], before and after.
            reads: [batch, tokens, states, rank].
            marks: address of [lanes, blocks, rank * rank] numbers for the states at the blocks' starts,
                column after column; 0 if they are not wanted.
            sizes: states, tokens, first, last.
        """
        _forward(_zeros(rank, dtype), inputs, state, reads, final, marks, sizes)

    return forward, (_INPUTS, _TENSOR, _TENSOR, _TENSOR, _INT, _SIZES)


def _make_backward(rank, dtype):
    def backward(inputs, d_reads, d_final, d_inputs, d_state, marks, history, sizes):
        """The gradients of forward's inputs and state, from those of its reads and final state.

        Args:
            marks: what `forward` left there.
            history: address of BLOCK * rank * rank numbers to work with.
        """
        like = _zeros(rank, dtype)
        _backward(like, inputs, d_reads, d_final, d_inputs, d_state, marks, history, sizes)

    return backward, (_INPUTS, _TENSOR, _TENSOR, _INPUTS, _TENSOR, _INT, _INT, _SIZES)


_RULE = types.UniTuple(_INT, 3)
_ADVANCE = (_FLAGS, _INT, _TENSOR, _FLAGS, _TENSOR, _TENSOR)


def _make_advance(rank, dtype):
    def advance(z, bias, state, mask, reads, final, writes, rule, sizes):
        """Activates, reads and writes; float32 only. See `ops.advance`.

        Args:
            z: address and strides of batch and token; the features lie side by side.
            bias: address.
            mask, writes: bytes, address and strides of batch and token; address 0: none given.
            rule: tied gates, gates per row (0 or 1), and the place of its update in `UPDATES`.
        """
        _advance(_zeros(rank, dtype), z, bias, state, mask, reads, final, writes, rule, sizes)

    return advance, (*_ADVANCE, _FLAGS, _RULE, _SIZES)


def _make_advance_segments(rank, dtype):
    def advance_segments(z, bias, state, mask, reads, final, segments, rule, sizes):
        """As `advance`; what is written is the segments' means. See `ops.advance_segments`.

        Args:
            segments: addresses of the new open sums, the old ones, and of the plan's index, member, ends,
                closes, open_before and stays_open, all contiguous.
        """
        _advance_segments(_zeros(rank, dtype), z, bias, state, mask, reads, final, segments, rule, sizes)

    return advance_segments, (*_ADVANCE, types.UniTuple(_INT, 8), _RULE, _SIZES)


# The arguments of one token's kernels are flat: to unpack tuples takes longer than such a kernel.
_LAYER = types.Array(_INT, 1, "C")
_TO = types.UniTuple(_INT, 4)


def _make_step(rank, dtype):
    def step(layer, scale, hidden, state, final, mask, by_mask, writes, by_writes, batch, add, to):
        """Projects, activates, reads, writes and corrects, one token a row; float32 only.

        Args:
            layer: what is the layer's: addresses of in_proj and gate_bias; tied, per_row and update, as in
                `advance`; states; numbers in a row of `hidden`; and of up to four heads the address of its
                delta and its size, 0 for one that is not there. In all FIXED + 8 numbers.
            scale: of the corrections.
            hidden, state, final: addresses of contiguous tensors.
            mask, writes: addresses of bytes, 0 if none are given; each with its stride from row to row.
            add: whether the first correction is added to what is there.
            to: addresses of the heads' corrections.
        """
        like = _zeros(rank, dtype)
        room, z, state_, reads, final_, rule, sizes = _one_token(like, layer, hidden, state, final, batch)
        mask_, writes_ = (mask, by_mask, 0), (writes, by_writes, 0)
        _advance(like, z, layer[1], state_, mask_, reads, final_, writes_, rule, sizes)
        _correct_all(like, layer, reads, batch, scale, add, to)
        room[0] = 0.0  # numba frees what is not used further down

    return step, (_LAYER, types.float64, *(_INT,) * 9, _TO)


def _make_step_segments(rank, dtype):
    def step_segments(
        layer, scale, hidden, state, final, mask, by_mask,
        new_sum, open_sum, index, member, ends, closes, open_before, stays_open,
        batch, add, to,
    ):  # fmt: skip
        """As `step`; what is written is the segments' means, as in `advance_segments`."""
        like = _zeros(rank, dtype)
        room, z, state_, reads, final_, rule, sizes = _one_token(like, layer, hidden, state, final, batch)
        segments = (new_sum, open_sum, index, member, ends, closes, open_before, stays_open)
        mask_ = (mask, by_mask, 0)
        _advance_segments(like, z, layer[1], state_, mask_, reads, final_, segments, rule, sizes)
        _correct_all(like, layer, reads, batch, scale, add, to)
        room[0] = 0.0

    return step_segments, (_LAYER, types.float64, *(_INT,) * 15, _TO)


def _make_plan_segments(_, dtype):
    def plan_segments(
        ids, writes, present, open_count, open_ids, keep_open,
        closes, index, member, ends, open_before, counts, stays_open, count_after, ids_after,
        keep, batch, tokens,
    ):  # fmt: skip
        """See `segments.plan`. All tensors are contiguous; given are their addresses.

        Args:
            ids, writes, present: 0 for None: all tokens have id 0, write, are present.
            keep_open: 0 for None: `keep` is for all rows.
            closes, …, ids_after: the plan's, in their order.
        """
        id_of, writes_, present_, keeps = _integers(ids), _bytes(writes), _bytes(present), _bytes(keep_open)
        member_, ends_, index_ = _bytes(member), _bytes(ends), _integers(index)
        for row in range(batch):
            before = _integers(open_count)[row]
            count = _floats(counts + 4 * row * (tokens + 1))
            here = 0  # the segment
            final = -1  # its last token so far
            anybody = False
            last_id = _integers(open_ids)[row] if before > 0 else -1
            closed = 0
            for segment in range(tokens + 1):
                count[segment] = 0.0
            count[0] = before
            for at in range(row * tokens, (row + 1) * tokens):
                is_present = present == 0 or present_[at] != 0
                id_here = 0 if ids == 0 else id_of[at]
                member_[at] = ends_[at] = 0
                if is_present and (writes == 0 or writes_[at] != 0):
                    anybody = True
                    if id_here != last_id:
                        if final >= 0:
                            ends_[final] = count[here] > 0
                        elif here == 0 and before > 0:
                            closed = 1
                            count[0] = 0.0
                        last_id = id_here
                        here += 1
                        final = -1
                    if last_id >= 0:
                        member_[at] = 1
                        count[here] += 1.0
                if is_present:
                    final = at
                index_[at] = here
            keeps_open = keep != 0 if keep_open == 0 else keeps[row] != 0
            if anybody and final >= 0 and not keeps_open:
                ends_[final] = count[here] > 0
            stays = not anybody or (keeps_open and last_id >= 0)
            _bytes(closes)[row], _bytes(stays_open)[row] = closed, stays
            _floats(open_before)[row] = before
            _integers(count_after)[row] = np.int64(count[here]) if stays else 0
            _integers(ids_after)[row] = last_id

    return plan_segments, (_INT,) * 18


_MAKERS = {
    "forward": _make_forward,
    "backward": _make_backward,
    "advance": _make_advance,
    "advance_segments": _make_advance_segments,
    "step": _make_step,
    "step_segments": _make_step_segments,
    "plan_segments": _make_plan_segments,
}
_compiled = {}
_compiling = threading.Lock()


def kernel(name, rank, dtype=np.float32):
    """A compiled function of `_MAKERS` for a rank (or so many lanes) and dtype."""
    key = name, rank, dtype
    if key not in _compiled:
        with _compiling:
            if key not in _compiled:
                _compiled[key] = _compile(*key)
    return _compiled[key]


def _compile(name, rank, dtype):
    function, arguments = _MAKERS[name](rank, dtype)
    # numba names the files of its cache after the function. Were they shared, two processes that
    # compile for two ranks at once could leave the code of one under the name of the other.
    function.__qualname__ = f"{name}_{rank}_{dtype.__name__}"
    types_of = types.void(*arguments)
    try:
        return njit(types_of, cache=True, **OPTIONS)(function)
    except Exception:  # nowhere to write, a full disk, a file cut short: compile for this process alone
        return njit(types_of, **OPTIONS)(function)
