"""The tensors of Llama and its relatives, against the tests' own mapping of names, and what is refused."""

import json
from typing import Any

import numpy as np
import pytest

import convert
from gptjax import api
from gptjax.checkpoints.checkpoint import open_path
from gptjax.checkpoints.weights import flatten
from gptjax.config import read_config
from gptjax.errors import CheckpointError, ConfigError
from gptjax.models import registry
from pallas_kernels.formats.mxfp4 import MXFP4
from tests.convert import made
from tests.convert.conversion_material import streamed
from tests.oracles import gpt_oss_random, llama_ours, llama_random
from tests.oracles.llama_random import VARIANTS

BUFFER = "model.layers.1.self_attn.rotary_emb.inv_freq"


def _flat(params: Any) -> dict[str, np.ndarray]:
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten(params).items()}


def _same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert made.same_bits(np.asarray(found[name]), array), name


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_weight_is_where_it_belongs(tmp_path, changes):
    checkpoint = llama_random.checkpoint(dtype=made.BFLOAT16, **changes)
    llama_random.write(tmp_path, checkpoint, shards=3)
    _same(streamed(tmp_path), _flat(llama_ours.params(checkpoint.tensors, made.BFLOAT16)))


def test_a_tied_head_under_either_name_and_a_copy_of_it(tmp_path):
    checkpoint = llama_random.checkpoint(**VARIANTS["qwen3"])
    expected = _flat(llama_ours.params(checkpoint.tensors))
    embedding = checkpoint.tensors["model.embed_tokens.weight"]
    both = llama_random.write(tmp_path / "both", checkpoint, **{"lm_head.weight": embedding})
    _same(streamed(both), expected)
    moved = {("lm_head.weight" if "embed" in name else name): x for name, x in checkpoint.tensors.items()}
    _same(streamed(llama_random.write(tmp_path / "moved", checkpoint._replace(tensors=moved))), expected)
    untied = llama_random.write(tmp_path / "untied", checkpoint, **{"lm_head.weight": embedding + 1})
    with pytest.raises(CheckpointError, match="tie_word_embeddings to false"):
        streamed(untied)


def test_rotary_buffers_are_ignored(tmp_path):
    checkpoint = llama_random.checkpoint()
    llama_random.write(tmp_path, checkpoint, **{BUFFER: np.ones(8, np.float32)})
    _same(streamed(tmp_path), _flat(llama_ours.params(checkpoint.tensors)))


@pytest.mark.parametrize(
    ("variant", "drop", "add", "parts"),
    [
        ("llama3", "model.layers.1.mlp.up_proj.weight", "", ["model.layers.1.mlp.up_proj.weight"]),
        ("qwen3", "model.layers.0.self_attn.k_norm.weight", "", ["k_norm"]),
        ("llama3", "lm_head.weight", "", ["lm_head.weight", "tie_word_embeddings to true"]),
        ("llama3", "", "model.layers.0.self_attn.q_proj.bias", ["q_proj.bias", "the model has no"]),
        ("mistral", "", "model.layers.0.block_sparse_moe.gate.weight", ["1 tensor unknown", "block_sparse_moe"]),
        ("llama3", "lm_head.weight", "score.weight", ["classifies texts", "LlamaForCausalLM"]),
        ("qwen2 window", "lm_head.weight", "qa_outputs.bias", ["finds answers", "Qwen2ForCausalLM"]),
    ],
)
def test_tensors_that_do_not_match_are_refused(tmp_path, variant, drop, add, parts):
    checkpoint = llama_random.checkpoint(**VARIANTS[variant])
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name != drop}
    tensors |= {add: np.zeros(96, np.float32)} if add else {}
    llama_random.write(tmp_path, checkpoint._replace(tensors=tensors))
    with pytest.raises(CheckpointError) as caught:
        streamed(tmp_path)
    for part in parts:
        assert part in str(caught.value)


def test_a_matrix_of_the_wrong_shape_is_named(tmp_path):
    checkpoint = llama_random.checkpoint()
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors = {**checkpoint.tensors, name: np.zeros((96, 90), np.float32)}
    llama_random.write(tmp_path, checkpoint._replace(tensors=tensors))
    with pytest.raises(CheckpointError, match=r"o_proj\.weight is \[96, 90\], expected \[96, 96\]"):
        streamed(tmp_path)


@pytest.mark.parametrize("targets", ["linear", "all"])
def test_a_packed_model_is_read_back(tmp_path, targets):
    """Its logits are near those of the float one, by transformers' layout, through a converted directory."""
    widths = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    checkpoint = llama_random.checkpoint(std=0.05, **{**VARIANTS["qwen2 window"], **widths})
    source = llama_random.write(tmp_path / "source", checkpoint)
    convert.convert(source, tmp_path / "packed", quantize=targets)
    config = read_config(tmp_path / "packed")
    assert (config.mxfp4, json.loads((tmp_path / "packed" / "config.json").read_text())["model_type"]) == (
        targets,
        "qwen2",
    )
    model = registry.build(config)
    params = api.load_params(open_path(tmp_path / "packed"), model)
    for layer, name in (("attention", "qkv"), ("attention", "out"), ("mlp", "gate_up"), ("mlp", "down")):
        assert isinstance(params["block_1"][layer][name]["kernel"], MXFP4)
    assert isinstance(params["token_embedding"], MXFP4) == (targets == "all")
    ids = gpt_oss_random.tokens(1, 9)
    expected = llama_ours.llama_numpy.forward(checkpoint.tensors, checkpoint.config, ids).logits_TV
    logits = np.asarray(llama_ours.run_whole(model, params, ids).logits_BTV)
    assert 0 < np.abs(logits - expected).max() < 0.5 * np.abs(expected).max()


def test_widths_that_cannot_be_packed_are_named(tmp_path):
    """Also with factors for each pair of a head, whose number follows from its width."""
    source = llama_random.write(tmp_path / "source", llama_random.checkpoint(**VARIANTS["factors"]))
    with pytest.raises(ConfigError, match=r"mlp/down/kernel is \[80, 96\], and its products sum over 80"):
        convert.convert(source, tmp_path / "packed", quantize="linear")
    assert not (tmp_path / "packed").exists()
