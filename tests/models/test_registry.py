"""What follows from a model's own declaration of its weights."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from gptjax.config import PUBLISHED
from gptjax.models import registry

CONFIGS = {
    "gpt2": dataclasses.replace(PUBLISHED["gpt2"], num_layers=3),
    "gpt2 packed": dataclasses.replace(PUBLISHED["gpt2"], num_layers=3, mxfp4="all", tied_head=False),
    "gpt-oss": dataclasses.replace(PUBLISHED["gpt-oss-20b"], num_layers=3, windows=(128, None, 128)),
    "gpt-oss dense": dataclasses.replace(PUBLISHED["gpt-oss-20b"], num_layers=3, windows=(None,) * 3, mxfp4="none"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shapes_are_those_that_initialising_gives(name):
    """They are told from one block, and all blocks must be like it."""
    model = registry.build(CONFIGS[name], dtype=jnp.bfloat16)
    made = jax.eval_shape(lambda: registry.init_params(model, jax.random.key(0)))
    told = registry.abstract_params(model)
    assert jax.tree.structure(told) == jax.tree.structure(made)
    assert jax.tree.leaves(told) == jax.tree.leaves(made)


@pytest.mark.parametrize("mxfp4", ["none", "experts", "linear", "all"])
def test_packing_does_not_change_the_number_of_parameters(mxfp4):
    packed = registry.build(dataclasses.replace(CONFIGS["gpt-oss"], mxfp4=mxfp4))
    assert registry.num_params(packed) == registry.num_params(registry.build(CONFIGS["gpt-oss"]))
    types = {leaf.dtype for leaf in jax.tree.leaves(registry.abstract_params(packed))}
    assert types == {jnp.dtype("float32")} | ({jnp.dtype("uint8")} if mxfp4 != "none" else set())
