"""Decode attention over pages: kernels against float64 NumPy, and that they lower for CUDA.

Triton's are interpreted on a CPU; Mosaic's, which cannot be, run on a Hopper GPU. Whatever no row sees is NaN, page 0
included.
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, fp8_pages, pages
from pallas_kernels.attention import api, attention_over_pages
from pallas_kernels.attention.decode import mosaic_sm90, triton
from tests.oracles import attention_numpy
from tests.oracles.paged import Paged, paged, renumbered
from tests.pallas_kernels.marks import lowered, lowered_for_h200, needs_hopper, needs_mosaic
from tests.thinned import thinned, thorough

EPS32 = float(jnp.finfo(jnp.float32).eps)
BFLOAT16 = [
    pytest.param(mosaic_sm90.decode, jnp.bfloat16, id="mosaic", marks=needs_hopper),
    pytest.param(partial(triton.decode, tile=32, interpret=True), jnp.bfloat16, id="triton-bfloat16"),
]
FLOAT32 = pytest.param(
    partial(triton.decode, interpret=True), jnp.float32, id="triton-float32", marks=pytest.mark.thorough
)
KERNELS = [*BFLOAT16, FLOAT32]


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


TILE_EDGES = [0, 31, 32, 62, 63, 64, 127, 128, 190]
EDGES = [0, 1, 31, 32, 127, 128, 129, 255, 256, 300, -1]
CASES = {
    "all positions": Case(N=8, K=1, H=64, positions=[300, -1, 0, 127, 128]),
    "edges of tiles": Case(N=8, K=1, H=64, positions=TILE_EDGES, settings={"splits": 1}),
    "edges of tiles, splits": Case(N=8, K=1, H=64, positions=TILE_EDGES, settings={"splits": 2}),
    "one query a group": Case(N=3, K=3, H=64, positions=[127, 0], settings={"splits": 1}),
    "eleven queries a group": Case(N=22, K=2, H=64, positions=[12, -1], settings={"splits": 3}),
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
SM90_TILE_EDGES = [
    count + more
    for count in (0, 7, 15, 31, 63, 127, 159, 255, 1023, 1198)
    for more in (-1, 0, 1)
    if count + more < 1199
]
SM90 = {
    "one block": Case(N=8, K=1, H=64, positions=[700, -1, 33], settings={"splits": 1, "blocks": 1}),
    "splits of blocks": Case(N=16, K=2, H=64, positions=[699, -1, 0, 500], settings={"splits": 3, "blocks": 1}),
    "a cluster": Case(N=64, K=8, H=64, positions=[700, 5, 128, -1, 255], settings={"splits": 1, "blocks": 8}),
    "splits of clusters": Case(N=14, K=2, H=128, positions=[1100], settings={"splits": 3, "blocks": 2}),
    "short tiles": Case(N=8, K=1, H=64, positions=[900, 99], settings={"splits": 1, "blocks": 2, "warp_tile": 16}),
    "long tiles": Case(N=8, K=1, H=64, positions=[900, 99], settings={"splits": 1, "blocks": 1, "warp_tile": 64}),
    "a window, a cluster": Case(N=64, K=8, H=64, positions=EDGES, window=128, settings={"splits": 1, "blocks": 2}),
    "a long window in a loop": Case(
        N=8, K=1, H=64, positions=[900, 511, 400, 7, -1], window=400, settings={"splits": 1, "blocks": 1}
    ),
    "a window of three pages": Case(N=8, K=1, H=64, positions=[383, 384, 256, 200, -1], window=200),
    "edges of tiles, one block": Case(N=8, K=1, H=64, positions=SM90_TILE_EDGES, settings={"splits": 1, "blocks": 1}),
    "edges of tiles, a cluster": Case(N=8, K=1, H=64, positions=SM90_TILE_EDGES, settings={"splits": 1, "blocks": 8}),
    "eight warps": Case(N=8, K=1, H=64, positions=SM90_TILE_EDGES, settings={"splits": 1, "blocks": 1, "warps": 8}),
    "eight warps, a cluster": Case(
        N=64, K=8, H=64, positions=[700, 5, 128, -1, 255, 2047], settings={"splits": 1, "blocks": 4, "warps": 8}
    ),
    "eight warps, one query a group": Case(
        N=5, K=5, H=64, positions=[511, 128, -1], settings={"splits": 1, "blocks": 2, "warps": 8}
    ),
    "eight warps, splits": Case(
        N=14, K=2, H=128, positions=[1100, 3, 600, -1], settings={"splits": 3, "blocks": 2, "warps": 8}
    ),
    "eight warps, sixteen queries a group": Case(
        N=32, K=2, H=64, positions=[129, -1, 900], settings={"splits": 1, "blocks": 2, "warps": 8}
    ),
    "eight warps, wide tiles": Case(
        N=32, K=8, H=128, positions=[2047, 100, -1], settings={"splits": 1, "blocks": 8, "warps": 8, "warp_tile": 32}
    ),
    "gpt2-xl": Case(N=25, K=25, H=64, positions=[1023]),
    "one query a group, a cluster": Case(
        N=25, K=25, H=64, positions=[511, 128, -1], settings={"splits": 1, "blocks": 4}
    ),
    "sixteen queries a group": Case(N=32, K=2, H=64, positions=[129, -1], settings={"splits": 1, "blocks": 2}),
    "more queries than a block has room for": Case(N=40, K=2, H=64, positions=[130, 600], window=128),
    "… in splits of clusters": Case(N=40, K=2, H=64, positions=[129, -1], settings={"splits": 2, "blocks": 2}),
    "three times the width": Case(N=5, K=1, H=192, positions=[199, -1], settings={"splits": 1, "blocks": 4}),
    "more turns than a warp holds pages for": Case(
        N=8, K=1, H=128, positions=[4500, 2100, 2047, 2048, -1], settings={"splits": 1, "blocks": 1}
    ),
    "gpt-oss": Case(N=64, K=8, H=64, positions=[32767]),
    "gpt-oss, half of a cluster's": Case(N=64, K=8, H=64, positions=[2047]),
    "gpt-oss, a short row in a long table": Case(N=64, K=8, H=64, positions=[100], pages=1024),
    "gpt-oss, eight rows": Case(N=64, K=8, H=64, positions=[2047, 0, 1000, 127, 128, -1, 1500, 2046]),
    "gpt-oss, its windows": Case(N=64, K=8, H=64, positions=[*range(2000, 2030), -1, 5], window=128, pages=16),
    "gpt2": Case(N=12, K=12, H=64, positions=[1023, 511, -1, 0, 128, 127, 640, 1000]),
    "llama 8B": Case(N=32, K=8, H=128, positions=[2047, 100, -1, 1024]),
}


@needs_hopper
@pytest.mark.parametrize("name", [*CASES, *SM90])
def test_pages_in_float8_give_the_bits_of_rounded_numbers_on_a_gpu(name):
    case = {**CASES, **SM90}[name]
    _, (q, k, v, *rest) = _operands(case, jnp.bfloat16)
    packed = [fp8_pages.rounded(jnp.asarray(pool)) for pool in (k, v)]
    plain = [fp8_pages.expanded(pool, jnp.bfloat16) for pool in packed]
    found, expected = (np.asarray(_run(mosaic_sm90.decode, case)(q, *pools, *rest)) for pools in (packed, plain))
    np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))
    assert np.isfinite(found.astype(np.float32)).all() and found.astype(np.float32).any()


def _given(case: Case, dtype: Any, **more: Any) -> Paged:
    back = (case.window or 1 << 30) - 1
    spans = [(max(0, p - back), p + 1) for p in case.positions]
    return paged(spans, K=case.K, H=case.H, dtype=dtype, pages=case.pages, **more)


def _operands(case: Case, dtype: Any, sinks: Any = jnp.float32, **more: Any) -> tuple[Paged, list[Any]]:
    rng = np.random.default_rng(7)
    shape = len(case.positions), 1, case.N, case.H
    q = np.asarray(jnp.asarray(rng.standard_normal(shape, np.float32), dtype))
    given = _given(case, dtype, **more)
    positions = np.array(case.positions, np.int32)[:, None]
    sinks_N = None if sinks is None else np.asarray(jnp.asarray(rng.standard_normal(case.N) * 2, sinks))
    return given, [q, given.k_YKSH, given.v_YKSH, given.table_BZ, positions, sinks_N]


def _run(kernel: Any, case: Case) -> Any:
    kernel = partial(kernel, **case.settings)
    return jax.jit(partial(api._decode_pages, kernel, scale=case.scale, window=case.window))


def _check(kernel: Any, dtype: Any, case: Case, sinks: Any = jnp.float32) -> None:
    given, operands = _operands(case, dtype, sinks)
    actual = _run(kernel, case)(*operands)
    assert actual.dtype == dtype
    _compare(actual, given, operands, case)
    assert not np.asarray(actual, np.float32)[operands[4][:, 0] < 0].any()


def _compare(actual: jax.Array, given: Paged, operands: list[Any], case: Case, more: float = 0.0) -> None:
    """As in `test_attention.py`: rounding of weights and results, and float32 sums over H and S.

    exp2 of scores times log2(e), a float32 of size up to 8, adds 8·eps32; `more` is added too.
    """
    q, *_, positions, sinks_N = operands
    tolerance = 4 * EPS32 * (math.sqrt(case.H) + math.sqrt(given.k_BKSH.shape[2]) + 2) + more
    tolerance += 2 * float(jnp.finfo(q.dtype).eps) if q.dtype != jnp.float32 else 0.0
    contiguous = q, given.k_BKSH, given.v_BKSH, positions, given.positions_BS, sinks_N
    expected = attention_numpy.attention(*contiguous, scale=case.scale, window=case.window)
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
@pytest.mark.parametrize("name", thinned(CASES, "all positions", "edges of tiles", "a window", "a window and splits"))
def test_agrees_with_the_oracle(name, kernel, dtype):
    _check(kernel, dtype, CASES[name])


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
@pytest.mark.parametrize(
    "name", thinned(["edges of tiles", "edges of tiles, splits", "a window", "a window and splits"], "edges of tiles")
)
def test_agrees_with_the_oracle_without_sinks(name, kernel, dtype):
    _check(kernel, dtype, CASES[name], sinks=None)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dtype", thinned(triton.DTYPES, jnp.bfloat16, jnp.float32))
@pytest.mark.parametrize(("N", "K", "H"), [(6, 2, 80), thorough(2, 2, 96), (10, 5, 12)])
def test_odd_widths(N, K, H, dtype, splits):
    case = Case(N=N, K=K, H=H, positions=[69, -1, 16], settings={"splits": splits, "tile": 32})
    _check(partial(triton.decode, interpret=True), dtype, case)


@pytest.mark.parametrize(("kernel", "dtype"), BFLOAT16)
@pytest.mark.parametrize("splits", [1, 3])
def test_large_sinks(splits, kernel, dtype):
    """A sink that is far below all scores is no sink, and one far above takes all."""
    case = CASES["all positions"]._replace(settings={"splits": splits})
    given, operands = _operands(case, dtype)
    operands[-1] = np.repeat([-1e9, -np.inf, 1e4, 1e9], 2).astype(np.float32)
    actual = _run(kernel, case)(*operands)
    _compare(actual, given, operands, case)
    assert not np.asarray(actual, np.float32)[:, 0, 4:].any()
    operands[-1] = None
    _compare(actual[:, :, :4], given, [operands[0][:, :, :4], *operands[1:]], case)


@pytest.mark.parametrize(("kernel", "dtype"), BFLOAT16)
def test_scores_that_grow_and_shrink_by_hundreds(kernel, dtype):
    """Pages whose maxima are far apart, in both orders: the running maximum carries them."""
    case = Case(N=4, K=1, H=64, positions=[383, 383], settings={"splits": 1})
    given, (q, *rest) = _operands(case, dtype, sinks=None)
    for row, sizes in enumerate([(1, 60, 8), (8, 60, 1)]):
        for block, size in enumerate(sizes):
            places = slice(128 * block, 128 * (block + 1))
            for keys in (given.k_YKSH[given.table_BZ[row, block]], given.k_BKSH[row, :, places]):
                keys *= keys.dtype.type(size)
    operands = [q * q.dtype.type(4), *rest]
    # Scores up to about 2000 are off by 2000·eps32·4, and so are the weights, relatively.
    _compare(_run(kernel, case)(*operands), given, operands, case, more=4e-3)


@needs_hopper
@pytest.mark.parametrize("sinks", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", SM90)
def test_agrees_with_the_oracle_on_a_gpu(name, sinks):
    _check(mosaic_sm90.decode, jnp.bfloat16, SM90[name], sinks)


@needs_hopper
@pytest.mark.parametrize("window", [1, 31, 32, 33, 96, 127, 128, 129, 130, 257])
def test_every_edge_of_a_window_on_a_gpu(window):
    case = Case(N=8, K=1, H=64, positions=[*range(120, 136), *range(250, 262), 31, 32, 33, 1, 0, -1], window=window)
    _check(mosaic_sm90.decode, jnp.bfloat16, case)
    _check(mosaic_sm90.decode, jnp.bfloat16, case._replace(settings={"splits": 1, "blocks": 1}), sinks=None)


def _bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float32)


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
@pytest.mark.parametrize("name", thinned(["all positions", "splits", "a window"], "a window"))
def test_bits_do_not_depend_on_where_pages_lie(name, kernel, dtype):
    case = CASES[name]
    given, (q, *_, positions, sinks_N) = _operands(case, dtype, shuffled=False)
    run = _run(kernel, case)
    expected = _bits(run(q, given.k_YKSH, given.v_YKSH, given.table_BZ, positions, sinks_N))
    for seed in (1, 2):
        other = renumbered(given, seed)
        actual = _bits(run(q, other.k_YKSH, other.v_YKSH, other.table_BZ, positions, sinks_N))
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
@pytest.mark.parametrize(("window", "splits"), [(None, 1), (None, 3), (128, 2)])
def test_bits_do_not_depend_on_other_rows(window, splits, kernel, dtype):
    _bits_do_not_depend_on_other_rows(window, {"splits": splits}, kernel, dtype)


def _bits_do_not_depend_on_other_rows(window: int | None, settings: dict[str, int], kernel: Any, dtype: Any) -> None:
    ours = Case(N=8, K=1, H=64, positions=[300, 17, -1], window=window, pages=4, settings=settings)
    theirs = ours._replace(positions=[300, 511, 130])
    first, operands = _operands(ours, dtype)
    expected = _bits(_run(kernel, ours)(*operands))[0]
    other, (q, k, v, table, positions, sinks_N) = _operands(theirs, dtype, seed=3)
    for block, page in enumerate(table[0]):  # the first row has the same keys and values, in other pages
        k[page], v[page] = (pool[first.table_BZ[0, block]] for pool in (first.k_YKSH, first.v_YKSH))
    actual = _bits(_run(kernel, theirs)(q, k, v, other.table_BZ, positions, sinks_N))[0]
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(("kernel", "dtype"), BFLOAT16)
@pytest.mark.parametrize("splits", [1, 3])
def test_bits_do_not_depend_on_the_width_of_the_table(splits, kernel, dtype):
    _bits_do_not_depend_on_the_width_of_the_table({"splits": splits}, kernel, dtype)


def _bits_do_not_depend_on_the_width_of_the_table(settings: dict[str, int], kernel: Any, dtype: Any) -> None:
    case = Case(N=8, K=1, H=64, positions=[255, 70, -1], settings=settings)
    _, (q, k, v, table, *rest) = _operands(case, dtype)
    wide = np.pad(table, ((0, 0), (0, 5)))
    run = _run(kernel, case)
    np.testing.assert_array_equal(_bits(run(q, k, v, wide, *rest)), _bits(run(q, k, v, table, *rest)))


@needs_hopper
@pytest.mark.parametrize(
    "settings", [{"splits": 1, "blocks": 1}, {"splits": 1, "blocks": 8}, {"splits": 3, "blocks": 2}]
)
def test_bits_depend_neither_on_other_rows_nor_on_the_table_on_a_gpu(settings):
    _bits_do_not_depend_on_other_rows(None, settings, mosaic_sm90.decode, jnp.bfloat16)
    _bits_do_not_depend_on_the_width_of_the_table(settings, mosaic_sm90.decode, jnp.bfloat16)


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


def test_what_the_kernels_refuse():
    case = Case(N=8, K=1, H=64, positions=[0, 0])

    def operands(case: Case, dtype: Any = jnp.bfloat16) -> tuple[list[Any], dict[str, Any]]:
        _, (q, k, v, table, positions, _) = _operands(case, dtype)
        return [q[:, 0], k, v, positions[:, 0] + 1], {"table_BZ": table, "scale": 1.0}

    (q, k, v, counts), more = operands(case)
    for operand in range(3):
        mixed = [x.astype(np.float32) if i == operand else x for i, x in enumerate((q, k, v))]
        for decode in (mosaic_sm90.decode, triton.decode):
            with pytest.raises(ValueError, match="float32"):
                decode(*mixed, counts, **more)
    with pytest.raises(ValueError, match="float64"), jax.enable_x64(True):
        triton.decode(*(x.astype(np.float64) for x in (q, k, v)), counts, **more)
    given, its = operands(case._replace(H=80))
    with pytest.raises(ValueError, match="multiples of 64, found 80"):
        mosaic_sm90.decode(*given, **its)
    given, its = operands(case._replace(N=16, K=3))
    for decode in (mosaic_sm90.decode, triton.decode):
        with pytest.raises(ValueError, match="16 query heads cannot share 3"):
            decode(*given, **its)
    for tile in (8, 48, 100, 256):
        with pytest.raises(ValueError, match=f"16, 32, 64 or 128 places, found {tile}"):
            triton.decode(q, k, v, counts, **more, tile=tile)
        with pytest.raises(ValueError, match=f"16, 32, 64 or 128 places, found {tile}"):
            mosaic_sm90.decode(q, k, v, counts, **more, warp_tile=tile)
    with pytest.raises(ValueError, match="2, 4 or 8 blocks, found 3"):
        mosaic_sm90.decode(q, k, v, counts, **more, blocks=3)
    with pytest.raises(ValueError, match="2 ranges of 4096 places need 2 splits, or 1 block"):
        wide = np.pad(more["table_BZ"], ((0, 0), (0, 32)))
        mosaic_sm90.decode(q, k, v, counts, **{**more, "table_BZ": wide}, splits=1, blocks=2)
    given, its = operands(case._replace(N=16, H=256))
    with pytest.raises(ValueError, match="8 warps, 4 a cluster, have no room"):
        wide = np.pad(its["table_BZ"], ((0, 0), (0, 31)))
        mosaic_sm90.decode(*given, **{**its, "table_BZ": wide}, splits=1, blocks=4, warps=8)
    with pytest.raises(ValueError, match="sinks of bfloat16 or float32, found float16"):
        mosaic_sm90.decode(q, k, v, counts, np.zeros(case.N, np.float16), **more)


def _shapes(case: Case, dtype: Any, sinks: Any = jnp.float32) -> list[Any]:
    B, Z = len(case.positions), case.pages or max(max(case.positions) // pages.PAGE + 1, 1)
    pool = jax.ShapeDtypeStruct((1 + B * Z, case.K, pages.PAGE, case.H), dtype)
    return [
        jax.ShapeDtypeStruct((B, 1, case.N, case.H), dtype),
        pool,
        pool,
        jax.ShapeDtypeStruct((B, Z), jnp.int32),
        jax.ShapeDtypeStruct((B, 1), jnp.int32),
        None if sinks is None else jax.ShapeDtypeStruct((case.N,), sinks),
    ]


@needs_mosaic
@pytest.mark.parametrize("sinks", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", [*CASES, *SM90])
def test_mosaic_lowers_for_cuda(name, sinks):
    case = {**CASES, **SM90}[name]
    text = lowered(_run(mosaic_sm90.decode, case), *_shapes(case, jnp.bfloat16, sinks))
    assert "decode_attention" in text
    # One kernel, and one that combines its parts if a cluster has not all of a row; and none that converts arrays.
    is_split = case.settings.get("splits", 1) > 1 or name in ("gpt-oss", "gpt-oss, a short row in a long table")
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 1 + is_split
    assert not re.search(r"stablehlo\.convert .*(bf16|f32)", text)


@needs_mosaic
def test_auto_lowers_the_kernel(monkeypatch):
    monkeypatch.setattr(dispatch, "preferred", lambda: dispatch.MOSAIC)
    for case in (CASES["all positions"], CASES["a window"]):
        run = partial(attention_over_pages, scale=case.scale, window=case.window)
        assert "mosaic_gpu" in lowered(run, *_shapes(case, jnp.bfloat16))
        assert "mosaic_gpu" not in lowered(run, *_shapes(case, jnp.float32))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", triton.DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        *(CASES[name] for name in ("all positions", "a window", "a window and splits", "wide")),
        *(SM90[name] for name in ("gpt-oss", "gpt-oss, its windows", "gpt2-xl")),
        *(Case(N=N, K=K, H=H, positions=[69, 3]) for N, K, H in ((6, 2, 80), (2, 2, 96), (10, 5, 12))),
    ],
    ids=lambda case: f"{case.N} on {case.K}·{case.H}",
)
def test_triton_lowers_for_cuda(case, dtype):
    text = lowered_for_h200(_run(triton.decode, case), *_shapes(case, dtype))
    assert len(re.findall(r"custom_call @\S*triton", text)) == 1
