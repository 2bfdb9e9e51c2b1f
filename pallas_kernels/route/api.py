"""Which experts a token goes to, and with what weights, of the norm of what is still being summed."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.route import reference


def norm_route(
    x_TD: jax.Array,
    terms: PartialSum | None,
    scale_D: jax.Array,
    bias_D: jax.Array | None = None,
    *,
    epsilon: float,
    center: bool,
    router_DE: jax.Array,
    router_bias_E: jax.Array,
    positions_T: jax.Array,
    top: int,
    implementation: str = dispatch.AUTO,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`add_norm`, and of its norm the `top` experts of each token and the softmax over their logits.

    Means, with the sum and the norm as `add_norm` has them:

        logits  = (normed · router + router_bias), accumulated in float32, rounded to x's dtype
        experts = the numbers of the `top` largest logits, falling; of equals, the lower number first
        weights = softmax(logits[experts]), in float32
        experts = -1 where positions < 0

    Args:
      x_TD, terms, scale_D, bias_D, epsilon, center: see `add_norm`.
      router_DE, router_bias_E: of any floating dtype; the router is rounded to x's.
      positions_T: int32; a token at a negative one is padding, which has no experts, and any weights.
      top: how many experts, 1 to E.
      implementation: "auto", "mosaic" (bfloat16, up to 128 rows, on Hopper) or "xla".

    Returns:
      The sum and the norm, [T, D] of x's dtype; int32 numbers of experts and their float32 weights, [T, top].

    Raises:
      ValueError: an unknown implementation, or one that does not take these operands.
    """
    operands = (x_TD, terms, scale_D, bias_D, router_DE, router_bias_E, positions_T)
    available = {dispatch.XLA: reference.norm_route}
    if dispatch.wanted(implementation) == dispatch.MOSAIC:
        from pallas_kernels.route import mosaic_sm90

        if mosaic_sm90.supports(*operands, top=top):
            available[dispatch.MOSAIC] = mosaic_sm90.norm_route
    run = dispatch.choose("norm_route", implementation, available)
    return run(*operands, epsilon=epsilon, center=center, top=top)
