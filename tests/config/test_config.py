"""Reading `config.json`: every key's meaning, and every fault named.

The oracle is what the published files say and how transformers 5 reads them (docs/MODELS.md).
"""

import dataclasses
import json
from typing import Any

import pytest

from gptjax.config import (
    PUBLISHED,
    WITHOUT_EFFECT,
    GPT2Config,
    config_from_json,
    read_config,
)
from gptjax.errors import CheckpointError, ConfigError, RequestError

# The files as they are on the Hub.
HUB_SMALL: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
_LARGER: dict[str, Any] = {**HUB_SMALL, "n_special": 0, "predict_special_tokens": True}
HUB: dict[str, dict[str, Any]] = {
    "gpt2": HUB_SMALL,
    "gpt2-medium": {**_LARGER, "n_embd": 1024, "n_head": 16, "n_layer": 24},
    "gpt2-large": {**_LARGER, "n_embd": 1280, "n_head": 20, "n_layer": 36},
    "gpt2-xl": {**_LARGER, "n_embd": 1600, "n_head": 25, "n_layer": 48, "output_past": True},
}
TINY: dict[str, Any] = dict(model_type="gpt2", vocab_size=101, n_positions=37, n_embd=60, n_head=5, n_layer=3)
TINY_READ = GPT2Config(
    vocab_size=101,
    context_length=37,
    width=60,
    num_layers=3,
    num_heads=5,
    mlp_width=240,
    activation="gelu_tanh",
    norm_epsilon=1e-5,
    scale_attention=True,
    scale_attention_by_layer=False,
    tied_head=True,
)


def _without(*names: str) -> dict[str, Any]:
    return {key: value for key, value in TINY.items() if key not in names}


def _fault(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        config_from_json(raw)
    return str(caught.value)


@pytest.mark.parametrize("name", HUB)
def test_published_files_are_the_published_configs(name):
    config = config_from_json(HUB[name])
    assert config == PUBLISHED[name]
    assert (config.head_width, config.mlp_width, config.num_kv_heads) == (64, 4 * config.width, config.num_heads)
    sizes = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280)}
    assert (config.num_layers, config.num_heads, config.width) == sizes.get(name, (48, 25, 1600))


def test_what_transformers_5_writes_is_read():
    """`GPT2Config().to_json_string(use_diff=False)` of transformers 5.23."""
    written = {
        **{key: value for key, value in HUB_SMALL.items() if key not in ("n_ctx", "task_specific_params")},
        **{"_name_or_path": "", "add_cross_attention": False, "chunk_size_feed_forward": 0, "dtype": None},
        **{"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "is_encoder_decoder": False, "n_inner": None},
        **{"output_attentions": False, "output_hidden_states": False, "pad_token_id": None, "problem_type": None},
        **{"reorder_and_upcast_attn": False, "return_dict": True, "scale_attn_by_inverse_layer_idx": False},
        **{"scale_attn_weights": True, "tie_word_embeddings": True, "transformers_version": "5.23.0"},
        **{"use_cache": True},
    }
    assert config_from_json(written) == PUBLISHED["gpt2"]


def test_absent_keys_mean_what_transformers_says():
    assert config_from_json(TINY) == TINY_READ
    assert TINY_READ.head_width == 12


@pytest.mark.parametrize(
    ("raw", "read"),
    [
        ({"n_inner": None}, {}),
        ({"n_inner": 52}, {"mlp_width": 52}),
        ({"intermediate_size": 52}, {"mlp_width": 52}),
        ({"intermediate_size": None}, {}),
        ({"n_inner": None, "intermediate_size": 52}, {"mlp_width": 52}),
        ({"n_inner": 52, "intermediate_size": 53}, {"mlp_width": 52}),  # which transformers does not read
        ({"n_ctx": 37}, {}),
        ({"n_ctx": 36}, {}),  # which transformers does not read
        ({"n_ctx": 41, "n_positions": None}, {"context_length": 41}),
        ({"max_position_embeddings": 41, "n_positions": None, "n_ctx": 3}, {"context_length": 41}),
        ({"hidden_size": 60, "num_attention_heads": 5, "num_hidden_layers": 3, "max_position_embeddings": 37}, {}),
        ({"n_embd": None, "hidden_size": 60}, {}),
        ({"max_seq_len_cached": None, "zeta": None}, {}),
        ({"unsloth_fixed": True, "eos_token_id": 50256}, {}),
        # All that transformers 4's base class wrote, and what people added.
        ({"tie_encoder_decoder": False, "tf_legacy_loss": False, "decoder_start_token_id": 0, "xla_device": False}, {}),
        ({"author": "A", "created_date": "2021-04-28", "license": "CC-BY-NC-SA 4.0"}, {}),
        ({"do_sample": True, "max_length": 50, "temperature": 0.7, "num_beams": 1}, {}),  # as versions 2 and 3 wrote
        ({"activation_function": "gelu_new"}, {"activation": "gelu_tanh"}),
        ({"activation_function": "gelu"}, {"activation": "gelu_erf"}),
        ({"activation_function": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
        ({"activation_function": "gelu_fast"}, {"activation": "gelu_tanh"}),
        ({"activation_function": "relu"}, {"activation": "relu"}),
        ({"activation_function": "silu"}, {"activation": "silu"}),
        ({"activation_function": "swish"}, {"activation": "silu"}),
        ({"activation_function": "tanh"}, {"activation": "tanh"}),
        ({"layer_norm_epsilon": 1}, {"norm_epsilon": 1.0}),
        ({"layer_norm_epsilon": 1e-6}, {"norm_epsilon": 1e-6}),
        ({"scale_attn_weights": False}, {"scale_attention": False}),
        ({"scale_attn_by_inverse_layer_idx": True}, {"scale_attention_by_layer": True}),
        ({"tie_word_embeddings": False}, {"tied_head": False}),
        (dict.fromkeys(WITHOUT_EFFECT - {"model_type", "add_cross_attention"}, "anything"), {}),
    ],
)
def test_every_key(raw, read):
    assert config_from_json({**TINY, **raw}) == dataclasses.replace(TINY_READ, **read)


def test_n_ctx_alone_is_the_context_length():
    assert config_from_json({**_without("n_positions"), "n_ctx": 37}) == TINY_READ


def test_both_names_of_the_context_length_are_written():
    """transformers reads the one, llama.cpp's converter the other (conversion/gpt2.py)."""
    written = TINY_READ.to_json()
    assert (written["n_positions"], written["n_ctx"]) == (37, 37)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"n_embd": 60, "hidden_size": 64}, "n_embd is 60 but hidden_size is 64"),
        ({"max_position_embeddings": 36}, "n_positions is 37 but max_position_embeddings is 36"),
        ({"n_head": 7}, "n_embd 60 is not a multiple of n_head 7"),
        ({"activation_function": "gelu_10"}, "activation_function is 'gelu_10'; gptjax supports gelu, gelu_fast, "),
        ({"activation_function": ["gelu"]}, r"activation_function is ['gelu']"),
        ({"n_layer": 0}, "n_layer is 0; expected a whole number from 1"),
        ({"n_layer": -3}, "n_layer is -3"),
        ({"n_layer": True}, "n_layer is True"),
        ({"n_layer": 3.0}, "n_layer is 3.0"),
        ({"vocab_size": "101"}, "vocab_size is '101'"),
        ({"n_inner": 0}, "n_inner is 0"),
        ({"n_embd": [60]}, "n_embd is [60]"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0; expected a number above 0"),
        ({"layer_norm_epsilon": True}, "layer_norm_epsilon is True"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5'"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon is inf"),
        ({"layer_norm_epsilon": 10**400}, "layer_norm_epsilon is 1"),
        ({"scale_attn_weights": 1}, "scale_attn_weights is 1; expected true or false"),
        ({"scale_attn_by_inverse_layer_idx": "false"}, "scale_attn_by_inverse_layer_idx is 'false'"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings is 0"),
        ({"add_cross_attention": True}, "add_cross_attention is true"),
        ({"rotary_dim": 64}, "unknown key rotary_dim:"),
        ({"zeta": 0, "alpha": 1}, "unknown keys alpha, zeta:"),
        ({"zeta": None, "alpha": 1}, "unknown key alpha: "),
        ({"rotary_dim": 64}, "ignore_config=('rotary_dim',) or --ignore-config rotary_dim"),
    ],
)
def test_what_cannot_be_used_is_named(raw, message):
    text = _fault({**TINY, **raw})
    assert message in text
    assert len(text.splitlines()) == 2, "one fault, one line, after the heading"


@pytest.mark.parametrize("name", ["vocab_size", "n_positions", "n_embd", "n_head", "n_layer"])
@pytest.mark.parametrize("how", ["absent", "null"])
def test_sizes_have_no_defaults(name, how):
    raw = _without(name) if how == "absent" else {**TINY, name: None}
    lines = _fault(raw).splitlines()
    assert len(lines) == 2
    assert "is missing" in lines[1] and name in lines[1]


def test_all_faults_are_reported_together():
    raw = {"model_type": "gpt2", "n_embd": 60, "n_head": 7, "n_layer": True, "activation_function": "?", "rope": 1}
    text = _fault(raw)
    for part in ["vocab_size is missing", "n_positions or n_ctx is missing", "n_layer is True", "'?'", "rope"]:
        assert part in text
    assert "multiple of n_head 7" in text
    assert len(text.splitlines()) == 7


@pytest.mark.parametrize("model_type", [None, "bert", "GPT2", 2, ["gpt2"], "absent"])
def test_unsupported_model_types_are_named(model_type):
    text = _fault(_without("model_type") if model_type == "absent" else {**TINY, "model_type": model_type})
    assert "gptjax supports" in text and "gpt2" in text.split("supports")[1]
    assert "no model_type" in text if model_type in (None, "absent") else repr(model_type) in text


def test_configs_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY_READ.width = 61  # type: ignore[misc]
    assert hash(TINY_READ) == hash(dataclasses.replace(TINY_READ))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no config.json"),
        (b"{", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1]", "contains a JSON list"),
        (b"null", "contains a JSON NoneType"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"n_embd": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
    ids=["absent", "truncated", "not UTF-8", "empty", "list", "null", "deep", "digits"],
)
def test_files_that_cannot_be_read(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_directory_that_is_a_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        read_config(tmp_path / "model.safetensors")


def test_read_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    assert read_config(tmp_path) == TINY_READ


def test_keys_that_are_to_be_ignored(tmp_path):
    raw = {**TINY, "rotary_dim": 64, "activation_function": "gelu_10", "nested": {"a": 1}}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    assert read_config(tmp_path, ignore=["rotary_dim", "activation_function", "nested"]) == TINY_READ
    with pytest.raises(ConfigError, match=r"unknown keys nested, rotary_dim:.*\('nested', 'rotary_dim',\)"):
        read_config(tmp_path, ignore=["activation_function"])
    for path in ("rotary", "rotary_dim.x", "nested.b", ""):
        with pytest.raises(ConfigError, match=f"has no {path or repr(path)} to ignore; it has a"):
            read_config(tmp_path, ignore=[path])
    for ignored in ("rotary_dim", [5]):
        with pytest.raises(RequestError, match=r'ignore_config=\("key",\)'):
            read_config(tmp_path, ignore=ignored)


@pytest.mark.parametrize(
    "raw",
    [
        {"\x1b]0;owned\x07" + "k" * 10**6: 1},
        {"activation_function": "\x1b[31m" * 10**5},
        {"model_type": "\x1b[31m" * 10**5},
        {"n_layer": ["\u202e" * 10**6]},
        {"vocab_size": {"k" * 10**6: "\x9b1m"}},
        {f"unknown\x1b{n}": 1 for n in range(10**4)},
    ],
)
def test_messages_are_short_and_cannot_steer_a_terminal(raw):
    text = _fault({**TINY, **raw})
    assert len(text) < 2500
    assert all(letter.isprintable() or letter == "\n" for letter in text)
