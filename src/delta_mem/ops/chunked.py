"""The delta rule in chunks of tokens: pure PyTorch, any device, differentiable by autograd.

Row i of a state has its own gates, so each row s is a recurrence of its own; the rows of one state
share the keys. Token t adds u_t k_t to what the row keeps:

    s_t = keep_t s_{t-1} + u_t k_t,    u_t = write_t v_t − erase_t (s_{t-1} · k_t)

Let D[t, j] be the product of the keep gates after the write of token j and before the read of
token t, and D[t] the product of all gates of the chunk before the read of token t. With s_{t-1}
written out back to the start s_0 of the chunk,

    u_t + erase_t Σ_{j<t} D[t, j] (k_j · k_t) u_j = write_t v_t − erase_t D[t] (s_0 · k_t)

which is unit lower triangular in the chunk's u, and linear in s_0. So:

1. for all chunks at once, solve for u as a function of s_0: u = own − carried · s_0;
2. chunk after chunk, the one sequential part, find each chunk's s_0;
3. for all chunks at once, put s_0 into u and read
   m_t = D[t] (s_0 · q_t) + Σ_{j<t} D[t, j] (k_j · q_t) u_j.

Gates may be exactly 0 or 1, therefore D is multiplied up along its own tokens. A quotient of
running products would be 0 / 0, a difference of running log sums −∞ + ∞ (or, with a floor under
the gates, a wrong gradient at 0), and `cumprod` is several times slower to differentiate.

With `torch.backends.cuda.matmul.allow_tf32` the matrix products are as coarse as the user asked.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Work and memory grow with tokens × rank × CHUNK, the sequential steps with tokens / CHUNK. Time on
# a CPU, against 16: at rank 8 and one state 8 takes 2.5 times as long, 32 takes 1.1 times; at rank 64
# and four states 0.9 and 1.7 times.
CHUNK = 16

# The largest temporaries hold about this many numbers, however long the input and however large the
# batch. A CPU gains nothing from more; a GPU, where each operation costs a launch, wants more: at
# batch 8, four states and rank 16, 2^20 takes twice as long as 2^22 there.
BLOCK_CPU = 1 << 20
BLOCK_GPU = 1 << 22


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """See `delta_mem.ops.delta_rule`; inputs as `delta_mem.ops.BACKENDS` promises them."""
    batch, tokens, states, rank = q.shape
    block = BLOCK_CPU if q.device.type == "cpu" else BLOCK_GPU
    chunks = max(1, block // (batch * states * rank * CHUNK * CHUNK))
    reads = []
    for start in range(0, tokens, chunks * CHUNK):
        inputs = (x[:, start : start + chunks * CHUNK] for x in (q, k, v, keep, erase, write))
        read, state = _block(*inputs, state)
        reads.append(read)
    return torch.cat(reads, dim=1), state


def _block(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Steps 1 to 3 for one block of chunks. In the shapes below, lanes are batch × states."""
    batch, tokens, states, rank = q.shape
    lanes = batch * states
    padding = -tokens % CHUNK

    def by_token(x: Tensor, neutral: float = 0.0) -> Tensor:  # [chunks, lanes, CHUNK, rank]
        if padding:
            x = F.pad(x, (0, 0, 0, 0, 0, padding), value=neutral)
        x = x.reshape(batch, -1, CHUNK, states, rank).permute(1, 0, 3, 2, 4)
        return x.reshape(-1, lanes, CHUNK, rank)

    def by_row(x: Tensor, neutral: float = 0.0) -> Tensor:  # [chunks, lanes, rank, CHUNK]
        return by_token(x, neutral).mT.contiguous()

    q, k = by_token(q), by_token(k)
    v, keep, erase, write = by_row(v), by_row(keep, neutral=1.0), by_row(erase), by_row(write)
    decay, decay_from_start, decay_to_end, kept = _decays(keep)

    # Step 1. What u needs of s_0: the row itself (rank numbers), or, where that is less, its
    # products with the chunk's keys (CHUNK numbers).
    fold = rank < CHUNK
    basis = k.mT.unsqueeze(2) if fold else torch.eye(CHUNK, dtype=k.dtype, device=k.device)
    coupling = decay * (k @ k.mT).unsqueeze(2) * erase.unsqueeze(-1)
    own = (write * v).unsqueeze(-2)
    carried = (erase * decay_from_start).unsqueeze(-2) * basis
    solved = torch.linalg.solve_triangular(
        coupling, torch.cat([own, carried], dim=-2).mT, upper=False, unitriangular=True
    )  # [chunks, lanes, rank, CHUNK, 1 + (rank or CHUNK)]
    own, carried = solved[..., :1], solved[..., 1:]

    # Step 2.
    left = solved * decay_to_end.unsqueeze(-1)
    scan = _scan_folded if fold else _scan_factored
    starts, state = scan(left, k, kept, state.reshape(lanes, rank, rank))

    # Step 3.
    seen = starts if fold else starts @ k.mT
    u = own - carried @ seen.unsqueeze(-1)
    lookup = decay * (q @ k.mT).unsqueeze(2)
    reads = decay_from_start * (starts @ q.mT) + (lookup @ u).squeeze(-1)

    reads = reads.reshape(-1, batch, states, rank, CHUNK).permute(1, 0, 4, 2, 3)
    reads = reads.reshape(batch, -1, states, rank)[:, :tokens]
    return reads, state.reshape(batch, states, rank, rank)


def _decays(keep: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products of keep gates [..., CHUNK] between any two points of a chunk.

    Returns:
        D[t, j] [..., CHUNK, CHUNK]: from the write of token j to the read of token t; 0 for j ≥ t.
        D[t] [..., CHUNK]: from the start of the chunk to the read of token t.
        [..., CHUNK]: from the write of token j to the end of the chunk.
        [..., 1]: over the whole chunk.
    """
    fresh = torch.eye(CHUNK, dtype=keep.dtype, device=keep.device)
    since_write, since_start = torch.zeros_like(keep), torch.ones_like(keep[..., :1])
    writes, starts = [], []
    for t, keep_t in enumerate(keep.split(1, dim=-1)):
        writes.append(since_write)
        starts.append(since_start)
        since_write = torch.addcmul(fresh[t], since_write, keep_t)
        since_start = since_start * keep_t
    return torch.stack(writes, dim=-2), torch.cat(starts, dim=-1), since_write, since_start


def _scan_folded(left: Tensor, k: Tensor, kept: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The states at the chunks' starts; each chunk is folded into one affine map per row.

    One small product per chunk, but the maps take rank³ numbers: for low ranks only.

    Args:
        left: [chunks, lanes, rank, CHUNK, 1 + rank]: what is left of u at the end of its chunk,
            first u's own part, then the part that s_0 carries.
        k: [chunks, lanes, CHUNK, rank].
        kept: [chunks, lanes, rank, 1], the product of the chunk's keep gates.
        state: [lanes, rank, rank].

    Returns:
        [chunks, lanes, rank, rank], and the state after the last chunk.
    """
    rank = k.shape[-1]
    folded = (left.mT.flatten(2, 3) @ k).unflatten(2, (rank, 1 + rank)).flatten(1, 2)
    kept = torch.diag_embed(kept.expand(-1, -1, -1, rank)).flatten(1, 2)
    offsets, maps = folded[:, :, :1], kept - folded[:, :, 1:]
    row = state.reshape(-1, 1, rank)
    starts = []
    for offset_c, map_c in zip(offsets, maps, strict=True):
        starts.append(row)
        row = torch.baddbmm(offset_c, row, map_c)
    return torch.stack(starts).unflatten(1, (-1, rank)).squeeze(-2), row.reshape(state.shape)


def _scan_factored(left: Tensor, k: Tensor, kept: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """As `_scan_folded` for high ranks: left is [chunks, lanes, rank, CHUNK, 1 + CHUNK], where
    the carried part applies to s_0's products with the keys. Three small products per chunk.
    """
    own, carried = left[..., :1].flatten(1, 2), left[..., 1:].flatten(1, 2)
    starts = []
    for own_c, carried_c, k_c, kept_c in zip(own, carried, k, kept, strict=True):
        starts.append(state)
        recalled = (state @ k_c.mT).view(-1, CHUNK, 1)
        u = torch.baddbmm(own_c, carried_c, recalled, alpha=-1).view(*state.shape[:2], CHUNK)
        state = torch.baddbmm(kept_c * state, u, k_c)
    return torch.stack(starts), state
