"""GPT-OSS's three layouts, against the tests' own mapping of names, and what is refused. Its configs: tests/config."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

import convert
from gptjax import api
from gptjax.checkpoints.checkpoint import open_path
from gptjax.checkpoints.weights import flatten
from gptjax.config import read_config
from gptjax.errors import CheckpointError
from gptjax.models import registry
from pallas_kernels.formats.mxfp4 import MXFP4
from tests.convert import made
from tests.convert.conversion_material import streamed
from tests.oracles import gpt_oss_numpy, gpt_oss_ours, gpt_oss_random

Tensors = dict[str, np.ndarray]
EXPERTS = "model.layers.1.mlp.experts."


@pytest.fixture(scope="module")
def checkpoint() -> gpt_oss_random.Checkpoint:
    return gpt_oss_random.checkpoint(**gpt_oss_random.TWO_LAYERS)


def _flat(params: Any) -> dict[str, np.ndarray]:
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten(params).items()}


def _same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert made.same_bits(np.asarray(found[name]), array), name


def _refused(directory: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        streamed(directory)
    for part in parts:
        assert part in str(caught.value)


def _write(tmp_path: Path, tensors: Tensors, **config: Any) -> Path:
    """A directory of these tensors with the config of packed experts, and of another one beside it to convert to."""
    raw = {**gpt_oss_random.CONFIG, **gpt_oss_random.TWO_LAYERS, "quantization_config": gpt_oss_random.QUANTIZATION}
    raw |= config
    directory = tmp_path / "checkpoint"
    gpt_oss_random.write_files(directory, {key: value for key, value in raw.items() if value is not None}, tensors)
    return directory


@pytest.mark.parametrize("dtype", [np.float32, made.BFLOAT16])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", gpt_oss_random.LAYOUTS)
def test_every_weight_is_where_it_belongs(tmp_path, layout, shards, dtype):
    checkpoint = gpt_oss_random.checkpoint(dtype=dtype)
    gpt_oss_random.write(tmp_path, checkpoint, layout=layout, shards=shards)
    tensors = checkpoint.dense if layout == "dequantised" else checkpoint.packed
    _same(streamed(tmp_path), _flat(gpt_oss_ours.params(tensors, dtype)))


@pytest.mark.parametrize("changes", [{"attention_bias": False}, {"tie_word_embeddings": True}], ids=str)
@pytest.mark.parametrize("layout", ["packed", "dequantised"])
def test_models_with_fewer_weights(tmp_path, layout, changes):
    checkpoint = gpt_oss_random.checkpoint(**changes)
    gpt_oss_random.write(tmp_path, checkpoint, layout=layout)
    tensors = checkpoint.dense if layout == "dequantised" else checkpoint.packed
    found = streamed(tmp_path)
    _same(found, _flat(gpt_oss_ours.params(tensors)))
    assert ("head_embedding" in found) == (not changes.get("tie_word_embeddings", False))


def test_packed_experts_are_the_same_numbers(tmp_path, checkpoint):
    """As those of the dequantised layout, which has their axes the other way round."""
    _, packed = gpt_oss_ours.load(gpt_oss_random.write(tmp_path / "packed", checkpoint))
    _, dense = gpt_oss_ours.load(gpt_oss_random.write(tmp_path / "dense", checkpoint, layout="dequantised"))
    for layer in range(2):
        for name in ("gate_up_kernel", "down_kernel"):
            one, other = (params[f"block_{layer}"]["moe"][name] for params in (packed, dense))
            assert isinstance(one, MXFP4)
            assert one.nbytes == one.size * 17 // 32
            np.testing.assert_array_equal(np.asarray(one.dequantize()).swapaxes(1, 2), other)


@pytest.mark.parametrize("layout", gpt_oss_random.LAYOUTS)
def test_a_converted_directory_holds_the_same_bits(tmp_path, checkpoint, layout):
    source = gpt_oss_random.write(tmp_path / "source", checkpoint, layout=layout, shards=2)
    model, direct = gpt_oss_ours.load(source)
    summary = convert.convert(source, tmp_path / "converted")
    again, converted = gpt_oss_ours.load(tmp_path / "converted")
    assert again.config == model.config
    assert jax.tree.structure(converted) == jax.tree.structure(direct)
    _same(_flat(converted), _flat(direct))
    assert summary.num_weights == len(_flat(direct))
    assert summary.bytes == sum(array.nbytes for array in _flat(direct).values())


def test_a_conversion_to_bfloat16_leaves_packed_weights_alone(tmp_path, checkpoint):
    source = gpt_oss_random.write(tmp_path / "source", checkpoint)
    convert.convert(source, tmp_path / "converted", dtype="bfloat16")
    model = registry.build(read_config(source), dtype=made.BFLOAT16)
    converted, direct = (_flat(api.load_params(open_path(tmp_path / name), model)) for name in ("converted", "source"))
    _same(converted, direct)
    assert {array.dtype for array in converted.values()} == {np.dtype(np.uint8), made.BFLOAT16}


def test_scales_at_the_ends_of_the_range_pass(tmp_path, checkpoint):
    tensors = dict(checkpoint.packed)
    scales = tensors[f"{EXPERTS}down_proj_scales"].copy()
    scales[0, 0], scales[0, 1] = 2, 252
    tensors[f"{EXPERTS}down_proj_scales"] = scales
    _, params = gpt_oss_ours.load(_write(tmp_path, tensors))
    expected = gpt_oss_numpy.dequantize(tensors[f"{EXPERTS}down_proj_blocks"], scales)
    np.testing.assert_array_equal(params["block_1"]["moe"]["down_kernel"].dequantize(), expected)


@pytest.mark.parametrize("layout", ["packed", "original"])
@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
def test_a_scale_of_255_is_refused(tmp_path, checkpoint, layout, part):
    name = f"{EXPERTS}{part}_scales"
    scales = checkpoint.packed[name].copy()
    scales[-1, -1, -1] = 255
    damaged = checkpoint._replace(packed={**checkpoint.packed, name: scales})
    source = {
        ("packed", "gate_up_proj"): name,
        ("packed", "down_proj"): name,
        ("original", "gate_up_proj"): "block.1.mlp.mlp1_weight.scales",
        ("original", "down_proj"): "block.1.mlp.mlp2_weight.scales",
    }[layout, part]
    directory = gpt_oss_random.write(tmp_path / "checkpoint", damaged, layout=layout)
    _refused(directory, source, "255")
    with pytest.raises(CheckpointError, match="255"):
        convert.convert(directory, tmp_path / "converted")
    assert list(tmp_path.iterdir()) == [directory]  # nothing is left of it


@pytest.mark.parametrize(
    "name", ["gate_up_proj_blocks", "gate_up_proj_scales", "gate_up_proj_bias", "down_proj_blocks", "down_proj_scales"]
)
def test_missing_parts_of_experts_are_named(tmp_path, checkpoint, name):
    tensors = {key: value for key, value in checkpoint.packed.items() if key != EXPERTS + name}
    _refused(_write(tmp_path, tensors), "1 tensor missing", EXPERTS + name)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.sinks",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.v_proj.bias",
        "model.layers.1.self_attn.o_proj.bias",
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.1.mlp.router.bias",
    ],
)
def test_missing_tensors_are_named(tmp_path, checkpoint, name):
    tensors = {key: value for key, value in checkpoint.packed.items() if key != name}
    _refused(_write(tmp_path, tensors), "1 tensor missing", name)


@pytest.mark.parametrize("name", ["block.1.attn.qkv.bias", "block.0.mlp.mlp1_weight.scales", "unembedding.weight"])
def test_missing_tensors_of_the_original_layout_are_named_as_they_are_there(tmp_path, checkpoint, name):
    tensors = gpt_oss_random.original_tensors(checkpoint.packed)
    del tensors[name]
    directory = tmp_path / "checkpoint"
    gpt_oss_random.write_files(directory, gpt_oss_random.original_config(checkpoint.config), tensors)
    _refused(directory, "1 tensor missing", name)


MISSHAPEN: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "an expert short": ("gate_up_proj_blocks", lambda x: x[:-1]),
    "a block short": ("gate_up_proj_blocks", lambda x: x[:, :, :-1]),
    "half a block": ("down_proj_blocks", lambda x: x[..., :8]),
    "flat blocks": ("down_proj_blocks", lambda x: x.reshape(*x.shape[:2], -1)),
    "turned blocks": ("down_proj_blocks", lambda x: x.swapaxes(1, 2)),
    "a scale short": ("down_proj_scales", lambda x: x[:, :, :-1]),
    "a scale for each row": ("gate_up_proj_scales", lambda x: x[..., 0]),
    "too many scales": ("gate_up_proj_scales", lambda x: np.concatenate([x, x], axis=-1)),
}


@pytest.mark.parametrize("case", MISSHAPEN)
def test_misshapen_blocks_and_scales_are_refused(tmp_path, checkpoint, case):
    name, damage = MISSHAPEN[case]
    array = checkpoint.packed[EXPERTS + name]
    damaged = np.ascontiguousarray(damage(array))
    directory = _write(tmp_path, {**checkpoint.packed, EXPERTS + name: damaged})
    _refused(
        directory,
        "1 tensor of the wrong shape",
        f"{EXPERTS}{name} is {list(damaged.shape)}, expected {list(array.shape)}",
    )


@pytest.mark.parametrize("name", ["q_proj.weight", "k_proj.weight", "k_proj.bias", "v_proj.weight", "o_proj.weight"])
def test_misshapen_projections_are_refused(tmp_path, checkpoint, name):
    """Parts of what is stored fused here are checked one by one: a q as small as k, with a larger v, would fit too."""
    name = f"model.layers.0.self_attn.{name}"
    array = checkpoint.packed[name]
    damaged = np.ascontiguousarray(array.T) if name.endswith("o_proj.weight") else np.concatenate([array, array])
    directory = _write(tmp_path, {**checkpoint.packed, name: damaged})
    _refused(directory, "1 tensor of the wrong shape", f"{name} is {list(damaged.shape)}, expected {list(array.shape)}")


def test_swapped_projections_are_refused(tmp_path, checkpoint):
    tensors = dict(checkpoint.packed)
    q, k = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk")
    tensors[q], tensors[k] = tensors[k], tensors[q]
    _refused(_write(tmp_path, tensors), "2 tensors of the wrong shape", q, k)


def test_turned_experts_are_refused(tmp_path, checkpoint):
    """The dequantised layout is [E, in, out]; Linear's would be [E, out, in]."""
    tensors = {
        name: np.ascontiguousarray(value.swapaxes(1, 2) if value.ndim == 3 else value, np.float32)
        for name, value in checkpoint.dense.items()
    }
    directory = _write(tmp_path, tensors, quantization_config=None)
    _refused(directory, "4 tensors of the wrong shape", f"{EXPERTS}gate_up_proj is [6, 128, 96], expected [6, 96, 128]")


@pytest.mark.parametrize(
    ("name", "dtype", "found", "expected"),
    [
        ("gate_up_proj_blocks", np.int8, "I8", "U8"),
        ("gate_up_proj_blocks", np.float32, "F32", "U8"),
        ("down_proj_scales", np.float32, "F32", "U8"),
        ("down_proj_scales", ml_dtypes.float8_e4m3fn, "F8_E4M3", "U8"),
        ("down_proj_bias", np.uint8, "U8", "F32"),
    ],
)
def test_other_dtypes_are_refused(tmp_path, checkpoint, name, dtype, found, expected):
    directory = tmp_path / "checkpoint"
    tensors = {**checkpoint.packed, EXPERTS + name: checkpoint.packed[EXPERTS + name].astype(dtype)}
    config = {**checkpoint.config, "quantization_config": gpt_oss_random.QUANTIZATION}
    gpt_oss_random.write_files(directory, config, tensors)
    _refused(directory, "1 tensor of the wrong dtype", f"{EXPERTS}{name} is {found}, expected {expected}")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.self_attn.sinks",
        "model.layers.0.self_attn.sinks.scale",
        "model.layers.01.self_attn.sinks",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.up_proj_blocks",
        "model.layers.0.mlp.shared_expert.weight",
        "block.0.attn.norm.weight",
        "sinks",
    ],
)
def test_unknown_tensors_are_refused(tmp_path, checkpoint, name):
    directory = _write(tmp_path, {**checkpoint.packed, name: np.zeros(10, np.float32)})
    _refused(directory, "1 tensor unknown", name)


def test_a_mixture_of_layouts_is_refused(tmp_path, checkpoint):
    original = gpt_oss_random.original_tensors(checkpoint.packed)
    directory = _write(tmp_path, {**checkpoint.packed, **original})
    _refused(directory, "tensors unknown", "block.0.attn.qkv.weight", "block.0.attn.out.weight")


def test_experts_must_be_as_the_config_says(tmp_path, checkpoint):
    dense = {name: np.ascontiguousarray(value, np.float32) for name, value in checkpoint.dense.items()}
    _refused(_write(tmp_path / "a", dense), "4 tensors unknown", "quantization_config", f"{EXPERTS}down_proj_blocks")
    directory = _write(tmp_path / "b", checkpoint.packed, quantization_config=None)
    _refused(directory, "8 tensors unknown", "quantization_config", f"{EXPERTS}down_proj_scales")


def test_biases_must_be_as_the_config_says(tmp_path, checkpoint):
    directory = _write(tmp_path / "a", checkpoint.packed, attention_bias=False)
    _refused(directory, "8 tensors unknown", "model.layers.1.self_attn.v_proj.bias")
    without = gpt_oss_random.checkpoint(attention_bias=False, **gpt_oss_random.TWO_LAYERS)
    _refused(_write(tmp_path / "b", without.packed), "8 tensors missing", "model.layers.1.self_attn.v_proj.bias")


def test_a_tied_head_may_be_stored_if_it_is_equal(tmp_path):
    checkpoint = gpt_oss_random.checkpoint(tie_word_embeddings=True, **gpt_oss_random.TWO_LAYERS)
    head = checkpoint.packed["model.embed_tokens.weight"].copy()
    directory = _write(tmp_path / "a", {**checkpoint.packed, "lm_head.weight": head}, tie_word_embeddings=True)
    assert "head_embedding" not in streamed(directory)
    head = head.copy()
    head.view(np.uint32)[100, 95] ^= 1
    directory = _write(tmp_path / "b", {**checkpoint.packed, "lm_head.weight": head}, tie_word_embeddings=True)
    _refused(directory, "lm_head.weight differs from model.embed_tokens.weight", "tie_word_embeddings to false")


def test_a_tied_tensor_may_be_stored_as_the_head_only(tmp_path):
    checkpoint = gpt_oss_random.checkpoint(tie_word_embeddings=True, **gpt_oss_random.TWO_LAYERS)
    expected = streamed(_write(tmp_path / "a", checkpoint.packed, tie_word_embeddings=True))
    tensors = dict(checkpoint.packed)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    _same(streamed(_write(tmp_path / "b", tensors, tie_word_embeddings=True)), expected)


def test_a_classifier_of_texts_is_named(tmp_path):
    tensors = {
        **gpt_oss_random.checkpoint(**gpt_oss_random.TWO_LAYERS).packed,
        "score.weight": np.ones((2, 96), np.float32),
    }
    del tensors["lm_head.weight"]
    _refused(
        _write(tmp_path, tensors), "score.weight is a head that classifies texts", "GptOssForCausalLM.from_pretrained"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.sinks", "model.layers.1.self_attn.k_proj.weight"])
def test_numbers_that_are_none_are_refused(tmp_path, checkpoint, name, value):
    damaged = checkpoint.packed[name].copy()
    damaged.flat[-1] = value
    _refused(_write(tmp_path, {**checkpoint.packed, name: damaged}), name, "NaN or infinity")


def test_parts_of_several_dtypes_are_refused(tmp_path, checkpoint):
    tensors = dict(checkpoint.packed)
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    _refused(_write(tmp_path, tensors), "with mixed dtypes in one weight", f"{name} F16")
