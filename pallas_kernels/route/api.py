"""Which experts a token goes to, and with what weights: of rows, or of the norm of what is still being summed."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.parts import Parts
from pallas_kernels.route import reference


def route(
    x_TD: jax.Array,
    router_DE: jax.Array,
    bias_E: jax.Array,
    positions_T: jax.Array,
    *,
    top: int,
    implementation: str = dispatch.AUTO,
) -> tuple[jax.Array, jax.Array]:
    """The `top` experts of each token and the softmax over their logits.

    Means:

        logits  = (x · router + bias), accumulated in float32, rounded to x's dtype
        experts = the numbers of the `top` largest logits, falling; of equals, the lower number first
        weights = softmax(logits[experts]), in float32
        experts = -1 where positions < 0

    Args:
      x_TD: one row a token.
      router_DE, bias_E: of any floating dtype; the router is rounded to x's.
      positions_T: int32; a token at a negative one is padding, which has no experts, and any weights.
      top: how many experts, 1 to E.
      implementation: "auto", "mosaic" (bfloat16, up to 128 rows, on Hopper) or "xla".

    Returns:
      int32 numbers of experts [T, top] and float32 weights [T, top].

    Raises:
      ValueError: an unknown implementation, or one that does not take these operands.
    """
    available = {dispatch.XLA: reference.route}
    if dispatch.wanted(implementation) == dispatch.MOSAIC:
        from pallas_kernels.route import mosaic

        if mosaic.supports(x_TD, router_DE, bias_E, positions_T, top=top):
            available[dispatch.MOSAIC] = mosaic.route
    return dispatch.choose("route", implementation, available)(x_TD, router_DE, bias_E, positions_T, top=top)


def norm_route(
    x_TD: jax.Array,
    terms: Parts | None,
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
    """`add_norm`, and the `route` of the norm, in one.

    Returns:
      The sum and the norm, [T, D] of x's dtype; int32 numbers of experts and their float32 weights, [T, top].

    Raises:
      ValueError: an unknown implementation, or one that does not take these operands.
    """
    operands = (x_TD, terms, scale_D, bias_D, router_DE, router_bias_E, positions_T)
    available = {dispatch.XLA: reference.norm_route}
    if dispatch.wanted(implementation) == dispatch.MOSAIC:
        from pallas_kernels.route import mosaic

        if mosaic.supports_norm(*operands, top=top):
            available[dispatch.MOSAIC] = mosaic.norm_route
    run = dispatch.choose("norm_route", implementation, available)
    return run(*operands, epsilon=epsilon, center=center, top=top)
