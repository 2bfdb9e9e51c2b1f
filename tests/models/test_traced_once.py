"""JAX traces each kind of block once, not once a layer, and nothing else changes by that."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import PUBLISHED, LlamaConfig
from gptjax.layers.observe import COLLECTION
from gptjax.models import registry
from gptjax.models.params import Params, abstract_params, init_params
from gptjax.models.registry import Model
from tests.thinned import thorough

LAYERS, WINDOW = 6, 200
SIZES = {"vocab_size": 101, "width": 64, "num_layers": LAYERS, "num_heads": 4, "mlp_width": 96}
GPT2 = dataclasses.replace(PUBLISHED["gpt2"], context_length=300, **SIZES)
SCALED = dataclasses.replace(GPT2, scale_attention_by_layer=True)
GPT_OSS = dataclasses.replace(
    PUBLISHED["gpt-oss-20b"].with_one_layer(),
    windows=(WINDOW, None) * (LAYERS // 2),
    num_kv_heads=2,
    head_width=16,
    num_experts=4,
    experts_per_token=2,
    **SIZES,
)
LLAMA = dataclasses.replace(
    PUBLISHED["llama-3.2-1b"], windows=(None,) * LAYERS, num_kv_heads=2, head_width=16, context_length=300, **SIZES
)


def _shallow(config: Any) -> Any:
    """Three layers, for what is compiled: one of the first kind, two of the other."""
    windows = {"windows": config.windows[:3]} if isinstance(config, LlamaConfig) else {}
    return dataclasses.replace(config, num_layers=3, **windows)


def _blocks(model: Model, tokens: int) -> list[Any]:
    """What JAX traced for each layer's block in a call over a cache."""
    ids_BT = jax.ShapeDtypeStruct((2, tokens), jnp.int32)
    cache = jax.eval_shape(lambda: registry.create_cache(model, batch=2, max_length=300))
    params = abstract_params(model)
    call = jax.make_jaxpr(lambda params, *arguments: model.apply({"params": params}, *arguments))
    equations = call(params, ids_BT, ids_BT, cache).eqns
    return [each.params["jaxpr"] for each in equations if each.params.get("name") == "_traced_once"]


# The first block is a kind of its own: nothing is pending in the residual stream before it.
@pytest.mark.parametrize(
    ("config", "kinds"),
    [(GPT2, 2), (GPT_OSS, 3), (LLAMA, 2), (SCALED, LAYERS)],
    ids=["gpt2", "gpt-oss", "llama", "scaled"],
)
@pytest.mark.parametrize("tokens", [1, 7])
def test_each_kind_of_block_is_traced_once(config, kinds, tokens):
    blocks = _blocks(registry.build(config), tokens)
    assert len(blocks) == LAYERS
    assert len({id(block) for block in blocks}) == kinds


# Experts' loops on a CPU have no gradient.
@pytest.mark.parametrize("config", [thorough(_shallow(GPT2)), _shallow(LLAMA)], ids=["gpt2", "llama"])
def test_values_and_gradients_are_those_of_blocks_traced_in_place(config):
    """As they are while their stages are observed."""
    model = registry.build(config)
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    ids_BT = jnp.arange(14, dtype=jnp.int32).reshape(2, 7)
    positions_BT = jnp.broadcast_to(jnp.arange(7), (2, 7))

    def loss(params: Params, observed: bool) -> jax.Array:
        found = model.apply({"params": params}, ids_BT, positions_BT, mutable=[COLLECTION] if observed else False)
        hidden_BTD, _ = found[0] if observed else found
        return jnp.square(hidden_BTD - 0.1).sum()

    of_both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (value, grads), (expected, expected_grads) = of_both(params, False), of_both(params, True)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected_grads))
    for grad, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-6 * largest)
    assert any(jnp.abs(leaf).max() > 1e-3 * largest for leaf in jax.tree.leaves(grads["block_2"]))


def test_a_block_may_be_vectorised():
    """`vmap` over whole calls gives each what it gets alone."""
    model = registry.build(_shallow(GPT2))
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    ids_BT = jnp.arange(14, dtype=jnp.int32).reshape(2, 7)

    def hidden(ids_T: jax.Array) -> jax.Array:
        return model.apply({"params": params}, ids_T[None], jnp.arange(7)[None])[0][0]

    np.testing.assert_allclose(jax.vmap(hidden)(ids_BT)[1], jax.jit(hidden)(ids_BT[1]), rtol=0, atol=1e-5)
