"""GGUF files, loaded and converted: the same configuration and the same bits as the checkpoint they were made from."""

import re
from collections import Counter

import numpy as np
import pytest

import convert
import gptjax
from gptjax.checkpoints.checkpoint import open_checkpoint
from gptjax.config.rope import Factors
from gptjax.errors import CheckpointError, ConfigError
from gptjax.gguf import GGUFFile
from tests.gguf import made
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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"embedding_length": 64, "attention.head_count": 4}, r"blk.1.attn_q.weight is [96, 96], expected [64, 64]"),
        ({"feed_forward_length": 96}, "blk.1.ffn_down.weight is [96, 64], expected [96, 96]"),
        ({"attention.head_count": 12}, "blk.1.attn_q.weight is [96, 96], expected [192, 96]"),
        ({"attention.head_count_kv": 3}, "blk.1.attn_k.weight is [32, 96], expected [48, 96]"),
        (
            {"embedding_length": 80, "attention.head_count": 5, "attention.head_count_kv": 1},
            "blk.1.attn_q.weight is [96, 96], expected [80, 80]",
        ),
    ],
)
def test_packed_tensors_that_do_not_go_with_the_metadata_are_named(tmp_path, changes, said):
    """Also those of whose blocks the other sizes are no multiples, as 80 is not of 32."""
    model = llama_random.checkpoint(3, intermediate_size=64)
    types = dict.fromkeys(
        ("attn_q.weight", "attn_k.weight", "attn_output.weight", "token_embd.weight"), gguf_from_hf.Q8_0
    )
    types |= dict.fromkeys(("attn_v.weight", "ffn_up.weight", "ffn_gate.weight", "ffn_down.weight"), gguf_from_hf.Q4_0)
    sizes = {f"llama.{key}": made.number(made.U32, value) for key, value in changes.items()}
    if "attention.head_count" in changes:
        sizes |= {f"llama.{key}": made.number(made.U32, 16) for key in ("attention.key_length", "rope.dimension_count")}
    path = gguf_from_hf.write(tmp_path / "model.gguf", *model, types=types, metadata=sizes)
    for use in (gptjax.load, lambda path: convert.convert(path, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
            use(path)
        assert str(path) in str(caught.value)


def test_what_gpt2_lacks_is_named_as_its_files_have_it(tmp_path):
    """Not as queries, keys and values apart, which other families' files have."""
    config, tensors = gpt2_random.checkpoint(4, activation_function="gelu_new")
    del tensors["h.1.attn.c_attn.weight"]
    gguf = gguf_from_hf.write(tmp_path / "model.gguf", config, tensors)
    with pytest.raises(CheckpointError, match=r"1 tensor missing:\n +blk\.1\.attn_qkv\.weight$"):
        convert.open_params(open_checkpoint(gguf))


@pytest.mark.parametrize("use", ["loaded", "converted"])
def test_packed_experts_are_read_once(tmp_path, monkeypatch, use):
    """Though their blocks and scales are two weights."""
    read = Counter()
    once = GGUFFile.packed
    monkeypatch.setattr(GGUFFile, "packed", lambda self, name: read.update([name]) or once(self, name))
    model = gpt_oss_random.checkpoint(8)
    gguf = gguf_from_hf.write(tmp_path / "model.gguf", model.config, model.packed)
    if use == "loaded":
        params(open_checkpoint(gguf))
    else:
        convert.convert(gguf, tmp_path / "converted")
    experts = {f"blk.{layer}.ffn_{part}_exps.weight" for layer in range(3) for part in ("gate", "up", "down")}
    assert read == dict.fromkeys(experts, 1)
