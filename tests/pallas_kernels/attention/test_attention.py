"""`pallas_kernels.attention` against float64 NumPy (`tests/oracles/attention_numpy.py`).

Keys and values that nobody may see are NaN. `pages/test_pages.py` has attention over pages.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attention, reference
from tests.oracles import attention_numpy
from tests.thinned import thinned, thorough

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


class Shape(NamedTuple):
    """Sizes of a case, by `gptjax.axes`."""

    B: int
    T: int
    N: int
    K: int
    S: int
    H: int


SHAPES = [
    Shape(B=3, T=7, N=10, K=2, S=29, H=12),
    Shape(B=2, T=1, N=5, K=5, S=37, H=4),
    Shape(B=2, T=13, N=3, K=3, S=13, H=33),
    Shape(B=1, T=1, N=4, K=2, S=1, H=1),
    Shape(B=2, T=1, N=6, K=3, S=128, H=16),
    Shape(B=3, T=1, N=10, K=2, S=384, H=20),
    Shape(B=2, T=19, N=4, K=2, S=256, H=24),
    Shape(B=1, T=140, N=2, K=1, S=256, H=8),
]


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def _ids(shape: Shape) -> str:
    return "-".join(f"{name}{size}" for name, size in shape._asdict().items())


def _operands(shape: Shape, dtype: Any = jnp.float32, seed: int = 0, window: int | None = None) -> list[np.ndarray]:
    """q, k, v, positions of queries and keys. Keys lie anywhere, with holes; unseen ones are NaN.

    Row 0 has all keys in order, row 1 any order and random holes; a third row sees nothing.
    """
    rng = np.random.default_rng(seed)
    B, T, N, K, S, H = shape
    q, k, v = (
        np.array(jnp.asarray(rng.standard_normal(size), dtype)) for size in ((B, T, N, H), (B, K, S, H), (B, K, S, H))
    )
    k_positions = np.stack([rng.permutation(S) for _ in range(B)]).astype(np.int32)
    k_positions[rng.random((B, S)) < 0.4] = -1
    k_positions[0] = np.arange(S)
    q_positions = rng.integers(0, S, size=(B, T)).astype(np.int32)
    q_positions[rng.random((B, T)) < 0.2] = -2
    q_positions[0] = np.arange(S - T, S)
    if B > 2:
        k_positions[-1] = rng.choice([-1, -7, S, S + 3], size=S)
    ahead = q_positions[:, :, None] - k_positions[:, None]
    seen = ((k_positions[:, None] >= 0) & (ahead >= 0) & (ahead < (window or S))).any(axis=1)
    for array in (k, v):
        array[np.broadcast_to(~seen[:, None], array.shape[:3])] = np.nan
    return [q, k, v, q_positions, k_positions]


def _tolerance(dtype: Any, shape: Shape) -> float:
    """What an output, a mean of values of size about 1 to 4, may be off.

    Scores are sums of H products of numbers of size 1, scaled to size 1: their error is a few eps32·sqrt(H), and so is
    the weights' relative error; normalising and the sum over S cost eps32·sqrt(S). Weights and result are rounded to
    `dtype` (eps/2 each, of numbers up to 4).
    """
    accumulated = 4 * float(jnp.finfo(jnp.float32).eps) * (math.sqrt(shape.H) + math.sqrt(shape.S))
    rounded = 2 * float(jnp.finfo(dtype).eps) if dtype != jnp.float32 else 0.0
    return accumulated + rounded


@pytest.mark.parametrize("shape", SHAPES, ids=_ids)
def test_agrees_with_the_oracle(shape):
    _check(shape, jnp.float32, "auto")


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("shape", thinned(SHAPES[::3], SHAPES[0]), ids=_ids)
def test_half_precision_agrees_with_the_oracle(shape, dtype):
    _check(shape, dtype, "xla")


WINDOWS = [1, 2, 127, 128, 129]


@pytest.mark.parametrize("shape", thinned(SHAPES, SHAPES[0], SHAPES[7]), ids=_ids)
def test_sinks_agree_with_the_oracle(shape):
    _check(shape, jnp.float32, "xla", sinks=True)
    _check(shape, jnp.float32, "xla", sinks=True, window=WINDOWS[sum(shape) % len(WINDOWS)])


@pytest.mark.parametrize("sinks", [True, thorough(False)])  # no model has windows alone
@pytest.mark.parametrize("shape", thinned(SHAPES, SHAPES[0], SHAPES[6]), ids=_ids)
def test_windows_agree_with_the_oracle(shape, sinks):
    """In one program for all windows: `attention` asks a window how large it is, what it hands it on to does not."""
    run = jax.jit(partial(reference.dense, scale=1 / math.sqrt(shape.H)))
    for window in WINDOWS:
        operands = _operands_and_sinks(shape, jnp.float32, window, sinks)
        _compare(run(*operands, window=window), operands, shape, window)


@pytest.mark.parametrize("dtype", thinned(DTYPES[1:], jnp.bfloat16))
def test_windows_and_sinks_in_half_precision(dtype):
    _check(SHAPES[6], dtype, "xla", window=9, sinks=True)


@pytest.mark.parametrize("sink", thinned([-1e9, 1e9, 1e4], 1e9))
def test_large_sinks(sink):
    """A sink that is far below all scores is no sink, and one far above takes all."""
    shape = SHAPES[5]
    operands, sinks_N = _operands(shape), np.full(shape.N, sink, np.float32)
    actual = attention(*operands, sinks_N, scale=0.2)
    expected = attention_numpy.attention(*operands, None if sink < 0 else sinks_N, scale=0.2)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=_tolerance(jnp.float32, shape))


def _check(
    shape: Shape,
    dtype: Any,
    implementation: str,
    *,
    window: int | None = None,
    sinks: bool = False,
) -> None:
    operands, scale = _operands_and_sinks(shape, dtype, window, sinks), 1 / math.sqrt(shape.H)
    run = jax.jit(partial(attention, scale=scale, window=window, implementation=implementation))
    _compare(run(*operands), operands, shape, window)


def _operands_and_sinks(shape: Shape, dtype: Any, window: int | None, sinks: bool) -> list[np.ndarray]:
    operands = _operands(shape, dtype, window=window)
    if sinks:
        operands.append(np.random.default_rng(1).standard_normal(shape.N).astype(dtype) * 2)
    return operands


def _compare(actual: jax.Array, operands: list[np.ndarray], shape: Shape, window: int | None) -> None:
    dtype = operands[0].dtype
    assert actual.dtype == dtype
    expected = attention_numpy.attention(*operands, scale=1 / math.sqrt(shape.H), window=window)
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=_tolerance(dtype, shape))
    nothing_BT = operands[3] < 0
    if shape.B > 2:
        nothing_BT[-1] = True
    assert not np.asarray(actual, np.float32)[nothing_BT].any(), "a query that sees nothing must give exactly 0"


@pytest.mark.parametrize("dtype", thinned(DTYPES[1:], jnp.bfloat16))
def test_half_precision_rounds_weights_and_result_only(dtype):
    """Scores and sums are float32.

    Rounding to `dtype` is off by 0.21 eps (root mean square). The result is rounded once, and weights once, which
    passes on undiminished to a sum of values of mean 0: together 0.30 eps. Rounded scores would make it 0.55.
    """
    B, T, N, K, S, H = Shape(B=2, T=3, N=4, K=2, S=1024, H=40)
    rng = np.random.default_rng(4)
    q, k, v = (jnp.asarray(rng.standard_normal(size), dtype) for size in ((B, T, N, H), (B, K, S, H), (B, K, S, H)))
    operands = (q, k, v, np.tile(np.arange(S - T, S), (B, 1)), np.tile(np.arange(S), (B, 1)))
    actual = np.asarray(attention(*operands, scale=1 / math.sqrt(H)), np.float64)
    expected = attention_numpy.attention(*map(np.asarray, operands), scale=1 / math.sqrt(H))
    error = np.sqrt(np.square(actual - expected).mean() / np.square(expected).mean())
    assert error < 0.33 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("magnitude", thinned([1e4, -1e4], 1e4))
def test_large_scores(magnitude):
    """Scores far beyond what exp can hold: the softmax must subtract its maximum."""
    shape = Shape(B=2, T=1, N=2, K=1, S=384, H=3)
    q, k, v, q_positions, k_positions = _operands(shape)
    q, k = np.full_like(q, magnitude), np.where(np.isnan(k), k, 1 + 0.001 * k)
    actual = attention(q, k, v, q_positions, k_positions, scale=1.0)
    expected = attention_numpy.attention(q, k, v, q_positions, k_positions, scale=1.0)
    # Scores of 3e4 are good to eps/2 of that, 2e-3, and so are the weights, relatively; values go up to 4.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=0.01)


def test_it_can_be_differentiated():
    """A derivative in a random direction, against central differences of the float64 oracle."""
    shape = Shape(B=2, T=6, N=4, K=2, S=6, H=5)
    q, k, v, q_positions, k_positions = _operands(shape, seed=5)
    k, v = np.nan_to_num(k, nan=0.5), np.nan_to_num(v, nan=0.5)
    rng = np.random.default_rng(6)
    directions = [rng.standard_normal(x.shape) for x in (q, k, v)]
    weights = rng.standard_normal(q.shape)

    def loss(run: Any, *operands: Any) -> Any:
        return (run(*operands, q_positions, k_positions, scale=0.4) * weights).sum()

    gradients = jax.grad(partial(loss, attention), argnums=(0, 1, 2))(q, k, v)
    actual = sum(np.vdot(gradient, direction) for gradient, direction in zip(gradients, directions, strict=True))
    step = 1e-5
    ends = [
        loss(attention_numpy.attention, *(x + sign * step * d for x, d in zip((q, k, v), directions, strict=True)))
        for sign in (1, -1)
    ]
    np.testing.assert_allclose(actual, (ends[0] - ends[1]) / (2 * step), rtol=1e-4)


def test_what_cannot_be_run_raises():
    operands = _operands(Shape(B=1, T=1, N=5, K=2, S=8, H=4))
    with pytest.raises(ValueError, match="5 query heads cannot share 2 key/value heads"):
        attention(*operands, scale=1.0)
    operands = _operands(Shape(B=1, T=1, N=4, K=2, S=8, H=4))
    with pytest.raises(ValueError, match=r"attention has no implementation 'triton9' for these operands; it has .*xla"):
        attention(*operands, scale=1.0, implementation="triton9")
