"""Pages in float8 against ml_dtypes, and attention over them against float64 NumPy and against pages of numbers."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import append, fp8_pages, pages
from pallas_kernels.attention import attention_over_pages, packed_attention_over_pages, takes_product
from pallas_kernels.pages import PAGE, Tiles
from tests.oracles import attention_numpy, fp8_numpy
from tests.oracles.paged import paged
from tests.thinned import thinned, thorough

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
EPS32 = float(jnp.finfo(jnp.float32).eps)


def _vectors(dtype) -> np.ndarray:
    """Of all sizes; ties, and what is next to them; a largest number that just fits and one that just does not."""
    rng = np.random.default_rng(0)
    vectors = [rng.standard_normal((200, 64)) * 2.0 ** rng.integers(-12, 12, (200, 1))]
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    every = np.sort(every[np.isfinite(every)])
    middle = np.resize((every[1:] + every[:-1]) / 2, (4, 64))
    vectors += [middle, middle * (1 + 2**-20), middle * (1 - 2**-20)]
    ends = rng.standard_normal((6, 64))
    ends[:, 7] = [448, -448, 449, -480, 224, 225]
    vectors += [ends, np.zeros((1, 64)), np.full((1, 64), 2.0**-24)]
    if dtype != jnp.float16:
        vectors += [ends * 2.0**100, ends * 2.0**-100, ends * 2.0**-112, np.full((1, 64), 3e38)]
    return np.array(jnp.asarray(np.concatenate(vectors), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_are_rounded_as_ml_dtypes_does(dtype):
    x = _vectors(dtype)
    numbers, exponents = fp8_numpy.rounded(x)
    found = jax.jit(fp8_pages.rounded)(x)
    np.testing.assert_array_equal(found.exponents_YKS1, exponents + 127)
    np.testing.assert_array_equal(found.numbers_YKSH, numbers.view(np.uint8))
    read = np.asarray(jax.jit(fp8_pages.as_read)(x))
    assert read.dtype == dtype
    # Exactly, even in float16, which has no number between those that a vector of it can be rounded to.
    np.testing.assert_array_equal(read.astype(np.float64), fp8_numpy.as_read(x))
    np.testing.assert_array_equal(jax.jit(fp8_pages.as_read)(read), read)


def test_every_number_is_read_as_ml_dtypes_does():
    numbers = np.arange(256, dtype=np.uint8)
    numbers = numbers[np.isfinite(numbers.view(ml_dtypes.float8_e4m3fn).astype(np.float32))][None]
    exponents = np.array([27, 100, 127, 130, 246], np.uint8)[:, None]  # from the least to that of float32's largest
    pages = fp8_pages.Fp8Pages(jnp.asarray(np.tile(numbers, (5, 1))), jnp.asarray(exponents))
    expected = numbers.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * 2.0 ** (exponents.astype(int) - 127)
    for dtype in DTYPES[:2]:
        found = jax.jit(partial(fp8_pages.expanded, dtype=dtype))(pages)
        np.testing.assert_array_equal(np.asarray(found).astype(np.float64), expected)


def test_what_is_not_finite_stays_so():
    x = np.ones((3, 8), np.float32)
    x[0, 1], x[1, 2] = np.nan, np.inf
    np.testing.assert_array_equal(np.isfinite(fp8_pages.as_read(x)).any(axis=1), [False, False, True])


def _pools(x: np.ndarray) -> tuple[np.ndarray, fp8_pages.Fp8Pages]:
    """A pool of rounded numbers, and the same in float8; NaN in both where there is NaN."""
    numbers, exponents = fp8_numpy.rounded(x)
    scales = np.where(np.isnan(x).any(axis=-1, keepdims=True), 255, exponents + 127).astype(np.uint8)
    return fp8_numpy.as_read(x).astype(x.dtype), fp8_pages.Fp8Pages(jnp.asarray(numbers.view(np.uint8)), scales)


@pytest.mark.parametrize("dtype", thinned([jnp.float32, jnp.bfloat16], jnp.float32))
@pytest.mark.parametrize(
    ("N", "K", "window", "sinks"), [thorough(6, 2, None, True), (6, 2, 130, True), (3, 3, None, False)]
)
def test_attention_has_the_bits_of_attention_over_rounded_numbers(N, K, window, sinks, dtype):
    """One token a row, and tiles; in float32 with as many queries as keys, that is `lanes`."""
    H, ends, scale = 32, [300, 129, 1, 128], 1 / math.sqrt(32)
    given = paged([(max(0, end - (window or end) - 1), end) for end in ends], K=K, H=H, dtype=dtype)
    plain, packed = zip(*(_pools(x) for x in (given.k_YKSH, given.v_YKSH)), strict=True)
    rng = np.random.default_rng(1)
    q_BTNH = jnp.asarray(rng.standard_normal((len(ends), 2, N, H)), dtype)
    sinks_N = rng.standard_normal(N).astype(np.float32) if sinks else None
    positions_BT = np.array(ends, np.int32)[:, None] - 1
    how = {"scale": scale, "window": window}
    run = jax.jit(partial(attention_over_pages, **how))
    found = run(q_BTNH[:, :1], *packed, given.table_BZ, positions_BT, sinks_N)
    np.testing.assert_array_equal(found, run(q_BTNH[:, :1], *plain, given.table_BZ, positions_BT, sinks_N))
    k, v = (fp8_numpy.as_read(x) for x in (given.k_BKSH, given.v_BKSH))
    operands = np.asarray(q_BTNH[:, :1], np.float64), k, v, positions_BT, given.positions_BS, sinks_N
    expected = attention_numpy.attention(*operands, **how)
    np.testing.assert_allclose(found, expected, rtol=0, atol=64 * EPS32 if dtype == jnp.float32 else 0.02)
    # The last two tokens of each row that has so many, as tiles.
    positions_BT = np.where(positions_BT > 0, positions_BT + np.array([-1, 0], np.int32), [[-1, 0]]).astype(np.int32)
    run = jax.jit(partial(packed_attention_over_pages, **how))
    operands = given.table_BZ, Tiles.of(positions_BT), sinks_N
    q_1TNH = q_BTNH.reshape(1, -1, N, H)
    np.testing.assert_array_equal(run(q_1TNH, *packed, *operands), run(q_1TNH, *plain, *operands))


def test_named_kernels_refuse_what_they_cannot_read():
    q_B1NH, pool = jnp.zeros((1, 1, 2, 64), jnp.bfloat16), fp8_pages.zeros((2, 2, PAGE, 64), fp8_pages.FP8)
    operands = pool, pool, np.ones((1, 1), np.int32), np.zeros((1, 1), np.int32)
    assert not attention_over_pages(q_B1NH, *operands, scale=1.0, implementation="xla").any()
    assert not takes_product(1, pool, implementation="triton")
    with pytest.raises(ValueError, match="no implementation 'triton'"):
        attention_over_pages(q_B1NH, *operands, scale=1.0, implementation="triton")


@pytest.mark.parametrize("T", [1, 40])  # token by token, and page by page
def test_writing(T):
    K, H = 3, 16
    rng = np.random.default_rng(T)
    new_TKH = rng.standard_normal((2 * T, K, H)).astype(np.float32)
    pool = jax.tree.map(lambda x: x + np.uint8(77), fp8_pages.zeros((6, K, PAGE, H), fp8_pages.FP8))
    table_BZ = jnp.array([[3, 1], [5, 2]], jnp.int32)
    positions_BT = np.array([[120], [-1]], np.int32) + np.arange(T, dtype=np.int32)
    positions_BT[1] = np.where(positions_BT[1] < 0, -1, positions_BT[1])
    if T == 1:
        found = append.write_rows(pool, new_TKH, table_BZ, positions_BT[:, 0])
    else:
        found = append.write_tiles(pool, new_TKH, table_BZ, Tiles.of(positions_BT))
    expected = jax.tree.map(np.array, pool)
    numbers, exponents = fp8_numpy.rounded(new_TKH)
    slots_T = np.asarray(pages.slots(table_BZ, positions_BT)).reshape(-1)
    for slot, vector, exponent in zip(slots_T, numbers.view(np.uint8), exponents + 127, strict=True):
        if slot >= 0:
            expected.numbers_YKSH[slot // PAGE, :, slot % PAGE] = vector
            expected.exponents_YKS1[slot // PAGE, :, slot % PAGE] = exponent
    jax.tree.map(np.testing.assert_array_equal, found, expected)
