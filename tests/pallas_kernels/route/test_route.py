"""`pallas_kernels.route` against float64 NumPy. The kernels are lowered everywhere, and run on Hopper."""

import importlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ptx
from pallas_kernels.route import norm_route
from tests.oracles import add_norm_numpy
from tests.oracles.add_norm_numpy import Case
from tests.pallas_kernels.emulated_ptx import launched
from tests.pallas_kernels.marks import lowered, needs_hopper, needs_mosaic
from tests.thinned import thinned, thorough

EPSILON = 1e-5
SHAPES = [(1, 2880, 32, 4), (3, 96, 128, 4), (7, 88, 6, 3), (5, 64, 8, 8), (2, 96, 5, 1)]  # T, D, E, top
IMPLEMENTATIONS = ["xla", pytest.param("mosaic", marks=needs_hopper)]


def _router(T: int, D: int, E: int, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A router, its bias, and tokens' positions, of which the second and each fifth after it are padding."""
    rng = np.random.default_rng(T + E)
    router, bias = rng.standard_normal((D, E)) / np.sqrt(D), rng.standard_normal(E)
    positions = np.where(np.arange(T) % 5 == 1, -1 - np.arange(T), np.arange(T)).astype(np.int32)
    return jnp.asarray(router, dtype), jnp.asarray(bias, dtype), jnp.asarray(positions)


def _operands(T: int, D: int, E: int, dtype: Any) -> tuple[jax.Array, ...]:
    x = np.random.default_rng(T).standard_normal((T, D))
    return jnp.asarray(x, dtype), *_router(T, D, E, dtype)


def _route(
    x: jax.Array, router: jax.Array, bias: jax.Array, positions: jax.Array, *, top: int, implementation: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The norm of x alone, and what is chosen of it."""
    choice = {"router_DE": router, "router_bias_E": bias, "positions_T": positions, "top": top}
    scale = jnp.ones(x.shape[1], x.dtype)
    return norm_route(x, None, scale, epsilon=EPSILON, implementation=implementation, **choice)[1:]


def _check(experts: jax.Array, weights: jax.Array, operands: tuple[jax.Array, ...], top: int) -> None:
    """That these are right for a norm, a router, its bias, and positions."""
    x, router, bias, positions = operands
    assert experts.dtype == jnp.int32 and weights.dtype == jnp.float32
    assert experts.shape == weights.shape == (len(x), top)
    token = np.asarray(positions) >= 0
    experts, weights = np.asarray(experts), np.asarray(weights)
    assert (experts[~token] == -1).all()
    logits = np.asarray(x, np.float64) @ np.asarray(router, np.float64) + np.asarray(bias, np.float64)
    experts, weights, logits = experts[token], weights[token], logits[token]
    # A logit is rounded to x's dtype: one that is chosen is at most that much below one that is not.
    tolerance = np.abs(logits).max() * float(jnp.finfo(x.dtype).eps)
    chosen = np.take_along_axis(logits, experts, axis=1)
    best = -np.sort(-logits, axis=1)[:, :top]
    np.testing.assert_allclose(chosen, best, rtol=0, atol=tolerance + 1e-5)
    expected = np.exp(best - best.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights, expected, rtol=0, atol=tolerance + 1e-6)
    assert all(len(set(row)) == top for row in experts.tolist())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("T", "D", "E", "top"), SHAPES)
def test_agrees_with_numpy(T, D, E, top, dtype):
    operands = _operands(T, D, E, dtype)
    with jax.default_matmul_precision("highest"):
        normed, experts, weights = jax.jit(partial(_route, top=top, implementation="xla"))(*operands)
    _check(experts, weights, (normed, *operands[1:]), top)


@needs_hopper
@pytest.mark.parametrize("T", [1, 3, 8, 32, 128])
@pytest.mark.parametrize(
    ("D", "E", "top"), [(2880, 32, 4), (2880, 128, 4), (768, 64, 4), (64, 8, 8), (8192, 16, 3), (8192, 128, 4)]
)
def test_the_kernel_agrees_with_numpy(T, D, E, top):
    operands = _operands(T, D, E, jnp.bfloat16)
    normed, experts, weights = _route(*operands, top=top, implementation="mosaic")
    _check(experts, weights, (normed, *operands[1:]), top)


ROWS = [1, 3, 8, 32, 128]
SIZES = [  # D, E, S, X
    (2880, 32, 5, 0),
    (2880, 128, 5, 0),
    (2880, 32, 3, 4),
    (768, 64, 0, 0),
    (64, 8, 3, 4),
    (8192, 16, 2, 0),
]
# The kernel is another for each number of rows and size. To jnp all rows are alike: each number of them comes at least
# twice, and each size with a few and with many.
PAIRS = [
    (T, sizes, "xla") if sizes in SIZES[2:4] else thorough(T, sizes, "xla")
    for n, sizes in enumerate(SIZES)
    for T in (ROWS[n % 2], ROWS[2 + n % 3])
]
PAIRS += [pytest.param(T, sizes, "mosaic", marks=needs_hopper) for sizes in SIZES for T in ROWS]


@pytest.mark.parametrize(("T", "sizes", "implementation"), PAIRS)
def test_the_norm_and_the_choice_agree_with_numpy(T, sizes, implementation):
    D, E, S, X = sizes
    case = Case(T=T, D=D, S=max(S, 1), X=X, E=5 if X else 1, weighted=bool(X))
    x, terms, scale, _ = add_norm_numpy.operands(case, jnp.bfloat16)
    terms = terms if S else None
    router, router_bias, positions = _router(T, D, E, jnp.bfloat16)
    run = partial(norm_route, epsilon=EPSILON, top=4, implementation=implementation)
    choice = {"router_DE": router, "router_bias_E": router_bias, "positions_T": positions}
    sum_TD, normed_TD, experts, weights = run(x, terms, scale, **choice)
    assert sum_TD.dtype == normed_TD.dtype == jnp.bfloat16
    # Both are rounded once, to half a unit in the last place, and by XLA what is added too; the rest is float32's.
    rounding = float(jnp.finfo(jnp.bfloat16).eps) / 2
    added = add_norm_numpy.total(terms) if S else np.zeros((T, D))
    expected = np.asarray(x, np.float64) + added
    rounded = rounding * (1 + rounding) * np.abs(added) if implementation == "xla" else 0
    assert (np.abs(np.asarray(sum_TD, np.float64) - expected) <= rounding * np.abs(expected) + rounded + 1e-5).all()
    expected = add_norm_numpy.norm(sum_TD, scale, None, epsilon=EPSILON, center=False)
    np.testing.assert_allclose(np.asarray(normed_TD, np.float64), expected, rtol=rounding, atol=2e-5)
    _check(experts, weights, (normed_TD, router, router_bias, positions), 4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_of_equals_the_lower_number_comes_first(implementation):
    x, positions = jnp.zeros((1, 8), jnp.bfloat16), jnp.zeros(1, jnp.int32)
    router, bias = jnp.zeros((8, 8), jnp.bfloat16), jnp.asarray([1, 3, 2, 3, 2, 2, -1, 3], jnp.bfloat16)
    _, experts, weights = _route(x, router, bias, positions, top=5, implementation=implementation)
    np.testing.assert_array_equal(experts, [[1, 3, 7, 2, 4]])
    np.testing.assert_array_equal(weights[0, :1], weights[0, 2:3])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_are_rounded_before_they_are_compared(implementation):
    """As in the code that the models were published with: 256.5 and 257 are 256 and 256 in bfloat16."""
    bias = jnp.zeros(8).at[jnp.asarray([1, 2])].set(jnp.asarray([256.5, 257]))
    x, router, positions = jnp.zeros((1, 8), jnp.bfloat16), jnp.zeros((8, 8), jnp.bfloat16), jnp.zeros(1, jnp.int32)
    _, experts, _ = _route(x, router, bias, positions, top=2, implementation=implementation)
    np.testing.assert_array_equal(experts, [[1, 2]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_lies_at_padding_has_no_influence(implementation):
    x, router, bias, _ = _operands(3, 96, 8, jnp.bfloat16)
    positions = jnp.asarray([4, -1, 0], jnp.int32)
    run = partial(_route, top=4, implementation=implementation)
    expected, actual = run(x, router, bias, positions)[1:], run(x.at[1].set(jnp.nan), router, bias, positions)[1:]
    np.testing.assert_array_equal(actual[0], expected[0])
    np.testing.assert_array_equal(actual[1][::2], expected[1][::2])
    np.testing.assert_array_equal(actual[0][1], [-1] * 4)


def _kernels(lowered: Any) -> int:
    return lowered.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic_gpu")


@needs_mosaic
@pytest.mark.parametrize("T", thinned([1, 3, 8, 32, 128], 1, 32))
@pytest.mark.parametrize(("D", "E", "top"), [(2880, 32, 4), (2880, 128, 4), (96, 8, 2)])
def test_the_kernels_lower_for_cuda(T, D, E, top):
    mosaic = importlib.import_module("pallas_kernels.route.mosaic_sm90")
    router = _router(T, D, E, jnp.bfloat16)
    run = jax.jit(partial(mosaic.norm_route, epsilon=EPSILON, top=top))
    for case in (Case(T=T, D=D, S=5, E=1), Case(T=T, D=D, S=3, X=4, E=3, weighted=True)):
        x, terms, scale, _ = add_norm_numpy.operands(case, jnp.bfloat16)
        for summed in (terms, None):
            assert mosaic.supports(x, summed, scale, *router, top=top)
            assert _kernels(run.trace(x, summed, scale, *router)) == 1


@needs_mosaic
@pytest.mark.parametrize(("E", "top"), [(32, 4), (128, 4), (6, 6)])
def test_the_kernel_for_many_emulated_agrees_with_numpy(E, top, monkeypatch):
    """With logits of few values, so that most tokens have equal ones."""
    choice, many = (importlib.import_module(f"pallas_kernels.route.{name}_sm90") for name in ("choice", "many"))
    monkeypatch.setattr(ptx, "launch", launched(choice, many))
    T, rng = 133, np.random.default_rng(E)
    logits = rng.choice(np.float32([-3, -0.5, -0.0, 0.0, 1, 2.001]), (T, -(-E // 64) * 64))  # beyond E: not to be read
    logits[:3], bias = 1, rng.choice([0, 0.5], E)
    positions = np.where(np.arange(T) % 5 == 1, -1 - np.arange(T), np.arange(T)).astype(np.int32)
    given = jnp.asarray(logits), jnp.asarray(bias, jnp.bfloat16), jnp.asarray(positions)
    experts, weights = many.choose.__wrapped__(*given, top=top)
    rounded = np.asarray(jnp.asarray(logits[:, :E] + np.float32(bias), jnp.bfloat16), np.float64)
    best = np.argsort(-rounded, axis=1, kind="stable")[:, :top]
    np.testing.assert_array_equal(experts, np.where(positions[:, None] < 0, -1, best))
    expected = np.exp(np.take_along_axis(rounded, best, axis=1))
    np.testing.assert_allclose(weights, expected / expected.sum(axis=1, keepdims=True), rtol=1e-6, atol=0)
    fewer = many.choose.__wrapped__(given[0][2:7], given[1], given[2][2:7], top=top)
    np.testing.assert_array_equal(fewer[1].view(np.int32), weights[2:7].view(np.int32))


@needs_mosaic
@pytest.mark.parametrize(("D", "E", "top"), [(2880, 32, 4), (2880, 128, 4), (128, 6, 2)])
def test_two_kernels_for_many_are_lowered(D, E, top):
    operands = _operands(2048, D, E, jnp.bfloat16)
    text = lowered(partial(_route, top=top, implementation="mosaic"), *operands)
    assert text.count("custom_call @mosaic_gpu") == 2 and "top_k" not in text


@needs_hopper
@pytest.mark.parametrize("T", [129, 256, 2048])
@pytest.mark.parametrize(("D", "E", "top"), [(2880, 32, 4), (2880, 128, 4), (64, 6, 6)])
def test_the_kernels_for_many_agree_with_numpy(T, D, E, top):
    operands = _operands(T, D, E, jnp.bfloat16)
    normed, experts, weights = _route(*operands, top=top, implementation="mosaic")
    _check(experts, weights, (normed, *operands[1:]), top)


def test_what_the_kernels_do_not_take():
    mosaic = importlib.import_module("pallas_kernels.route.mosaic_sm90")
    x, router, bias, positions = _operands(2, 96, 32, jnp.bfloat16)
    scale = jnp.ones(96, jnp.bfloat16)

    def supports(x: jax.Array, *choice: jax.Array, top: int, scale: jax.Array = scale) -> bool:
        return bool(mosaic.supports(x, None, scale, *choice, top=top))

    assert supports(x, router, bias, positions, top=4)
    assert supports(x, router, bias.astype(jnp.float32), positions, top=32)
    assert not supports(x.astype(jnp.float32), router, bias, positions, top=4)
    assert not supports(x[:, :-4], router[:-4], bias, positions, top=4, scale=scale[:-4])
    assert not supports(x, router[:, :24], bias[:24], positions, top=4)
    assert not supports(x, router, bias, positions.astype(jnp.int16), top=4)
    assert not supports(x, router, bias, positions, top=33)
    assert not supports(x, router, bias, positions, top=4, scale=scale.astype(jnp.float16))
    many = jnp.zeros((129, 96), jnp.bfloat16)
    assert not supports(many, router, bias, jnp.zeros(129, jnp.int32), top=4)


@pytest.mark.parametrize("implementation", ["cuda", "mosaic"])
def test_an_implementation_that_there_is_not_raises(implementation):
    x, router, bias, positions = _operands(2, 96, 8, jnp.float32)
    with pytest.raises(ValueError, match=f"norm_route has no implementation '{implementation}'"):
        _route(x, router, bias, positions, top=2, implementation=implementation)
