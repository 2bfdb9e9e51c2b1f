"""Many rows times a matrix: the work of prompts, bound by arithmetic."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.matmul import reference


def matmul(x_TI: jax.Array, kernel_IO: jax.Array, *, implementation: str = dispatch.AUTO) -> jax.Array:
    """x · kernel, accumulated in float32.

    Args:
      x_TI: one row per token.
      kernel_IO: of x's dtype.
      implementation: "auto", "mosaic" (bfloat16, I and O multiples of 64) or "xla".

    Returns:
      [T, O] float32. A row's bits do not depend on the others; nor on T, with "mosaic", or with "xla" on a CPU in
      float32. They differ from those of `matvec`.

    Raises:
      ValueError: an unknown implementation, or one that does not support these operands.
    """
    available = {dispatch.XLA: reference.product}
    fits = x_TI.dtype == kernel_IO.dtype == jnp.bfloat16 and not any(size % 64 for size in kernel_IO.shape)
    if dispatch.wanted(implementation) == dispatch.MOSAIC and fits:
        from pallas_kernels.matmul import mosaic_sm90

        available[dispatch.MOSAIC] = mosaic_sm90.product
    return dispatch.choose("matmul", implementation, available)(x_TI, kernel_IO)
