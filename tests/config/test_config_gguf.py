"""What GGUF metadata says about a model, and what is refused. Sound files are compared with their Hugging Face form in
tests/convert/test_convert_gguf.py."""

import contextlib
from types import SimpleNamespace

import pytest

from gptjax.config import config_from_json
from gptjax.config.gguf import config_json_from_gguf
from gptjax.errors import ConfigError

METADATA = {
    "general.architecture": "llama",
    "llama.context_length": 512,
    "llama.embedding_length": 96,
    "llama.block_count": 2,
    "llama.feed_forward_length": 80,
    "llama.attention.head_count": 6,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
}
TENSORS = {
    "token_embd.weight": SimpleNamespace(shape=(101, 96), type="F16"),
    "output.weight": SimpleNamespace(shape=(101, 96), type="F16"),
}


def raw(metadata, tensors=TENSORS, **options):
    return config_json_from_gguf(metadata, tensors, read={}.__getitem__, **options)


def read(**changes):
    """The config.json of METADATA with changes; None removes a key."""
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    metadata = {key: value for key, value in {**METADATA, **changed}.items() if value is not None}
    return raw(metadata)


def test_numbers_are_the_decimals_that_were_meant():
    config = config_from_json(read(llama__rope__freq_base=500000.0))
    assert config.norm_epsilon == 1e-05
    assert config.rope.theta == 500000.0
    assert config.head_width == 16
    assert not config.tied_head


def test_a_file_with_a_vocabulary_alone():
    with pytest.raises(ConfigError, match="it has no tensors, only a vocabulary; choose a file with weights"):
        raw(METADATA, {})


def test_a_value_for_each_layer_is_one_if_they_agree():
    assert (
        config_from_json(read(llama__attention__head_count=[6, 6], llama__feed_forward_length=[80, 80])).num_heads == 6
    )
    with pytest.raises(ConfigError, match="num_attention_heads is"):
        config_from_json(read(llama__attention__head_count=[6, 3], llama__attention__key_length=16))


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({}, None),
        ({"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0}, None),
        ({"llama__rope__scaling__factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"llama__rope__scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 1.0}, None),
        (
            {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "truncate": True},
        ),
    ],
)
def test_rotation(changes, scaling):
    """As llama.cpp reads it: src/llama-model.cpp, `load_hparams`."""
    assert read(**changes).get("rope_scaling") == scaling


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"general__architecture": "mamba"}, "the architecture 'mamba'; gptjax supports gpt-oss, gpt2, llama, qwen2"),
        ({"general__architecture": None}, "no general.architecture"),
        ({"general__architecture": 7}, "the architecture 7"),
        ({"llama__expert_count": 8, "llama__expert_used_count": 2}, "llama.expert_count is 8"),
        ({"llama__rope__scaling__type": "longrope"}, "llama.rope.scaling.type is 'longrope'"),
        ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count is 8; gptjax supports 16"),
        ({"llama__attention__value_length": 8}, "llama.attention.value_length is 8; gptjax supports 16"),
        ({"llama__attention__causal": False}, "llama.attention.causal is False"),
        ({"llama__logit_scale": 0.5}, "unknown key llama.logit_scale.*--ignore-config llama.logit_scale"),
        ({"llama__embedding_length": None}, "llama.embedding_length is missing"),
        ({"llama__attention__layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
    ],
)
def test_what_is_refused_is_named(changes, fault):
    with pytest.raises(ConfigError, match=fault):
        read(**changes)


def test_a_file_without_an_embedding_is_refused():
    with pytest.raises(ConfigError, match=r"no tensor token_embd\.weight"):
        raw(METADATA, {"output.weight": TENSORS["output.weight"]})


def test_ignored_keys():
    metadata = {**METADATA, "llama.logit_scale": 0.5}
    assert raw(metadata, ignore=["llama.logit_scale"])["hidden_size"] == 96
    with pytest.raises(ConfigError, match=r"no llama\.nothing to ignore"):
        raw(METADATA, ignore=["llama.nothing"])


def test_strange_types_are_faults_and_no_crash():
    for key in METADATA:
        for value in ("text", [], [1, 2], ["a"], True, -1, 2**70, float("inf"), float("nan")):
            with contextlib.suppress(ConfigError):
                config_from_json(raw({**METADATA, key: value}))
