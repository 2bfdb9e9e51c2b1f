"""A residual's sum and its norm in jnp, which XLA compiles."""

import jax
import jax.numpy as jnp

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
        y_TD -= y_TD.mean(axis=-1, keepdims=True)
    normed_TD = y_TD * jax.lax.rsqrt(jnp.square(y_TD).mean(axis=-1, keepdims=True) + epsilon)
    normed_TD *= scale_D.astype(jnp.float32)
    if bias_D is not None:
        normed_TD += bias_D.astype(jnp.float32)
    return sum_TD, normed_TD.astype(x_TD.dtype)
