"""Decode attention kernels against float64 NumPy, and that they lower for CUDA.

Triton's are interpreted on a CPU; Mosaic's, which cannot be, run on a Hopper GPU.

Keys and values beyond a row's count are NaN throughout.
"""

import math
import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.decode import mosaic_sm90, split, triton
from tests.pallas_kernels.marks import lowered_for_h200, needs_hopper, needs_mosaic
from tests.thinned import thinned

TRITON = [
    pytest.param(
        partial(triton.decode, tile=32, interpret=True),
        dtype,
        id=f"triton-{jnp.dtype(dtype).name}",
        marks=[pytest.mark.thorough] if dtype == jnp.float16 else [],
    )
    for dtype in triton.DTYPES
]
KERNELS = [pytest.param(mosaic_sm90.decode, jnp.bfloat16, id="mosaic", marks=needs_hopper), *TRITON]
BFLOAT16 = [kernel for kernel in KERNELS if kernel.values[1] == jnp.bfloat16]


class Shape(NamedTuple):
    """Sizes of a case, by `gptjax.axes`."""

    B: int
    N: int
    K: int
    S: int
    H: int


SHAPES = [
    Shape(B=4, N=8, K=1, S=320, H=64),
    Shape(B=2, N=3, K=3, S=128, H=64),
    Shape(B=1, N=14, K=2, S=201, H=128),
    Shape(B=2, N=22, K=2, S=13, H=64),
]
ODD_WIDTHS = [Shape(B=2, N=6, K=2, S=70, H=80), Shape(B=2, N=2, K=2, S=65, H=96), Shape(B=3, N=10, K=5, S=33, H=12)]
LARGE = {
    "gpt-oss": Shape(B=1, N=64, K=8, S=32768, H=64),
    "gpt-oss ring": Shape(B=32, N=64, K=8, S=128, H=64),
    "gpt-oss-tales ring": Shape(B=2, N=8, K=2, S=32, H=64),
    "gpt2": Shape(B=8, N=12, K=12, S=1024, H=64),
    "gpt2-xl": Shape(B=1, N=25, K=25, S=1024, H=64),
    "wide": Shape(B=2, N=28, K=4, S=1000, H=128),
}


def _ids(shape: Shape) -> str:
    return "-".join(f"{name}{size}" for name, size in shape._asdict().items())


def _operands(shape: Shape, dtype: Any, counts: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    B, N, K, S, H = shape
    q, k, v = (np.array(jnp.asarray(rng.standard_normal(s), dtype)) for s in ((B, N, H), (B, K, S, H), (B, K, S, H)))
    for row, count in enumerate(counts):
        k[row, :, count:] = v[row, :, count:] = np.nan
    return [q, k, v, np.array(counts, np.int32)]


def _counts(shape: Shape) -> list[int]:
    """Of each row: all, then few and none; then anything."""
    return [shape.S, *(c for c in (0, 1, shape.S // 2 + 1))][: shape.B]


def _sinks(shape: Shape) -> np.ndarray:
    return (np.random.default_rng(1).standard_normal(shape.N) * 2).astype(np.float32)


def _oracle(q_BNH, k_BKSH, v_BKSH, counts_B, sinks_N=None, *, scale):
    q_BNH, k_BKSH, v_BKSH = (np.asarray(x, np.float64) for x in (q_BNH, k_BKSH, v_BKSH))
    B, N, _ = q_BNH.shape
    out_BNH = np.zeros(q_BNH.shape)
    for b, n in np.ndindex(B, N):
        count, k = counts_B[b], n // (N // k_BKSH.shape[1])
        if count:
            scores = k_BKSH[b, k, :count] @ q_BNH[b, n] * scale
            sink = [] if sinks_N is None else [float(sinks_N[n])]
            weights = np.exp(scores - max([*scores, *sink]))
            total = weights.sum() + sum(np.exp(s - max([*scores, *sink])) for s in sink)
            out_BNH[b, n] = weights / total @ v_BKSH[b, k, :count]
    return out_BNH


def _tolerance(dtype: Any, shape: Shape) -> float:
    """As in `test_attention.py`: rounding of weights and results, and float32 sums over H and S.

    exp2 of scores times log2(e), a float32 of size up to 8, adds 8·eps32.
    """
    accumulated = 4 * float(jnp.finfo(jnp.float32).eps) * (math.sqrt(shape.H) + math.sqrt(shape.S) + 2)
    return accumulated + (2 * float(jnp.finfo(dtype).eps) if dtype != jnp.float32 else 0.0)


def _check(kernel: Any, dtype: Any, shape: Shape, splits: int | None, sinks: bool, counts: list[int]) -> None:
    operands, scale = _operands(shape, dtype, counts), 1 / math.sqrt(shape.H)
    if sinks:
        operands.append(_sinks(shape))
    actual = kernel(*operands, scale=scale, splits=splits)
    assert actual.dtype == dtype
    expected = _oracle(*operands, scale=scale)
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=_tolerance(dtype, shape))
    for row, count in enumerate(counts):
        assert count or not np.asarray(actual[row], np.float32).any()


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
@pytest.mark.parametrize(("splits", "sinks"), [(1, False), (3, True)])
@pytest.mark.parametrize("shape", thinned(SHAPES, SHAPES[0], SHAPES[2], SHAPES[3]), ids=_ids)
def test_agrees_with_the_oracle(shape, splits, sinks, kernel, dtype):
    _check(kernel, dtype, shape, splits, sinks, _counts(shape))


@pytest.mark.parametrize(("kernel", "dtype"), BFLOAT16)
@pytest.mark.parametrize("count", [1, 32, 33, 63, 64, 65, 128, 129, 191])
def test_every_edge_of_a_tile(count, kernel, dtype):
    shape = Shape(B=1, N=8, K=1, S=192, H=64)
    _check(kernel, dtype, shape, 2 if count % 2 else 1, bool(count % 3), [count])


@pytest.mark.parametrize(("kernel", "dtype"), TRITON)
@pytest.mark.parametrize("shape", thinned(ODD_WIDTHS, ODD_WIDTHS[0], ODD_WIDTHS[2]), ids=_ids)
def test_odd_widths(shape, kernel, dtype):
    _check(kernel, dtype, shape, 2, True, _counts(shape))
    _check(kernel, dtype, shape, 1, False, _counts(shape))


@pytest.mark.parametrize(("kernel", "dtype"), BFLOAT16)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("sink", [-1e9, -np.inf, 1e4, 1e9])
def test_large_sinks(sink, splits, kernel, dtype):
    """A sink that is far below all scores is no sink, and one far above takes all."""
    shape = SHAPES[0]
    operands = _operands(shape, dtype, _counts(shape))
    actual = kernel(*operands, np.full(shape.N, sink, np.float32), scale=0.125, splits=splits)
    expected = _oracle(*operands, scale=0.125) if sink < 0 else np.zeros(actual.shape)
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=_tolerance(dtype, shape))


@pytest.mark.parametrize(("kernel", "dtype"), BFLOAT16)
def test_scores_that_grow_and_shrink_by_hundreds(kernel, dtype):
    """Tiles whose maxima are far apart, in both orders: the running maximum carries them."""
    shape = Shape(B=2, N=4, K=1, S=192, H=64)
    operands = _operands(shape, dtype, [192, 192])
    size_S1 = np.repeat([1.0, 60.0, 8.0], 64)[:, None]
    operands[1] = (operands[1] * np.stack([size_S1, size_S1[::-1]])[:, None]).astype(dtype)
    actual = kernel(*operands, scale=0.5, splits=1)
    expected = _oracle(*operands, scale=0.5)
    # Scores up to about 2000 are off by 2000·eps32·4, and so are the weights, relatively.
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=_tolerance(dtype, shape) + 4e-3)


@pytest.mark.parametrize(("kernel", "dtype"), BFLOAT16)
@pytest.mark.parametrize("splits", [1, 3])
def test_a_row_does_not_depend_on_its_company(splits, kernel, dtype):
    shape = Shape(B=3, N=8, K=1, S=192, H=64)
    run = partial(kernel, scale=0.125, splits=splits)
    operands = _operands(shape, dtype, [70, 192, 0])
    others = _operands(shape, dtype, [192, 1, 129], seed=1)
    for ours, theirs in zip(operands, others, strict=True):
        theirs[0] = ours[0]
    np.testing.assert_array_equal(run(*operands)[0], run(*others)[0])


@pytest.mark.parametrize(("kernel", "dtype"), BFLOAT16)
@pytest.mark.parametrize("splits", [1, 3])
def test_a_row_does_not_depend_on_the_capacity(splits, kernel, dtype):
    shape = Shape(B=2, N=8, K=1, S=128, H=64)
    q, k, v, counts = _operands(shape, dtype, [128, 70])
    wide_k, wide_v = (np.pad(x, ((0, 0), (0, 0), (0, 192), (0, 0)), constant_values=np.nan) for x in (k, v))
    run = partial(kernel, scale=0.125, splits=splits)
    np.testing.assert_array_equal(run(q, k, v, counts), run(q, wide_k, wide_v, counts))


def test_splits_without_work_change_no_bit():
    """So that the Triton kernel's default number of splits, which a small capacity lowers, does not either."""
    rng = np.random.default_rng(0)
    out = rng.standard_normal((2, 3, 4, 2, 5)).astype(np.float32)
    lse, counts = rng.standard_normal((2, 3, 4, 2)).astype(np.float32), np.array([400, 130], np.int32)
    more_out = np.concatenate((out, np.full_like(out, np.nan)), axis=2)
    more_lse = np.concatenate((lse, np.full_like(lse, np.nan)), axis=2)
    combine = partial(split.combine, counts_B=counts, sinks_N=None, tile=128, dtype=np.float32)
    np.testing.assert_array_equal(combine(out, lse), combine(more_out, more_lse))


@pytest.mark.parametrize("splits", [1, 2, 7, 32])
def test_runs_deal_out_all_tiles_once(splits):
    for count in [0, 1, 127, 128, 129, 1000, 32768]:
        first, tiles = split.run(jnp.full(splits, count), jnp.arange(splits), tile=128, splits=splits)
        dealt = [tile for at, n in zip(first, tiles, strict=True) for tile in range(int(at), int(at + n))]
        assert dealt == list(range(-(-count // 128)))


def test_splits_by_default():
    assert split.choose(8, 32768, 128) == 32  # gpt-oss, one row: 256 programs
    assert split.choose(8, 2048, 128) == 16
    assert split.choose(8, 128, 128) == 1  # a ring
    assert split.choose(256, 2048, 128) == 1
    assert split.choose(1000, 2048, 128) == 1


def test_what_the_kernels_refuse():
    shape = SHAPES[0]
    operands = _operands(shape, jnp.bfloat16, [1] * shape.B)
    for operand in range(3):
        mixed = [x.astype(np.float32) if i == operand else x for i, x in enumerate(operands)]
        for decode in (mosaic_sm90.decode, triton.decode):
            with pytest.raises(ValueError, match="float32"):
                decode(*mixed, scale=1.0)
    with pytest.raises(ValueError, match="float64"), jax.enable_x64(True):
        triton.decode(*(x.astype(np.float64) for x in operands[:3]), operands[3], scale=1.0)
    with pytest.raises(ValueError, match="multiples of 64, found 80"):
        mosaic_sm90.decode(*_operands(ODD_WIDTHS[0], jnp.bfloat16, [1, 1]), scale=1.0)
    for decode in (mosaic_sm90.decode, triton.decode):
        with pytest.raises(ValueError, match="16 query heads cannot share 3"):
            decode(*_operands(shape._replace(N=16, K=3), jnp.bfloat16, [1] * 4), scale=1.0)
    with pytest.raises(ValueError, match="found 100"):
        triton.decode(*operands, scale=1.0, tile=100)
    with pytest.raises(ValueError, match="multiple of 16 places, found 100"):
        mosaic_sm90.decode(*operands, scale=1.0, warp_tile=100)
    with pytest.raises(ValueError, match="2, 4 or 8 blocks, found 3"):
        mosaic_sm90.decode(*operands, scale=1.0, blocks=3)
    with pytest.raises(ValueError, match="sinks of bfloat16 or float32, found float16"):
        mosaic_sm90.decode(*operands, np.zeros(shape.N, np.float16), scale=1.0)


@needs_mosaic
@pytest.mark.parametrize("name", LARGE)
def test_mosaic_lowers_for_cuda(name):
    text = _lowered(mosaic_sm90.decode, jnp.bfloat16, LARGE[name])
    # One kernel, and one that combines its parts where a cluster has not all of a row.
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == (2 if name == "gpt-oss" else 1)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", triton.DTYPES)
@pytest.mark.parametrize("shape", [LARGE["gpt-oss"], LARGE["gpt-oss ring"], LARGE["gpt2-xl"], *ODD_WIDTHS], ids=_ids)
def test_triton_lowers_for_cuda(shape, dtype):
    text = _lowered(triton.decode, dtype, shape)
    assert len(re.findall(r"custom_call @\S*triton", text)) == 1


def _lowered(decode: Any, dtype: Any, shape: Shape) -> str:
    B, N, K, S, H = shape
    shapes = [
        *(jax.ShapeDtypeStruct(size, dtype) for size in ((B, N, H), (B, K, S, H), (B, K, S, H))),
        jax.ShapeDtypeStruct((B,), jnp.int32),
        jax.ShapeDtypeStruct((N,), jnp.float32),
    ]
    return lowered_for_h200(partial(decode, scale=0.125), *shapes)
