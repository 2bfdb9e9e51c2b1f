"""Reading the `config.json` of Llama and its relatives: the published files, every key, and what is refused.

What absent keys mean, against transformers' own classes: `tests/oracle/test_llama_transformers.py`.
"""

import dataclasses
import json
import random
from typing import Any

import pytest

from gptjax.config import MODEL_TYPES, PUBLISHED, LlamaConfig, config_from_json
from gptjax.config.rope import Factors, Linear, Llama3, Rope, Yarn
from gptjax.errors import ConfigError
from tests.fuzz import rounds
from tests.oracles import llama_random
from tests.oracles.llama_random import CONFIG, LLAMA3, LONGROPE, VARIANTS, YARN

_COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0",
    "use_cache": True,
}
_LLAMA: dict[str, Any] = {
    **_COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
}
_LLAMA_31: dict[str, Any] = {
    **_LLAMA,
    "attention_bias": False,
    "eos_token_id": [128001, 128008, 128009],
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
_LLAMA_31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_QWEN: dict[str, Any] = {
    **_COMMON,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# The files as they are on the Hub.
HUB: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        **_LLAMA,
        "_name_or_path": "meta-llama/Llama-2-7b-hf",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_length": 4096,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pad_token_id": 0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "llama-3.1-8b": {
        **_LLAMA_31,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "rope_scaling": _LLAMA_31_ROPE,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        **_LLAMA_31,
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "rope_scaling": {**_LLAMA_31_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        **_LLAMA,
        "attention_bias": False,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "vocab_size": 49152,
    },
    "mistral-7b": {
        **_COMMON,
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen2.5-0.5b": {
        **_QWEN,
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
    },
    "qwen2.5-7b": {
        **_QWEN,
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
    "qwen3-0.6b": {
        **_QWEN,
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
}


def _read(**changes: Any) -> LlamaConfig:
    """The config of tiny models with changes, as read from JSON. A key changed to ... is absent."""
    raw = {key: value for key, value in {**CONFIG, **changes}.items() if value is not ...}
    config = config_from_json(json.loads(json.dumps(raw)))
    assert isinstance(config, LlamaConfig)
    return config


@pytest.mark.parametrize("name", HUB)
def test_published_files_are_the_published_configs(name):
    assert config_from_json(HUB[name]) == PUBLISHED[name]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_what_is_written_is_read_as_the_same(changes):
    config = _read(**changes)
    assert config_from_json(json.loads(json.dumps(config.to_json()))) == config
    packed = dataclasses.replace(config, width=128, mlp_width=64, num_heads=12, head_width=16, mxfp4="all")
    assert config_from_json(packed.to_json()) == packed


def test_absent_keys_mean_what_transformers_says():
    config = _read(rms_norm_eps=..., rope_theta=..., tie_word_embeddings=...)
    assert (config.norm_epsilon, config.rope, config.tied_head) == (1e-6, Rope(10000.0), False)
    assert not (config.qkv_bias or config.out_bias or config.mlp_bias or config.qk_norm)
    assert config.head_width == 96 // 6
    assert _read(model_type="qwen3").head_width == 128
    assert _read(model_type="mistral").windows == (4096, 4096)
    assert _read(num_key_value_heads=...).num_kv_heads == 6
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        assert _read(model_type=family, num_key_value_heads=None, head_dim=None).num_kv_heads == 6


@pytest.mark.parametrize(
    ("family", "flags"),
    {
        "llama": (True, True, False),
        "qwen2": (True, False, False),
        "qwen3": (True, True, True),
    }.items(),
)
def test_biases_and_norms_of_the_families(family, flags):
    changes = {} if family == "qwen2" else {"attention_bias": True}
    config = _read(model_type=family, **changes)
    assert (config.qkv_bias, config.out_bias, config.qk_norm) == flags


_USED: dict[str, Any] = {"model_type": "qwen2", "num_hidden_layers": 3, "use_sliding_window": True}


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({**_USED, "sliding_window": 9, "max_window_layers": 1}, (None, 9, 9)),
        ({**_USED, "sliding_window": 9, "max_window_layers": 0}, (9, 9, 9)),
        ({**_USED, "sliding_window": 9}, (None, None, None)),  # of 28 layers, none would slide
        ({**_USED, "max_window_layers": 2}, (None, None, 4096)),
        ({**_USED, "sliding_window": None, "max_window_layers": 0}, (None, None, None)),
        ({**_USED, "sliding_window": 9, "max_window_layers": 0, "use_sliding_window": False}, (None, None, None)),
        (
            {**_USED, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
            (9, None, None),
        ),
        ({"model_type": "llama", "layer_types": ["full_attention"] * 2}, (None, None)),
        ({"model_type": "mistral", "sliding_window": 9, "layer_types": ["sliding_attention"] * 2}, (9, 9)),
        ({"model_type": "mistral", "sliding_window": None}, (None, None)),
    ],
)
def test_windows(changes, windows):
    assert _read(**changes).windows == windows


@pytest.mark.parametrize(
    ("section", "scaling"),
    [
        ({"rope_type": "default"}, None),
        ({"type": "linear", "factor": 4}, Linear(4.0)),
        (LLAMA3, Llama3(8.0, 64, 1.0, 4.0)),
        ({key: value for key, value in LLAMA3.items() if key[:8] != "original"}, Llama3(8.0, 512, 1.0, 4.0)),
        (YARN, Yarn(4.0, 64, 32.0, 1.0, truncate=True)),
        (LONGROPE, Factors(tuple(llama_random.FACTORS))),
        ({**LONGROPE, "factor": 8.0}, Factors(tuple(llama_random.FACTORS))),  # attention_factor outranks it
    ],
)
def test_rotations_in_both_spellings(section, scaling):
    expected = Rope(5e5, scaling)
    assert _read(rope_theta=5e5, rope_scaling=section).rope == expected
    assert _read(rope_theta=..., rope_parameters={**section, "rope_theta": 5e5}).rope == expected


BAD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown key": ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "--ignore-config")),
    "a key of another family": ({"sliding_window": 9}, ("sliding_window",)),
    "mlp_bias of Qwen": ({"model_type": "qwen2", "mlp_bias": True}, ("mlp_bias",)),
    "experts": ({"num_local_experts": 8}, ("num_local_experts is 8", "Llama models without experts")),
    "experts of Qwen": ({"model_type": "qwen3", "num_experts": 8}, ("num_experts is 8", "without experts")),
    "interleaved rotation": ({"rope_interleaved": True}, ("rope_interleaved",)),
    "rotation by several positions": ({"model_type": "qwen2", "use_mrope": True}, ("use_mrope",)),
    "another activation": ({"hidden_act": "gelu"}, ("hidden_act", "gelu", "silu")),
    "no head_dim": ({"hidden_size": 100}, ("100", "6", "head_dim")),
    "odd head": ({"head_dim": 15}, ("head_dim", "15")),
    "heads that cannot share": ({"num_key_value_heads": 4}, ("6", "4")),
    "no key/value heads": ({"model_type": "qwen2", "num_key_value_heads": ...}, ("num_key_value_heads is missing",)),
    "no width": ({"hidden_size": None}, ("hidden_size is missing",)),
    "no heads": ({"num_attention_heads": 0}, ("num_attention_heads is 0",)),
    "dynamic NTK": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        ("'dynamic'", "default, linear, llama3, longrope, yarn"),
    ),
    "linear without a factor": ({"rope_scaling": {"type": "linear"}}, ("factor is missing",)),
    "llama3 upside down": ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, ("low_freq_factor", "4.0")),
    "factor below 1": ({"rope_scaling": {**LLAMA3, "factor": 0.5}}, ("factor is 0.5",)),
    "factors of a longer head": ({"rope_scaling": LONGROPE, "head_dim": 20}, ("8 rotary factors", "10")),
    "factors that depend on the length": (
        {"rope_scaling": {**LONGROPE, "short_factor": [1.0] * 8}},
        ("short_factor", "long_factor"),
    ),
    "factors of 0": ({"rope_scaling": {**LONGROPE, "short_factor": [0] * 8, "long_factor": [0] * 8}}, ("rotary",)),
    "factors of text": ({"rope_scaling": {**LONGROPE, "long_factor": ["1"] * 8}}, ("long_factor", "list of numbers")),
    "factors missing": ({"rope_scaling": {"type": "longrope", "attention_factor": 1}}, ("short_factor is missing",)),
    "factors that scale": ({"rope_scaling": {**LONGROPE, "attention_factor": 1.2}}, ("attention_factor is 1.2",)),
    "layers that slide without a window": (
        {"model_type": "qwen2", "layer_types": ["sliding_attention", "full_attention"]},
        ("layer_types", "use_sliding_window"),
    ),
    "a Llama that slides": ({"layer_types": ["sliding_attention"] * 2}, ("layer_types", "no window")),
    "a Mistral that does not": (
        {"model_type": "mistral", "sliding_window": 9, "layer_types": ["full_attention"] * 2},
        ("layer_types", "Mistral"),
    ),
    "layer types short": ({"model_type": "qwen2", "layer_types": ["full_attention"]}, ("layer_types", "1", "2")),
    "chunked layers": ({"layer_types": ["chunked_attention"] * 2}, ("chunked_attention",)),
    "window 0": ({**_USED, "sliding_window": 0}, ("sliding_window is 0",)),
    "window layers -1": ({**_USED, "max_window_layers": -1}, ("max_window_layers is -1", "from 0")),
    "another quantization": ({"quantization_config": {"quant_method": "gptq"}}, ("gptq", "mxfp4")),
    "a width that cannot be packed": (
        {"quantization_config": {"quant_method": "mxfp4", "targets": "linear"}},
        ("80", "multiple"),
    ),
    "packed experts": ({"quantization_config": {"quant_method": "mxfp4", "targets": "experts"}}, ("experts",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configs_are_refused(case):
    changes, parts = BAD[case]
    with pytest.raises(ConfigError) as caught:
        _read(**changes)
    for part in parts:
        assert part in str(caught.value)


def test_all_faults_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        _read(hidden_act="gelu", head_dim=15, num_experts=2, rope_scaling={"type": "dynamic"}, strange=1)
    for part in ("hidden_act", "head_dim", "num_experts", "dynamic", "strange", "for Llama"):
        assert part in str(caught.value)


@pytest.mark.parametrize("model_type", ["llama4", "qwen2_moe", "qwen3_moe", "mixtral", "gemma2", "phi3"])
def test_relatives_that_are_not_supported_are_refused_with_the_list_of_those_that_are(model_type):
    with pytest.raises(ConfigError, match=rf"{model_type}.*{', '.join(sorted(MODEL_TYPES))}"):
        config_from_json({**CONFIG, "model_type": model_type})


JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2, 15, 1 << 24, 1 << 70, -(1 << 2000), 1e308, 1e-320, 0.5, "", "silu", "\x1b[2J",
    [], [1], [None], ["sliding_attention"] * 2, ["full_attention"] * 2, [1.0] * 8, [1e-300] * 8, [1 << 3000] * 8,
    {}, {"a": 1}, {"rope_type": ["llama3"]}, {"type": "linear", "factor": 1e-9}, {"rope_type": "yarn", "factor": 1e300},
    LONGROPE, {"quant_method": "mxfp4", "targets": "all"},
]  # fmt: skip
MORE = (
    "layer_types use_sliding_window sliding_window head_dim attention_bias rope_parameters quantization_config".split()
)


@pytest.mark.fuzz
def test_whatever_is_in_a_config_it_is_read_or_refused():
    """And what is read is written as the same."""
    rng = random.Random(0)
    read = 0
    for _ in range(rounds(30_000)):
        raw: dict[str, Any] = {**CONFIG, **rng.choice(list(VARIANTS.values()))}
        for _ in range(rng.randint(1, 3)):
            inside = isinstance(raw.get("rope_scaling"), dict) and rng.random() < 0.4
            changed = dict(raw["rope_scaling"]) if inside else raw
            key = rng.choice([*changed, "rope_theta"] if inside else [*CONFIG, "rope_scaling", *MORE])
            if key != "model_type":
                changed[key] = rng.choice(JUNK)
            raw = {**raw, "rope_scaling": changed} if inside else changed
        try:
            config = config_from_json(raw)
        except ConfigError as error:
            assert len(str(error)) < 10_000 and "\x1b" not in str(error)
        else:
            read += 1
            assert config_from_json(json.loads(json.dumps(config.to_json()))) == config
    assert read
