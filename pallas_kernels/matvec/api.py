"""A few rows times a matrix: most of decoding's work, bound by reading the matrix."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.matvec import reference
from pallas_kernels.partial_sum import PartialSum

FEW = 64  # rows at most: larger products are bound by arithmetic, where XLA's own are good
# Rows up to which a kernel was measured faster than XLA's own product, on an H200 (Triton: at one row).
_FASTER = {dispatch.MOSAIC: 8, dispatch.TRITON: 4}


def matvec(
    x_TI: jax.Array, kernel_IO: jax.Array, bias_O: jax.Array | None = None, *, implementation: str = dispatch.AUTO
) -> PartialSum:
    """x · kernel + bias, accumulated in float32.

    Args:
      x_TI: one row per token, up to `FEW` rows.
      kernel_IO: of x's dtype.
      bias_O: of any floating dtype.
      implementation: "auto", "mosaic" (bfloat16, I and O multiples of 64), "triton" (bfloat16, float16 or float32) or
        "xla".

    Returns:
      [T, O] float32. Whoever reads it adds up the parts of I, and the bias. A row's bits do not depend on the others,
      for a given T.

    Raises:
      ValueError: an unknown implementation, one that does not support these operands, or too many rows.
    """
    if x_TI.shape[0] > FEW:
        raise ValueError(f"matvec takes up to {FEW} rows, found {x_TI.shape[0]}: use a product of matrices")
    available = {dispatch.XLA: reference.product}
    T, outputs = x_TI.shape[0], kernel_IO.shape[1]
    wanted = dispatch.wanted(implementation) if x_TI.dtype == kernel_IO.dtype else dispatch.XLA
    # If rows are not multiples of 16 bytes, the Triton kernel would load number by number.
    if implementation == dispatch.AUTO and (_FASTER.get(wanted, 0) < T or outputs % 8):
        wanted = dispatch.XLA
    fits = x_TI.dtype == jnp.bfloat16 and not any(size % 64 for size in kernel_IO.shape)
    if wanted == dispatch.MOSAIC and fits:
        from pallas_kernels.matvec import mosaic_sm90

        available[dispatch.MOSAIC] = mosaic_sm90.product
    if wanted == dispatch.TRITON:
        from pallas_kernels.matvec import triton

        if x_TI.dtype in triton.DTYPES:
            available[dispatch.TRITON] = triton.product
    return dispatch.choose("matvec", implementation, available)(x_TI, kernel_IO, bias_O)
