"""Attention on a CPU of all rows at once: against float64, and that a row's bits depend on nothing but itself.

Keys and values that a row does not see are NaN throughout.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import same_bits
from pallas_kernels.attention.decode import lanes
from tests.oracles import attention_numpy
from tests.oracles.paged import paged, renumbered
from tests.thinned import thinned, thorough

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="for CPUs")

EPS32 = float(jnp.finfo(jnp.float32).eps)
EDGES = np.array([[0], [400], [-1], [63], [64], [127], [128], [255]], np.int32)


def spans(positions_B1: np.ndarray, window: int | None) -> list[tuple[int, int]]:
    """What rows at these positions see."""
    return [(0, 0) if p < 0 else (max(0, p - (window or 1000) + 1), p + 1) for p in positions_B1[:, 0]]


def queries(*shape: int) -> np.ndarray:
    """Normally distributed ones."""
    return np.random.default_rng(math.prod(shape)).standard_normal(shape).astype(np.float32)


def compiled(**how):
    """As the engine's programs are."""
    return jax.jit(partial(lanes.attend, **how), compiler_options=same_bits.COMPILER)


@pytest.mark.parametrize("window", thinned([None, 1, 63, 64, 65, 100, 200], None, 64, 200))
@pytest.mark.parametrize(("N", "H", "sinks"), [(3, 64, True), (2, 12, False), thorough(5, 80, True)])
def test_against_float64(N, H, sinks, window):
    given = paged(spans(EDGES, window), K=N, H=H, dtype=np.float32)
    q = queries(len(EDGES), 1, N, H)
    more = [queries(N)] if sinks else []
    run = compiled(scale=0.3, window=window)
    actual = np.asarray(run(q, given.k_YKSH, given.v_YKSH, given.table_BZ, EDGES, *more))
    operands = q, given.k_BKSH, given.v_BKSH, EDGES, given.positions_BS, *more
    expected = attention_numpy.attention(*operands, scale=0.3, window=window)
    tolerance = 4 * EPS32 * (math.sqrt(H) + math.sqrt(given.k_BKSH.shape[2]))  # as in `test_pages.py`
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)
    assert actual.dtype == np.float32
    assert not actual[EDGES[:, 0] < 0].any()
    other = renumbered(given, seed=5)
    again = run(q, other.k_YKSH, other.v_YKSH, other.table_BZ, EDGES, *more)
    np.testing.assert_array_equal(again, actual)


def test_large_sinks():
    """A sink that is far below all scores is no sink, and one far above takes all."""
    given = paged(spans(EDGES, None), K=3, H=16, dtype=np.float32)
    q, sinks = queries(len(EDGES), 1, 3, 16), np.array([-1e9, 1e4, 1e9], np.float32)
    operands = q, given.k_YKSH, given.v_YKSH, given.table_BZ, EDGES
    actual, without = (np.asarray(compiled(scale=0.3)(*operands, *more)) for more in ([sinks], []))
    np.testing.assert_allclose(actual[:, :, 0], without[:, :, 0], rtol=0, atol=8 * EPS32)
    assert not actual[:, :, 1:].any()


@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_large_scores(magnitude):
    """Scores far beyond what exp can hold, which grow or shrink from block to block."""
    positions = np.array([[383], [150]], np.int32)
    given = paged(spans(positions, None), K=2, H=32, dtype=np.float32)
    k_YKSH, k_BKSH = (1 + np.float32(0.001) * k for k in (given.k_YKSH, given.k_BKSH))
    q = np.full((2, 1, 2, 32), magnitude / 10, np.float32)
    actual = compiled(scale=1.0)(q, k_YKSH, given.v_YKSH, given.table_BZ, positions)
    expected = attention_numpy.attention(q, k_BKSH, given.v_BKSH, positions, given.positions_BS, scale=1.0)
    # Scores of 3e4 are good to eps/2 of that, 2e-3, and so are the weights, relatively; values go up to 4.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=0.01)


@pytest.mark.skipif(not same_bits.holds(), reason="this CPU was not looked at")
@pytest.mark.parametrize(("window", "H"), [thorough(None, 64), thorough(100, 64), (9, 16)])
def test_a_row_among_others(window, H):
    """Its bits depend neither on how many rows there are, nor on how long these and the table are."""
    rng = np.random.default_rng(H)
    positions = rng.integers(-1, 384, (128, 1), np.int32)
    given = paged(spans(positions, window), K=4, H=H, dtype=np.float32)
    q, sinks = 2 * queries(128, 1, 4, H), queries(4)
    run = compiled(scale=H**-0.5, window=window)

    def rows(first: int, count: int, Z: int = given.table_BZ.shape[1]) -> np.ndarray:
        of = slice(first, first + count)
        return np.asarray(run(q[of], given.k_YKSH, given.v_YKSH, given.table_BZ[of, :Z], positions[of], sinks))

    together = rows(0, 128)
    for count in (1, 2, 3, 5, 8, 9, 16, 31, 32, 33, 64, 100):
        for first in range(0, 129 - count, max(count, 3)):
            np.testing.assert_array_equal(rows(first, count), together[first : first + count], err_msg=f"{count} rows")
    short = np.flatnonzero((positions[:, 0] >= 0) & (positions[:, 0] < 128))
    assert len(short) > 9
    for row in short:
        np.testing.assert_array_equal(rows(row, 1, Z=1), together[row : row + 1])


def test_what_it_takes():
    assert lanes.takes(np.zeros((2, 1, 4, 8), np.float32), np.zeros((3, 4, 128, 8), np.float32))
    for T, N, K, dtype in ((2, 4, 4, np.float32), (1, 4, 2, np.float32), (1, 4, 4, np.float16)):
        assert not lanes.takes(np.zeros((2, T, N, 8), dtype), np.zeros((3, K, 128, 8), dtype))
