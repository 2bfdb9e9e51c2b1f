"""The product in jnp."""

import jax
import jax.numpy as jnp

from pallas_kernels.partial_sum import PartialSum


def product(x_TI: jax.Array, kernel_IO: jax.Array, bias_O: jax.Array | None = None) -> PartialSum:
    """See `api.matvec`."""
    y_TO = jnp.dot(x_TI, kernel_IO, preferred_element_type=jnp.float32)
    return PartialSum(y_TO[None], bias_EO=None if bias_O is None else bias_O[None])
