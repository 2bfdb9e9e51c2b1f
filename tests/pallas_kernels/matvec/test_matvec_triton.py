"""The Triton kernel of a few rows' products against float64 NumPy, interpreted without a GPU; and that it lowers."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.matvec import matvec, triton
from tests.pallas_kernels.marks import lowered_for_h200
from tests.thinned import thinned, thorough

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
INTERPRET = dispatch.preferred() == dispatch.XLA
LARGE = [(2880, 5120), (4096, 2880), (768, 2304), (3072, 768), (1600, 6400), (768, 50257)]


def _operands(T: int, K: int, N: int, dtype: Any) -> list[jax.Array]:
    rng = np.random.default_rng(T + K + N)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((T, K), (K, N), (N,))]


@pytest.mark.parametrize("dtype", thinned(triton.DTYPES, jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize(("T", "splits"), [(1, None), (3, 1), (17, 2)])
@pytest.mark.parametrize(("K", "N"), [(320, 192), (7, 1), thorough(100, 70), thorough(129, 65)])
def test_agrees_with_numpy(K, N, T, splits, dtype):
    x, kernel, bias = _operands(T, K, N, dtype)
    parts = triton.product(x, kernel, bias, splits=splits, interpret=INTERPRET)
    assert parts.parts_JAO.dtype == jnp.float32
    x, kernel, bias = (np.asarray(each, np.float64) for each in (x, kernel, bias))
    # float32 sums of K products and the bias, each of size 1. Tensor cores cut off what others round: twice as much.
    atol = (4 if INTERPRET else 8) * float(jnp.finfo(jnp.float32).eps) * (math.sqrt(K) + 1) * 4
    np.testing.assert_allclose(parts.total(), x @ kernel + bias, rtol=0, atol=atol)


def test_splits_share_the_tiles():
    x, kernel, _ = _operands(1, 320, 64, jnp.bfloat16)
    for splits, expected in ((1, 1), (2, 2), (3, 3), (4, 3), (5, 5), (9, 5), (None, 5)):
        assert triton.product(x, kernel, splits=splits, interpret=INTERPRET).parts_JAO.shape == (expected, 1, 64)


def test_a_row_does_not_depend_on_its_company():
    x, kernel, _ = _operands(5, 320, 70, jnp.bfloat16)
    expected = triton.product(x, kernel, interpret=INTERPRET).parts_JAO
    others = jnp.full_like(x, jnp.nan).at[3].set(x[3])
    np.testing.assert_array_equal(triton.product(others, kernel, interpret=INTERPRET).parts_JAO[:, 3], expected[:, 3])


def test_operands_of_two_dtypes_are_not_taken():
    x, kernel, _ = _operands(1, 64, 64, jnp.bfloat16)
    with pytest.raises(ValueError, match="no implementation 'triton' for these operands"):
        matvec(x.astype(jnp.float32), kernel, implementation=dispatch.TRITON)


@pytest.mark.parametrize(("T", "dtype"), [(1, jnp.bfloat16), (64, jnp.float16), (4, jnp.float32)])
@pytest.mark.parametrize(("K", "N"), LARGE)
def test_lowers_for_cuda(K, N, T, dtype):
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((T, K), (K, N), (N,))]
    text = lowered_for_h200(lambda *each: matvec(*each, implementation=dispatch.TRITON).total(), *operands)
    assert len(re.findall(r"custom_call @\S*triton", text)) == 1
