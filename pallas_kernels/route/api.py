"""Which experts a token goes to, and with what weights."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.route import reference


def route(
    x_TD: jax.Array,
    router_DE: jax.Array,
    bias_E: jax.Array,
    *,
    top: int,
    implementation: str = dispatch.AUTO,
) -> tuple[jax.Array, jax.Array]:
    """The `top` experts of each token and the softmax over their logits.

    Means:

        logits  = (x · router + bias), accumulated in float32, rounded to x's dtype
        experts = the numbers of the `top` largest logits, falling; of equals, the lower number first
        weights = softmax(logits[experts]), in float32

    Args:
      x_TD: one row a token.
      router_DE, bias_E: of any floating dtype; the router is rounded to x's.
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

        if mosaic.supports(x_TD, router_DE, bias_E, top=top):
            available[dispatch.MOSAIC] = mosaic.route
    return dispatch.choose("route", implementation, available)(x_TD, router_DE, bias_E, top=top)
