"""`pallas_kernels.route` against float64 NumPy. The kernel runs on a GPU only: here it is lowered for one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.route import route

SHAPES = [(1, 2880, 32, 4), (3, 96, 128, 4), (7, 88, 6, 3), (5, 64, 8, 8), (2, 96, 5, 1)]  # T, D, E, top


def _operands(T: int, D: int, E: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(T + E)
    x, router, bias = rng.standard_normal((T, D)), rng.standard_normal((D, E)) / np.sqrt(D), rng.standard_normal(E)
    return jnp.asarray(x, dtype), jnp.asarray(router, dtype), jnp.asarray(bias, dtype)


def _logits(x: jax.Array, router: jax.Array, bias: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(router, np.float64) + np.asarray(bias, np.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("T", "D", "E", "top"), SHAPES)
def test_agrees_with_numpy(T, D, E, top, dtype):
    operands = _operands(T, D, E, dtype)
    with jax.default_matmul_precision("highest"):
        experts, weights = jax.jit(partial(route, top=top, implementation="xla"))(*operands)
    assert experts.dtype == jnp.int32 and weights.dtype == jnp.float32
    logits = _logits(*operands)
    # A logit is rounded to dtype: one that is chosen is at most that much below one that is not.
    tolerance = np.abs(logits).max() * float(jnp.finfo(dtype).eps)
    chosen = np.take_along_axis(logits, np.asarray(experts), axis=1)
    best = -np.sort(-logits, axis=1)[:, :top]
    np.testing.assert_allclose(chosen, best, rtol=0, atol=tolerance + 1e-5)
    expected = np.exp(best - best.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights, expected, rtol=0, atol=tolerance + 1e-6)
    assert all(len(set(row)) == top for row in np.asarray(experts).tolist())


def test_of_equals_the_lower_number_comes_first():
    x = jnp.zeros((1, 8), jnp.bfloat16)
    bias = jnp.asarray([1, 3, 2, 3, 2, 2, -1, 3], jnp.bfloat16)
    experts, weights = route(x, jnp.zeros((8, 8), jnp.bfloat16), bias, top=5, implementation="xla")
    np.testing.assert_array_equal(experts, [[1, 3, 7, 2, 4]])
    np.testing.assert_array_equal(weights[0, :1], weights[0, 2:3])


def test_logits_are_rounded_before_they_are_compared():
    """As in the code that the models were published with: 256.5 and 257 are 256 and 256 in bfloat16."""
    bias = jnp.asarray([0, 256.5, 257, 0], jnp.float32)
    experts, _ = route(jnp.zeros((1, 8), jnp.bfloat16), jnp.zeros((8, 4)), bias, top=2, implementation="xla")
    np.testing.assert_array_equal(experts, [[1, 2]])


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Mosaic kernels are for JAX 0.11 and newer")
@pytest.mark.parametrize("T", [1, 3, 8, 32, 128])
@pytest.mark.parametrize(("D", "E", "top"), [(2880, 32, 4), (2880, 128, 4), (96, 8, 2)])
def test_the_kernel_lowers_for_cuda(T, D, E, top):
    from pallas_kernels.route import mosaic

    operands = _operands(T, D, E, jnp.bfloat16)
    assert mosaic.supports(*operands, top=top)
    lowered = jax.jit(partial(mosaic.route, top=top)).trace(*operands).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 1


def test_what_the_kernel_does_not_take():
    from pallas_kernels.route import mosaic

    x, router, bias = _operands(2, 96, 32, jnp.bfloat16)
    assert mosaic.supports(x, router, bias, top=4)
    assert mosaic.supports(x, router, bias.astype(jnp.float32), top=32)
    assert not mosaic.supports(x.astype(jnp.float32), router, bias, top=4)
    assert not mosaic.supports(x[:, :-4], router[:-4], bias, top=4)
    assert not mosaic.supports(x, router[:, :24], bias[:24], top=4)
    assert not mosaic.supports(x, router, bias, top=33)
    assert not mosaic.supports(jnp.zeros((129, 96), jnp.bfloat16), router, bias, top=4)


@pytest.mark.parametrize("implementation", ["cuda", "mosaic"])
def test_an_implementation_that_there_is_not_raises(implementation):
    with pytest.raises(ValueError, match=f"route has no implementation '{implementation}'"):
        route(*_operands(2, 96, 8, jnp.float32), top=2, implementation=implementation)
