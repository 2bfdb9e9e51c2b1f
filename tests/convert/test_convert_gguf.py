"""GGUF files, loaded and converted: the same configuration and the same bits as the checkpoint they were made from."""

import re

import numpy as np
import pytest

import convert
from gptjax.checkpoints.checkpoint import open_checkpoint
from gptjax.config.rope import Factors
from gptjax.errors import CheckpointError, ConfigError
from gptjax.gguf import GGUFFile
from tests.oracles import gguf_from_hf, gpt2_random, gpt_oss_random, llama_random

# config.json says more than llama.cpp's files can: these are left out there.
LLAMAS = ["llama2", "llama3", "llama biases", "linear", "qwen2", "qwen2 yarn", "qwen3"]


def params(checkpoint) -> dict[str, np.ndarray]:
    return {"/".join(path): np.array(read()) for path, read in convert.open_params(checkpoint)}


def assert_same(gguf, directory) -> None:
    found, expected = open_checkpoint(gguf), open_checkpoint(directory)
    assert found.config == expected.config
    ours, theirs = params(found), params(expected)
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        np.testing.assert_array_equal(ours[path], array, err_msg=path, strict=True)


@pytest.mark.parametrize("variant", LLAMAS)
def test_llama(tmp_path, variant):
    model = llama_random.checkpoint(3, **llama_random.VARIANTS[variant])
    directory = llama_random.write(tmp_path / "hf", model)
    assert_same(gguf_from_hf.write(tmp_path / "model.gguf", *model), directory)


@pytest.mark.parametrize("variant", ["llama biases", "qwen2"])
@pytest.mark.parametrize("types", [{}, {"attn_qkv.weight": gguf_from_hf.Q8_0}], ids=["floats", "packed"])
def test_queries_keys_and_values_in_one_tensor(tmp_path, variant, types):
    """llama's queries and keys are in the order of its rotation there too."""
    model = llama_random.checkpoint(3, **llama_random.VARIANTS[variant])
    fused = open_checkpoint(gguf_from_hf.write(tmp_path / "fused.gguf", *model, types=types, fused=True))
    if not types:
        return assert_same(fused.path, llama_random.write(tmp_path / "hf", model))
    kinds = {f"attn_{part}.weight": gguf_from_hf.Q8_0 for part in "qkv"}
    apart = open_checkpoint(gguf_from_hf.write(tmp_path / "apart.gguf", *model, types=kinds))
    assert fused.config == apart.config and fused.config.types
    path = "block_1/attention/qkv/kernel/blocks"
    np.testing.assert_array_equal(params(fused)[path], params(apart)[path], strict=True)


@pytest.mark.parametrize("shape", [(2, 4), (3_000_000,)], ids=["two axes", "millions"])
def test_other_factors_of_the_rotation_are_refused_unread(tmp_path, shape, monkeypatch):
    path = gguf_from_hf.write(
        tmp_path / "model.gguf", *llama_random.checkpoint(6), rope_freqs=np.ones(shape, np.float32)
    )
    monkeypatch.setattr(GGUFFile, "read", None)
    with pytest.raises(ConfigError, match=re.escape(f"rope_freqs.weight is {list(shape)}")):
        open_checkpoint(path)


@pytest.mark.parametrize("changes", [{}, {"n_inner": None}, {"tie_word_embeddings": False}])
def test_gpt2(tmp_path, changes):
    config, tensors = gpt2_random.checkpoint(4, activation_function="gelu_new", **changes)
    gpt_oss_random.write_files(tmp_path / "hf", config, tensors)
    assert_same(gguf_from_hf.write(tmp_path / "model.gguf", config, tensors), tmp_path / "hf")


@pytest.mark.parametrize("layout", ["packed", "dense"])
def test_gpt_oss(tmp_path, layout):
    """Its nibbles are in another order, gate and up are apart, and YaRN's bounds are not rounded as llama.cpp does."""
    model = gpt_oss_random.checkpoint(5)
    directory = gpt_oss_random.write(tmp_path / "hf", model, layout=layout)
    tensors = model.packed if layout == "packed" else {k: np.float32(v) for k, v in model.dense.items()}
    assert_same(gguf_from_hf.write(tmp_path / "model.gguf", model.config, tensors), directory)


def test_llama3_factors_are_read_from_their_tensor(tmp_path):
    model = llama_random.checkpoint(6, **llama_random.VARIANTS["llama3.1"])
    found = open_checkpoint(gguf_from_hf.write(tmp_path / "model.gguf", *model)).config
    scaling = found.rope.scaling
    assert isinstance(scaling, Factors)
    expected = llama_random.llama_numpy.inv_freq(model.config)[0]
    plain = llama_random.llama_numpy.inv_freq({**model.config, "rope_scaling": None})[0]
    np.testing.assert_allclose(plain / np.array(scaling.divisors), expected, rtol=1e-6)


def test_half_precision_next_to_float32_becomes_float32(tmp_path):
    model = llama_random.checkpoint(7)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = {**model.tensors, name: model.tensors[name].astype(np.float16)}
    directory = llama_random.write(
        tmp_path / "hf", model._replace(tensors={**tensors, name: np.float32(tensors[name])})
    )
    assert_same(gguf_from_hf.write(tmp_path / "model.gguf", model.config, tensors), directory)


def test_a_converted_file_is_the_same_again(tmp_path):
    model = gpt_oss_random.checkpoint(8)
    gguf = gguf_from_hf.write(tmp_path / "model.gguf", model.config, model.packed)
    summary = convert.convert(gguf, tmp_path / "converted")
    assert summary.num_weights
    converted, source = open_checkpoint(tmp_path / "converted"), open_checkpoint(gguf)
    assert converted.is_converted
    assert converted.config == source.config
    assert converted.text.metadata == source.text.metadata
    assert convert.verify(tmp_path / "converted").faults == ()


def test_missing_and_unknown_tensors_are_named(tmp_path):
    model = llama_random.checkpoint(9)
    tensors = dict(model.tensors)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    gguf = gguf_from_hf.write(tmp_path / "model.gguf", model.config, tensors)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight"):
        convert.open_params(open_checkpoint(gguf))
