"""ggml's types repacked for tensor cores: the numbers stay the same, bit for bit, and lie where the layout says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.ggml.fragments import PARTS, QuantizedFragments, fits
from pallas_kernels.formats.ggml.weight import Quantized
from tests.pallas_kernels.formats.ggml_blocks import random_blocks
from tests.thinned import thinned


def quantized(name: str, outputs: int, inputs: int, seed: int = 0) -> Quantized:
    shape = Quantized.abstract((outputs, inputs), name).blocks.shape
    return Quantized(jnp.asarray(random_blocks(name, shape[:-1], seed)), name)


def same_bits(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual).view(np.uint32), np.asarray(expected).view(np.uint32))


@pytest.mark.parametrize("name", thinned(PARTS, "Q4_K", "Q6_K", "Q8_0"))  # four bits with minima, six, eight
def test_numbers_are_kept(name):
    weight = quantized(name, 128, 768)
    fragments = QuantizedFragments.of(weight)
    assert (fragments.shape, fragments.size, fragments.ndim) == (weight.shape, weight.size, weight.ndim)
    expected = np.asarray(weight.dequantize())
    same_bits(fragments.dequantize(), expected)
    rows = jnp.asarray([[5, 127], [64, 0], [63, 126]])
    same_bits(fragments.rows(rows), expected[rows])
    assert fragments.rows(rows, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize(("name", "more"), [("Q4_K", 1 / 8), ("Q5_K", 1 / 8), ("Q6_K", 0), ("Q8_0", 0), ("Q4_1", 0)])
def test_memory(name, more):
    weight = quantized(name, 64, 512)
    fragments = QuantizedFragments.of(weight)
    assert fragments.nbytes == weight.nbytes + more * weight.size / 8
    assert fragments.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(fragments))


def test_what_has_no_layout_is_refused():
    for weight in (quantized("Q4_0", 96, 64), quantized("Q4_0", 64, 96), quantized("Q5_1", 64, 64)):
        assert not fits(weight)
        with pytest.raises(ValueError, match="cannot be repacked"):
            QuantizedFragments.of(weight)
