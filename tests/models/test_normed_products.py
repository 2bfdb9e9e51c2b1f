"""Products that norm their row: in a model, numbers go the same ways as if the norm came before the product."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax.layers.weight
from gptjax.config import PUBLISHED
from gptjax.models import registry
from gptjax.models.packing import quantized
from gptjax.models.params import abstract_params, random_params, weights_by_path
from pallas_kernels.add_norm import add_norm
from pallas_kernels.formats import is_packed
from pallas_kernels.formats.ggml.fragments import QuantizedFragments
from pallas_kernels.formats.ggml.weight import Quantized
from pallas_kernels.matvec import RowNorm, packed_matvec

LAYERS = 2


def _finished(norm: RowNorm) -> tuple[jax.Array, jax.Array]:
    """What the kernel computes before it multiplies: the sum and the norm, one row each."""
    row = norm.x.reshape(1, -1)
    return add_norm(row, norm.terms, norm.scale_D, epsilon=norm.epsilon, center=False, implementation="xla")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts jnp in the place of the kernels, and returns a list of what they were called for."""
    calls = []

    def normed_matvec(norm: RowNorm, parts: Any, bias: Any) -> Any:
        calls.append("product")
        total, normed = _finished(norm)
        return total.reshape(norm.x.shape), packed_matvec(normed, parts, bias, implementation="xla")

    def normed_gated(norm: RowNorm, parts: Any) -> Any:
        calls.append("gated")
        total, normed = _finished(norm)
        y = packed_matvec(normed, parts, implementation="xla").total().astype(norm.x.dtype)
        gate, up = jnp.split(y.astype(jnp.float32), 2, axis=-1)
        return total.reshape(norm.x.shape), (jax.nn.silu(gate) * up).astype(norm.x.dtype)

    kernels = {"normed_matvec": normed_matvec, "normed_gated": normed_gated}
    for name, function in kernels.items():
        monkeypatch.setattr(gptjax.layers.weight, name, function)
    return calls


@pytest.fixture
def model_and_params() -> Any:
    """Two layers with biases, packed, in bfloat16."""
    sizes = {"width": 128, "num_heads": 2, "num_kv_heads": 1, "head_width": 64, "mlp_width": 192, "vocab_size": 64}
    config = dataclasses.replace(PUBLISHED["qwen2.5-0.5b"], num_layers=LAYERS, windows=(None,) * LAYERS, **sizes)
    config = quantized(config, weights_by_path(abstract_params(registry.build(config))), "Q4_0")
    model = registry.build(config, dtype=jnp.bfloat16)

    def repacked(weight: Any) -> Any:
        return QuantizedFragments.of(weight) if isinstance(weight, Quantized) else weight

    return model, jax.tree.map(repacked, random_params(model), is_leaf=is_packed)


def _steps(model: Any, params: Any, tokens: int, **more: Any) -> list[np.ndarray]:
    """Hidden states and caches of two calls."""
    jax.clear_caches()  # of blocks, whose kernels this test exchanges
    cache, found = registry.create_cache(model, batch=1, max_length=64), []
    for call in range(2):
        positions = call * tokens + jnp.arange(tokens, dtype=jnp.int32)[None]
        ids = 7 * positions + 3
        result = jax.jit(partial(model.apply, **more))({"params": params}, ids, positions, cache)
        hidden, cache = result[0] if more else result
        found += [np.asarray(each, np.float32) for each in jax.tree.leaves((hidden, cache))]
    return found


def _takes(monkeypatch: pytest.MonkeyPatch, *, takes: bool) -> None:
    for name in ("takes_normed", "takes_normed_gated"):
        monkeypatch.setattr(gptjax.layers.weight, name, lambda *operands, **settings: takes)


def test_a_model_of_products_that_norm_has_the_same_numbers(model_and_params, taken, monkeypatch):
    _takes(monkeypatch, takes=False)
    expected = _steps(*model_and_params, 1)
    assert not taken
    _takes(monkeypatch, takes=True)
    actual = _steps(*model_and_params, 1)
    # The first block, without a pending update, is traced by itself, and the others once.
    assert taken == ["product", "gated"] * 2
    for one, other in zip(expected, actual, strict=True):
        np.testing.assert_array_equal(one, other)


def test_norms_that_are_observed_or_of_several_rows_are_not_part_of_products(model_and_params, taken, monkeypatch):
    _takes(monkeypatch, takes=True)
    _steps(*model_and_params, 2)
    _steps(*model_and_params, 1, mutable=["activations"])
    assert not taken
