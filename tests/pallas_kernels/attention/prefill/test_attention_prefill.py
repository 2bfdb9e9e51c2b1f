"""Prefill attention for Hopper: interpreted on a CPU, lowered for CUDA everywhere, and run on such a GPU.

Keys and values that no query of the call sees are NaN throughout.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import reference
from pallas_kernels.attention.prefill import mosaic_sm90, schedule
from tests.oracles import attention_numpy
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


class Case(NamedTuple):
    """Sizes, by `gptjax.axes`; where each row's tokens start and how many there are.

    Places are a cache's or, where there is a ring of so many, the ring's and then those of the T tokens.
    """

    T: int
    N: int
    K: int
    S: int
    H: int
    starts: list[int]
    counts: list[int]
    window: int | None = None
    ring: int | None = None
    sinks: Any = None

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.H)


CASES = {
    "a prompt": Case(T=136, N=2, K=2, S=256, H=64, starts=[0], counts=[130]),
    "a prefix, groups": Case(T=72, N=4, K=2, S=200, H=64, starts=[50], counts=[70], sinks=jnp.bfloat16),
    "rows of different lengths": Case(T=72, N=2, K=1, S=304, H=64, starts=[130, 0, 7], counts=[70, 1, 0]),
    "three heads a group": Case(T=144, N=6, K=2, S=168, H=64, starts=[3, 20], counts=[140, 65], sinks=jnp.float32),
    "wide": Case(T=72, N=2, K=1, S=336, H=128, starts=[200], counts=[64], sinks=jnp.bfloat16),
    "a width of 80": Case(T=40, N=2, K=2, S=152, H=80, starts=[100], counts=[40]),
    "a width of 96": Case(T=72, N=1, K=1, S=96, H=96, starts=[10], counts=[70]),
    "fewer places than a block": Case(T=8, N=2, K=1, S=16, H=64, starts=[4], counts=[5]),
    "a window in a cache": Case(T=72, N=2, K=1, S=512, H=64, starts=[400, 20], counts=[70, 40], window=100),
    "a long window": Case(T=72, N=2, K=1, S=1024, H=64, starts=[800], counts=[70], window=600),
    "a ring": Case(T=72, N=2, K=1, S=0, H=64, starts=[300], counts=[70], window=128, ring=128, sinks=jnp.bfloat16),
    "a ring that is not full": Case(T=144, N=2, K=1, S=0, H=64, starts=[9, 0], counts=[140, 100], window=128, ring=128),
    "a ring of several blocks": Case(T=200, N=2, K=2, S=0, H=64, starts=[777], counts=[190], window=300, ring=304),
    "a wide ring": Case(T=144, N=2, K=1, S=0, H=128, starts=[500, 30], counts=[140, 144], window=100, ring=104),
}
LARGE = {
    "gpt-oss": Case(T=2048, N=64, K=8, S=2048, H=64, starts=[0], counts=[2048], sinks=jnp.bfloat16),
    "gpt-oss, its windows": Case(
        T=2048, N=64, K=8, S=0, H=64, starts=[0], counts=[2048], window=128, ring=128, sinks=jnp.bfloat16
    ),
    "gpt-oss, eight rows": Case(
        T=1024, N=64, K=8, S=2048, H=64, starts=[0] * 8, counts=[1024, 1, 0, 100, 513, 64, 65, 1000], sinks=jnp.bfloat16
    ),
    "gpt-oss, a long prefix": Case(T=2048, N=64, K=8, S=32768, H=64, starts=[30720], counts=[2048], sinks=jnp.bfloat16),
    "gpt-oss, windows after a long prefix": Case(
        T=2048, N=64, K=8, S=0, H=64, starts=[30721], counts=[2000], window=128, ring=128, sinks=jnp.bfloat16
    ),
    "gpt2": Case(T=512, N=12, K=12, S=1024, H=64, starts=[0], counts=[500]),
    "gpt2-xl": Case(T=512, N=25, K=25, S=1024, H=64, starts=[100], counts=[512]),
    "wide": Case(T=1000, N=28, K=4, S=4096, H=128, starts=[3000, 5], counts=[1000, 900]),
    "a width of 80": Case(T=304, N=32, K=32, S=704, H=80, starts=[333], counts=[300]),
    "a width of 96": Case(T=304, N=6, K=3, S=704, H=96, starts=[333], counts=[299], window=200),
}


def _positions(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """As the engine's steps and `gptjax.layers.cache` have them."""
    token_T, starts_B1, counts_B1 = np.arange(case.T), *(np.array(x)[:, None] for x in (case.starts, case.counts))
    q_positions_BT = np.where(token_T < counts_B1, starts_B1 + token_T, -1).astype(np.int32)
    lengths_B1 = starts_B1 if case.ring else starts_B1 + counts_B1
    places = case.ring or case.S
    k_positions_BS = lengths_B1 - 1 - (lengths_B1 - 1 - np.arange(places)) % places
    k_positions_BS = np.where(k_positions_BS < 0, -1, k_positions_BS).astype(np.int32)
    if case.ring:
        k_positions_BS = np.concatenate((k_positions_BS, q_positions_BT), axis=1)
    return q_positions_BT, k_positions_BS


def _operands(case: Case, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    q_positions_BT, k_positions_BS = _positions(case)
    (B, S), H = k_positions_BS.shape, case.H
    shapes = (B, case.T, case.N, H), (B, case.K, S, H), (B, case.K, S, H)
    q, k, v = (np.array(jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)) for shape in shapes)
    for row in range(B):
        seen_TS = _seen(q_positions_BT[row], k_positions_BS[row], case.window)
        k[row, :, ~seen_TS.any(axis=0)] = v[row, :, ~seen_TS.any(axis=0)] = np.nan
    sinks = [] if case.sinks is None else [np.asarray(jnp.asarray(rng.standard_normal(case.N) * 2, case.sinks))]
    return [q, k, v, q_positions_BT, k_positions_BS, *sinks]


def _seen(q_positions_T: np.ndarray, k_positions_S: np.ndarray, window: int | None) -> np.ndarray:
    q_T1, k_1S = q_positions_T[:, None], k_positions_S[None]
    return (k_1S >= 0) & (k_1S <= q_T1) & (k_1S > q_T1 - (window or 1 << 30))


def _check(actual: jax.Array, operands: list[Any], case: Case, queries: Any = slice(None)) -> None:
    assert actual.dtype == jnp.bfloat16
    # As in `test_attention_decode.py`: roundings of weights and results, and float32 sums over H and S.
    tolerance = 2 * BF16 + 4 * EPS32 * (math.sqrt(case.H) + math.sqrt(operands[1].shape[2]) + 2)
    q, k, v, q_positions_BT, *rest = operands
    some = q[:, queries], k, v, q_positions_BT[:, queries], *rest
    expected = attention_numpy.attention(*some, scale=case.scale, window=case.window)
    actual = np.asarray(actual, np.float64)
    np.testing.assert_allclose(actual[:, queries], expected, rtol=0, atol=tolerance)
    assert not actual[q_positions_BT < 0].any()


SOME = (
    "a prefix, groups",
    "rows of different lengths",
    "wide",
    "a width of 80",
    "a window in a cache",
    "a ring that is not full",
)


@interpreted
@pytest.mark.parametrize("name", thinned(CASES, *SOME))
def test_agrees_with_the_oracle(name):
    case = CASES[name]
    operands = _operands(case)
    run = partial(mosaic_sm90.prefill, scale=case.scale, window=case.window, interpret=True)
    _check(run(*operands), operands, case)


@interpreted
@pytest.mark.parametrize("window", thinned([1, 64, 127, 128, 129], 1, 128))
def test_every_edge_of_a_window(window):
    case = Case(T=72, N=2, K=1, S=320, H=64, starts=[191], counts=[65], window=window, sinks=jnp.bfloat16)
    operands = _operands(case)
    run = partial(mosaic_sm90.prefill, scale=case.scale, window=window, interpret=True)
    actual = run(*operands)
    _check(actual, operands, case)
    expected = np.asarray(reference.cached(*operands, scale=case.scale, window=window), np.float32)
    np.testing.assert_allclose(np.asarray(actual, np.float32), expected, rtol=2 * BF16, atol=2 * BF16)


@interpreted
def test_any_negative_position_is_padding():
    case = Case(T=72, N=2, K=1, S=128, H=64, starts=[0], counts=[50])
    operands = _operands(case)
    operands[3] = np.where(operands[3] < 0, -1 - np.arange(case.T), operands[3]).astype(np.int32)
    _check(mosaic_sm90.prefill(*operands, scale=case.scale, interpret=True), operands, case)


@interpreted
@pytest.mark.parametrize("programs", [thorough(1), 5])
def test_programs_take_items_in_turn(programs, monkeypatch):
    monkeypatch.setattr(schedule, "PROGRAMS", programs)
    case = Case(T=200, N=3, K=1, S=384, H=64, starts=[150, 0], counts=[200, 90], sinks=jnp.float32)
    operands = _operands(case)
    # Another scale for each, since the number is no argument of what is compiled.
    case_scale = case.scale * (1 + programs / 16)
    actual = mosaic_sm90.prefill(*operands, scale=case_scale, interpret=True)
    q = np.asarray(operands[0], np.float64) * case_scale / case.scale
    _check(actual, [q, *operands[1:]], case)


@interpreted
@pytest.mark.parametrize("sink", [thorough(-1e9), -np.inf, 1e9])
def test_large_sinks(sink):
    """A sink that is far below all scores is no sink, and one far above takes all."""
    case = Case(T=24, N=2, K=1, S=128, H=64, starts=[60], counts=[19])
    operands = _operands(case)
    run = partial(mosaic_sm90.prefill, scale=case.scale, interpret=True)
    actual = run(*operands, np.full(2, sink, np.float32))
    if sink < 0:
        _check(actual, operands, case)
    else:
        assert not np.asarray(actual, np.float32).any()


@interpreted
def test_scores_that_grow_and_shrink_by_hundreds():
    """Blocks whose maxima are far apart, in both orders: the running maximum carries them."""
    case = Case(T=64, N=2, K=1, S=384, H=64, starts=[320, 320], counts=[64, 64])
    operands = _operands(case)
    size_S1 = np.repeat([1.0, 60.0, 8.0], 128)[:, None]
    operands[1] = (operands[1] * np.stack([size_S1, size_S1[::-1]])[:, None]).astype(operands[1].dtype)
    actual = mosaic_sm90.prefill(*operands, scale=0.5, interpret=True)
    expected = attention_numpy.attention(*operands, scale=0.5)
    # Scores up to about 2000 are off by 2000·eps32·4, and so are the weights, relatively.
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=2 * BF16 + 4e-3)


@interpreted
def test_bits_depend_neither_on_other_rows_nor_on_the_capacity():
    ours = Case(T=72, N=2, K=1, S=256, H=64, starts=[140, 0], counts=[66, 70])
    theirs = ours._replace(starts=[140, 186], counts=[66, 70])
    run = partial(mosaic_sm90.prefill, scale=ours.scale, interpret=True)
    operands, others = _operands(ours), _operands(theirs, seed=1)
    expected = np.asarray(run(*operands)[0], np.float32)
    for mine, other in zip(operands[:3], others[:3], strict=True):
        other[0] = mine[0]
    np.testing.assert_array_equal(np.asarray(run(*others)[0], np.float32), expected)
    longer = [np.pad(x, ((0, 0), (0, 0), (0, 200), (0, 0)), constant_values=np.nan) for x in operands[1:3]]
    positions = np.pad(operands[4], ((0, 0), (0, 200)), constant_values=-1)
    actual = run(operands[0], *longer, operands[3], positions)
    np.testing.assert_array_equal(np.asarray(actual[0], np.float32), expected)


@pytest.mark.parametrize("window", [1, 5, 16, 40, None])
@pytest.mark.parametrize("seed", thinned(range(4), 0, 1))
def test_plans_cover_what_is_seen(seed, window):
    """Positions in any order, with gaps and padding."""
    rng = np.random.default_rng(seed)
    B, T, S, tile, places = 3, int(rng.integers(1, 40)), int(rng.integers(1, 90)), 8, 16
    q_positions_BT = np.where(np.arange(T) < rng.integers(0, T + 1, (B, 1)), rng.integers(0, 60, (B, 1)), -1)
    q_positions_BT = np.where(q_positions_BT < 0, -1, q_positions_BT + np.arange(T)).astype(np.int32)
    # A ring, and what is in order; some of it missing.
    k_positions_BS = np.stack([np.roll(np.arange(S), rng.integers(0, S)) for _ in range(B)]) + rng.integers(0, 20)
    k_positions_BS = np.where(rng.random((B, S)) < rng.choice([0, 0.1]), -1, k_positions_BS).astype(np.int32)
    limit = schedule.UNUSED if window is None else window
    q, k, spans_BQ4, unclean_BS = map(
        np.asarray, schedule.schedule(q_positions_BT, k_positions_BS, window=limit, tile=tile, places=places)
    )
    for row in range(B):
        seen_TS = _seen(q[row].astype(np.int64) - (q[row] == 2**32 - 1) * 2**32, k[row].astype(np.int64), window)
        seen_TS[:, k[row] == schedule.UNUSED] = False
        expected_TS = _seen(q_positions_BT[row], k_positions_BS[row], window)
        np.testing.assert_array_equal(seen_TS[:T, :S], expected_TS)
        assert not seen_TS[T:].any() and not seen_TS[:, S:].any()
        # UNUSED is what nobody sees, but for gaps between the first and the last position that somebody does.
        assert (k[row, :S][seen_TS.any(axis=0)[:S]] != schedule.UNUSED).all()
        blocks_S = (k[row].reshape(-1, places) == schedule.UNUSED).any(axis=1)
        np.testing.assert_array_equal(unclean_BS[row], blocks_S)
        for j, (first, plain_first, plain_end, end) in enumerate(spans_BQ4[row]):
            tile_tS = seen_TS[j * tile : (j + 1) * tile]
            assert 0 <= first < end <= len(blocks_S)
            assert not tile_tS[:, : first * places].any() and not tile_tS[:, end * places :].any()
            assert tile_tS[:, plain_first * places : plain_end * places].all()
            assert plain_first >= plain_end or first <= plain_first < plain_end <= end


def test_plans_mask_no_more_than_edges():
    """So that a long prefix costs neither masks nor, behind a window, reading."""
    q_positions_BT, k_positions_BS = _positions(LARGE["gpt-oss, a long prefix"])
    spans = partial(schedule.schedule, tile=64, places=128)
    _, _, spans_BQ4, _ = spans(q_positions_BT, k_positions_BS, window=schedule.UNUSED)
    diagonal_J = (30720 + 64 * np.arange(32)) // 128
    expected = np.stack((0 * diagonal_J, 0 * diagonal_J, diagonal_J, diagonal_J + 1), axis=1)
    np.testing.assert_array_equal(spans_BQ4[0], expected)
    _, _, spans_BQ4, unclean_BS = spans(*_positions(LARGE["gpt-oss, its windows"]), window=128)
    end_J = 64 * np.arange(32) // 128 + 2  # a block of the ring, which is empty, and those of the tokens
    np.testing.assert_array_equal(spans_BQ4[0, :, 0], np.maximum(end_J - 2, 1))
    np.testing.assert_array_equal(spans_BQ4[0, :, 3], end_J)
    np.testing.assert_array_equal(unclean_BS[0], [1] + [0] * 16)


def test_what_the_kernel_refuses():
    case = CASES["a prompt"]
    operands = _operands(case)
    assert mosaic_sm90.refused(*operands[:3], None, scale=1.0) is None
    for operand in range(3):
        mixed = [x.astype(np.float32) if i == operand else x for i, x in enumerate(operands)]
        with pytest.raises(ValueError, match="takes bfloat16, found bfloat16, float32"):
            mosaic_sm90.prefill(*mixed, scale=1.0)
    with pytest.raises(ValueError, match="sinks of bfloat16 or float32, found float16"):
        mosaic_sm90.prefill(*operands, np.zeros(case.N, np.float16), scale=1.0)
    with pytest.raises(ValueError, match="head widths of 64, 80, 96, 128, found 72"):
        mosaic_sm90.prefill(*_operands(case._replace(H=72)), scale=1.0)
    with pytest.raises(ValueError, match="found 3 and 2"):
        mosaic_sm90.prefill(*_operands(case._replace(N=3)), scale=1.0)
    for odd in (case._replace(T=132), case._replace(S=260)):
        with pytest.raises(ValueError, match="multiples of 8, found"):
            mosaic_sm90.prefill(*_operands(odd), scale=1.0)
    with pytest.raises(ValueError, match="more than 0, found -1"):
        mosaic_sm90.prefill(*operands, scale=-1.0)


@needs_mosaic
@pytest.mark.parametrize("name", LARGE)
def test_lowers(name):
    case = LARGE[name]
    q_positions_BT, k_positions_BS = _positions(case)
    (B, S), N, K, H = k_positions_BS.shape, case.N, case.K, case.H
    shapes = [*(jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in ((B, case.T, N, H), (B, K, S, H), (B, K, S, H)))]
    shapes += [jax.ShapeDtypeStruct(x.shape, jnp.int32) for x in (q_positions_BT, k_positions_BS)]
    if case.sinks is not None:
        shapes.append(jax.ShapeDtypeStruct((N,), case.sinks))
    text = lowered(partial(mosaic_sm90.prefill, scale=case.scale, window=case.window), *shapes)
    assert text.count("custom_call @mosaic_gpu") == 1


@needs_hopper
@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_agrees_with_the_oracle_on_a_gpu(name):
    case = {**CASES, **LARGE}[name]
    operands = _operands(case)
    run = partial(mosaic_sm90.prefill, scale=case.scale, window=case.window)
    some = np.unique([0, 63, 64, *np.random.default_rng(1).integers(0, case.T, 2), case.T - 1])
    _check(run(*operands), operands, case, some[some < case.T])


@needs_hopper
@pytest.mark.parametrize("start", [0, 1, 63, 64, 65, 127, 128, 129, 300])
@pytest.mark.parametrize("window", [None, 1, 100, 127, 128, 129])
def test_every_edge_on_a_gpu(window, start):
    case = Case(T=152, N=4, K=2, S=504, H=64, starts=[start], counts=[149], window=window, sinks=jnp.bfloat16)
    operands = _operands(case)
    _check(mosaic_sm90.prefill(*operands, scale=case.scale, window=window), operands, case)
