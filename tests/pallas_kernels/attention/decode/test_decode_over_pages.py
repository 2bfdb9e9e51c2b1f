"""Decode attention over pages: kernels against float64 NumPy, and that they lower for CUDA.

Triton's are interpreted on a CPU; Mosaic's, which cannot be, run on a Hopper GPU. Whatever no row sees is NaN, page 0
included.
"""

import math
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, pages
from pallas_kernels.attention import api, attention_over_pages
from pallas_kernels.attention.decode import mosaic_sm90, triton
from tests.oracles import attention_numpy
from tests.oracles.paged import Paged, paged, renumbered
from tests.pallas_kernels.marks import lowered, lowered_for_h200, needs_hopper, needs_mosaic
from tests.thinned import thinned, thorough

EPS32 = float(jnp.finfo(jnp.float32).eps)
KERNELS = [
    pytest.param(mosaic_sm90.decode, jnp.bfloat16, id="mosaic", marks=needs_hopper),
    pytest.param(partial(triton.decode, tile=32, interpret=True), jnp.bfloat16, id="triton-bfloat16"),
    pytest.param(partial(triton.decode, interpret=True), jnp.float32, id="triton-float32", marks=pytest.mark.thorough),
]


class Case(NamedTuple):
    """Sizes, by `gptjax.axes`; the rows' positions, of which -1 is padding; and the pages of a table."""

    N: int
    K: int
    H: int
    positions: list[int]
    window: int | None = None
    pages: int | None = None
    settings: Mapping[str, int] = MappingProxyType({})  # of the kernel

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.H)


EDGES = [0, 1, 31, 32, 127, 128, 129, 255, 256, 300, -1]
CASES = {
    "all positions": Case(N=8, K=1, H=64, positions=[300, -1, 0, 127, 128]),
    "splits": Case(N=8, K=2, H=64, positions=[511, 3, -1], settings={"splits": 3}),
    "pages that are not in use": Case(N=4, K=2, H=64, positions=[130, 5], pages=7, settings={"splits": 2}),
    "a window": Case(N=8, K=1, H=64, positions=EDGES, window=128),
    "a short window": Case(N=8, K=2, H=64, positions=[0, 9, 130, 255, 256, -1], window=10),
    "a window of one": Case(N=2, K=1, H=64, positions=[0, 127, 128, -1], window=1),
    "a window and splits": Case(N=8, K=1, H=64, positions=[700, 600, 4, -1], window=300, settings={"splits": 3}),
    "a window longer than the cache": Case(N=8, K=1, H=64, positions=[200, 3], window=4096),
    "wide": Case(N=14, K=2, H=128, positions=[200, 64, -1]),
    "a wide window": Case(N=14, K=2, H=128, positions=[400, 64, -1, 127], window=128),
}
SM90 = {
    "one block": Case(N=8, K=1, H=64, positions=[700, -1, 33], settings={"splits": 1, "blocks": 1}),
    "a cluster": Case(N=64, K=8, H=64, positions=[700, 5, 128, -1, 255], settings={"splits": 1, "blocks": 8}),
    "splits of clusters": Case(N=14, K=2, H=128, positions=[1100], settings={"splits": 3, "blocks": 2}),
    "short tiles": Case(N=8, K=1, H=64, positions=[900, 99], settings={"splits": 1, "blocks": 2, "warp_tile": 16}),
    "long tiles": Case(N=8, K=1, H=64, positions=[900, 99], settings={"splits": 1, "blocks": 1, "warp_tile": 64}),
    "a window, a cluster": Case(N=64, K=8, H=64, positions=EDGES, window=128, settings={"splits": 1, "blocks": 2}),
    "a long window in a loop": Case(
        N=8, K=1, H=64, positions=[900, 511, 400, 7, -1], window=400, settings={"splits": 1, "blocks": 1}
    ),
    "a window of three pages": Case(N=8, K=1, H=64, positions=[383, 384, 256, 200, -1], window=200),
    "one query a group": Case(N=25, K=25, H=64, positions=[511, 128, -1]),
    "more queries than a block has room for": Case(N=40, K=2, H=64, positions=[130, 600], window=128),
    "more turns than a warp holds pages for": Case(
        N=8, K=1, H=128, positions=[4500, 2100, 2047, 2048, -1], settings={"splits": 1, "blocks": 1}
    ),
    "gpt-oss": Case(N=64, K=8, H=64, positions=[32767]),
    "gpt-oss, a short row in a long table": Case(N=64, K=8, H=64, positions=[100], pages=1024),
    "gpt-oss, eight rows": Case(N=64, K=8, H=64, positions=[2047, 0, 1000, 127, 128, -1, 1500, 2046]),
    "gpt-oss, its windows": Case(N=64, K=8, H=64, positions=[*range(2000, 2030), -1, 5], window=128, pages=16),
    "gpt2": Case(N=12, K=12, H=64, positions=[1023, 511, -1, 0, 128, 127, 640, 1000]),
    "llama 8B": Case(N=32, K=8, H=128, positions=[2047, 100, -1, 1024]),
}


def _given(case: Case, dtype: Any, **more: Any) -> Paged:
    back = (case.window or 1 << 30) - 1
    spans = [(max(0, p - back), p + 1) for p in case.positions]
    return paged(spans, K=case.K, H=case.H, dtype=dtype, pages=case.pages, **more)


def _operands(case: Case, dtype: Any, sinks: bool, **more: Any) -> tuple[Paged, list[Any]]:
    rng = np.random.default_rng(7)
    shape = len(case.positions), 1, case.N, case.H
    q = np.asarray(jnp.asarray(rng.standard_normal(shape, np.float32), dtype))
    given = _given(case, dtype, **more)
    positions = np.array(case.positions, np.int32)[:, None]
    sinks_N = (rng.standard_normal(case.N) * 2).astype(np.float32) if sinks else None
    return given, [q, given.k_YKSH, given.v_YKSH, given.table_BZ, positions, sinks_N]


def _run(kernel: Any, case: Case) -> Any:
    kernel = partial(kernel, **case.settings)
    return jax.jit(partial(api._decode_pages, kernel, scale=case.scale, window=case.window))


def _check(kernel: Any, dtype: Any, case: Case, sinks: bool) -> None:
    given, operands = _operands(case, dtype, sinks)
    actual = _run(kernel, case)(*operands)
    q, *_, positions, sinks_N = operands
    assert actual.dtype == dtype
    # As in `test_attention_decode.py`.
    tolerance = 4 * EPS32 * (math.sqrt(case.H) + math.sqrt(given.k_BKSH.shape[2]) + 2)
    tolerance += 2 * float(jnp.finfo(dtype).eps) if dtype != jnp.float32 else 0.0
    contiguous = q, given.k_BKSH, given.v_BKSH, positions, given.positions_BS, sinks_N
    expected = attention_numpy.attention(*contiguous, scale=case.scale, window=case.window)
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=tolerance)
    assert not np.asarray(actual, np.float32)[positions[:, 0] < 0].any()


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
@pytest.mark.parametrize("sinks", [True, thorough(False)])
@pytest.mark.parametrize("name", thinned(CASES, "all positions", "a window", "a window and splits"))
def test_agrees_with_the_oracle(name, sinks, kernel, dtype):
    _check(kernel, dtype, CASES[name], sinks)


@needs_hopper
@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize("name", SM90)
def test_agrees_with_the_oracle_on_a_gpu(name, sinks):
    _check(mosaic_sm90.decode, jnp.bfloat16, SM90[name], sinks)


@needs_hopper
@pytest.mark.parametrize("window", [1, 31, 32, 33, 96, 127, 128, 129, 130, 257])
def test_every_edge_of_a_window_on_a_gpu(window):
    case = Case(N=8, K=1, H=64, positions=[*range(120, 136), *range(250, 262), 31, 32, 33, 1, 0, -1], window=window)
    _check(mosaic_sm90.decode, jnp.bfloat16, case, True)
    _check(mosaic_sm90.decode, jnp.bfloat16, case._replace(settings={"splits": 1, "blocks": 1}), False)


def _bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float32)


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
@pytest.mark.parametrize("name", thinned(["all positions", "splits", "a window"], "a window"))
def test_bits_do_not_depend_on_where_pages_lie(name, kernel, dtype):
    case = CASES[name]
    given, (q, *_, positions, sinks_N) = _operands(case, dtype, True, shuffled=False)
    run = _run(kernel, case)
    expected = _bits(run(q, given.k_YKSH, given.v_YKSH, given.table_BZ, positions, sinks_N))
    for seed in (1, 2):
        other = renumbered(given, seed)
        actual = _bits(run(q, other.k_YKSH, other.v_YKSH, other.table_BZ, positions, sinks_N))
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
@pytest.mark.parametrize("name", thinned(["all positions", "splits"], "splits"))
def test_bits_are_those_of_places_that_lie_together(name, kernel, dtype):
    """With a window that is not a page they need not be: a ring's places are in another order."""
    case = CASES[name]
    given, operands = _operands(case, dtype, True)
    q, *_, positions, sinks_N = operands
    counts = np.maximum(positions[:, 0] + 1, 0)
    together = kernel(q[:, 0], given.k_BKSH, given.v_BKSH, counts, sinks_N, scale=case.scale, **case.settings)
    np.testing.assert_array_equal(_bits(_run(kernel, case)(*operands)[:, 0]), _bits(together))


@needs_hopper
def test_bits_of_a_window_of_a_page_are_those_of_a_ring():
    case = SM90["gpt-oss, its windows"]
    given, operands = _operands(case, jnp.bfloat16, True)
    q, *_, positions, sinks_N = operands
    rings = [np.full((len(q), case.K, 128, case.H), np.nan, q.dtype) for _ in "kv"]
    for row, position in enumerate(positions[:, 0]):
        seen = np.arange(max(0, position - 127), position + 1)
        for ring, cache in zip(rings, (given.k_BKSH, given.v_BKSH), strict=True):
            ring[row, :, seen % 128] = cache[row, :, seen]
    counts = np.clip(positions[:, 0] + 1, 0, 128)
    expected = mosaic_sm90.decode(q[:, 0], *rings, counts, sinks_N, scale=case.scale)
    np.testing.assert_array_equal(_bits(_run(mosaic_sm90.decode, case)(*operands)[:, 0]), _bits(expected))


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
@pytest.mark.parametrize("window", [None, 128])
def test_bits_do_not_depend_on_other_rows(window, kernel, dtype):
    ours = Case(N=8, K=1, H=64, positions=[300, 17, -1], window=window, pages=4, settings={"splits": 2})
    theirs = ours._replace(positions=[300, 511, 130])
    first, operands = _operands(ours, dtype, True)
    expected = _bits(_run(kernel, ours)(*operands))[0]
    other, (q, k, v, table, positions, sinks_N) = _operands(theirs, dtype, True, seed=3)
    for block, page in enumerate(table[0]):  # the first row has the same keys and values, in other pages
        k[page], v[page] = (pool[first.table_BZ[0, block]] for pool in (first.k_YKSH, first.v_YKSH))
    actual = _bits(_run(kernel, theirs)(q, k, v, other.table_BZ, positions, sinks_N))[0]
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 130, 300])
def test_windows_of_tables(size):
    """Every position of a window is found in its page, and none before or behind it."""
    table = np.arange(1, 9)[None] * 10
    for position in [-1, 0, 1, 126, 127, 128, 129, 255, 256, 400, 1023]:
        window_1Z, start_1, end_1 = pages.window(table, np.array([position]), size)
        places = range(int(start_1[0]), int(end_1[0]))
        expected = range(max(0, position - size + 1), position + 1)
        assert len(places) == len(expected) and int(start_1[0]) < pages.PAGE
        assert not places or places[-1] < window_1Z.shape[1] * pages.PAGE
        for place, wanted in zip(places, expected, strict=True):
            assert window_1Z[0, place // pages.PAGE] == table[0, wanted // pages.PAGE]
            assert place % pages.PAGE == wanted % pages.PAGE


def _shapes(case: Case, dtype: Any) -> list[Any]:
    B, Z = len(case.positions), case.pages or max(max(case.positions) // pages.PAGE + 1, 1)
    pool = jax.ShapeDtypeStruct((1 + B * Z, case.K, pages.PAGE, case.H), dtype)
    return [
        jax.ShapeDtypeStruct((B, 1, case.N, case.H), dtype),
        pool,
        pool,
        jax.ShapeDtypeStruct((B, Z), jnp.int32),
        jax.ShapeDtypeStruct((B, 1), jnp.int32),
        jax.ShapeDtypeStruct((case.N,), jnp.float32),
    ]


@needs_mosaic
@pytest.mark.parametrize("name", [*CASES, *SM90])
def test_mosaic_lowers_for_cuda(name):
    case = {**CASES, **SM90}[name]
    text = lowered(_run(mosaic_sm90.decode, case), *_shapes(case, jnp.bfloat16))
    assert "decode_attention" in text


@needs_mosaic
def test_auto_lowers_the_kernel(monkeypatch):
    monkeypatch.setattr(dispatch, "preferred", lambda: dispatch.MOSAIC)
    for case in (CASES["all positions"], CASES["a window"]):
        run = partial(attention_over_pages, scale=case.scale, window=case.window)
        assert "mosaic_gpu" in lowered(run, *_shapes(case, jnp.bfloat16))
        assert "mosaic_gpu" not in lowered(run, *_shapes(case, jnp.float32))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["all positions", "a window", "a window and splits", "wide"])
def test_triton_lowers_for_cuda(name):
    case = CASES[name]
    text = lowered_for_h200(_run(triton.decode, case), *_shapes(case, jnp.bfloat16))
    assert "triton" in text
