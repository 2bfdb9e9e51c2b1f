"""Where one half of a transformer's block ends and the next begins: adding to the residual, and the norm of the sum."""

from collections.abc import Callable
from functools import partial

import jax

from pallas_kernels import dispatch
from pallas_kernels.add_norm import reference
from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.peers import Peers, exchanged_or_gathered


def add_norm(
    x_TD: jax.Array,
    terms: PartialSum | None,
    scale_D: jax.Array,
    bias_D: jax.Array | None = None,
    *,
    epsilon: float,
    center: bool,
    peers: Peers | None = None,
    implementation: str = dispatch.AUTO,
) -> tuple[jax.Array, jax.Array]:
    """x + terms, and the norm of that.

    Means, in float32:

        sum    = (x + terms.total()), rounded to x's dtype (by "xla", terms.total() is rounded first)
        y      = sum - mean(sum) if center else sum
        normed = (y / sqrt(mean(y²) + epsilon) * scale + bias), rounded to x's dtype

    Args:
      x_TD: one row per token.
      terms: what to add; if None, the sum is x itself.
      scale_D, bias_D: of any floating dtype; the bias may be missing.
      epsilon: added to the mean of squares.
      center: True for LayerNorm, which subtracts the mean; False for RMSNorm.
      peers: how kernels add up terms over the devices of a mesh; None: XLA does.
      implementation: "auto", "mosaic" (bfloat16, on Hopper; beyond 128 rows only terms with rows of their own) or
        "xla".

    Returns:
      The sum and the norm, [T, D] of x's dtype. A token's bits do not depend on the others, for a given T; by "mosaic",
      for any.

    Raises:
      ValueError: an unknown implementation, or one that does not support these operands.
    """
    available: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {dispatch.XLA: reference.add_norm}
    if dispatch.wanted(implementation) == dispatch.MOSAIC:
        from pallas_kernels.add_norm import mosaic_sm90

        terms = exchanged_or_gathered(terms, peers)
        if mosaic_sm90.supports(x_TD, terms, scale_D, bias_D):
            available[dispatch.MOSAIC] = partial(mosaic_sm90.add_norm, peers=peers)
    run = dispatch.choose("add_norm", implementation, available)
    return run(x_TD, terms, scale_D, bias_D, epsilon=epsilon, center=center)
