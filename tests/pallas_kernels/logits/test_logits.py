"""`pallas_kernels.logits` against float64 NumPy. The kernel is emulated and lowered everywhere, and run on Hopper."""

import importlib
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ptx
from pallas_kernels.logits import summary
from tests.pallas_kernels.emulated_ptx import launched
from tests.pallas_kernels.marks import lowered, needs_hopper, needs_mosaic

VOCABULARIES = [1, 7, 512, 2047, 5000, 50257, 151936, 201088, 1 << 18]
EMULATED = [1, 7, 512, 2047, 5000, 50257]


def _logits(rows: int, V: int) -> np.ndarray:
    """Random ones, among them rows whose largest comes twice, with infinities, and with nothing else."""
    logits = (4 * np.random.default_rng(V).standard_normal((rows, V))).astype(np.float32)
    logits[1:2, [V // 3, V - 1]] = logits.max() + 1
    logits[2:3, :: max(2, V // 5)] = -math.inf
    logits[3:4, V // 2] = math.nan
    logits[4:5, V // 2] = math.inf
    logits[5:6] = -math.inf
    return logits


def _check(found: Any, logits: np.ndarray) -> None:
    largest, token, total = map(np.asarray, found)
    V = logits.shape[1]
    assert (largest.dtype, token.dtype, total.dtype) == (np.float32, np.int32, np.float32)
    assert ((token >= 0) & (token < V)).all()
    finite = np.isfinite(logits.max(axis=1))
    np.testing.assert_array_equal(np.isfinite(largest) & np.isfinite(total), finite)
    exact = logits[finite].astype(np.float64)
    np.testing.assert_array_equal(largest[finite], exact.max(axis=1))
    np.testing.assert_array_equal(token[finite], exact.argmax(axis=1))
    expected = np.exp(exact - exact.max(axis=1, keepdims=True)).sum(axis=1)
    # An exponential is exact to 2 ulp and what its argument, of up to about 40, is rounded by.
    np.testing.assert_allclose(total[finite], expected, rtol=4e-6, atol=0)


@pytest.mark.parametrize("V", EMULATED)
def test_agrees_with_numpy(V):
    logits = _logits(8, V)
    _check(jax.jit(partial(summary, implementation="xla"))(logits), logits)


@needs_mosaic
@pytest.mark.parametrize("V", EMULATED)
def test_the_kernel_emulated_agrees_with_numpy(V, monkeypatch):
    mosaic = importlib.import_module("pallas_kernels.logits.mosaic_sm90")
    monkeypatch.setattr(ptx, "launch", launched(mosaic))
    logits = _logits(7, V)
    with np.errstate(invalid="ignore"):
        _check(mosaic.summary.__wrapped__(jnp.asarray(logits)), logits)


@needs_mosaic
@pytest.mark.parametrize("B", [1, 128])
@pytest.mark.parametrize("V", VOCABULARIES)
def test_the_kernel_lowers_for_cuda(V, B):
    text = lowered(partial(summary, implementation="mosaic"), jax.ShapeDtypeStruct((B, V), jnp.float32))
    assert text.count("custom_call @mosaic_gpu") == 1


@needs_hopper
@pytest.mark.parametrize("V", VOCABULARIES)
def test_the_kernel_agrees_with_numpy_and_rows_have_the_bits_that_they_have_alone(V):
    logits = _logits(128, V)
    run = jax.jit(partial(summary, implementation="mosaic"))
    alone = [np.concatenate(each) for each in zip(*(run(logits[row : row + 1]) for row in range(9)), strict=True)]
    for rows in (1, 2, 3, 8, 16, 33, 64, 128):
        found = run(logits[:rows])
        _check(found, logits[:rows])
        for one, several in zip(alone, found, strict=True):
            assert one[:rows].tobytes() == np.asarray(several)[:9].tobytes()


def test_what_the_kernel_does_not_take():
    mosaic = importlib.import_module("pallas_kernels.logits.mosaic_sm90")
    assert mosaic.supports(jax.ShapeDtypeStruct((3, 50257), jnp.float32))
    assert not mosaic.supports(jax.ShapeDtypeStruct((3, 50257), jnp.bfloat16))
    assert not mosaic.supports(jax.ShapeDtypeStruct((3, (1 << 18) + 1), jnp.float32))
    assert not mosaic.supports(jax.ShapeDtypeStruct((0, 50257), jnp.float32))


@pytest.mark.parametrize("implementation", ["cuda", "mosaic"])
def test_an_implementation_that_there_is_not_raises(implementation):
    with pytest.raises(ValueError, match=f"summary has no implementation '{implementation}'"):
        summary(jnp.zeros((2, (1 << 18) + 4)), implementation=implementation)
