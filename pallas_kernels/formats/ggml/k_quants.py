"""The K-quants: blocks of 256 values in runs of 16 or 32, whose scales are small integers times the block's own.

Products of the scales and the small integers fit into float32's 24 bits, so only the final subtraction rounds, and it
makes no difference whether a compiler contracts it with the product.
"""

from typing import Final

import numpy as np

from pallas_kernels.formats.ggml.packed import Array, Packed, floats, half, planes, scaled


def _flat(values: Array) -> Array:
    return values.reshape(*values.shape[:-2], 256)


def _q2_k(scales: Array, qs: Array, d: Array, dmin: Array) -> Array:
    factors, offsets = half(d) * floats(scales & 15), half(dmin) * floats(scales >> 4)
    return _flat(scaled(factors, floats(planes(qs, 2, 32))) - offsets[..., None])


def _q3_k(hmask: Array, qs: Array, scales: Array, d: Array) -> Array:
    six_bits = planes(scales[..., :8], 4, 8) | planes(scales[..., 8:], 2, 4) << 4
    values = floats(planes(qs, 2, 32) | planes(hmask, 1, 32) << 2) - 4
    return _flat(scaled(half(d) * (floats(six_bits) - 32), values))


def scales_and_offsets(scales: Array) -> tuple[Array, Array]:
    """The small integers of Q4_K and Q5_K: six bits each, 2 x uint8 [..., 8], of 12 bytes.

    These hold the first four of both, then the low bits of the last four, whose high bits fill up the first bytes.
    """
    xp = scales.__array_namespace__()
    first = scales[..., :8]
    last = planes(scales[..., 8:], 4, 4) | first >> 6 << 4
    halves = [part.reshape(*part.shape[:-1], 2, 4) for part in (first & 63, last)]
    both = xp.concatenate(halves, axis=-1)
    return both[..., 0, :], both[..., 1, :]


def q5_k_codes(qh: Array, qs: Array) -> Array:
    """uint8 [..., 256], up to 31."""
    return planes(qs, 4, 32) | planes(qh, 1, 32) << 4


def q6_k_codes(ql: Array, qh: Array) -> Array:
    """uint8 [..., 256], up to 63."""
    return planes(ql, 4, 64) | planes(qh, 2, 32) << 4


def _q4_k(d: Array, dmin: Array, scales: Array, qs: Array) -> Array:
    factors, offsets = scales_and_offsets(scales)
    values = scaled(half(d) * floats(factors), floats(planes(qs, 4, 32)))
    return _flat(values - (half(dmin) * floats(offsets))[..., None])


def _q5_k(d: Array, dmin: Array, scales: Array, qh: Array, qs: Array) -> Array:
    factors, offsets = scales_and_offsets(scales)
    values = scaled(half(d) * floats(factors), floats(q5_k_codes(qh, qs)))
    return _flat(values - (half(dmin) * floats(offsets))[..., None])


def _q6_k(ql: Array, qh: Array, scales: Array, d: Array) -> Array:
    values = floats(q6_k_codes(ql, qh)) - 32
    return _flat(scaled(half(d) * floats(scales.view(np.int8)), values))


Q2_K: Final = Packed(256, {"scales": 16, "qs": 64, "d": 2, "dmin": 2}, _q2_k)
Q3_K: Final = Packed(256, {"hmask": 32, "qs": 64, "scales": 12, "d": 2}, _q3_k)
Q4_K: Final = Packed(256, {"d": 2, "dmin": 2, "scales": 12, "qs": 128}, _q4_k)
Q5_K: Final = Packed(256, {"d": 2, "dmin": 2, "scales": 12, "qh": 32, "qs": 128}, _q5_k)
Q6_K: Final = Packed(256, {"ql": 128, "qh": 64, "scales": 16, "d": 2}, _q6_k)
