"""The delta rule as it is defined: one token after the other.

Every other backend computes the same function faster and is tested against this one.
"""

import torch
from torch import Tensor


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """See `delta_mem.ops.delta_rule`; inputs as `delta_mem.ops.BACKENDS` promises them."""
    # Vectors become columns [batch, states, rank, 1], so that the lines below read as in the paper.
    tokens = zip(*(x.unsqueeze(-1).unbind(1) for x in (q, k, v, keep, erase, write)), strict=True)
    reads = []
    for q_t, k_t, v_t, keep_t, erase_t, write_t in tokens:
        reads.append(state @ q_t)  # m_t = S_{t-1} q_t, before the write
        recalled = state @ k_t  # S_{t-1} k_t
        # S_t = diag(keep) S_{t-1} − diag(erase) (S_{t-1} k_t) k_tᵀ + diag(write) v_t k_tᵀ
        state = keep_t * state + (write_t * v_t - erase_t * recalled) * k_t.mT
    return torch.stack(reads, dim=1).squeeze(-1), state
