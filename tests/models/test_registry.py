"""What follows from a model's own declaration of its weights."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.random import write_random
from gptjax import load
from gptjax.checkpoints.hub import DEMOS
from gptjax.config import PUBLISHED, read_config
from gptjax.layers.observe import COLLECTION
from gptjax.models import registry
from gptjax.models.packing import overlaid
from gptjax.models.params import abstract_params, init_params, num_params, random_params, repacked, weights_by_path
from pallas_kernels.formats.fragments import MXFP4Fragments

CONFIGS = {
    "gpt2": dataclasses.replace(PUBLISHED["gpt2"], num_layers=3),
    "gpt2 packed": dataclasses.replace(PUBLISHED["gpt2"], num_layers=3, mxfp4="all", tied_head=False),
    "gpt-oss": dataclasses.replace(PUBLISHED["gpt-oss-20b"], num_layers=3, windows=(128, None, 128)),
    "gpt-oss dense": dataclasses.replace(PUBLISHED["gpt-oss-20b"], num_layers=3, windows=(None,) * 3, mxfp4="none"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shapes_are_those_that_initialising_gives(name):
    """They are derived from one block, and all blocks must be like it. Packed, they are those of packed numbers."""
    model = registry.build(CONFIGS[name], dtype=jnp.bfloat16)
    made = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    told = abstract_params(model)
    expected = overlaid(model.config, made)
    assert jax.tree.structure(told) == jax.tree.structure(expected)
    assert jax.tree.leaves(told) == jax.tree.leaves(expected)


@pytest.mark.parametrize("mxfp4", ["none", "experts", "linear", "all"])
def test_packing_does_not_change_the_number_of_parameters(mxfp4):
    packed = registry.build(dataclasses.replace(CONFIGS["gpt-oss"], mxfp4=mxfp4))
    assert num_params(packed) == num_params(registry.build(CONFIGS["gpt-oss"]))
    types = {leaf.dtype for leaf in jax.tree.leaves(abstract_params(packed))}
    assert types == {jnp.dtype("float32")} | ({jnp.dtype("uint8")} if mxfp4 != "none" else set())


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="nothing is repacked for an older JAX")
def test_repacked_weights_give_the_same_result_and_stand_where_they_stood():
    config = read_config(DEMOS / "gpt-oss-tales").with_one_layer()
    model = registry.build(config, dtype=jnp.bfloat16)
    hopper = registry.build(config, dtype=jnp.bfloat16, implementation="mosaic")  # as if there were one
    params = random_params(model)
    tokens_BT = jnp.arange(12, dtype=jnp.int32)[None]
    expected, _ = model.apply({"params": params}, tokens_BT, tokens_BT)
    paths = weights_by_path(params).keys()
    in_fragments = repacked(hopper, params)
    experts = weights_by_path(in_fragments)["block_0", "moe", "gate_up_kernel"]
    assert isinstance(experts, MXFP4Fragments) and experts.shape == (8, 384, 256)
    assert weights_by_path(in_fragments).keys() == paths
    actual, _ = model.apply({"params": in_fragments}, tokens_BT, tokens_BT)
    np.testing.assert_array_equal(actual, expected)


def test_nothing_is_repacked_where_there_is_no_kernel():
    config = read_config(DEMOS / "gpt-oss-tales")
    for options in ({"dtype": jnp.bfloat16}, {"dtype": jnp.float32, "implementation": "mosaic"}):
        model = registry.build(config, **options)
        params = random_params(model)
        before = jax.tree.leaves(params)
        assert all(now is was for now, was in zip(jax.tree.leaves(repacked(model, params)), before, strict=True))


@pytest.mark.thorough
@pytest.mark.parametrize("written", [False, True])
def test_random_weights_tell_tokens_apart(tmp_path, written):
    """Else all rows of a measurement go to the same few experts, which is faster than any model is."""
    config = read_config(DEMOS / "gpt-oss-tales")
    if written:
        write_random(config, tmp_path / "written")
        lm = load(tmp_path / "written", dtype="float32")
        model, params = lm.model, lm.params
    else:
        model = registry.build(config)
        params = random_params(model)
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, model.config.vocab_size, (64, 1)), jnp.int32)
    run = jax.jit(partial(model.apply, mutable=[COLLECTION]))
    _, state = run({"params": params}, tokens_BT, jnp.zeros_like(tokens_BT))
    logits_TE = state[COLLECTION]["block_5"]["moe"]["router"]["output"][:, 0]
    experts, counts = np.unique(jax.lax.top_k(logits_TE, 4)[1], return_counts=True)
    # With other seeds, either kind has experts that are chosen up to six times as often as others.
    assert len(experts) == 8 and counts.max() < (6 if written else 3) * counts.min()
