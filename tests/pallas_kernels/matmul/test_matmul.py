"""Products of many rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.matmul import matmul
from tests.pallas_kernels.marks import lowered, needs_hopper, needs_mosaic

SIZES = [(64, 64), (320, 192), (2880, 5120), (4096, 2880), (1600, 6400)]


def _shape(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


@needs_mosaic
@pytest.mark.parametrize("T", [1, 128, 2048])
@pytest.mark.parametrize(("K", "N"), SIZES)
def test_products_lower(T, K, N):
    assert "matmul" in lowered(lambda *operands: matmul(*operands, implementation="mosaic"), _shape(T, K), _shape(K, N))


@needs_mosaic
def test_tiles_fill_the_device():
    from pallas_kernels.matmul.mosaic_sm90 import _MatmulPlan

    assert [_MatmulPlan.of(rows, 2880, 5120).width for rows in (64, 512, 2048)] == [64, 192, 256]
    assert _MatmulPlan.of(512, 2880, 5120).waves == 1


@needs_hopper
@pytest.mark.parametrize(("K", "N"), SIZES)
def test_products_agree_with_numpy_with_the_same_bits_among_any_number_of_rows(K, N):
    rng = np.random.default_rng(K)
    x, kernel = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((2048, K), (K, N)))
    products = {T: np.asarray(matmul(x[:T], kernel, implementation="mosaic")) for T in (1, 16, 100, 512, 1000, 2048)}
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(products[2048], expected, rtol=0, atol=1e-6 * K)
    for T, product in products.items():
        np.testing.assert_array_equal(product, products[2048][:T], err_msg=f"{T} rows")
    shifted = np.asarray(matmul(x[77:589], kernel, implementation="mosaic"))
    np.testing.assert_array_equal(shifted, products[2048][77:589])
