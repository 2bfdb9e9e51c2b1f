"""Prefill attention over pages for Hopper, packed: interpreted on a CPU, lowered for CUDA, and run on such a GPU.

Whatever no query of a row sees is NaN, page 0 included.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.attention import attention_over_pages, packed_attention_over_pages
from pallas_kernels.attention.prefill import mosaic_sm90, schedule
from pallas_kernels.fp8_pages import Fp8Pages
from pallas_kernels.pages import PAGE, TILE, Tiles
from tests.oracles import attention_numpy, fp8_numpy
from tests.oracles.paged import Paged, paged, renumbered
from tests.pallas_kernels.marks import lowered, needs_hopper, needs_mosaic
from tests.thinned import thinned, thorough

BF16 = float(jnp.finfo(jnp.bfloat16).eps)
EPS32 = float(jnp.finfo(jnp.float32).eps)


@pytest.fixture
def on_the_cpu():
    """The default device of every thread: the interpreter calls JAX from inside a running program, and a GPU that runs
    that program would wait for itself."""
    before = jax.config.jax_default_device
    jax.config.update("jax_default_device", jax.devices("cpu")[0])
    yield
    jax.config.update("jax_default_device", before)


def interpreted(test):
    """For tests of the kernel as Pallas interprets it."""
    return needs_mosaic(pytest.mark.usefixtures("on_the_cpu")(test))


class Part(NamedTuple):
    """Tokens of one row that follow each other in a call, after `gap` tokens of padding."""

    row: int
    position: int
    count: int
    gap: int = 0


class Case(NamedTuple):
    """Sizes, by `gptjax.axes`; the tokens; and how many tiles there are besides those that the tokens need."""

    T: int
    N: int
    K: int
    H: int
    parts: list[Part]
    window: int | None = None
    sinks: Any = None
    spare: int = 1
    pages: int | None = None

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.H)

    @property
    def rows(self) -> int:
        return 1 + max(part.row for part in self.parts)


CASES = {
    "a prompt": Case(T=130, N=2, K=2, H=64, parts=[Part(0, 0, 130)]),
    "groups and a prefix": Case(T=70, N=4, K=2, H=64, parts=[Part(0, 50, 69, gap=1)], sinks=jnp.bfloat16),
    "rows of different lengths": Case(
        T=300, N=2, K=1, H=64, parts=[Part(2, 130, 100, gap=3), Part(0, 0, 1), Part(1, 7, 150, gap=5)]
    ),
    "three heads a group": Case(
        T=201, N=3, K=1, H=64, parts=[Part(0, 3, 129), Part(1, 20, 65, gap=2)], sinks=jnp.float32
    ),
    "wide": Case(T=100, N=2, K=1, H=128, parts=[Part(0, 200, 64), Part(1, 0, 30)], sinks=jnp.bfloat16),
    "a width of 80": Case(T=40, N=2, K=2, H=80, parts=[Part(0, 100, 33, gap=5)]),
    "a width of 96": Case(T=71, N=1, K=1, H=96, parts=[Part(0, 10, 70)]),
    "one token": Case(T=1, N=2, K=1, H=64, parts=[Part(0, 128, 1)]),
    "a window": Case(T=230, N=2, K=1, H=64, parts=[Part(0, 400, 70), Part(1, 20, 150)], window=100),
    "a window of a page": Case(
        T=200, N=2, K=1, H=64, parts=[Part(1, 127, 130), Part(0, 0, 64, gap=3)], window=128, sinks=jnp.bfloat16
    ),
    "a long window": Case(T=72, N=2, K=1, H=64, parts=[Part(0, 800, 70)], window=600),
    "a wide window": Case(T=150, N=2, K=1, H=128, parts=[Part(0, 500, 140)], window=100),
}
LARGE = {
    "gpt-oss": Case(T=2048, N=64, K=8, H=64, parts=[Part(0, 0, 2048)], sinks=jnp.bfloat16),
    "gpt-oss, its windows": Case(T=2048, N=64, K=8, H=64, parts=[Part(0, 0, 2048)], window=128, sinks=jnp.bfloat16),
    "gpt-oss, four prompts": Case(
        T=2048, N=64, K=8, H=64, parts=[Part(row, 0, 500 + row, gap=row) for row in range(4)], sinks=jnp.bfloat16
    ),
    "gpt-oss, many short prompts": Case(
        T=2048, N=64, K=8, H=64, parts=[Part(63 - row, 2048, 31, gap=1) for row in range(64)], sinks=jnp.bfloat16
    ),
    "gpt-oss, windows of many rows": Case(
        T=1111, N=64, K=8, H=64, parts=[Part(row, 97 * row, 20 * row, gap=row) for row in range(10)], window=128
    ),
    "gpt-oss, a long prefix and short ones": Case(
        T=2000, N=64, K=8, H=64, parts=[Part(1, 5, 100), Part(0, 30720, 1800), Part(2, 127, 1)], sinks=jnp.bfloat16
    ),
    "gpt2": Case(T=512, N=12, K=12, H=64, parts=[Part(0, 0, 500)]),
    "gpt2-xl": Case(T=512, N=25, K=25, H=64, parts=[Part(1, 100, 300, gap=7), Part(0, 0, 200)]),
    "llama 8B": Case(T=1000, N=32, K=8, H=128, parts=[Part(0, 3000, 700), Part(1, 5, 300)]),
    "a width of 80": Case(T=304, N=32, K=32, H=80, parts=[Part(0, 333, 300, gap=3)]),
    "a width of 96": Case(T=304, N=6, K=3, H=96, parts=[Part(0, 333, 299, gap=2)], window=200),
}


def tiles_of(case: Case, size: int = TILE) -> Tiles:
    tiles, start = [], 0
    for row, position, count, gap in case.parts:
        start += gap
        tiles += [(row, start + i, min(size, count - i), position + i) for i in range(0, count, size)]
        start += count
    assert start <= case.T
    tiles += [(0, 7, 0, 99)] * case.spare
    return Tiles(*(np.array(each, np.int32) for each in zip(*tiles, strict=True)))


def _given(case: Case, **more: Any) -> Paged:
    back = (case.window or 1 << 30) - 1
    spans = [(0, 0)] * case.rows
    for row, position, count, _ in case.parts:
        spans[row] = max(0, position - back), position + count
    return paged(spans, K=case.K, H=case.H, dtype=jnp.bfloat16, pages=case.pages, **more)


def _operands(case: Case, **more: Any) -> tuple[Paged, list[Any]]:
    rng = np.random.default_rng(5)
    given, tiles = _given(case, **more), tiles_of(case)
    q = np.array(jnp.asarray(rng.standard_normal((case.T, case.N, case.H), np.float32), jnp.bfloat16))
    q[np.asarray(tiles.tokens(case.T)[0]) < 0] = np.nan  # padding
    sinks = [] if case.sinks is None else [np.asarray(jnp.asarray(rng.standard_normal(case.N) * 2, case.sinks))]
    return given, [q, given.k_YKSH, given.v_YKSH, given.table_BZ, tiles, *sinks]


def _check(
    actual: jax.Array, given: Paged, operands: list[Any], case: Case, most: int = 1 << 30, more: float = 0.0
) -> None:
    """Compares up to `most` tokens of a row; `more` is added to the tolerance."""
    assert actual.dtype == jnp.bfloat16
    # As in `test_decode_over_pages.py`: roundings of weights and results, and float32 sums over H and S.
    tolerance = 2 * BF16 + 4 * EPS32 * (math.sqrt(case.H) + math.sqrt(given.k_BKSH.shape[2]) + 2) + more
    q, _, _, _, tiles, *sinks = operands
    actual = np.asarray(actual, np.float64)
    rows_T, positions_T = map(np.asarray, tiles.tokens(case.T))
    assert not actual[rows_T < 0].any()
    for part in case.parts:
        tokens = np.flatnonzero(rows_T == part.row)
        rng = np.random.default_rng(part.row)
        edges = [i for i in (0, 1, 62, 63, 64, 65, 126, 127, 128, 129, part.count - 1) if i < part.count]
        some = tokens if part.count <= most else tokens[np.unique([*edges, *rng.integers(0, part.count, 2)])]
        row = slice(part.row, part.row + 1)
        contiguous = (
            q[None, some],
            given.k_BKSH[row],
            given.v_BKSH[row],
            positions_T[None, some],
            given.positions_BS[row],
        )
        expected = attention_numpy.attention(*contiguous, *sinks, scale=case.scale, window=case.window)[0]
        np.testing.assert_allclose(actual[some], expected, rtol=0, atol=tolerance)


def _run(case: Case, *, interpret: bool) -> Any:
    return partial(mosaic_sm90.prefill, scale=case.scale, window=case.window, interpret=interpret)


SOME = ("groups and a prefix", "rows of different lengths", "wide", "a window of a page")


@interpreted
@pytest.mark.parametrize("name", thinned(CASES, *SOME))
def test_agrees_with_the_oracle(name):
    case = CASES[name]
    given, operands = _operands(case)
    _check(_run(case, interpret=True)(*operands), given, operands, case, most=40)


FP8 = {
    "rows of different lengths": CASES["rows of different lengths"],
    "windows": Case(T=230, N=2, K=1, H=64, parts=[Part(2, 400, 70), Part(0, 20, 150)], window=100, pages=9),
    "one row": Case(T=72, N=2, K=1, H=64, parts=[Part(0, 800, 70)], window=300, sinks=jnp.bfloat16),
}


def _in_float8(operands: list[Any]) -> tuple[list[Any], list[Any]]:
    """With the numbers that float8 has; and in float8, with NaN and infinite scales where nobody looks."""
    q, *pools, table, tiles = operands[:5]
    plain = [fp8_numpy.as_read(pool).astype(pool.dtype) for pool in pools]
    packed = []
    for pool in pools:
        numbers, exponents = fp8_numpy.rounded(pool)
        exponents = np.where(np.isnan(pool).any(axis=-1, keepdims=True), 255, exponents + 127).astype(np.uint8)
        packed.append(Fp8Pages(jnp.asarray(numbers.view(np.uint8)), jnp.asarray(exponents)))
    return [q, *plain, table, tiles, *operands[5:]], [q, *packed, table, tiles, *operands[5:]]


@interpreted
@pytest.mark.parametrize("name", thinned(FP8, "windows"))
def test_pages_in_float8_give_the_bits_of_rounded_numbers(name):
    _check_float8(FP8[name], interpret=True)


@needs_hopper
@pytest.mark.parametrize("name", [*FP8, *LARGE])
def test_pages_in_float8_give_the_bits_of_rounded_numbers_on_a_gpu(name):
    _check_float8({**FP8, **LARGE}[name], interpret=False)


def _check_float8(case: Case, interpret: bool) -> None:
    plain, packed = _in_float8(_operands(case)[1])
    run = jax.jit(_run(case, interpret=interpret)) if not interpret else _run(case, interpret=True)
    expected, actual = (np.asarray(run(*each)) for each in (plain, packed))
    np.testing.assert_array_equal(actual.view(np.uint16), expected.view(np.uint16))
    assert np.isfinite(actual.astype(np.float32)).all() and actual.astype(np.float32).any()


@interpreted
@pytest.mark.parametrize("window", thinned([1, 64, 127, 128, 129], 129))
def test_every_edge_of_a_window(window):
    case = Case(T=72, N=2, K=1, H=64, parts=[Part(0, 191, 65, gap=4)], window=window, sinks=jnp.bfloat16)
    given, operands = _operands(case)
    _check(_run(case, interpret=True)(*operands), given, operands, case)


@interpreted
@pytest.mark.parametrize("programs", [thorough(1), 5])
def test_programs_take_items_in_turn(programs, monkeypatch):
    monkeypatch.setattr(schedule, "PROGRAMS", programs)
    parts = [Part(1, 150, 150, gap=2), Part(0, 0, 40)]
    case = Case(T=200 + programs, N=3, K=1, H=64, parts=parts, sinks=jnp.float32, spare=3)
    given, operands = _operands(case)
    _check(_run(case, interpret=True)(*operands), given, operands, case, most=40)


@interpreted
@pytest.mark.parametrize("sink", [thorough(-1e9), -np.inf, 1e9])
def test_large_sinks(sink):
    """A sink that is far below all scores is no sink, and one far above takes all."""
    case = Case(T=24, N=2, K=1, H=64, parts=[Part(0, 60, 19)])
    given, operands = _operands(case)
    actual = _run(case, interpret=True)(*operands, np.full(2, sink, np.float32))
    if sink < 0:
        _check(actual, given, operands, case)
    else:
        assert not np.asarray(actual, np.float32).any()


@interpreted
def test_scores_that_grow_and_shrink_by_hundreds():
    """Pages whose maxima are far apart, in both orders: the running maximum carries them."""
    case = Case(T=128, N=2, K=1, H=64, parts=[Part(0, 320, 64), Part(1, 320, 64)])
    given, (q, *_, tiles) = _operands(case)
    for row, sizes in enumerate([(1, 60, 8), (8, 60, 1)]):
        for block, size in enumerate(sizes):
            for keys in (given.k_YKSH[given.table_BZ[row, block]], given.k_BKSH[row, :, PAGE * block :][:, :PAGE]):
                keys *= keys.dtype.type(size)
    operands = [(q * q.dtype.type(4)), given.k_YKSH, given.v_YKSH, given.table_BZ, tiles]
    # Scores up to about 2000 are off by 2000·eps32·4, and so are the weights, relatively.
    _check(_run(case, interpret=True)(*operands), given, operands, case, more=4e-3)


@interpreted
def test_no_tile_at_all():
    case = Case(T=64, N=2, K=1, H=64, parts=[Part(0, 0, 0)], spare=2)
    _, operands = _operands(case)
    assert _run(case, interpret=True)(*operands).shape == (64, 2, 64)


def _bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float32)


def _bits_do_not_depend(interpret: bool) -> None:
    """… on where pages lie, on what else is in the call, where tiles or chunks are cut, or on how wide the table is."""
    window, more = 100, {"N": 2, "K": 1, "H": 64, "window": 100}
    alone = Case(T=150, parts=[Part(0, 60, 150)], **more)
    given, (q, k, v, table, tiles) = _operands(alone)
    expected = _bits(_run(alone, interpret=interpret)(q, k, v, table, tiles))
    other = renumbered(given, 3)
    actual = _run(alone, interpret=interpret)(q, other.k_YKSH, other.v_YKSH, other.table_BZ, tiles)
    np.testing.assert_array_equal(_bits(actual), expected)
    # Behind another row's tokens, in tiles of other sizes, with a wider table.
    company = Case(T=300, parts=[Part(1, 0, 77, gap=3), Part(0, 60, 150, gap=1)], **more)
    sizes = tiles_of(company, 90)
    rng = np.random.default_rng(9)
    queries = np.array(jnp.asarray(rng.standard_normal((300, 2, 64), np.float32), jnp.bfloat16))
    queries[81:231] = q
    both = np.pad(table, ((0, 1), (0, 2)))
    actual = _run(company, interpret=interpret)(queries, k, v, both, sizes)
    np.testing.assert_array_equal(_bits(actual)[81:231], expected)
    # The second part of it alone: as the next chunk of a prompt.
    later = Case(T=99, parts=[Part(0, 60 + 51, 99)], **more)
    actual = _run(later, interpret=interpret)(q[51:], k, v, table, tiles_of(later))
    np.testing.assert_array_equal(_bits(actual), expected[51:])
    assert window < 128


@interpreted
def test_bits_do_not_depend_on_company_nor_on_cuts():
    _bits_do_not_depend(interpret=True)


@needs_hopper
def test_bits_do_not_depend_on_company_nor_on_cuts_on_a_gpu():
    _bits_do_not_depend(interpret=False)


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("places", [64, 128])
@pytest.mark.parametrize("window", [1, 100, 128, 129, None])
def test_items_cover_what_is_seen(window, places, tile):
    """Each part of a tile once, those with the most blocks first, with the blocks that it sees; and all padding."""
    parts = [Part(2, 130, 300, gap=3), Part(0, 0, 1), Part(1, 127, 128, gap=9), Part(3, 5000, 65)]
    case = Case(T=600, N=1, K=1, H=64, parts=parts, spare=4)
    limit = schedule.UNLIMITED if window is None else window
    items, total = schedule.tile_items(tiles_of(case), tokens=case.T, window=limit, tile=tile, places=places)
    rows_T, positions_T = (np.asarray(each) for each in tiles_of(case).tokens(case.T))
    seen_by, zeroed = np.full(case.T, -1), np.zeros(case.T, int)
    work = []
    for number in range(int(total[0])):
        item = schedule.TileItem(*(int(each) for each in items[number]))
        tokens = slice(item.start, item.start + item.tokens)
        assert 0 < item.tokens <= tile and (seen_by[tokens] == -1).all()
        seen_by[tokens] = item.row
        np.testing.assert_array_equal(positions_T[tokens], item.position + np.arange(item.tokens))
        zeroed[(item.start + item.tokens + np.arange(item.gap)) % case.T] += 1
        work.append(item.end - item.first)
        q_T1 = positions_T[tokens][:, None]
        last = item.end * places + 3 * places
        seen_TS = (np.arange(last) <= q_T1) & (np.arange(last) > q_T1 - (window or 1 << 30))
        assert not seen_TS[:, : item.first * places].any() and not seen_TS[:, item.end * places :].any()
        assert seen_TS[:, item.first * places : (item.first + 1) * places].any()
        assert seen_TS[:, (item.end - 1) * places : item.end * places].any()
        assert seen_TS[:, item.plain_first * places : max(item.plain_end, item.plain_first) * places].all()
        for block in range(item.first, item.end):  # as many as can be are plain
            is_plain = item.plain_first <= block < item.plain_end
            assert is_plain == seen_TS[:, block * places : (block + 1) * places].all()
        of_row = positions_T[rows_T == item.row]
        assert item.seen_first == max(0, of_row.min() - (window or 1 << 30) + 1) and item.seen_end == of_row.max() + 1
    np.testing.assert_array_equal(seen_by, rows_T)
    np.testing.assert_array_equal(zeroed, rows_T < 0)
    assert work == sorted(work, reverse=True)


def test_what_the_kernel_refuses():
    case = CASES["a prompt"]
    _, operands = _operands(case)
    assert mosaic_sm90.refused(*operands[:3], None, scale=1.0) is None
    for operand in range(3):
        mixed = [x.astype(np.float32) if i == operand else x for i, x in enumerate(operands)]
        with pytest.raises(ValueError, match="takes bfloat16, found bfloat16, float32"):
            mosaic_sm90.prefill(*mixed, scale=1.0)
    with pytest.raises(ValueError, match="sinks of bfloat16 or float32, found float16"):
        mosaic_sm90.prefill(*operands, np.zeros(case.N, np.float16), scale=1.0)
    with pytest.raises(ValueError, match="head widths of 64, 80, 96, 128, found 72"):
        mosaic_sm90.prefill(*_operands(case._replace(H=72))[1], scale=1.0)
    with pytest.raises(ValueError, match="found 3 and 2"):
        mosaic_sm90.prefill(*_operands(case._replace(N=3))[1], scale=1.0)
    with pytest.raises(ValueError, match="more than 0, found -1"):
        mosaic_sm90.prefill(*operands, scale=-1.0)


def _shapes(case: Case) -> list[Any]:
    tiles = tiles_of(case)
    Z = case.pages or -(-max(part.position + part.count for part in case.parts) // PAGE)
    pool = jax.ShapeDtypeStruct((1 + case.rows * Z, case.K, PAGE, case.H), jnp.bfloat16)
    shapes = [jax.ShapeDtypeStruct((case.T, case.N, case.H), jnp.bfloat16), pool, pool]
    shapes += [jax.ShapeDtypeStruct((case.rows, Z), jnp.int32), jax.tree.map(jnp.shape, tiles)]
    shapes[-1] = Tiles(*(jax.ShapeDtypeStruct(each.shape, jnp.int32) for each in tiles))
    return shapes + ([] if case.sinks is None else [jax.ShapeDtypeStruct((case.N,), case.sinks)])


@needs_mosaic
@pytest.mark.parametrize("name", LARGE)
def test_lowers(name):
    text = lowered(_run(LARGE[name], interpret=False), *_shapes(LARGE[name]))
    assert text.count("custom_call @mosaic_gpu") == 1


@needs_mosaic
def test_auto_lowers_the_kernel(monkeypatch):
    monkeypatch.setattr(dispatch, "preferred", lambda: dispatch.MOSAIC)
    q, *rest = _shapes(CASES["a window"])
    run = partial(packed_attention_over_pages, scale=0.125, window=100)
    assert "prefill_attention" in lowered(run, jax.ShapeDtypeStruct((1, *q.shape), q.dtype), *rest)
    _, k, v, table, _ = rest = _shapes(CASES["a window"])
    q = jax.ShapeDtypeStruct((2, 40, 2, 64), jnp.bfloat16)
    positions = jax.ShapeDtypeStruct((2, 40), jnp.int32)
    run = partial(attention_over_pages, scale=0.125, window=100)
    assert "prefill_attention" in lowered(run, q, k, v, table, positions)


@needs_hopper
@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_agrees_with_the_oracle_on_a_gpu(name):
    case = {**CASES, **LARGE}[name]
    given, operands = _operands(case)
    # Memory that the result may get is full of NaN.
    poison = [jnp.full((case.T, case.N, case.H), jnp.nan, jnp.bfloat16) for _ in range(4)]
    jax.block_until_ready(poison)
    del poison
    _check(_run(case, interpret=False)(*operands), given, operands, case, most=20)


@needs_hopper
@pytest.mark.parametrize("start", [0, 1, 63, 64, 127, 128, 300])
@pytest.mark.parametrize("window", [None, 1, 127, 128, 129])
def test_every_edge_on_a_gpu(window, start):
    parts = [Part(0, start, 149, gap=start % 5), Part(1, 2 * start, 1 + start % 70)]
    case = Case(T=230, N=4, K=2, H=64, parts=parts, window=window, sinks=jnp.bfloat16)
    given, operands = _operands(case)
    _check(_run(case, interpret=False)(*operands), given, operands, case)
