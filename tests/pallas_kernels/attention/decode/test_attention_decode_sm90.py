"""Decode attention for Hopper: its settings lower for CUDA everywhere, and agree with float64 NumPy on such a GPU.

Keys and values beyond a row's count are NaN throughout. `test_attention_decode.py` has what holds for all such kernels.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.decode import mosaic_sm90
from tests.oracles import attention_numpy
from tests.pallas_kernels.marks import lowered, needs_hopper, needs_mosaic

BF16 = float(jnp.finfo(jnp.bfloat16).eps)
EPS32 = float(jnp.finfo(jnp.float32).eps)


class Case(NamedTuple):
    """Sizes, by `gptjax.axes`, and how the places are dealt."""

    B: int
    N: int
    K: int
    S: int
    H: int
    settings: dict[str, int]


CASES = {
    "one block": Case(B=4, N=8, K=1, S=320, H=64, settings={"splits": 1, "blocks": 1}),
    "splits": Case(B=4, N=16, K=2, S=700, H=64, settings={"splits": 3, "blocks": 1}),
    "a cluster": Case(B=2, N=64, K=8, S=600, H=64, settings={"splits": 1, "blocks": 8}),
    "splits of clusters": Case(B=1, N=14, K=2, S=1100, H=128, settings={"splits": 3, "blocks": 2}),
    "one query a group": Case(B=2, N=25, K=25, S=300, H=64, settings={"splits": 1, "blocks": 4}),
    "sixteen queries a group": Case(B=2, N=32, K=2, S=130, H=64, settings={"splits": 1, "blocks": 2}),
    "more queries than a block has room for": Case(B=2, N=40, K=2, S=130, H=64, settings={"splits": 2, "blocks": 2}),
    "short tiles": Case(B=2, N=8, K=1, S=1000, H=64, settings={"splits": 1, "blocks": 2, "warp_tile": 16}),
    "tiles of three sixteens": Case(B=2, N=8, K=1, S=1000, H=64, settings={"splits": 2, "warp_tile": 48}),
    "long tiles": Case(B=2, N=8, K=1, S=1000, H=64, settings={"splits": 1, "blocks": 1, "warp_tile": 64}),
    "three times the width": Case(B=2, N=5, K=1, S=200, H=192, settings={"splits": 1, "blocks": 4}),
    "less places than a warp's": Case(B=2, N=22, K=2, S=13, H=64, settings={}),
    "gpt-oss": Case(B=1, N=64, K=8, S=32768, H=64, settings={}),
    "gpt-oss, half of a cluster's": Case(B=1, N=64, K=8, S=2048, H=64, settings={}),
    "gpt-oss, eight rows": Case(B=8, N=64, K=8, S=2048, H=64, settings={}),
    "gpt-oss ring": Case(B=32, N=64, K=8, S=128, H=64, settings={}),
    "gpt2": Case(B=8, N=12, K=12, S=1024, H=64, settings={}),
    "gpt2-xl": Case(B=1, N=25, K=25, S=1024, H=64, settings={}),
    "wide": Case(B=2, N=28, K=4, S=1000, H=128, settings={}),
}


def _counts(B: int, S: int) -> list[int]:
    """Of each row: all, none, one; then anything."""
    return [S, 0, 1, *np.random.default_rng(S).integers(0, S, B).tolist()][:B]


def _operands(case: Case, counts: list[int], seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    B, N, K, S, H, _ = case
    q, k, v = (np.array(jnp.asarray(rng.standard_normal(s), jnp.bfloat16)) for s in ((B, N, H), *[(B, K, S, H)] * 2))
    for row, count in enumerate(counts):
        k[row, :, count:] = v[row, :, count:] = np.nan
    return [q, k, v, np.array(counts, np.int32)]


def _sinks(N: int, dtype: Any) -> np.ndarray:
    return np.asarray(jnp.asarray(np.random.default_rng(1).standard_normal(N) * 2, dtype))


def _oracle(q_BNH, k_BKSH, v_BKSH, counts_B, sinks_N=None, *, scale):
    places_BS = np.broadcast_to(np.arange(k_BKSH.shape[2]), (len(counts_B), k_BKSH.shape[2]))
    operands = q_BNH[:, None], k_BKSH, v_BKSH, counts_B[:, None] - 1, places_BS, sinks_N
    return attention_numpy.attention(*operands, scale=scale)[:, 0]


def _check(actual: jax.Array, operands: list[Any], scale: float) -> None:
    S, H = operands[1].shape[2:]
    # As in `test_attention_decode.py`: roundings of weights and results, and float32 sums over H and S.
    tolerance = 2 * BF16 + 4 * EPS32 * (math.sqrt(H) + math.sqrt(S) + 2)
    expected = _oracle(*operands, scale=scale)
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=tolerance)


@needs_mosaic
@pytest.mark.parametrize("sinks", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", CASES)
def test_lowers(name, sinks):
    B, N, K, S, H, settings = CASES[name]
    shapes = [*(jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in ((B, N, H), (B, K, S, H), (B, K, S, H)))]
    shapes.append(jax.ShapeDtypeStruct((B,), jnp.int32))
    if sinks is not None:
        shapes.append(jax.ShapeDtypeStruct((N,), sinks))
    text = lowered(partial(mosaic_sm90.decode, scale=0.125, **settings), *shapes)
    assert "stablehlo.convert" not in text  # which would be another kernel


@needs_hopper
@pytest.mark.parametrize("sinks", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_oracle(name, sinks):
    case = CASES[name]
    scale = 1 / math.sqrt(case.H)
    for counts in ([case.S] * case.B, _counts(case.B, case.S)):
        operands = _operands(case, counts)
        if sinks is not None:
            operands.append(_sinks(case.N, sinks))
        actual = mosaic_sm90.decode(*operands, scale=scale, **case.settings)
        assert actual.dtype == jnp.bfloat16
        _check(actual, operands, scale)
        assert not np.asarray(actual, np.float32)[np.array(counts) == 0].any()


@needs_hopper
@pytest.mark.parametrize("blocks", [1, 8])
@pytest.mark.parametrize(
    "count", [1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 160, 255, 256, 257, 1023, 1024, 1025, 1199]
)
def test_every_edge_of_a_tile(count, blocks):
    operands = _operands(Case(B=1, N=8, K=1, S=1200, H=64, settings={}), [count])
    _check(mosaic_sm90.decode(*operands, scale=0.125, splits=1, blocks=blocks), operands, 0.125)


@needs_hopper
@pytest.mark.parametrize(
    "settings", [{"splits": 1, "blocks": 1}, {"splits": 1, "blocks": 8}, {"splits": 3, "blocks": 2}]
)
def test_bits_depend_neither_on_other_rows_nor_on_the_capacity(settings):
    case = Case(B=3, N=16, K=2, S=1500, H=64, settings={})
    run = partial(mosaic_sm90.decode, scale=0.125, **settings)
    ours, others = _operands(case, [700, 1500, 0]), _operands(case, [1500, 1, 129], seed=1)
    for mine, theirs in zip(ours, others, strict=True):
        theirs[0] = mine[0]
    expected = np.asarray(run(*ours)[0], np.float32)
    np.testing.assert_array_equal(np.asarray(run(*others)[0], np.float32), expected)
    longer = [np.pad(x, ((0, 0), (0, 0), (0, 2000), (0, 0)), constant_values=np.nan) for x in ours[1:3]]
    np.testing.assert_array_equal(np.asarray(run(ours[0], *longer, ours[3])[0], np.float32), expected)
