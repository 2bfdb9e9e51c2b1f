"""The types whose four bits are an index into a table of values."""

from typing import Any, Final

import numpy as np

from pallas_kernels.formats.ggml.packed import Array, Packed, floats, half, planes, scaled

_NONLINEAR: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_TWICE_E2M1: Final = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # ggml has no negative zero
_NAN: Final = 255  # as a scale of MXFP4


def _looked_up(table: tuple[int, ...], codes: Array) -> Array:
    xp = codes.__array_namespace__()
    return xp.take(xp.asarray(np.array(table, np.float32)), codes, axis=0)


def _iq4_nl(d: Array, qs: Array) -> Array:
    return half(d) * _looked_up(_NONLINEAR, planes(qs, 4, 16))


def _iq4_xs(d: Array, scales_h: Array, scales_l: Array, qs: Array) -> Array:
    six_bits = planes(scales_l, 4, 1) | planes(scales_h, 2, 1) << 4
    values = scaled(half(d) * (floats(six_bits) - 32), _looked_up(_NONLINEAR, planes(qs, 4, 16)))
    return values.reshape(*values.shape[:-2], 256)


def _mxfp4(e: Array, qs: Array) -> Array:
    return _half_of_e8m0(e) * _looked_up(_TWICE_E2M1, planes(qs, 4, 16))


def _half_of_e8m0(e: Array) -> Array:
    """2^(e - 128) from its bits, since exp2 is not exact everywhere; NaN for 255.

    Below 2 it is subnormal, and XLA takes it for zero on a CPU.
    """
    xp = e.__array_namespace__()
    wide = e.astype(np.uint32)
    bits = xp.where(wide < 2, np.uint32(1 << 21) << wide, (wide - 1) << 23)
    return xp.where(wide == _NAN, np.float32(np.nan), bits.view(np.float32))


IQ4_NL: Final = Packed(32, {"d": 2, "qs": 16}, _iq4_nl)
IQ4_XS: Final = Packed(256, {"d": 2, "scales_h": 2, "scales_l": 4, "qs": 128}, _iq4_xs)
MXFP4: Final = Packed(32, {"e": 1, "qs": 16}, _mxfp4)


def to_mxfp4(blocks: Any) -> tuple[Any, Any]:
    """ggml's MXFP4 blocks in the layout of `pallas_kernels.formats.mxfp4.MXFP4`, losslessly.

    Args:
      blocks: uint8 [..., n/32, 17]: a block's scale, then byte j with the codes of values j (low nibble) and j + 16.

    Returns:
      The arguments of `MXFP4.of`: codes uint8 [..., n/32, 16], the low nibble of byte j the code of value 2j and the
      high one that of 2j + 1; scales uint8 [..., n/32].
    """
    codes = planes(blocks[..., 1:], 4, 16)
    return codes[..., 0::2] | codes[..., 1::2] << 4, blocks[..., 0]
