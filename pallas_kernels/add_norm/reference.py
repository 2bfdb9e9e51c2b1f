"""A residual's sum and its norm in jnp, which XLA compiles."""

import jax
import jax.numpy as jnp

from pallas_kernels import same_bits
from pallas_kernels.partial_sum import PartialSum


def add_norm(
    x_TD: jax.Array,
    terms: PartialSum | None,
    scale_D: jax.Array,
    bias_D: jax.Array | None = None,
    *,
    epsilon: float,
    center: bool,
) -> tuple[jax.Array, jax.Array]:
    """See `api.add_norm`."""
    # In half precision this rounds twice, as transformers does, so that near-ties of a router fall the same way.
    sum_TD = x_TD if terms is None else x_TD + terms.total().astype(x_TD.dtype)
    y_TD = sum_TD.astype(jnp.float32)
    if center:
        y_TD -= same_bits.mean(y_TD)
    normed_TD = y_TD * same_bits.rsqrt(same_bits.mean(jnp.square(y_TD)) + epsilon)
    normed_TD *= scale_D.astype(jnp.float32)
    if bias_D is not None:
        normed_TD += bias_D.astype(jnp.float32)
    return sum_TD, normed_TD.astype(x_TD.dtype)
