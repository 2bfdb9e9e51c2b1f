"""Llama's steps as they are compiled for a Hopper GPU: which kernels they take; nothing runs."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from gptjax.config import PUBLISHED
from gptjax.models import registry
from gptjax.models.packing import quantized
from gptjax.models.params import abstract_params, weights_by_path
from pallas_kernels import dispatch
from pallas_kernels.formats import is_packed
from pallas_kernels.formats.ggml.fragments import QuantizedFragments
from pallas_kernels.formats.ggml.weight import Quantized
from pallas_kernels.pages import Tiles
from tests.pallas_kernels.marks import lowered_for_h200, needs_mosaic
from tests.thinned import thorough


def _lowered(name: str, rows: int, tokens: int, packed: str | None = None, cache_dtype: str | None = None) -> str:
    """A call of `rows` x `tokens` of a published size with one layer, whose weights may be `packed` in a GGUF type."""
    config = PUBLISHED[name].with_one_layer()
    if packed is not None:
        config = quantized(config, weights_by_path(abstract_params(registry.build(config))), packed)
    model = registry.build(config, dtype=jnp.bfloat16, cache_dtype=cache_dtype)
    params = jax.tree.map(_fragments, abstract_params(model), is_leaf=is_packed)
    ids_BT = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    cache = jax.eval_shape(lambda: registry.create_cache(model, batch=rows, max_length=2048))

    def step(params, ids_BT, positions_BT, cache):
        return model.apply({"params": params}, ids_BT, positions_BT, cache)

    return lowered_for_h200(step, params, ids_BT, ids_BT, cache)


def _kernels(name: str, rows: int, tokens: int, cache_dtype: str | None = None) -> int:
    """How many kernels of ours that is."""
    return _lowered(name, rows, tokens, cache_dtype=cache_dtype).count("custom_call")


def _fragments(weight: Any) -> Any:
    return jax.eval_shape(QuantizedFragments.of, weight) if isinstance(weight, Quantized) else weight


@needs_mosaic
@pytest.mark.parametrize(
    "name", ["llama-3.1-8b", "qwen2.5-7b", "qwen3-0.6b", thorough("smollm2-135m"), thorough("mistral-7b")]
)
def test_decoding_takes_every_kernel(name, monkeypatch):
    """Three norms, four products, and attention, which also takes Qwen3's norms of heads, and appends."""
    monkeypatch.setattr(dispatch, "preferred", lambda: dispatch.MOSAIC)
    assert _kernels(name, rows=8, tokens=1) == 3 + 4 + 1
    assert _kernels(name, rows=1, tokens=512) == 4 + 1  # products and attention; XLA has the rest


@needs_mosaic
def test_float8_takes_as_many_kernels(monkeypatch):
    """Decode attention rounds and appends; a prompt's reads pages that XLA has expanded."""
    monkeypatch.setattr(dispatch, "preferred", lambda: dispatch.MOSAIC)
    assert _kernels("qwen3-0.6b", 8, 1, "fp8") == 3 + 4 + 1
    assert _kernels("qwen3-0.6b", 1, 512, "fp8") == 4 + 1


@needs_mosaic
@pytest.mark.parametrize(
    ("name", "takes", "kept"),
    [
        ("qwen2.5-7b", True, None),
        ("gpt-oss-20b", True, None),
        ("gpt-oss-20b", True, "fp8"),
        ("qwen3-0.6b", False, None),
    ],
)
def test_prompts_take_the_kernel_of_heads(name, takes, kept, monkeypatch):
    """Unless heads have norms."""
    monkeypatch.setattr(dispatch, "preferred", lambda: dispatch.MOSAIC)
    config = PUBLISHED[name].with_one_layer()
    model = registry.build(config, dtype=jnp.bfloat16, cache_dtype=kept)
    cache = jax.eval_shape(lambda: registry.create_cache(model, batch=2, max_length=512))
    tiles = Tiles(*[jax.ShapeDtypeStruct((4,), jnp.int32)] * 4)

    def read(params, ids_T, tiles, cache):
        _, positions_T = tiles.tokens(256)
        return model.apply({"params": params}, ids_T[None], positions_T[None], cache.packed(tiles))

    text = lowered_for_h200(read, abstract_params(model), jax.ShapeDtypeStruct((256,), jnp.int32), tiles, cache)
    assert ("prompt_heads" in text) == takes


@needs_mosaic
@pytest.mark.parametrize(("implementation", "kernels"), [("auto", 1), ("mosaic", 1), ("xla", 0), ("triton", 0)])
def test_the_head_is_as_the_model_was_told(implementation, kernels, monkeypatch):
    monkeypatch.setattr(
        dispatch, "preferred", lambda: dispatch.TRITON if implementation == "triton" else dispatch.MOSAIC
    )
    config = PUBLISHED["llama-3.1-8b"].with_one_layer()
    model = registry.build(config, dtype=jnp.bfloat16, implementation=implementation)
    hidden_TD = jax.ShapeDtypeStruct((2, config.width), jnp.bfloat16)
    text = lowered_for_h200(
        lambda params, hidden_TD: model.apply({"params": params}, hidden_TD, method="head"),
        abstract_params(model),
        hidden_TD,
    )
    assert text.count("custom_call") == kernels


@needs_mosaic
@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-7b"])
def test_the_activation_and_the_norms_of_one_row_are_in_products(name, monkeypatch):
    """But for the last norm."""
    monkeypatch.setattr(dispatch, "preferred", lambda: dispatch.MOSAIC)
    one, two = (_lowered(name, rows=rows, tokens=1, packed="Q4_K") for rows in (1, 2))
    assert two.count("custom_call") == 3 + 4 + 1
    assert one.count("custom_call") == 1 + 4 + 1
    assert one.count("call @add_norm") == 1
    assert "@silu" in two and "@silu" not in one  # XLA's activation
