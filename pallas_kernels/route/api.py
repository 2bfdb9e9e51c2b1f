"""The residual sum, its norm, and the routing of the norm to experts, in one operation."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.matmul import matmul
from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.peers import Peers, exchanged_or_gathered
from pallas_kernels.route import reference


def norm_route(
    x_TD: jax.Array,
    terms: PartialSum | None,
    scale_D: jax.Array,
    *,
    epsilon: float,
    router_DE: jax.Array,
    router_bias_E: jax.Array,
    positions_T: jax.Array,
    top: int,
    peers: Peers | None = None,
    implementation: str = dispatch.AUTO,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`add_norm` with RMSNorm, then each token's `top` experts by the norm, and the softmax over their logits.

    Means, with the sum and the norm as in `add_norm`:

        logits  = (normed · router + router_bias), accumulated in float32, rounded to x's dtype
        experts = the numbers of the `top` largest logits, in descending order; among equals, the lower number first
        weights = softmax(logits[experts]), in float32
        experts = -1 where positions < 0

    Args:
      x_TD, terms, scale_D, epsilon, peers: see `add_norm`.
      router_DE, router_bias_E: of any floating dtype; the router is rounded to x's.
      positions_T: int32; a token at a negative position is padding: it has no experts, and its weights are undefined.
      top: how many experts, 1 to E.
      implementation: "auto", "mosaic" (bfloat16, on Hopper; beyond 128 rows the sum and the norm are XLA's) or "xla".

    Returns:
      The sum and the norm, [T, D] of x's dtype; int32 experts and their float32 weights, [T, top]. By "mosaic", a
      token's bits depend neither on the others nor on T.

    Raises:
      ValueError: an unknown implementation, or one that does not support these operands.
    """
    on_hopper = dispatch.wanted(implementation) == dispatch.MOSAIC
    terms = exchanged_or_gathered(terms, peers) if on_hopper else terms
    operands = (x_TD, terms, scale_D, router_DE, router_bias_E, positions_T)
    available: dict[str, Callable[..., tuple[jax.Array, ...]]] = {dispatch.XLA: reference.norm_route}
    if on_hopper:
        from pallas_kernels.ptx.rows import MOST_ROWS
        from pallas_kernels.route import many_sm90, mosaic_sm90

        if mosaic_sm90.supports(*operands, top=top):
            available[dispatch.MOSAIC] = partial(mosaic_sm90.norm_route, peers=peers)
        elif x_TD.shape[0] > MOST_ROWS and many_sm90.supports(x_TD, router_bias_E, positions_T, top=top):
            available[dispatch.MOSAIC] = many_sm90.norm_route
        elif x_TD.shape[0] > MOST_ROWS and x_TD.dtype == jnp.bfloat16 and x_TD.shape[1] % 64 == 0:
            multiply = partial(matmul, implementation=dispatch.MOSAIC)
            available[dispatch.MOSAIC] = partial(reference.norm_route, multiply=multiply)
    run = dispatch.choose("norm_route", implementation, available)
    sum_TD, normed_TD, experts_TX, weights_TX = run(*operands, epsilon=epsilon, top=top)
    return sum_TD, normed_TD, experts_TX, weights_TX
