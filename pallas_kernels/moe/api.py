"""A mixture of experts: each token goes through a few of many feed-forward networks."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.moe import reference
from pallas_kernels.mxfp4 import MXFP4


def moe(
    x_TD: jax.Array,
    experts_TX: jax.Array,
    weights_TX: jax.Array,
    gate_up: jax.Array | MXFP4,
    gate_up_bias_E2F: jax.Array,
    down: jax.Array | MXFP4,
    down_bias_ED: jax.Array,
    *,
    alpha: float,
    limit: float,
    implementation: str = dispatch.AUTO,
) -> jax.Array:
    """The weighted sum of the chosen experts' clamped SwiGLU networks.

    Means, for token t, with e = experts[t, x]:

        h       = gate_up[e] · x[t] + gate_up_bias[e]
        gate    = minimum(h[0::2], limit)
        up      = clip(h[1::2], -limit, limit)
        y[t, x] = down[e] · (gate * sigmoid(alpha * gate) * (up + 1)) + down_bias[e]
        out[t]  = Σ_x weights[t, x] * y[t, x]

    Args:
      x_TD: one row a token. Its dtype is what the products' operands are rounded to; they accumulate in float32.
      experts_TX: int32 numbers of the chosen experts. One that there is not, such as E or -1, adds nothing, and costs
        little: so padding is marked.
      weights_TX: float32.
      gate_up: [E, D, 2F], gate and up interleaved; or packed, [E, 2F, D].
      down: [E, F, D]; or packed, [E, D, F].
      gate_up_bias_E2F, down_bias_ED: of any floating dtype.
      alpha, limit: of the activation.
      implementation: "auto" or "xla".

    Returns:
      [T, D] float32. A token's bits do not depend on the others, for a given T.

    Raises:
      ValueError: an unknown implementation.
    """
    run = dispatch.choose("moe", implementation, {"xla": reference.grouped})
    return run(x_TD, experts_TX, weights_TX, gate_up, gate_up_bias_E2F, down, down_bias_ED, alpha=alpha, limit=limit)
