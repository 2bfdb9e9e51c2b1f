"""Tables, tiles and writing of pages, and attention over pages in jnp, against NumPy."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import append, pages
from pallas_kernels.attention import attention_over_pages, packed_attention_over_pages
from pallas_kernels.pages import PAGE, Tiles
from tests.oracles import attention_numpy
from tests.oracles.paged import paged, renumbered
from tests.thinned import thinned, thorough

EPS32 = float(jnp.finfo(jnp.float32).eps)


def _tiles(parts: list[tuple[int, int, int]], gaps: list[int]) -> Tiles:
    """Of parts (row, position, tokens), with so many tokens of padding before each, cut into tiles."""
    tiles, start = [], 0
    for (row, position, count), gap in zip(parts, gaps, strict=True):
        start += gap
        for first in range(0, count, pages.TILE):
            tiles.append((row, start + first, min(pages.TILE, count - first), position + first))
        start += count
    return Tiles(*(np.array(each, np.int32) for each in zip(*tiles, strict=True)))


def test_tiles_know_the_row_and_the_position_of_each_token():
    tiles = _tiles([(2, 100, 300), (0, 7, 1), (1, 0, 128)], [3, 0, 2])
    rows_T, positions_T = map(np.asarray, tiles.tokens(440))
    expected_rows = [-1] * 3 + [2] * 300 + [0] + [-1] * 2 + [1] * 128 + [-1] * 6
    expected = [-1] * 3 + [*range(100, 400), 7] + [-1] * 2 + [*range(128)] + [-1] * 6
    np.testing.assert_array_equal(rows_T, expected_rows)
    np.testing.assert_array_equal(positions_T, expected)


@pytest.mark.parametrize("T", [1, 5, 128, 300])
def test_tiles_of_a_call_of_rows_cover_its_tokens(T):
    rng = np.random.default_rng(T)
    positions_BT = rng.integers(-9, 0, (4, T), np.int32)  # any negative position is padding
    for row, start in enumerate([0, 200, 5]):  # the last row is padding
        before, after = sorted(rng.integers(0, T + 1, 2))
        positions_BT[row, before:after] = start + np.arange(after - before)
    positions_BT[1] = np.arange(77, 77 + T)
    rows_T, positions_T = map(np.asarray, Tiles.of(positions_BT).tokens(4 * T))
    np.testing.assert_array_equal(positions_T, np.maximum(positions_BT, -1).reshape(-1))
    np.testing.assert_array_equal(rows_T, np.where(positions_T < 0, -1, np.repeat(np.arange(4), T)))


def test_slots():
    table_BZ = np.array([[3, 5], [9, 0]], np.int32)
    actual = pages.slots(table_BZ, np.array([[0, 127, 128, 255], [-1, 1, -3, 127]], np.int32))
    expected = [[3 * PAGE, 3 * PAGE + 127, 5 * PAGE, 5 * PAGE + 127], [-1, 9 * PAGE + 1, -1, 9 * PAGE + 127]]
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tokens_of_rows_are_written_to_their_pages(dtype):
    rng = np.random.default_rng(0)
    pool = np.asarray(jnp.asarray(rng.standard_normal((9, 2, PAGE, 4), np.float32), dtype))
    new = np.asarray(jnp.asarray(rng.standard_normal((5, 2, 4), np.float32), dtype))
    table = np.array([[1, 2], [3, 4], [5, 0], [6, 7], [8, 0]], np.int32)
    positions = np.array([0, 255, -1, 128, 127], np.int32)
    expected = pool.copy()
    for row, position in enumerate(positions):
        if position >= 0:
            expected[table[row, position // PAGE], :, position % PAGE] = new[row]
    np.testing.assert_array_equal(jax.jit(append.write_rows)(pool, new, table, positions), expected)


@pytest.mark.parametrize(
    "parts",
    [
        [(0, 0, 5)],
        [(1, 120, 9), (0, 0, 2)],
        [(2, 127, 1), (0, 3, 300), (1, 128, 128)],
        [(1, 0, 128), (2, 5, 128), (0, 300, 84)],
    ],
    ids=str,
)
def test_tokens_of_tiles_are_written_to_their_pages(parts):
    rng = np.random.default_rng(1)
    T = sum(count for _, _, count in parts) + 4
    tiles = _tiles(parts, [1] * len(parts))
    pool = np.array(jnp.asarray(rng.standard_normal((10, 2, PAGE, 4), np.float32), jnp.bfloat16))
    pool[0] = np.nan
    new = np.asarray(jnp.asarray(rng.standard_normal((T, 2, 4), np.float32), jnp.bfloat16))
    table = (1 + rng.permutation(9)).reshape(3, 3).astype(np.int32)
    expected = pool.copy()
    for row, start, count, position in zip(*tiles, strict=True):
        for i in range(count):
            expected[table[row, (position + i) // PAGE], :, (position + i) % PAGE] = new[start + i]
    actual = jax.jit(append.write_tiles)(pool, new, table, tiles)
    np.testing.assert_array_equal(*(np.asarray(each, np.float32) for each in (actual, expected)))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="for CPUs")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_copies_or_converts_the_pool(dtype):
    """On a CPU, XLA's scatter of bfloat16 would convert all of it to float32 and back."""
    if dtype == jnp.bfloat16 and jax.__version_info__ < (0, 11):
        pytest.skip("the XLA of JAX 0.10 copies a pool of bfloat16")
    pool = jax.ShapeDtypeStruct((2048, 2, PAGE, 8), dtype)
    table = jax.ShapeDtypeStruct((4, 8), jnp.int32)
    tiles = Tiles(*[jax.ShapeDtypeStruct((5,), jnp.int32)] * 4)
    new = partial(jax.ShapeDtypeStruct, dtype=dtype)
    attend = partial(packed_attention_over_pages, scale=1.0)
    for function, *operands in (
        (append.write_rows, pool, new((4, 2, 8)), table, jax.ShapeDtypeStruct((4,), jnp.int32)),
        (append.write_tiles, pool, new((12, 2, 8)), table, tiles),
        (append.write_tiles, pool, new((256, 2, 8)), table, tiles),
        (lambda pool, q, *rest: (pool, attend(q, pool, pool, *rest)), pool, new((1, 256, 4, 8)), table, tiles),
    ):
        compiled = jax.jit(function, donate_argnums=0).lower(*operands).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < math.prod(pool.shape)


WINDOWS = thinned([None, 1, 100, 128, 129, 200], None, 128, 200)


@pytest.mark.parametrize("dtype", thinned([jnp.float32, jnp.bfloat16], jnp.bfloat16))
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sinks", [True, thorough(False)])
def test_one_query_per_row(sinks, window, dtype):
    positions = np.array([[0], [400], [-1], [127], [128], [255]], np.int32)
    N, K, H = 6, 3, 16
    spans = [(0, 0) if p < 0 else (max(0, p - (window or 1000) + 1), p + 1) for p in positions[:, 0]]
    given = paged(spans, K=K, H=H, dtype=dtype)
    rng = np.random.default_rng(2)
    q = np.asarray(jnp.asarray(rng.standard_normal((6, 1, N, H), np.float32), dtype))
    more = [rng.standard_normal(N).astype(np.float32)] if sinks else []
    run = jax.jit(partial(attention_over_pages, scale=0.3, window=window))
    actual = run(q, given.k_YKSH, given.v_YKSH, given.table_BZ, positions, *more)
    _compare(actual, q, given, positions, more, window)
    other = renumbered(given, seed=5)
    again = run(q, other.k_YKSH, other.v_YKSH, other.table_BZ, positions, *more)
    np.testing.assert_array_equal(*(np.asarray(each, np.float32) for each in (actual, again)))


def _compare(actual, q, given, positions, more, window, queries=slice(None)):
    dtype, (S, H) = q.dtype, given.k_BKSH.shape[2:]
    # As in `test_attention.py`.
    tolerance = 4 * EPS32 * (math.sqrt(H) + math.sqrt(S)) + (
        2 * float(jnp.finfo(dtype).eps) if dtype != np.float32 else 0
    )
    operands = q, given.k_BKSH, given.v_BKSH, positions, given.positions_BS, *more
    expected = attention_numpy.attention(*operands, scale=0.3, window=window)
    assert actual.dtype == dtype
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=tolerance)
    assert not np.asarray(actual, np.float32)[positions < 0].any()


@pytest.mark.parametrize("window", WINDOWS)
def test_many_queries_per_row(window):
    """Rows of one length, of which some is padding, and the same tokens packed."""
    starts, counts, T, N, K, H = [0, 130, 0, 250], [150, 9, 0, 40], 150, 4, 2, 16
    ahead_T = np.arange(T)
    positions = np.stack([np.where(ahead_T < n, p + ahead_T, -1) for p, n in zip(starts, counts, strict=True)])
    positions = positions.astype(np.int32)
    spans = [
        (0, 0) if not n else (max(0, p - (window or 1000) + 1), p + n) for p, n in zip(starts, counts, strict=True)
    ]
    given = paged(spans, K=K, H=H, dtype=jnp.float32)
    rng = np.random.default_rng(3)
    q = rng.standard_normal((4, T, N, H)).astype(np.float32)
    sinks = rng.standard_normal(N).astype(np.float32)
    run = jax.jit(partial(attention_over_pages, scale=0.3, window=window))
    actual = run(q, given.k_YKSH, given.v_YKSH, given.table_BZ, positions, sinks)
    _compare(actual, q, given, positions, [sinks], window)

    parts = [(row, starts[row], counts[row]) for row in (1, 3, 0)]
    tiles = _tiles(parts, [2, 0, 5])
    rows_T, positions_T = map(np.asarray, tiles.tokens(210))
    first_T = positions_T - np.array(starts)[rows_T]
    packed_q = np.where((rows_T >= 0)[:, None, None], q[rows_T, np.where(rows_T < 0, 0, first_T)], np.nan)[None]
    run = jax.jit(partial(packed_attention_over_pages, scale=0.3, window=window))
    out = np.asarray(run(packed_q.astype(np.float32), given.k_YKSH, given.v_YKSH, given.table_BZ, tiles, sinks)[0])
    expected = np.where((rows_T >= 0)[:, None, None], np.asarray(actual)[rows_T, np.where(rows_T < 0, 0, first_T)], 0)
    np.testing.assert_allclose(out, expected, rtol=0, atol=4 * EPS32 * (math.sqrt(H) + math.sqrt(384)))
    assert not out[rows_T < 0].any()


def test_large_sinks():
    """A sink that is far below all scores is no sink, and one far above takes all."""
    positions = np.array([[383], [70], [-1]], np.int32)
    given = paged([(0, 384), (0, 71), (0, 0)], K=3, H=16, dtype=np.float32)
    q = np.random.default_rng(4).standard_normal((3, 1, 6, 16)).astype(np.float32)
    sinks = np.repeat([-1e9, 1e4, 1e9], 2).astype(np.float32)
    run = partial(attention_over_pages, scale=0.3)
    actual = run(q, given.k_YKSH, given.v_YKSH, given.table_BZ, positions, sinks)
    _compare(actual, q, given, positions, [sinks], None)
    _compare(actual[:, :, :2], q[:, :, :2], given._replace(k_BKSH=given.k_BKSH[:, :1]), positions, [], None)
    assert not actual[:, :, 2:].any()


@pytest.mark.parametrize("magnitude", thinned([1e4, -1e4], 1e4))
def test_large_scores(magnitude):
    """Scores far beyond what exp can hold: the softmax must subtract its maximum, in every page."""
    positions = np.array([[383], [150]], np.int32)
    given = paged([(0, 384), (0, 151)], K=1, H=3, dtype=np.float32)
    k_YKSH, k_BKSH = (1 + np.float32(0.001) * k for k in (given.k_YKSH, given.k_BKSH))
    q = np.full((2, 1, 2, 3), magnitude, np.float32)
    actual = attention_over_pages(q, k_YKSH, given.v_YKSH, given.table_BZ, positions, scale=1.0)
    expected = attention_numpy.attention(q, k_BKSH, given.v_BKSH, positions, given.positions_BS, scale=1.0)
    # Scores of 3e4 are good to eps/2 of that, 2e-3, and so are the weights, relatively; values go up to 4.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("dtype", thinned([jnp.bfloat16, jnp.float16], jnp.bfloat16))
def test_half_precision_rounds_weights_and_result_only(dtype):
    """As in `test_attention.py`. Partial sums of 8 pages that were rounded would make the error 0.35 eps or more."""
    positions = np.tile(np.arange(1021, 1024, dtype=np.int32), (2, 1))
    given = paged([(0, 1024)] * 2, K=2, H=40, dtype=dtype)
    q = np.asarray(jnp.asarray(np.random.default_rng(4).standard_normal((2, 3, 4, 40), np.float32), dtype))
    scale = 1 / math.sqrt(40)
    actual = attention_over_pages(q, given.k_YKSH, given.v_YKSH, given.table_BZ, positions, scale=scale)
    expected = attention_numpy.attention(q, given.k_BKSH, given.v_BKSH, positions, given.positions_BS, scale=scale)
    error = np.sqrt(np.square(np.asarray(actual, np.float64) - expected).mean() / np.square(expected).mean())
    assert error < 0.33 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", thinned([jnp.float32, jnp.bfloat16, jnp.float16], jnp.bfloat16))
@pytest.mark.parametrize("T", [1, 5])
def test_pages_that_a_row_does_not_see_change_no_bit(T, dtype):
    """The same row with a wider table, and beside rows that are longer, shorter and empty."""
    given = paged([(0, 512)] * 3, K=2, H=16, dtype=dtype)
    q = np.asarray(jnp.asarray(np.random.default_rng(3).standard_normal((3, T, 4, 16), np.float32), dtype))
    run = jax.jit(partial(attention_over_pages, scale=0.25))

    def row(lengths: list[int], Z: int) -> np.ndarray:
        positions = np.array(lengths, np.int32)[:, None] - np.arange(T, 0, -1, dtype=np.int32)
        return np.asarray(run(q, given.k_YKSH, given.v_YKSH, given.table_BZ[:, :Z], positions), np.float32)[1]

    expected = {Z: row([0, 150, 0], Z) for Z in (2, 4)}
    assert expected[2].any()
    if jax.default_backend() == "cpu":  # page by page; elsewhere all of a narrow table at once, in another order
        np.testing.assert_array_equal(expected[4], expected[2])
    for lengths, Z in [([512, 150, 9], 4), ([129, 150, 385], 4), ([256, 150, 1], 2)]:
        np.testing.assert_array_equal(row(lengths, Z), expected[Z])


def test_what_cannot_be_run_is_refused():
    q, pool = np.zeros((1, 1, 4, 8), np.float32), np.zeros((3, 2, 64, 8), np.float32)
    table, positions = np.zeros((1, 1), np.int32), np.zeros((1, 1), np.int32)
    with pytest.raises(ValueError, match="a page has 128 positions, found 64"):
        attention_over_pages(q, pool, pool, table, positions, scale=1.0)
    with pytest.raises(ValueError, match="5 query heads cannot share 2"):
        attention_over_pages(np.zeros((1, 1, 5, 8), np.float32), pool, pool, table, positions, scale=1.0)
    pool, run = np.zeros((3, 2, PAGE, 8), np.float32), partial(attention_over_pages, scale=1.0)
    with pytest.raises(ValueError, match=r"attention has no implementation 'triton9' for these operands; it has .*xla"):
        run(q, pool, pool, table, positions, implementation="triton9")
    with pytest.raises(ValueError, match="attention has no implementation 'triton' for these operands; it has xla"):
        run(np.zeros((1, 2, 4, 8), np.float32), pool, pool, table, np.array([[0, 1]]), implementation="triton")
