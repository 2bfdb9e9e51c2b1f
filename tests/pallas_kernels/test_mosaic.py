"""The Mosaic kernels of experts and products: lowered for CUDA everywhere, run on a Hopper GPU."""

import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, tiles
from pallas_kernels.formats.fragments import MXFP4Fragments
from pallas_kernels.formats.mxfp4 import quantize
from pallas_kernels.matvec import matvec
from pallas_kernels.moe import moe
from tests.oracles import moe_numpy
from tests.pallas_kernels.marks import lowered, needs_hopper, needs_mosaic

SETTINGS = {"alpha": 1.702, "limit": 7.0}
BF16 = float(jnp.finfo(jnp.bfloat16).eps)
ROWS = (1, 2, 3, 8, 9, 16, 31, 32, 64, 100, 128)  # of a step


def _shape(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _fragments(E: int, N: int, K: int) -> MXFP4Fragments:
    words, scales = (
        _shape(E, N // 64, K // 64, 128, 4, dtype=jnp.uint32),
        _shape(E, N // 64, K // 64, 64, dtype=jnp.uint16),
    )
    return MXFP4Fragments(words, scales)


@needs_mosaic
@pytest.mark.parametrize(
    ("T", "E"), [(1, 32), (2, 32), (8, 32), (64, 32), (128, 32), (128, 128), (200, 32), (2048, 32), (256, 128)]
)
def test_experts_lower(T, E):
    D, F, X = 2880, 2880, 4
    text = lowered(
        lambda *operands: moe(*operands, **SETTINGS, implementation="mosaic").total(),
        _shape(T, D),
        _shape(T, X, dtype=jnp.int32),
        _shape(T, X, dtype=jnp.float32),
        _fragments(E, 2 * F, D),
        _shape(E, 2 * F),
        _fragments(E, D, F),
        _shape(E, D),
    )
    assert text.count("call @product") == 2
    few = T <= 128 and T * X < 16 * E
    assert ("moe_product" if few else "moe_grouped") in text
    assert ("moe_groups" in text) == (not few) and "stablehlo.sort" not in text


@needs_mosaic
@pytest.mark.parametrize(
    ("T", "K", "N", "transposed"),
    [
        (1, 2880, 5120, False),
        (4, 4096, 2880, False),
        (8, 768, 2304, False),
        (8, 768, 50257, True),
        (9, 1600, 6400, False),
        (128, 2880, 5120, False),
        (128, 128, 67000, True),
        (9, 768, 50257, True),
        (128, 1600, 50257, True),
        (64, 64, 7, True),
    ],
)
def test_products_lower(T, K, N, transposed):
    product = importlib.import_module("pallas_kernels.matvec.mosaic_sm90").product
    kernel = _shape(N, K) if transposed else _shape(K, N)
    text = lowered(lambda *operands: product(*operands, transposed=transposed).total(), _shape(T, K), kernel, _shape(N))
    assert ("matvec_many" in text) == (T > 8)


@needs_mosaic
@pytest.mark.parametrize("T", [1, 32])
def test_kernels_ask_for_settings_and_lower_with_each_that_can_be_tried(T):
    E, D, F, X = 8, 320, 192, 2

    def chosen(*operands):
        return moe(*operands, **SETTINGS, implementation="mosaic").total()

    operands = (
        _shape(T, D),
        _shape(T, X, dtype=jnp.int32),
        _shape(T, X, dtype=jnp.float32),
        _fragments(E, 2 * F, D),
        _shape(E, 2 * F),
        _fragments(E, D, F),
        _shape(E, D),
    )
    with tiles.trial({}) as asked:
        jax.eval_shape(chosen, *operands)
    assert [operation for operation, _ in asked] == ["moe/mosaic", "moe/mosaic"]
    for operation, items in asked:
        module = importlib.import_module(dispatch.module(operation))
        shape = dict(items)
        tried = module.tunable(shape)
        assert module.heuristic(shape) in tried and len(tried) > 1
        for settings in tried:
            with tiles.trial({(operation, items): settings}):
                lowered(chosen, *operands)


@needs_mosaic
def test_auto_lowers_to_kernels_where_they_pay(monkeypatch):
    monkeypatch.setattr(dispatch, "preferred", lambda: dispatch.MOSAIC)

    def experts(T: int, E: int) -> str:
        D, F, X = 320, 192, 2
        operands = _shape(T, D), _shape(T, X, dtype=jnp.int32), _shape(T, X, dtype=jnp.float32)
        weights = _fragments(E, 2 * F, D), _shape(E, 2 * F), _fragments(E, D, F), _shape(E, D)
        return lowered(lambda *operands: moe(*operands, **SETTINGS).total(), *operands, *weights)

    def product(T: int, outputs: int) -> str:
        return lowered(lambda *operands: matvec(*operands).total(), _shape(T, 320), _shape(320, outputs))

    assert "moe_product" in experts(128, 32) and "moe_grouped" in experts(129, 32)
    assert "moe_product" in experts(31, 4) and "moe_grouped" in experts(32, 4)
    assert "mosaic_gpu" in product(8, 192) and "mosaic_gpu" in product(128, 192)
    assert "mosaic_gpu" not in product(8, 200)

    def head(T: int, outputs: int) -> str:
        operands = _shape(T, 320), _shape(outputs, 320)
        return lowered(lambda *operands: matvec(*operands, transposed=True).total(), *operands)

    assert all("mosaic_gpu" in head(T, outputs) for T in (1, 8, 9, 128) for outputs in (201, 208))


@needs_mosaic
@pytest.mark.parametrize(
    ("inputs", "outputs", "expected"),
    [
        (2880, 5120, 3),
        (4096, 2880, 4),
        (2880, 201088, 1),
        (4096, 28672, 1),
        (14336, 4096, 4),
        (64, 64, 1),
        (1600, 4800, 5),
    ],
)
def test_runs_follow_from_a_matrix_alone(inputs, outputs, expected):
    assert importlib.import_module("pallas_kernels.matvec.mosaic_sm90").runs(inputs, outputs) == expected


def _moe_operands(T: int, E: int, D: int, F: int, X: int, seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((T, D)), jnp.bfloat16)
    experts = np.stack([rng.permutation(E)[:X] for _ in range(T)]).astype(np.int32)
    missing = rng.choice([-1, E], (T, X))
    experts = np.where(rng.random((T, X)) < 0.2, missing, experts).astype(np.int32)
    gate_up = quantize(jnp.asarray(rng.standard_normal((E, 2 * F, D)) / math.sqrt(D), jnp.float32))
    down = quantize(jnp.asarray(rng.standard_normal((E, D, F)) / math.sqrt(F), jnp.float32))
    biases = [jnp.asarray(rng.standard_normal((E, n)), jnp.bfloat16) for n in (2 * F, D)]
    return [x, experts, rng.dirichlet(np.ones(X), T).astype(np.float32), gate_up, biases[0], down, biases[1]]


@needs_hopper
@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 33, 128, 129, 300, 1025])
@pytest.mark.parametrize(("E", "D", "F", "X"), [(5, 64, 192, 2), (32, 320, 64, 4), (128, 64, 64, 4), (3, 448, 320, 3)])
def test_experts_agree_with_the_oracle(T, E, D, F, X):
    _agrees_with_the_oracle(_moe_operands(T, E, D, F, X, seed=T))


@needs_hopper
def test_experts_with_any_number_of_tokens_agree_with_the_oracle():
    """No group to three, the last with a multiple of 32 of tokens, or with one less or more, or with any number."""
    counts = [0, 1, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 256, 300]
    T = sum(counts)
    x, experts, *rest = _moe_operands(T, len(counts), 320, 192, 1, seed=0)
    experts = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int32)[:, None]
    _agrees_with_the_oracle([x, experts, *rest])


def _agrees_with_the_oracle(operands):
    x, experts, weights, gate_up, bias, down, other = operands
    actual = jax.jit(lambda *given: moe(*given, **SETTINGS, implementation="mosaic").total())(
        x, experts, weights, MXFP4Fragments.of(gate_up), bias, MXFP4Fragments.of(down), other
    )
    dense = [np.asarray(each.dequantize().swapaxes(1, 2), np.float64) for each in (gate_up, down)]
    x, bias, other = (np.asarray(each, np.float64) for each in (x, bias, other))
    expected = moe_numpy.moe(x, experts, weights.astype(np.float64), dense[0], bias, dense[1], other, **SETTINGS)
    # What is rounded are the hidden values, of up to 56 and mostly about 1, each to half a last place.
    assert np.linalg.norm(actual - expected) < BF16 * np.linalg.norm(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=16 * BF16)


@needs_hopper
@pytest.mark.parametrize(
    ("K", "N", "transposed"),
    [
        (64, 64, False),
        (320, 192, False),
        (2880, 5120, False),
        (4096, 2880, False),
        (1600, 6400, False),
        (14336, 4096, False),
        (64, 8, True),
        (64, 7, True),
        (64, 65, True),
        (768, 1000, True),
        (320, 67000, True),
        (768, 50257, True),
        (1600, 50257, True),
    ],
)
def test_products_agree_with_numpy_with_the_same_bits_among_any_number_of_rows(K, N, transposed):
    product = importlib.import_module("pallas_kernels.matvec.mosaic_sm90").product
    rng = np.random.default_rng(K)
    x, kernel, bias = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((128, K), (K, N), (N,)))
    stored = kernel.T if transposed else kernel
    totals = {T: np.asarray(product(x[:T], stored, bias, transposed=transposed).total()) for T in ROWS}
    x, kernel, bias = (np.asarray(each, np.float64) for each in (x, kernel, bias))
    np.testing.assert_allclose(totals[128], x @ kernel + bias, rtol=0, atol=1e-6 * K)
    for T, total in totals.items():
        np.testing.assert_array_equal(total, totals[128][:T], err_msg=f"{T} rows")
