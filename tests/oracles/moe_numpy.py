"""The mixture of experts in float64 NumPy, one token and one expert at a time: the oracle of `pallas_kernels.moe`."""

import numpy as np


def moe(
    x_TD: np.ndarray,
    experts_TX: np.ndarray,
    weights_TX: np.ndarray,
    gate_up_EDI: np.ndarray,
    gate_up_bias_EI: np.ndarray,
    down_EFD: np.ndarray,
    down_bias_ED: np.ndarray,
    *,
    alpha: float,
    limit: float,
) -> np.ndarray:
    """[T, D]. I is 2F: gate and up, interleaved. Experts that there are not add nothing."""
    x_TD, weights_TX, gate_up_EDI, gate_up_bias_EI, down_EFD, down_bias_ED = (
        np.asarray(array, np.float64)
        for array in (x_TD, weights_TX, gate_up_EDI, gate_up_bias_EI, down_EFD, down_bias_ED)
    )
    out_TD = np.zeros(x_TD.shape)
    for t, x in np.ndindex(experts_TX.shape):
        expert = experts_TX[t, x]
        if not 0 <= expert < len(down_EFD):
            continue
        hidden = x_TD[t] @ gate_up_EDI[expert] + gate_up_bias_EI[expert]
        gate, up = np.minimum(hidden[::2], limit), np.clip(hidden[1::2], -limit, limit)
        activation = gate / (1 + np.exp(-alpha * gate)) * (up + 1)
        out_TD[t] += weights_TX[t, x] * (activation @ down_EFD[expert] + down_bias_ED[expert])
    return out_TD
