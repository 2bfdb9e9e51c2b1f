"""The products in jnp."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import same_bits
from pallas_kernels.formats.fragments import MXFP4Fragments
from pallas_kernels.formats.ggml.fragments import QuantizedFragments
from pallas_kernels.partial_sum import PartialSum


def product(
    x_TI: jax.Array, kernel: jax.Array, bias_O: jax.Array | None = None, *, transposed: bool = False
) -> PartialSum:
    """See `api.matvec`."""
    y_TO = (same_bits.head if transposed else same_bits.product)(x_TI, kernel)
    return PartialSum(y_TO[None], bias_EO=None if bias_O is None else bias_O[None])


def packed_product(
    x_TI: jax.Array, parts: Sequence[MXFP4Fragments | QuantizedFragments], bias_O: jax.Array | None = None
) -> PartialSum:
    """See `api.packed_matvec`."""
    kernel_OI = jnp.concatenate([part.dequantize(x_TI.dtype) for part in parts])
    return product(x_TI, kernel_OI.T, bias_O)
