"""Reading GPT-OSS's `config.json` in both spellings, the published sizes, and what is refused."""

import dataclasses
import json
from typing import Any

import pytest

from gptjax.config import PUBLISHED, config_from_json
from gptjax.config.keys import without
from gptjax.config.rope import Rope, Yarn
from gptjax.errors import ConfigError
from tests.oracles import gpt_oss_random

ORIGINAL = gpt_oss_random.original_config(gpt_oss_random.CONFIG)


@pytest.mark.parametrize(
    ("name", "mxfp4"),
    [
        (name, mxfp4)
        for name in PUBLISHED
        for mxfp4 in ("none", "experts", "linear", "all")
        if mxfp4 != "experts" or name.startswith("gpt-oss")  # others have none
    ],
)
def test_what_is_written_is_read_as_the_same(name, mxfp4):
    config = dataclasses.replace(PUBLISHED[name], mxfp4=mxfp4)
    assert config_from_json(json.loads(json.dumps(config.to_json()))) == config


def test_an_empty_rope_parameters_is_no_yarn():
    """As transformers 5 reads it; absent, it is the published models' YaRN."""
    raw = {key: value for key, value in gpt_oss_random.CONFIG.items() if key != "rope_scaling"}
    assert config_from_json(raw | {"rope_parameters": {}}).rope == Rope(150000.0)
    assert isinstance(config_from_json(raw).rope.scaling, Yarn)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope_scaling_factor": 1e308}, "factor is 1e[+]308"),
        ({"rope_scaling_factor": 1e-4}, "factor is 0.0001|context of 0 positions"),
        ({"rope_scaling_factor": 1e9}, "context of [0-9]+ positions is not"),
        ({"rope_ntk_alpha": 32, "rope_ntk_beta": 1}, "beta_fast is 1.0 and beta_slow 32.0"),
        ({"rope_theta": 0.5}, "rope_theta is 0.5"),
        ({"rope_theta": 1}, "rope_theta is 1.0"),
        ({"hidden_size": 80}, "width 80 is not a multiple of MXFP4's block of 32"),
        ({"strange": 1}, "unknown key strange"),
    ],
)
def test_original_configs_without_a_meaning_are_refused(changes: dict[str, Any], says: str):
    config_from_json(ORIGINAL)
    with pytest.raises(ConfigError, match=says):
        config_from_json(ORIGINAL | changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope_theta": 1.0, "rope_scaling": None}, "rope_theta is 1.0"),
        ({"sliding_window": None}, "sliding_window is missing"),
        ({"layer_types": ["odd"] * 3}, r"layer_types has 'odd'; gptjax supports sliding_attention, full_attention$"),
        (
            {"quantization_config": {"quant_method": "mxfp4", "targets": "linear"}, "num_attention_heads": 6},
            r"the width 72 is not a multiple",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(changes, says):
    base = gpt_oss_random.CONFIG | ({"head_dim": 12} if "num_attention_heads" in changes else {})
    with pytest.raises(ConfigError, match=says):
        config_from_json(base | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"initial_context_length": 2048},
        {"initial_context_length": None},
        {"experts_per_token": 3},
        {"unsloth_fixed": True, "max_seq_len_cached": None},
        {"max_seq_len_cached": 131072},
    ],
)
def test_what_transformers_does_not_read_changes_nothing(changes):
    assert config_from_json(gpt_oss_random.CONFIG | changes) == config_from_json(gpt_oss_random.CONFIG)


def test_an_absent_window_is_the_published_models():
    """As in transformers; null means no window."""
    raw = {key: value for key, value in gpt_oss_random.CONFIG.items() if key != "sliding_window"}
    assert set(config_from_json(raw).windows) == {None, 128}


def test_yarn_without_an_original_length_stretches_what_transformers_says():
    """The whole context, whatever `initial_context_length` says."""
    yarn = {key: value for key, value in gpt_oss_random.CONFIG["rope_scaling"].items() if key[:8] != "original"}
    raw = gpt_oss_random.CONFIG | {"rope_scaling": yarn}
    for more in ({}, {"initial_context_length": 16}):
        found = config_from_json(raw | more).rope.scaling
        assert isinstance(found, Yarn) and found.original_length == raw["max_position_embeddings"]


def test_a_key_inside_another_can_be_ignored():
    raw = gpt_oss_random.CONFIG | {"rope_scaling": {**gpt_oss_random.CONFIG["rope_scaling"], "mscale": 1.0}}
    with pytest.raises(ConfigError, match=r"--ignore-config rope_scaling\.mscale"):
        config_from_json(raw)
    assert config_from_json(without(raw, ["rope_scaling.mscale"])) == config_from_json(gpt_oss_random.CONFIG)


def test_gpt2_has_no_experts_to_be_packed():
    raw = PUBLISHED["gpt2"].to_json() | {"quantization_config": {"quant_method": "mxfp4"}}
    with pytest.raises(ConfigError, match="targets is missing"):
        config_from_json(raw)


@pytest.mark.parametrize("name", ["gpt-oss-20b", "gpt-oss-120b"])
def test_published_configs_are_read(name):
    """As they are published, in both layouts."""
    layers, experts = {"gpt-oss-20b": (24, 32), "gpt-oss-120b": (36, 128)}[name]
    common: dict[str, Any] = {
        "head_dim": 64,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "vocab_size": 201088,
        "initial_context_length": 4096,
        "experts_per_token": 4,
    }
    hugging_face: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_experts_per_tok": 4,
        "num_local_experts": experts,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "router_aux_loss_coef": 0.9,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
    }
    original = {
        "num_experts": experts,
        "rope_scaling_factor": 32.0,
        "rope_ntk_alpha": 1,
        "rope_ntk_beta": 32,
    }
    assert config_from_json({**common, **hugging_face}) == PUBLISHED[name]
    assert config_from_json({**common, **original}) == PUBLISHED[name]


YARN = gpt_oss_random.CONFIG["rope_scaling"]
PARAMETERS = {**YARN, "rope_theta": 150000.0}
# What is changed in the config, and what the error must say.
BAD_CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown key": ({"attention_sinks": 4}, ("attention_sinks",)),
    "two unknown keys": ({"moe_gate": 1, "qk_norm": True}, ("moe_gate", "qk_norm")),
    "unknown in rope_scaling": ({"rope_scaling": {**YARN, "mscale": 2.0}}, ("rope_scaling", "mscale")),
    "unknown in quantization": (
        {"quantization_config": {"quant_method": "mxfp4", "group_size": 16}},
        ("quantization_config", "group_size"),
    ),
    "another quantization": ({"quantization_config": {"quant_method": "fp8"}}, ("fp8", "mxfp4")),
    "quantization of no kind": ({"quantization_config": {"bits": 4}}, ("quantization_config",)),
    "spellings that differ": ({"rope_parameters": {**PARAMETERS, "factor": 16.0}}, ("rope_parameters", "rope_scaling")),
    "thetas that differ": ({"rope_parameters": {**PARAMETERS, "rope_theta": 1e4}}, ("rope_theta",)),
    "experts that differ": ({"num_experts": 8}, ("num_local_experts", "num_experts")),
    "another rope": ({"rope_scaling": {**YARN, "rope_type": "dynamic"}}, ("dynamic", "yarn")),
    "yarn's keys": ({"rope_scaling": {**YARN, "rope_type": "linear"}}, ("rope_scaling", "beta_fast", "beta_slow")),
    "no factor": ({"rope_scaling": {k: v for k, v in YARN.items() if k != "factor"}}, ("factor",)),
    "factor 0": ({"rope_scaling": {**YARN, "factor": 0}}, ("factor",)),
    "another attention factor": ({"rope_scaling": {**YARN, "attention_factor": 1.0}}, ("attention_factor",)),
    "rope_scaling no object": ({"rope_scaling": "yarn"}, ("rope_scaling",)),
    "theta 0": ({"rope_theta": 0}, ("rope_theta",)),
    "theta text": ({"rope_theta": "150000"}, ("rope_theta",)),
    "window 0": ({"sliding_window": 0}, ("sliding_window",)),
    "window negative": ({"sliding_window": -128}, ("sliding_window",)),
    "window text": ({"sliding_window": "128"}, ("sliding_window",)),
    "window a fraction": ({"sliding_window": 128.5}, ("sliding_window",)),
    "no window": ({"sliding_window": None}, ("sliding_window",)),
    "layer types short": ({"layer_types": ["full_attention"]}, ("layer_types", "1", "3")),
    "layer types unknown": (
        {"layer_types": ["sliding_attention", "chunked_attention", "full_attention"]},
        ("chunked_attention",),
    ),
    "layer types no list": ({"layer_types": "sliding_attention"}, ("layer_types",)),
    "odd head": ({"head_dim": 15}, ("head_dim", "15")),
    "D no multiple of 32": ({"hidden_size": 80}, ("80", "32")),
    "F no multiple of 32": ({"intermediate_size": 72}, ("72", "32")),
    "heads that cannot share": ({"num_key_value_heads": 3}, ("10", "3")),
    "more experts a token than there are": ({"num_experts_per_tok": 7}, ("7", "6")),
    "no experts": ({"num_local_experts": 0}, ("num_local_experts",)),
    "no layers": ({"num_hidden_layers": 0}, ("num_hidden_layers",)),
    "size a flag": ({"hidden_size": True}, ("hidden_size",)),
    "size too large": ({"vocab_size": 1 << 60}, ("vocab_size",)),
    "missing width": ({"hidden_size": None}, ("hidden_size",)),
    "missing experts": ({"num_local_experts": None}, ("num_local_experts",)),
    "another activation": ({"hidden_act": "gelu"}, ("hidden_act", "gelu")),
    "limit 0": ({"swiglu_limit": 0}, ("swiglu_limit",)),
    "epsilon negative": ({"rms_norm_eps": -1e-5}, ("rms_norm_eps",)),
    "flag text": ({"attention_bias": "true"}, ("attention_bias",)),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs_are_refused(case):
    changes, parts = BAD_CONFIGS[case]
    raw = {**gpt_oss_random.CONFIG, "quantization_config": gpt_oss_random.QUANTIZATION, **changes}
    with pytest.raises(ConfigError) as caught:
        config_from_json(json.loads(json.dumps(raw)))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1.0},
        {"rope_scaling": {**YARN, "factor": 0.5}},
        {"rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 32.0}},
    ],
    ids=["theta 1", "factor below 1", "betas the other way round"],
)
def test_rotary_settings_without_a_meaning_are_refused(rope):
    """The ramp between the two betas would be a division by zero, or run backwards."""
    with pytest.raises(ConfigError):
        config_from_json({**gpt_oss_random.CONFIG, **rope})


def test_all_faults_are_reported_together():
    raw = {**gpt_oss_random.CONFIG, "head_dim": 15, "sliding_window": 0, "qk_norm": True}
    with pytest.raises(ConfigError) as caught:
        config_from_json(raw)
    for part in ("head_dim", "sliding_window", "qk_norm"):
        assert part in str(caught.value)


def test_widths_of_dequantised_experts_are_free():
    config = config_from_json({**gpt_oss_random.CONFIG, "hidden_size": 80, "intermediate_size": 72})
    assert (config.width, config.mlp_width) == (80, 72)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"rope_scaling": YARN}, "rope_scaling"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"head_dim": 15}, "head_dim"),
        ({"hidden_size": 80}, "80"),
        ({"intermediate_size": 72}, "72"),
        ({"experts_per_token": 7}, "7"),
        ({"num_key_value_heads": None}, "num_key_value_heads"),
    ],
    ids=str,
)
def test_bad_original_configs_are_refused(changes, part):
    with pytest.raises(ConfigError, match=part):
        config_from_json({**ORIGINAL, **changes})


@pytest.mark.parametrize("key", ["num_experts", "experts_per_token", "initial_context_length", "rope_scaling_factor"])
def test_a_config_that_is_neither_is_refused(key):
    """OpenAI's own has no model type, and is recognised by all of these keys."""
    with pytest.raises(ConfigError, match="model_type"):
        config_from_json({name: value for name, value in ORIGINAL.items() if name != key})
