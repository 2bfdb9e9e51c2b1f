"""Weights that stay in a GGUF file's packed types: the same numbers as when they are expanded, in the same places."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
import gptjax
from gptjax.api import load_params
from gptjax.checkpoints.checkpoint import open_checkpoint
from gptjax.config import ModelConfig, config_from_json
from gptjax.config.sizes import PUBLISHED
from gptjax.errors import CheckpointError, ConfigError
from gptjax.layers.weight import AT_ONCE, product, unembed
from gptjax.models import registry
from gptjax.models.packing import quantized
from gptjax.models.params import abstract_params, expanded, num_params, random_params, repacked, weights_by_path
from pallas_kernels import dispatch
from pallas_kernels.formats import is_packed
from pallas_kernels.formats.ggml import PACKED
from pallas_kernels.formats.ggml.fragments import QuantizedFragments
from pallas_kernels.formats.ggml.weight import Quantized, Rows
from pallas_kernels.formats.mxfp4 import MXFP4
from pallas_kernels.matvec import Fragments
from tests.oracles import gguf_from_hf, gpt2_random, gpt_oss_random, llama_random
from tests.oracles.gguf_from_hf import Q4_0, Q8_0
from tests.thinned import thinned, thorough

ALL = {"token_embd.weight": Q8_0, "output.weight": Q4_0, "attn_q.weight": Q8_0, "attn_k.weight": Q8_0}
ALL |= {"attn_v.weight": Q4_0, "attn_output.weight": Q4_0, "ffn_gate.weight": Q4_0, "ffn_up.weight": Q4_0}
ALL |= {"ffn_down.weight": Q8_0, "attn_qkv.weight": Q8_0}
IDS = list(range(3, 20))


def llama(tmp_path, **changes):
    model = llama_random.checkpoint(3, intermediate_size=64, **changes)
    return gguf_from_hf.write(tmp_path / "model.gguf", *model, types=ALL)


def gpt2(tmp_path):
    return gguf_from_hf.write(
        tmp_path / "model.gguf",
        *gpt2_random.checkpoint(4, n_embd=64, n_head=4, n_inner=96, activation_function="gelu_new"),
        types=ALL,
    )


def gpt_oss(tmp_path, **changes):
    model = gpt_oss_random.checkpoint(5, **changes)
    return gguf_from_hf.write(tmp_path / "model.gguf", model.config, model.packed, types=ALL)


@pytest.mark.parametrize("make", [llama, gpt2, gpt_oss], ids=["llama", "gpt2", "gpt-oss"])
def test_packed_weights_have_the_numbers_of_expanded_ones(tmp_path, make):
    checkpoint = open_checkpoint(make(tmp_path))
    assert checkpoint.config.types
    packed = registry.build(checkpoint.config)
    params = load_params(checkpoint, packed)
    numbers = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, types=()))
    plain = registry.build(numbers.config)
    expected = weights_by_path(load_params(numbers, plain))  # expanded by NumPy, tensor by tensor
    found = weights_by_path(expanded(jax.tree.map(jnp.copy, params), jnp.float32))
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        if isinstance(array, jax.Array):
            np.testing.assert_array_equal(found[path], array, err_msg="/".join(path))
    assert num_params(packed) == num_params(plain)


def test_parts_of_a_fused_matrix_may_differ_in_type(tmp_path):
    leaves = weights_by_path(abstract_params(registry.build(open_checkpoint(llama(tmp_path)).config)))
    qkv = leaves["block_0", "attention", "qkv", "kernel"]
    assert isinstance(qkv, Rows)
    assert [(part.type, part.shape) for part in qkv.parts] == [
        ("Q8_0", (96, 96)),
        ("Q8_0", (32, 96)),
        ("Q4_0", (32, 96)),
    ]
    gate_up = leaves["block_0", "mlp", "gate_up", "kernel"]
    assert isinstance(gate_up, Quantized) and gate_up.type == "Q4_0" and gate_up.shape == (128, 96)


@pytest.mark.parametrize(
    ("make", "changes"),
    [(llama, {}), thorough(gpt_oss, {"layer_types": ["sliding_attention"]})],
    ids=["llama", "gpt-oss"],
)
def test_logits_and_tokens_are_those_of_expanded_weights(tmp_path, make, changes):
    """With one layer, since each one takes seconds to compile."""
    path = make(tmp_path, num_hidden_layers=1, **changes)
    with gptjax.load(path, max_length=64, packed=True) as one, gptjax.load(path, max_length=64, packed=False) as other:
        assert one.config.types and not other.config.types
        np.testing.assert_allclose(one.logits(IDS), other.logits(IDS), rtol=0, atol=2e-4)
        tokens = [lm.generate(IDS, max_tokens=12, temperature=0.0).token_ids for lm in (one, other)]
        assert tokens[0] == tokens[1]
        assert one.memory().weights < other.memory().weights / 2


def test_a_converted_directory_keeps_the_types_and_every_byte(tmp_path):
    checkpoint = open_checkpoint(gpt_oss(tmp_path))
    convert.convert(checkpoint.path, tmp_path / "converted")
    again = open_checkpoint(tmp_path / "converted")
    assert again.config == checkpoint.config
    model = registry.build(checkpoint.config)
    one, other = load_params(checkpoint, model), load_params(again, model)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_random_weights_are_finite_and_in_the_declared_types(tmp_path):
    model = registry.build(open_checkpoint(llama(tmp_path)).config)
    params = random_params(model)
    assert jax.tree.structure(params) == jax.tree.structure(abstract_params(model))
    for leaf in weights_by_path(params).values():
        for part in leaf.parts if isinstance(leaf, Rows) else [leaf]:
            packed = isinstance(part, Quantized)  # unpacked by NumPy, which compiles nothing
            assert np.isfinite(PACKED[part.type].dequantize(np.asarray(part.blocks)) if packed else part).all()


def test_types_of_weights_that_do_not_exist_are_refused():
    types = {"block_7/mlp/up/kernel": ["Q4_0"]}
    raw = {**llama_random.CONFIG, "quantization_config": {"quant_method": "ggml", "types": types}}
    with pytest.raises(ConfigError, match="block_7/mlp/up/kernel"):
        abstract_params(registry.build(config_from_json(raw)))
    for wrong in ({"a": "Q4_0"}, {"a": ["Q9"]}, {"a": []}, ["a"]):
        with pytest.raises(ConfigError, match="types"):
            config_from_json({**raw, "quantization_config": {"quant_method": "ggml", "types": wrong}})


def test_types_that_a_weight_cannot_have_are_refused():
    """Those of norms, routers and experts never stay packed, and Q4_K's blocks have more values than this model's D."""
    cases = [
        (llama_random.CONFIG, "final_norm/scale", "Q8_0"),
        (gpt_oss_random.checkpoint(5).config, "block_0/attention/sinks", "Q8_0"),
        (gpt_oss_random.checkpoint(5).config, "block_0/moe/router/kernel", "Q8_0"),
        (gpt_oss_random.checkpoint(5).config, "block_0/moe/gate_up_kernel", "Q8_0"),
        (gpt_oss_random.checkpoint(5).config, "block_0/moe/gate_up_bias", "Q8_0"),
        (llama_random.CONFIG, "token_embedding", "Q4_K"),
        (llama_random.CONFIG, "block_1/attention/out/kernel", "Q4_K"),
    ]
    for config, path, kind in cases:
        raw = {**config, "quantization_config": {"quant_method": "ggml", "types": {path: [kind]}}}
        with pytest.raises(ConfigError, match=f"{path}.*{kind}"):
            abstract_params(registry.build(config_from_json(raw)))


def test_a_product_in_parts_has_every_output():
    """More numbers than a CPU unpacks at a time, and not a multiple of that."""
    shape = (1001, 512)
    assert AT_ONCE < 1001 * 512 and 1001 % (AT_ONCE // 512)
    packed = Quantized.random(jax.random.key(1), shape, "Q4_K")
    x = np.random.default_rng(2).standard_normal((3, 512), np.float32)
    numbers = PACKED["Q4_K"].dequantize(np.asarray(packed.blocks)).astype(np.float64)
    for found in (
        product(jnp.asarray(x), packed, None, jnp.float32).total(),
        unembed(jnp.asarray(x), packed, jnp.float32),
    ):
        np.testing.assert_allclose(found, x @ numbers.T, rtol=0, atol=1e-5 * np.abs(x @ numbers.T).max())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("converted", thinned([False, True], False), ids=["gguf", "converted"])
def test_packed_numbers_that_float16_cannot_hold_are_refused(tmp_path, packed, converted):
    """A scale in half precision is finite, and its product with a code is not: 65504 · 7."""
    config, tensors = llama_random.checkpoint(3, intermediate_size=64, num_hidden_layers=1)
    large = "model.layers.0.self_attn.o_proj.weight"
    tensors[large] = tensors[large].copy()
    tensors[large][3, 40] = 70_000.0  # the scale of its block becomes 10,000, and the number 7 times that
    path = gguf_from_hf.write(tmp_path / "model.gguf", config, tensors, types=ALL)
    if converted:
        convert.convert(path, tmp_path / "converted")
        path = tmp_path / "converted"
    with pytest.raises(CheckpointError, match=r"block_0/attention/out/kernel has values beyond float16's 65504; use"):
        gptjax.load(path, dtype="float16", max_length=64, packed=packed)
    with gptjax.load(path, dtype="bfloat16", max_length=64, packed=packed) as lm:
        assert np.isfinite(lm.logits(IDS)).all()


def test_experts_in_mxfp4_that_float16_cannot_hold_are_refused(tmp_path):
    model = gpt_oss_random.checkpoint(5, num_hidden_layers=1, layer_types=["full_attention"])
    scales = model.packed["model.layers.0.mlp.experts.down_proj_scales"]
    scales[2, 5, 1] = 127 + 15  # 2^15 · 2 is too much
    directory = gpt_oss_random.write(tmp_path / "hf", model, layout="packed")
    with pytest.raises(CheckpointError, match=r"block_0/moe/down_kernel has values beyond float16's 65504"):
        gptjax.load(directory, dtype="float16", max_length=64)


def test_packed_numbers_that_float16_can_hold(tmp_path):
    """The same as in float32, as closely as float16 can."""
    path = llama(tmp_path, num_hidden_layers=1)
    with (
        gptjax.load(path, max_length=64, packed=True) as one,
        gptjax.load(path, dtype="float16", max_length=64) as other,
    ):
        expected = one.logits(IDS)
        np.testing.assert_allclose(other.logits(IDS), expected, rtol=0, atol=0.02 * np.abs(expected).max())


def _small(name: str, **changes):
    """A published size's configuration, with sizes that the kernels' layouts take."""
    sizes = {"width": 128, "num_layers": 1, "windows": (None,), "num_heads": 2, "num_kv_heads": 1, "head_width": 64}
    return dataclasses.replace(PUBLISHED[name], **sizes, mlp_width=192, vocab_size=320, **changes)


def _in_types(config: ModelConfig, kind: str) -> ModelConfig:
    """The configuration with its matrices in `kind`; the values of attention in Q4_0."""
    made = quantized(config, weights_by_path(abstract_params(registry.build(config))), kind)
    types = dict(made.types)
    types["block_0/attention/qkv/kernel"] = (kind, kind, "Q4_0")
    return dataclasses.replace(made, types=tuple(types.items()))


@pytest.mark.parametrize(
    ("config", "embedding"),
    [
        thorough(_in_types(_small("llama-3.2-1b"), "Q8_0"), QuantizedFragments),  # tied: the head's matrix too
        thorough(_in_types(_small("llama-3.1-8b"), "Q8_0"), Quantized),  # only looked up
        thorough(_small("llama-3.1-8b", mxfp4="all"), MXFP4),
    ],
    ids=["tied", "untied", "MXFP4"],
)
def test_repacked_matrices_compute_the_same(monkeypatch, config, embedding):
    """As on Hopper, but with jnp's products: of few tokens, and of more than the kernel takes."""
    model = registry.build(config, dtype="bfloat16")
    original = random_params(model)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "wanted", lambda implementation: dispatch.MOSAIC)
        copied = jax.tree.map(jnp.copy, original)
        params = repacked(model, copied)
    leaves = weights_by_path(params)
    assert isinstance(leaves["token_embedding",], embedding)
    for path, leaf in leaves.items():
        if is_packed(leaf) and path != ("token_embedding",):
            assert all(isinstance(part, Fragments) for part in (leaf.parts if isinstance(leaf, Rows) else [leaf])), path
    freed = [leaf.is_deleted() for leaf in jax.tree.leaves(copied["block_0"]["mlp"])]
    assert all(freed) and len(freed) >= 2

    @jax.jit
    def run(params, ids):
        hidden, _ = model.apply({"params": params}, ids, jnp.arange(ids.shape[1])[None])
        return hidden, model.apply({"params": params}, hidden, method="head")

    ids = jnp.asarray(np.random.default_rng(1).integers(0, 320, (1, 70)))
    for given in (ids, ids[:, :5]):
        for found, expected in zip(run(params, given), run(original, given), strict=True):
            of_numbers = np.asarray(expected, np.float32)
            np.testing.assert_allclose(np.asarray(found, np.float32), of_numbers, rtol=0, atol=0.02 * of_numbers.max())
