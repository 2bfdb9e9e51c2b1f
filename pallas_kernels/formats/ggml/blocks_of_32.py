"""The types with blocks of 32 values: one scale `d`, and in some an offset `m`."""

from typing import Final

import numpy as np

from pallas_kernels.formats.ggml.packed import Array, Packed, floats, half, planes


def _q4_0(d: Array, qs: Array) -> Array:
    return half(d) * (floats(planes(qs, 4, 16)) - 8)


def _q4_1(d: Array, m: Array, qs: Array) -> Array:
    return half(d) * floats(planes(qs, 4, 16)) + half(m)


def five_bits(qh: Array, qs: Array) -> Array:
    """The codes of Q5_0 and Q5_1: uint8 [..., 32]."""
    return planes(qs, 4, 16) | planes(qh, 1, 1) << 4


def _q5_0(d: Array, qh: Array, qs: Array) -> Array:
    return half(d) * (floats(five_bits(qh, qs)) - 16)


def _q5_1(d: Array, m: Array, qh: Array, qs: Array) -> Array:
    return half(d) * floats(five_bits(qh, qs)) + half(m)


def _q8_0(d: Array, qs: Array) -> Array:
    return half(d) * floats(qs.view(np.int8))


Q4_0: Final = Packed(32, {"d": 2, "qs": 16}, _q4_0)
Q4_1: Final = Packed(32, {"d": 2, "m": 2, "qs": 16}, _q4_1)
Q5_0: Final = Packed(32, {"d": 2, "qh": 4, "qs": 16}, _q5_0)
Q5_1: Final = Packed(32, {"d": 2, "m": 2, "qh": 4, "qs": 16}, _q5_1)
Q8_0: Final = Packed(32, {"d": 2, "qs": 32}, _q8_0)
