"""Models on meshes of eight devices, compared with one: `test_on_eight_devices.py` runs this in a process of its own.

On a CPU, XLA makes as many devices as $XLA_FLAGS says, once, when JAX starts.
"""

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import convert
import gptjax
from gptjax.checkpoints import saving, weights
from gptjax.checkpoints.hub import DEMOS
from gptjax.config import PUBLISHED
from gptjax.engine import memory
from gptjax.errors import RequestError
from gptjax.layers.cache import KVCache
from gptjax.models import registry, shards
from gptjax.models.params import Params, abstract_params
from gptjax.models.registry import Model
from gptjax.sharding.mesh import AXES, as_mesh
from gptjax.sharding.share import share_of
from pallas_kernels import dispatch, peers
from pallas_kernels.formats import is_packed
from pallas_kernels.formats.fragments import MXFP4Fragments
from pallas_kernels.formats.mxfp4 import MXFP4, quantize
from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.peers import Peers
from tests.oracles import llama_ours
from tests.pallas_kernels.marks import lowered_for_h200, needs_mosaic
from tests.shallow import shallow
from tests.sharding.on_mesh import bytes_by_device, of_all, placed, sizes
from tests.thinned import thorough

ROWS, TOKENS, STEPS = 8, 12, 3
TOLERANCE = 1e-4
# Each mesh with one model or more, and each model on meshes that divide all that it has: rows, heads, experts.
MESHES = {
    "gpt2": [(8, 1, 1), (1, 2, 4)],
    "gpt-oss": [(4, 2, 1), (2, 2, 2), (1, 1, 8)],
    "llama": [(4, 2, 1), (1, 1, 8)],
}

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="run by test_on_eight_devices.py")


class Whole(NamedTuple):
    """A model on one device, and what it says."""

    model: Model
    params: Params
    logits: list[np.ndarray]  # [B, V], after the prompt and after each step
    tokens: list[list[int]]


@functools.cache
def _whole(name: str) -> Whole:
    if name == "llama":  # grouped queries
        case = llama_ours.make_case()
        model, params = case.model, case.params
    else:
        lm = shallow(f"{name}-tales")
        model, params = lm.model, lm.params
    cache = registry.create_cache(model, batch=ROWS, max_length=64)
    step = jax.jit(lambda *operands: _stepped(model, _apply, _head, *operands))
    return Whole(model, params, *_run(step, model, params, cache))


def _apply(model: Model, params: Params, *operands: Any) -> Any:
    return model.apply({"params": params}, *operands)


def _head(model: Model, params: Params, hidden: jax.Array) -> Any:
    return model.apply({"params": params}, hidden, method="head")


def _stepped(model: Model, apply: Any, head: Any, params: Params, tokens_BT: Any, positions_BT: Any, cache: Any) -> Any:
    hidden_BTD, cache = apply(model, params, tokens_BT, positions_BT, cache)
    return head(model, params, hidden_BTD[:, -1]), cache


def _run(
    step: Any, model: Model, params: Params, cache: Any, *, at_once: bool = True
) -> tuple[list[np.ndarray], list[list[int]]]:
    """Logits and greedy tokens after a prompt of each row, read at once or token by token, and after some steps."""
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (ROWS, TOKENS)).astype(np.int32)
    positions = np.tile(np.arange(TOKENS, dtype=np.int32), (ROWS, 1))
    logits: list[np.ndarray] = []
    if not at_once:  # then only one program is compiled
        for place in range(TOKENS - 1):
            _, cache = step(params, tokens[:, place : place + 1], positions[:, place : place + 1], cache)
        tokens, positions = tokens[:, -1:], positions[:, -1:]
    for _ in range(1 + STEPS):
        logits_BV, cache = step(params, tokens, positions, cache)
        logits.append(np.asarray(logits_BV))
        tokens, positions = logits[-1].argmax(-1)[:, None].astype(np.int32), positions[:, -1:] + 1
    return logits, [each.argmax(-1).tolist() for each in logits]


def _check(name: str, mesh: dict[str, int], *, at_once: bool = False, **how: Any) -> tuple[Model, Params]:
    """Compares a model on a mesh with one device. Returns what each device has."""
    whole = _whole(name)
    model, params = placed(whole.model, whole.params, mesh, **how)
    cache = registry.create_cache(model, batch=ROWS, max_length=64)
    step = jax.jit(lambda *operands: _stepped(model, shards.apply, shards.head, *operands))
    logits, tokens = _run(step, model, params, cache, at_once=at_once)
    assert max(np.abs(mine - theirs).max() for mine, theirs in zip(logits, whole.logits, strict=True)) < TOLERANCE
    assert tokens == whole.tokens
    return model, params


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        (name, mesh) if (name, mesh) == ("llama", (4, 2, 1)) else thorough(name, mesh)
        for name, meshes in MESHES.items()
        for mesh in meshes
    ],
)
def test_logits_and_tokens_are_those_of_one_device(name, mesh):
    model, params = _check(name, sizes(*mesh), at_once=mesh == (4, 2, 1))
    need = memory.needed(model, batch=1, max_length=64)
    assert set(bytes_by_device(params).values()) == {need.weights}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        spec = leaf.sharding.spec
        parts = [leaf.shape[axis] // leaf.addressable_shards[0].data.shape[axis] for axis in range(leaf.ndim)]
        assert sum(each > 1 for each in parts) == sum(each is not None for each in spec), path


def test_shared_key_value_heads_and_widths_filled_up():
    """Four ways: two devices for each key/value head; 192 units are 64, 64, 64 and 0; 8,256 words 4 · 2,112."""
    model, _ = _check("gpt-oss", sizes(1, 4, 2), at_once=True)
    assert model.own.num_kv_heads == 1 and model.own.mlp_width == 64 and model.own.vocab_size == 2112


@pytest.mark.thorough
def test_rules_may_be_others():
    """Experts over both axes, and their widths over none."""
    model, params = _check("gpt-oss", sizes(1, 2, 2), rules={"E": ("expert", "tensor"), "F": None})
    assert model.own.num_experts == 2 and model.own.mlp_width == 192
    blocks = params["block_0"]["moe"]["down_kernel"].blocks
    assert blocks.sharding.spec[0] == ("expert", "tensor") and blocks.addressable_shards[0].data.shape[0] == 2


@pytest.mark.parametrize(("name", "part"), [("gpt2", 0.55), ("gpt-oss", 0.5)])
def test_a_device_has_its_part_of_the_weights(name, part):
    whole = _whole(name)
    model, params = placed(whole.model, whole.params, sizes(1, 2, 4))
    most = max(bytes_by_device(params).values())
    assert most < part * sum(leaf.nbytes for leaf in jax.tree.leaves(whole.params))
    pools = registry.create_pools(model, pages=[5] * len(set(model.config.windows)), rows=2, max_length=256)
    assert pools.k[0].addressable_shards[0].data.shape[1] == model.config.num_kv_heads // 2


@pytest.mark.parametrize("axes", [("tensor",), ("expert", "tensor")])
def test_sums_are_in_the_order_of_ranks(axes):
    """However they are added up: at each device, or by all devices together, from 256 tokens on."""
    mesh = as_mesh({"tensor": 4, "expert": 2})
    count = 8 if len(axes) == 2 else 4
    parts = 10.0 ** np.random.default_rng(1).uniform(-4, 4, (count, 512, 24)).astype(np.float32)
    expected = functools.reduce(np.add, parts)

    def total(part: jax.Array, tokens: int) -> jax.Array:
        return PartialSum(part[:, :tokens]).across(axes, box=0).total()

    for tokens in (512, 255):
        run = jax.shard_map(
            functools.partial(total, tokens=tokens), mesh=mesh, in_specs=P(axes), out_specs=P(), check_vma=False
        )
        assert (np.asarray(jax.jit(run)(parts)) == expected[:tokens]).all()
    assert (functools.reduce(np.add, parts[::-1]) != expected).any()


def test_packed_experts_are_repacked_in_parts(monkeypatch):
    monkeypatch.setattr(dispatch, "preferred", lambda: dispatch.MOSAIC if jax.__version_info__ >= (0, 11) else "triton")
    E, D, F = 4, 64, 192
    kernel = quantize(np.random.default_rng(2).standard_normal((E, D, F)).astype(np.float32))
    gate_up = quantize(np.random.default_rng(3).standard_normal((E, 2 * F, D)).astype(np.float32))
    config = PUBLISHED["gpt-oss-20b"].with_one_layer()
    config = type(config)(**{**vars(config), "width": D, "mlp_width": F, "num_experts": E, "vocab_size": 128})
    whole = registry.build(config, dtype=jnp.bfloat16)
    params = _zeros(whole)
    params["block_0"]["moe"] |= {"down_kernel": kernel, "gate_up_kernel": gate_up}
    model, parts = placed(whole, params, sizes(1, 2, 2))
    own = shards.repacked(model, parts)["block_0"]["moe"]
    assert isinstance(own["down_kernel"], MXFP4Fragments)  # 192 in two parts of whole tiles: 128 and 64, filled up
    specs = shards.weight_specs(model, {"block_0": {"moe": own}})["block_0"]["moe"]
    for name, axis, expected in (("down_kernel", 2, kernel), ("gate_up_kernel", 1, gate_up)):
        numbers = jax.jit(
            jax.shard_map(
                lambda packed: packed.dequantize(),
                mesh=model.own.mesh,
                in_specs=(specs[name],),
                out_specs=jax.tree.leaves(specs[name], is_leaf=lambda leaf: isinstance(leaf, P))[0],
                check_vma=False,
            )
        )(own[name])
        whole_size = expected.shape[axis]
        assert (np.asarray(numbers.take(np.arange(whole_size), axis)) == np.asarray(expected.dequantize())).all()
        assert not np.asarray(numbers.take(np.arange(whole_size, numbers.shape[axis]), axis)).any()


def _zeros(model: Model) -> Params:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_params(model))


def test_random_weights_are_alike_where_they_are_not_divided():
    config = PUBLISHED["gpt-oss-20b"].with_one_layer()
    config = type(config)(**{**vars(config), "width": 64, "mlp_width": 96, "num_experts": 4, "vocab_size": 128})
    model = registry.build(config, dtype=jnp.bfloat16)
    model = shards.divided(model, share_of(config, as_mesh(sizes(1, 2, 2)), dtype=model.dtype))
    params = shards.random_params(model)
    assert set(bytes_by_device(params).values()) == {memory.needed(model, batch=1, max_length=64).weights}
    moe, router = params["block_0"]["moe"], params["block_0"]["moe"]["router"]["kernel"]
    assert len({np.asarray(shard.data).tobytes() for shard in router.addressable_shards}) == 1
    assert len({np.asarray(shard.data).tobytes() for shard in moe["down_kernel"].blocks.addressable_shards}) == 4


def test_load_divides_a_checkpoint_in_any_form(tmp_path):
    """A converted directory has whole weights, so it loads on a mesh that it knew nothing of."""
    convert.convert(DEMOS / "gpt-oss-tales", tmp_path / "converted")
    names = "gpt-oss-tales", tmp_path / "converted"
    models = [gptjax.load(name, max_length=64, mesh={"data": 2, "tensor": 2, "expert": 2}) for name in names]
    first, second = (weights.flatten(lm.params) for lm in models)
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        assert set(leaf.devices()) == set(jax.devices())
        assert leaf.sharding == second[path].sharding and (np.asarray(leaf) == np.asarray(second[path])).all(), path


@pytest.mark.parametrize(("name", "mesh"), [thorough("gpt2", (1, 4, 1)), ("gpt-oss", (1, 4, 2)), ("llama", (1, 6, 1))])
def test_what_is_saved_on_one_mesh_loads_on_another(name, mesh, tmp_path):
    """Its parts are other ones: key/value heads that several have, and widths that were filled up."""
    whole = _whole(name)
    model, params = placed(whole.model, whole.params, sizes(*mesh))
    arrays = dict(shards.gathered(model, whole.model, params))
    shapes = {path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in arrays.items()}
    source = saving.Source("a mesh", tuple)
    saving.save(tmp_path / "saved", [saving.Part(shapes, lambda: arrays)], source=source)
    other, expected = placed(whole.model, whole.params, sizes(1, 2, 1))
    put = shards.putter(other, whole.model)
    restored = weights.restore(tmp_path / "saved", abstract_params(whole.model), put=put)
    for found, leaf in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert found.sharding == leaf.sharding and (np.asarray(found) == np.asarray(leaf)).all()


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"tensor": 16}, "a mesh of tensor=16 needs 16 devices, and there are 8"),
        (
            {"tensor": 3},
            "the model's 4 query heads cannot be divided among 3 devices (tensor); sizes that work: 1, 2, 4",
        ),
    ],
)
def test_load_refuses_what_does_not_divide(mesh, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        gptjax.load("gpt2-tales", mesh=mesh)


@needs_mosaic
@pytest.mark.parametrize(
    ("name", "mesh", "rows", "tokens"),
    [
        ("gpt-oss-20b", (1, 2, 1), 8, 1),
        ("gpt-oss-20b", (1, 2, 1), 1, 2048),
        thorough("gpt-oss-120b", (1, 2, 4), 8, 1),
        thorough("llama-3.1-8b", (1, 8, 1), 8, 1),
    ],
)
def test_steps_of_a_share_lower_with_all_kernels(name, mesh, rows, tokens, monkeypatch):
    """As many of ours as one device's step takes, but for the sum of the experts' outputs of many tokens."""
    monkeypatch.setattr(dispatch, "preferred", lambda: dispatch.MOSAIC)
    config = PUBLISHED[name].with_one_layer()
    whole = registry.build(config, dtype=jnp.bfloat16)
    own = shards.divided(whole, share_of(config, as_mesh(sizes(*mesh)), dtype=jnp.bfloat16))
    ids_BT = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    exchanged = tokens == 1 and mesh[2] == 1  # by the kernels that read what the devices add up
    texts = []
    for model, apply, head in ((whole, _apply, _head), (own, shards.apply, shards.head)):
        params = jax.tree.map(_fragments, abstract_params(model), is_leaf=is_packed)
        if model is own:
            params = jax.tree.map(
                lambda leaf, spec, model=model: of_all(leaf, spec, model), params, shards.weight_specs(model, params)
            )
        cache = jax.eval_shape(lambda model=model: registry.create_cache(model, batch=rows, max_length=4096))
        if model is own and exchanged:
            table = jax.ShapeDtypeStruct((math.prod(mesh), 4 + 2 * mesh[1]), jnp.int32)
            cache = dataclasses.replace(cache, peers=Peers(table, ("tensor",), config.width))
        step = functools.partial(_stepped, model, apply, head)
        texts.append(lowered_for_h200(step, params, ids_BT, ids_BT, cache))
    alone, together = (text.count("custom_call") for text in texts)
    # Of many tokens, XLA adds up what the devices have of the experts' outputs, and norms the sum.
    assert alone - (rows * tokens > 128) == together >= 6
    # Of the head, and of the layer's two sums.
    assert [text.count("stablehlo.all_gather") for text in texts] == [0, 1 if exchanged else 3]


@pytest.mark.parametrize(
    ("mesh", "rules", "count"),
    [
        ((8, 1, 1), None, 0),
        ((2, 4, 1), None, 4),
        ((2, 2, 2), None, 0),  # attention is added up over two devices, the experts over four
        ((2, 2, 2), {"N": ("expert", "tensor")}, 4),
        ((1, 1, 8), None, 0),
    ],
)
def test_devices_have_mailboxes_if_both_sums_of_a_layer_go_over_the_same_ones(mesh, rules, count, monkeypatch):
    """Their tables have the addresses in the order in which XLA gathers."""
    monkeypatch.setattr(dispatch, "preferred", lambda: dispatch.MOSAIC)
    monkeypatch.setattr(dispatch, "wanted", lambda implementation: dispatch.MOSAIC)
    monkeypatch.setattr(peers, "_reach_each_other", lambda ordinals: True)
    config = PUBLISHED["gpt-oss-20b"]
    share = share_of(config, as_mesh(sizes(*mesh)), dtype=jnp.bfloat16, rules=rules)
    boxes = shards.mailboxes(shards.divided(registry.build(config, dtype=jnp.bfloat16), share))
    assert (0 if boxes is None else boxes.peers.count) == count
    assert shards.mailboxes(shards.divided(registry.build(config, dtype=jnp.float32), share)) is None
    if boxes is None:
        return
    cache = KVCache((), (), (), jnp.zeros(8, jnp.int32), (), None, peers=boxes.peers)

    def seen(cache: KVCache) -> jax.Array:
        table, axes = cache.peers.own_table(), cache.peers.axes
        rank, others = jax.lax.axis_index(axes)[None], jax.lax.all_gather(table[:2], axes).reshape(-1)
        return jnp.concatenate([table[:2], rank, table[3:4], others])[None]

    found = jax.jit(share.run(seen, (share.cache_specs(cache),), P(AXES)))(cache)
    np.testing.assert_array_equal(found, boxes.peers.table)
    own = {box.device: box.unsafe_buffer_pointer() for box in boxes._boxes}
    for shard in found.addressable_shards:
        assert np.asarray(shard.data)[0, :2].view(np.uint64) == own[shard.device]


def _fragments(leaf: Any) -> Any:
    return jax.eval_shape(MXFP4Fragments.of, leaf) if isinstance(leaf, MXFP4) else leaf
