"""MXFP4 in the order of tensor cores."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.fragments import MXFP4Fragments
from pallas_kernels.formats.mxfp4 import MXFP4

SHAPES = [(64, 64), (3, 128, 192), (2, 64, 320)]
# Where the module's text says that a code's bits lie in a half: sign, two of exponent, mantissa.
PLACES = ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (14, 13, 11, 10))
MAGNITUDES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def _packed(shape: tuple[int, ...]) -> MXFP4:
    rng = np.random.default_rng(0)
    *lead, n = shape
    blocks = rng.integers(0, 256, (*lead, n // 32, 16), dtype=np.uint8)
    return MXFP4(jnp.asarray(blocks), jnp.asarray(rng.integers(100, 130, (*lead, n // 32), dtype=np.uint8)))


@pytest.mark.parametrize("shape", SHAPES)
def test_unpacked_is_the_same_to_the_bit(shape):
    packed = _packed(shape)
    fragments = MXFP4Fragments.of(packed)
    unpacked = fragments.unpacked()
    np.testing.assert_array_equal(unpacked.blocks, packed.blocks)
    np.testing.assert_array_equal(unpacked.scales, packed.scales)
    np.testing.assert_array_equal(fragments.dequantize(), packed.dequantize())
    assert fragments.shape == shape == packed.shape
    assert (fragments.size, fragments.nbytes, fragments.ndim) == (packed.size, packed.nbytes, packed.ndim)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_number_is_where_the_format_says(shape):
    packed = _packed(shape)
    fragments = MXFP4Fragments.of(packed)
    words, scales, numbers = (np.asarray(x) for x in (fragments.words, fragments.scales, packed.dequantize()))
    rng = np.random.default_rng(1)
    for _ in range(500):
        *lead, row, column = (int(rng.integers(size)) for size in shape)
        m, w, g, r = row // 64, row % 64 // 16, row % 16 // 2, row % 2
        k, q, p, c, h = column // 64, column % 64 // 16, column % 16 // 4, column % 4 // 2, column % 2
        thread = 32 * w + 4 * g + q
        half = int(words[(*lead, m, k, thread, 2 * c + r)]) >> 16 * h
        sign, *bits = (half >> place & 1 for place in PLACES[p])
        scale = int(scales[(*lead, m, k, thread // 2)]) >> 8 * r & 255
        value = MAGNITUDES[4 * bits[0] + 2 * bits[1] + bits[2]] * 2.0 ** (scale - 127)
        assert (-value if sign else value) == numbers[(*lead, row, column)]


def test_experts_are_indexed():
    packed = _packed(SHAPES[1])
    np.testing.assert_array_equal(MXFP4Fragments.of(packed)[1].dequantize(), packed[1].dequantize())
    with pytest.raises(IndexError, match="first axis only"):
        MXFP4Fragments.of(packed)[0, 1]
    with pytest.raises(IndexError, match="first axis only"):
        MXFP4Fragments.of(_packed(SHAPES[0]))[0]


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiples of 64"):
        MXFP4Fragments.of(_packed((96, 64)))
