"""Which part of a model a device gets, and what cannot be divided; no device is needed."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import PUBLISHED
from gptjax.errors import RequestError
from gptjax.models import registry
from gptjax.models.params import abstract_params, num_params, weights_by_path
from gptjax.sharding.mesh import as_mesh, parsed, planned
from gptjax.sharding.share import RULES, share_of

OSS, LLAMA = PUBLISHED["gpt-oss-20b"], PUBLISHED["llama-3.1-8b"]


def _share(config, rules=None, dtype=jnp.bfloat16, **sizes):
    return share_of(config, planned(sizes), dtype=dtype, rules=rules)


def test_a_share_has_whole_heads_whole_experts_and_whole_tiles():
    share = _share(OSS, tensor=2, expert=4)
    assert (share.num_heads, share.num_kv_heads, share.num_experts) == (32, 4, 8)
    # 2880 / 2 = 22.5 tiles of 64. Its kernels work in three runs of tiles, so the second device has 1344 and 192 zeros.
    assert share.mlp_width == 1536
    assert share.vocab_size == 201088 // 2
    assert _share(OSS, tensor=2, dtype=jnp.float32).mlp_width == 1440  # in blocks of 32, without kernels
    assert _share(LLAMA, tensor=2, dtype=jnp.float32).mlp_width == LLAMA.mlp_width // 2


def test_key_value_heads_are_shared_by_devices_beyond_their_number():
    assert _share(LLAMA, tensor=16).num_kv_heads == 1 and _share(LLAMA, tensor=16).num_heads == 2


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        (OSS, {"tensor": 3}, "64 query heads cannot be divided among 3 devices (tensor); sizes that work: 1, 2, 4, 8"),
        (LLAMA, {"tensor": 12}, "32 query heads cannot be divided among 12 devices (tensor); sizes that work: 1, 2, 4"),
        (OSS, {"expert": 5}, "32 experts cannot be divided among 5 devices (expert); sizes that work: 1, 2, 4, 8, 16"),
        (
            dataclasses.replace(PUBLISHED["gpt2"], width=96, num_heads=12, mxfp4="all"),
            {"tensor": 12},
            "12 heads of 8, packed in blocks of 32, cannot be divided among 12 devices (tensor); sizes that work: 1, 3",
        ),
        (
            dataclasses.replace(LLAMA, types=(("head_embedding", ("Q8_0",)),)),
            {"tensor": 2},
            "the packed weights of a GGUF file cannot be divided among devices: leave out the mesh",
        ),
    ],
)
def test_what_does_not_divide_is_refused_with_the_sizes_that_work(config, sizes, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        _share(config, **sizes)


@pytest.mark.parametrize("rules", [{"D": "tensor"}, {"N": "data"}, {"N": ("tensor", "model")}])
def test_rules_are_for_known_axes(rules):
    with pytest.raises(RequestError, match="no rule can say that"):
        _share(OSS, rules, tensor=2)


def test_an_experts_width_needs_an_axis_of_its_own():
    with pytest.raises(RequestError, match="the rules divide both E and F over tensor"):
        _share(OSS, {"E": ("expert", "tensor")}, tensor=2)
    share = _share(OSS, {"E": ("expert", "tensor"), "F": None}, tensor=2, expert=2)
    assert (share.num_experts, share.mlp_width) == (8, 2880)
    assert set(RULES) == {"N", "F", "V", "E"}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_shares_of_published_sizes_add_up(name):
    """Two devices have what one has, and what is not divided twice: norms, routers, positions and biases of sums."""
    whole = registry.build(PUBLISHED[name], dtype=jnp.bfloat16)
    share = _share(whole.config, tensor=2) if whole.config.num_heads % 2 == 0 else _share(whole.config, expert=1)
    own = registry.build(whole.config, dtype=jnp.bfloat16, share=share)
    parts = share.parts("N")
    mine, all_of_it = (weights_by_path(abstract_params(model)) for model in (own, whole))
    for path, leaf in all_of_it.items():
        grown = np.prod(mine[path].shape) * parts / np.prod(leaf.shape)
        divided = path[-1] in ("kernel", "gate_up_kernel", "down_kernel", "token_embedding", "head_embedding")
        if divided and path[-2:] != ("router", "kernel"):
            assert 1 <= grown < 1.1, path  # filled up, or heads that two devices have
    assert num_params(own) == num_params(whole)


@pytest.mark.parametrize(
    ("text", "sizes"), [("tensor=4", {"tensor": 4}), ("data=2, expert=1", {"data": 2, "expert": 1})]
)
def test_sizes_are_written_by_name(text, sizes):
    assert parsed(text) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4", "a mesh is written as in tensor=4 or tensor=2,expert=4, found '4'"),
        ("tensor=", "a mesh is written as in"),
        ("tensor=2,tensor=2", "a mesh is written as in"),
        ("", "a mesh is written as in"),
        ("model=2", "a mesh has no axis 'model'; its axes are data, tensor, expert"),
        ("tensor=0", "the mesh's axis tensor must be a whole number from 1, found 0"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        parsed(text)


@pytest.mark.parametrize("sizes", [{"tensor": True}, {"tensor": 1.5}, {"tensor": "2"}, {"tensor": -1}])
def test_sizes_are_whole_numbers(sizes):
    with pytest.raises(RequestError, match="must be a whole number from 1"):
        as_mesh(sizes)


def test_a_mesh_has_all_axes():
    assert dict(as_mesh({}).shape) == {"data": 1, "tensor": 1, "expert": 1}
    assert as_mesh(as_mesh({"tensor": 1})) == as_mesh({})
