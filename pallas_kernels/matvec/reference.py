"""The product in jnp."""

import jax
import jax.numpy as jnp

from pallas_kernels.partial_sum import PartialSum


def product(x_TK: jax.Array, kernel_KN: jax.Array, bias_N: jax.Array | None = None) -> PartialSum:
    """See `api.matvec`."""
    y_TN = jnp.dot(x_TK, kernel_KN, preferred_element_type=jnp.float32)
    return PartialSum(y_TN[None], bias_EN=None if bias_N is None else bias_N[None])
