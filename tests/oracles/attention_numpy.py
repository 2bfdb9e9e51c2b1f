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
    sinks_N: np.ndarray | None = None,
    *,
    scale: float,
    window: int | None = None,
) -> np.ndarray:
    """Causal attention with grouped queries, [B, T, N, H].

    A query sees positions up to its own, `window` of them; seeing none gives 0. A sink is a score with the value 0.
    """
    q_BTNH, k_BKSH, v_BKSH = (np.asarray(x, np.float64) for x in (q_BTNH, k_BKSH, v_BKSH))
    group = q_BTNH.shape[2] // k_BKSH.shape[1]
    out_BTNH = np.zeros(q_BTNH.shape)
    for b, t in np.ndindex(q_positions_BT.shape):
        last = q_positions_BT[b, t]
        first = 0 if window is None else max(0, last - window + 1)
        seen = [s for s, position in enumerate(k_positions_BS[b]) if first <= position <= last]
        if not seen:
            continue
        for n in range(q_BTNH.shape[2]):
            scores = k_BKSH[b, n // group, seen] @ q_BTNH[b, t, n] * scale
            sink = np.empty(0) if sinks_N is None else np.asarray(sinks_N, np.float64)[n : n + 1]
            weights = np.exp(scores - max([*scores, *sink]))
            total = weights.sum() + np.exp(sink - max([*scores, *sink])).sum()
            out_BTNH[b, t, n] = weights / total @ v_BKSH[b, n // group, seen]
    return out_BTNH
