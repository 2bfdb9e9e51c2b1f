"""The choice of experts in jnp, which XLA compiles."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import same_bits
from pallas_kernels.add_norm.reference import add_norm
from pallas_kernels.partial_sum import PartialSum


def choose(
    logits_TE: jax.Array, bias_E: jax.Array, positions_T: jax.Array, *, top: int, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """The experts and their weights, by logits without the bias: see `api.norm_route`, whose x is of `dtype`."""
    logits_TE = (logits_TE + bias_E.astype(jnp.float32)).astype(dtype)
    chosen_TX, experts_TX = jax.lax.top_k(logits_TE.astype(jnp.float32), top)
    return jnp.where(positions_T[:, None] < 0, -1, experts_TX), same_bits.softmax(chosen_TX)


def norm_route(
    x_TD: jax.Array,
    terms: PartialSum | None,
    scale_D: jax.Array,
    router_DE: jax.Array,
    router_bias_E: jax.Array,
    positions_T: jax.Array,
    *,
    epsilon: float,
    top: int,
    multiply: Callable[[jax.Array, jax.Array], jax.Array] = same_bits.product,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See `api.norm_route`. `multiply` is what computes the logits."""
    sum_TD, normed_TD = add_norm(x_TD, terms, scale_D, epsilon=epsilon, center=False)
    logits_TE = multiply(normed_TD, router_DE.astype(x_TD.dtype))
    return sum_TD, normed_TD, *choose(logits_TE, router_bias_E, positions_T, top=top, dtype=x_TD.dtype)
