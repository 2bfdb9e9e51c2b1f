"""Attention in float64 NumPy, one query at a time: the oracle of `pallas_kernels.attention`.

Keys that a query may not see are left out of the sums altogether, so that whatever lies there cannot matter.
"""

import numpy as np


def attention(
    q_BTNH: np.ndarray,
    k_BKSH: np.ndarray,
    v_BKSH: np.ndarray,
    q_positions_BT: np.ndarray,
    k_positions_BS: np.ndarray,
    *,
    scale: float,
) -> np.ndarray:
    """Causal attention with grouped queries, [B, T, N, H]. A query sees positions 0 to its own; seeing none gives 0."""
    q_BTNH, k_BKSH, v_BKSH = (np.asarray(x, np.float64) for x in (q_BTNH, k_BKSH, v_BKSH))
    group = q_BTNH.shape[2] // k_BKSH.shape[1]
    out_BTNH = np.zeros(q_BTNH.shape)
    for b, t in np.ndindex(q_positions_BT.shape):
        seen = [s for s, position in enumerate(k_positions_BS[b]) if 0 <= position <= q_positions_BT[b, t]]
        if not seen:
            continue
        for n in range(q_BTNH.shape[2]):
            scores = k_BKSH[b, n // group, seen] @ q_BTNH[b, t, n] * scale
            weights = np.exp(scores - scores.max())
            out_BTNH[b, t, n] = weights / weights.sum() @ v_BKSH[b, n // group, seen]
    return out_BTNH
