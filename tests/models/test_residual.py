"""The residual stream: what is pending counts, whoever adds it, and norms add it in passing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.layers.norm import LayerNorm, RMSNorm
from gptjax.layers.residual import Residual
from pallas_kernels.partial_sum import PartialSum

B, T, D = 2, 3, 5


def _random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _update(seed: int) -> tuple[PartialSum, np.ndarray]:
    """An update in four pieces with a bias, and what it comes to, in float64."""
    pieces, bias = _random(seed, 4, B * T, D), _random(seed + 1, 1, D)
    total = pieces.astype(np.float64).sum(axis=0) + bias
    return PartialSum(jnp.asarray(pieces), bias_EO=jnp.asarray(bias)), total.reshape(B, T, D)


def test_without_an_update_the_total_is_the_stream():
    x_BTD = jnp.asarray(_random(0, B, T, D))
    assert Residual(x_BTD).total() is x_BTD


def test_updates_are_added_in_turn():
    x = _random(0, B, T, D)
    (first, first_total), (second, second_total) = _update(1), _update(3)
    once = Residual(jnp.asarray(x)).plus(first)
    np.testing.assert_array_equal(once.x_BTD, x)  # until someone reads it
    np.testing.assert_allclose(once.total(), x + first_total, rtol=0, atol=1e-5)
    twice = once.plus(second)
    np.testing.assert_array_equal(twice.x_BTD, once.total())
    np.testing.assert_allclose(twice.total(), x + first_total + second_total, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_a_norm_takes_up_what_is_pending(kind, dtype):
    update, _ = _update(1)
    residual = Residual(jnp.asarray(_random(0, B, T, D), dtype)).plus(update)
    norm = kind(1e-5, dtype=dtype, param_dtype=jnp.float32, implementation="xla")
    (taken_up, normed_BTD), _ = norm.init_with_output(jax.random.key(0), residual, method="finished")
    assert taken_up.pending is None
    np.testing.assert_array_equal(taken_up.x_BTD, residual.total())
    y = np.asarray(residual.total(), np.float64)
    y -= y.mean(axis=-1, keepdims=True) if kind is LayerNorm else 0
    expected = y / np.sqrt(np.square(y).mean(axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        np.asarray(normed_BTD, np.float64), expected, rtol=0, atol=8 * float(jnp.finfo(dtype).eps)
    )
