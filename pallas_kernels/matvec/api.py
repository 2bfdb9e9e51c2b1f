"""A few rows times a matrix: most of decoding's work, bound by reading the matrix."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.formats import fragments
from pallas_kernels.formats.fragments import TILE, MXFP4Fragments
from pallas_kernels.formats.ggml import fragments as ggml_fragments
from pallas_kernels.formats.ggml.fragments import QuantizedFragments
from pallas_kernels.formats.ggml.weight import Quantized
from pallas_kernels.formats.mxfp4 import MXFP4
from pallas_kernels.matvec import reference
from pallas_kernels.matvec.row_norm import RowNorm
from pallas_kernels.partial_sum import PartialSum

FEW = 128  # rows at most: the sums of more would not fit in the registers
PACKED_FEW = 64  # and with a packed matrix
_TRITON_FASTER = 4  # rows up to which "auto" takes the Triton kernel (measured at one row, on an H200)
_AT_ONCE = 1 << 24  # numbers that are repacked at a time: the intermediate values are eight times as large

Fragments = MXFP4Fragments | QuantizedFragments


def matvec(
    x_TI: jax.Array,
    kernel: jax.Array,
    bias_O: jax.Array | None = None,
    *,
    transposed: bool = False,
    implementation: str = dispatch.AUTO,
) -> PartialSum:
    """x · kernel + bias, accumulated in float32.

    Args:
      x_TI: one row per token, up to `FEW` rows.
      kernel: [I, O], of x's dtype.
      bias_O: of any floating dtype.
      transposed: whether the kernel is [O, I], as the head's is.
      implementation: "auto", "mosaic" (bfloat16, I and O multiples of 64; transposed, O any number), "triton"
        (bfloat16, float16 or float32, not transposed) or "xla".

    Returns:
      [T, O] float32. Whoever reads it adds up the parts of I, and the bias. A row's bits do not depend on the others;
      nor on T, with "mosaic", or with "xla" on a CPU in float32.

    Raises:
      ValueError: an unknown implementation, one that does not support these operands, or too many rows.
    """
    if x_TI.shape[0] > FEW:
        raise ValueError(f"matvec takes up to {FEW} rows, found {x_TI.shape[0]}: use a product of matrices")
    available: dict[str, Callable[..., PartialSum]] = {dispatch.XLA: partial(reference.product, transposed=transposed)}
    T, outputs = x_TI.shape[0], kernel.shape[0 if transposed else 1]
    wanted = dispatch.wanted(implementation) if x_TI.dtype == kernel.dtype else dispatch.XLA
    if wanted == dispatch.MOSAIC and x_TI.dtype == jnp.bfloat16:
        from pallas_kernels.matvec import mosaic_sm90

        if mosaic_sm90.takes(x_TI.shape[1], outputs, transposed):
            available[dispatch.MOSAIC] = partial(mosaic_sm90.product, transposed=transposed)
    # If rows are not multiples of 16 bytes, the Triton kernel would load number by number.
    is_faster = T <= _TRITON_FASTER and outputs % 8 == 0
    if wanted == dispatch.TRITON and not transposed and (implementation != dispatch.AUTO or is_faster):
        from pallas_kernels.matvec import triton

        if x_TI.dtype in triton.DTYPES:
            available[dispatch.TRITON] = triton.product
    return dispatch.choose("matvec", implementation, available)(x_TI, kernel, bias_O)


def packed_matvec(
    x_TI: jax.Array,
    parts: Sequence[Fragments],
    bias_O: jax.Array | None = None,
    *,
    implementation: str = dispatch.AUTO,
) -> PartialSum:
    """x · matrixᵀ + bias, of a packed matrix [O, I], accumulated in float32.

    Args:
      x_TI: one row per token, up to `PACKED_FEW` rows.
      parts: the matrix's rows, repacked; several if they are of different types.
      bias_O: of any floating dtype.
      implementation: "auto", "mosaic" (bfloat16) or "xla".

    Returns:
      [T, O] float32. Whoever reads it adds up the parts of I, and the bias. A row's bits do not depend on the others,
      nor on T unless that is 1.

    Raises:
      ValueError: an unknown implementation, one that does not support these operands, or too many rows.
    """
    if x_TI.shape[0] > PACKED_FEW:
        raise ValueError(
            f"packed_matvec takes up to {PACKED_FEW} rows, found {x_TI.shape[0]}: use a product of matrices"
        )
    available = {dispatch.XLA: reference.packed_product}
    if dispatch.wanted(implementation) == dispatch.MOSAIC and x_TI.dtype == jnp.bfloat16:
        from pallas_kernels.matvec import packed_sm90

        available[dispatch.MOSAIC] = packed_sm90.product
    return dispatch.choose("packed_matvec", implementation, available)(x_TI, parts, bias_O)


def takes_gated(x_TI: jax.Array, parts: Sequence[Fragments], *, implementation: str = dispatch.AUTO) -> bool:
    """Whether `packed_gated` has a kernel for these operands: Hopper, a single row of bfloat16."""
    if dispatch.wanted(implementation) != dispatch.MOSAIC or x_TI.dtype != jnp.bfloat16:
        return False
    from pallas_kernels.matvec import row_sm90

    return row_sm90.takes_gated(x_TI, parts)


def packed_gated(x_TI: jax.Array, parts: Sequence[Fragments]) -> jax.Array:
    """silu(x · gateᵀ) · (x · upᵀ), of packed matrices [F, I], if `takes_gated` them.

    Both products are rounded to bfloat16 first, as `packed_matvec`'s users do.

    Args:
      x_TI: one row.
      parts: gate and up; or one matrix whose rows are those of gate and then those of up.

    Returns:
      [T, F] bfloat16.
    """
    from pallas_kernels.matvec import row_sm90

    return row_sm90.gated(x_TI, parts)


def takes_normed(norm: RowNorm, parts: Sequence[Fragments], *, implementation: str = dispatch.AUTO) -> bool:
    """Whether `normed_matvec` has a kernel for these operands: Hopper, a row of bfloat16, and a matrix of one type."""
    if dispatch.wanted(implementation) != dispatch.MOSAIC or norm.x.dtype != jnp.bfloat16:
        return False
    from pallas_kernels.matvec import row_sm90

    return row_sm90.takes_normed(norm, parts)


def normed_matvec(
    norm: RowNorm, parts: Sequence[Fragments], bias_O: jax.Array | None = None
) -> tuple[jax.Array, PartialSum]:
    """The sum that a norm is of, and the norm · matrixᵀ + bias, if `takes_normed` them.

    Bit by bit what `add_norm` (by "mosaic") and `packed_matvec` return; the sum has the shape of x.
    """
    from pallas_kernels.matvec import row_sm90

    total, parts_1TO = row_sm90.normed_product(norm, parts)
    return total, PartialSum(parts_1TO, bias_EO=None if bias_O is None else bias_O[None])


def takes_normed_gated(norm: RowNorm, parts: Sequence[Fragments], *, implementation: str = dispatch.AUTO) -> bool:
    """Whether `normed_gated` has a kernel for these operands: see `takes_normed` and `takes_gated`."""
    if dispatch.wanted(implementation) != dispatch.MOSAIC or norm.x.dtype != jnp.bfloat16:
        return False
    from pallas_kernels.matvec import row_sm90

    return row_sm90.takes_normed_gated(norm, parts)


def normed_gated(norm: RowNorm, parts: Sequence[Fragments]) -> tuple[jax.Array, jax.Array]:
    """The sum that a norm is of, and what `packed_gated` makes of the norm, if `takes_normed_gated` them.

    Bit by bit what `add_norm` (by "mosaic") and `packed_gated` return; the sum has the shape of x.
    """
    from pallas_kernels.matvec import row_sm90

    return row_sm90.normed_gated(norm, parts)


def repacked(weight: MXFP4 | Quantized, implementation: str = dispatch.AUTO) -> MXFP4 | Quantized | Fragments:
    """A matrix [O, I] in the layout that this device's kernel wants.

    Other devices, which have no such kernel, get it unchanged, and so does a matrix that does not fit: see `fits` in
    `formats.fragments` and `formats.ggml.fragments`.
    """
    if isinstance(weight, MXFP4):
        pack = repacking(weight, weight.shape, implementation)
        return weight if pack is None else pack(weight)
    wants = dispatch.wanted(implementation) == dispatch.MOSAIC and ggml_fragments.fits(weight)
    return _repack(weight) if wants else weight


def repacking(
    weight: MXFP4, shape: tuple[int, ...], implementation: str = dispatch.AUTO
) -> Callable[[MXFP4], Fragments] | None:
    """What repacks parts of this shape of a matrix, if this device's kernel wants them so."""
    return _repack if dispatch.wanted(implementation) == dispatch.MOSAIC and fragments.fits(weight, shape) else None


@jax.jit
def _repack(weight: MXFP4 | Quantized) -> Fragments:
    """Repacks some rows at a time."""
    panels = weight.shape[0] // TILE
    most = max(1, _AT_ONCE // (TILE * weight.shape[1]))
    step = next(step for step in range(min(panels, most), 0, -1) if panels % step == 0)
    groups = jax.tree.map(lambda array: array.reshape(panels // step, -1, *array.shape[1:]), weight)
    make = MXFP4Fragments.of if isinstance(weight, MXFP4) else QuantizedFragments.of
    repacked = jax.lax.map(make, groups)
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), repacked)
