"""The product in jnp."""

import jax
import jax.numpy as jnp

from pallas_kernels.parts import Parts


def product(x_TK: jax.Array, kernel_KN: jax.Array, bias_N: jax.Array | None = None) -> Parts:
    """See `api.matvec`."""
    y_TN = jnp.dot(x_TK, kernel_KN, preferred_element_type=jnp.float32)
    return Parts(y_TN[None], bias_EN=None if bias_N is None else bias_N[None])
