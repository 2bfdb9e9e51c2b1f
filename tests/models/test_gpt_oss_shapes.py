"""GPT-OSS's declared shapes and sizes, its caches and its rotary frequencies; no model runs."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import PUBLISHED, GptOssConfig, config_from_json
from gptjax.layers.rope import inv_freq
from gptjax.models import registry
from gptjax.models.params import Params, abstract_params, num_params
from tests.models.gpt_oss_material import make_case
from tests.oracles import gpt_oss_numpy, gpt_oss_ours, gpt_oss_random

# docs/MODELS.md, to 9 digits
INV_FREQ = {
    0: 1.0,
    1: 0.689044306,
    8: 0.0508132748,
    9: 0.0317056962,
    17: 1.29318701e-4,
    18: 3.83088124e-5,
    31: 3.02351143e-7,
}
ATTENTION_FACTOR = 1.3465735903


def test_inv_freq_is_that_of_the_release():
    for name in ("gpt-oss-20b", "gpt-oss-120b"):
        config = PUBLISHED[name]
        assert isinstance(config, GptOssConfig)
        frequencies = inv_freq(config.rope, config.head_width)
        assert frequencies.shape == (32,)
        for index, expected in INV_FREQ.items():
            assert frequencies[index] == pytest.approx(expected, rel=1e-8)
        assert config.rope.attention_factor == pytest.approx(ATTENTION_FACTOR, rel=1e-10)


@pytest.mark.parametrize("changes", gpt_oss_random.VARIANTS.values(), ids=gpt_oss_random.VARIANTS.keys())
def test_inv_freq_agrees_with_the_oracle(changes):
    raw = {**gpt_oss_random.CONFIG, **changes}
    config = config_from_json(raw)
    assert isinstance(config, GptOssConfig)
    frequencies, factor = gpt_oss_numpy.inv_freq(raw)
    np.testing.assert_allclose(inv_freq(config.rope, config.head_width), frequencies, rtol=1e-14)
    assert config.rope.attention_factor == pytest.approx(factor, rel=1e-14)


@pytest.mark.parametrize(
    ("name", "count", "gigabytes"),
    [("gpt-oss-20b", 20_914_757_184, 13.76), ("gpt-oss-120b", 116_829_156_672, 65.25)],
)
def test_published_sizes(name, count, gigabytes):
    """The published numbers of parameters and bytes (docs/MODELS.md), of shapes only."""
    model = registry.build(PUBLISHED[name], dtype=jnp.bfloat16)
    assert num_params(model) == count
    params = abstract_params(model)
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    assert stored == pytest.approx(gigabytes * 1e9, rel=1e-3)


def test_a_full_size_forward_pass():
    """Of gpt-oss-20b's first two layers, of shapes only."""
    published = PUBLISHED["gpt-oss-20b"]
    assert isinstance(published, GptOssConfig)
    published = dataclasses.replace(published, num_layers=2, windows=published.windows[:2])
    model = registry.build(published, dtype=jnp.bfloat16)
    config, params = model.config, abstract_params(model)
    tokens_BT = jax.ShapeDtypeStruct((2, 7), jnp.int32)
    cache = jax.eval_shape(lambda: registry.create_cache(model, batch=2, max_length=1000, chunk=256))
    outputs, after = jax.eval_shape(lambda *args: gpt_oss_ours.run(model, *args), params, tokens_BT, tokens_BT, cache)
    assert outputs.blocks_LBTD.shape == (config.num_layers, 2, 7, 2880)
    assert (outputs.final_BTD.shape, outputs.final_BTD.dtype) == ((2, 7, 2880), jnp.bfloat16)
    assert (outputs.logits_BTV.shape, outputs.logits_BTV.dtype) == ((2, 7, 201088), jnp.float32)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)
    assert [x.shape for x in after.k[:2]] == [(1 + 2 * 4, 8, 128, 64), (1 + 2 * 8, 8, 128, 64)]


@pytest.mark.parametrize("name", ["gpt-oss-20b", "gpt-oss-120b"])
def test_a_long_context_costs_the_full_layers_alone(name):
    """131072 positions in chunks of 1024: the others have the 10 pages that a chunk and the window before it touch."""
    model = registry.build(PUBLISHED[name], dtype=jnp.bfloat16)
    cache = jax.eval_shape(lambda: registry.create_cache(model, batch=1, max_length=131072, chunk=1024))
    layers, position = model.config.num_layers, 8 * 64 * 2 * 2  # K·H keys and as many values of 2 bytes
    used = sum(x.size * x.dtype.itemsize for x in cache.k + cache.v)
    assert used == position * 128 * layers // 2 * (1 + 1024 + 1 + 10)  # in each pool one page is no row's
    full = position * layers * 131072
    assert used / full == pytest.approx(0.5, abs=6e-3)


def test_layers_whose_window_is_longer_than_the_cache_are_like_the_others():
    config = config_from_json({**gpt_oss_random.CONFIG, "sliding_window": 500})
    model = registry.build(config)
    cache = jax.eval_shape(lambda: registry.create_cache(model, batch=3, max_length=130, chunk=32))
    assert [x.shape for x in cache.k + cache.v] == [(1 + 3 * 2, 2, 128, 16)] * 6
    assert len(cache.tables) == 1
    assert cache.capacity == 256


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dequantised"])
def test_declares_an_axis_name_for_every_dimension(packed):
    quantization = {"quantization_config": gpt_oss_random.QUANTIZATION} if packed else {}
    model = registry.build(config_from_json({**gpt_oss_random.CONFIG, **quantization}))
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), tokens_BT, tokens_BT)["params"]
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == leaf.value.ndim


def _shapes(params: Params) -> dict[str, tuple[Any, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype) for path, leaf in leaves}


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": False}], ids=str)
def test_declares_the_leaves_of_a_checkpoint(changes):
    case = make_case(jnp.bfloat16, **changes)
    assert _shapes(abstract_params(case.model)) == _shapes(case.params)
    raw = case.checkpoint.config
    dequantised = registry.build(config_from_json(raw), dtype=jnp.float32, param_dtype=jnp.float16)
    expected = gpt_oss_ours.params(case.checkpoint.dense, jnp.float16)
    assert _shapes(abstract_params(dequantised)) == _shapes(expected)
