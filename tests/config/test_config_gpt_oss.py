"""Reading GPT-OSS's `config.json` in both spellings, and what is refused. The sizes themselves: tests/convert."""

import dataclasses
import json
import shutil
from typing import Any

import pytest

import gptjax
from gptjax.config import PUBLISHED, config_from_json
from gptjax.config.keys import without
from gptjax.config.rope import Rope
from gptjax.diagnostics.info import describe
from gptjax.errors import ConfigError
from tests.oracles import gpt_oss_random

ORIGINAL = gpt_oss_random.original_config(gpt_oss_random.CONFIG)


@pytest.mark.parametrize(
    ("name", "mxfp4"),
    [
        (name, mxfp4)
        for name in PUBLISHED
        for mxfp4 in ("none", "experts", "linear", "all")
        if (name[:4], mxfp4) != ("gpt2", "experts")  # it has none
    ],
)
def test_what_is_written_is_read_as_the_same(name, mxfp4):
    config = dataclasses.replace(PUBLISHED[name], mxfp4=mxfp4)
    assert config_from_json(json.loads(json.dumps(config.to_json()))) == config


def test_an_empty_rope_parameters_is_no_yarn():
    """As transformers 5 reads it; absent, it is the published models' YaRN."""
    raw = {key: value for key, value in gpt_oss_random.CONFIG.items() if key != "rope_scaling"}
    assert config_from_json(raw | {"rope_parameters": {}}).rope == Rope(150000.0)
    assert config_from_json(raw).rope.yarn is not None


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
        found = config_from_json(raw | more).rope.yarn
        assert found is not None and found.original_length == raw["max_position_embeddings"]


def test_a_key_inside_another_can_be_ignored():
    raw = gpt_oss_random.CONFIG | {"rope_scaling": {**gpt_oss_random.CONFIG["rope_scaling"], "mscale": 1.0}}
    with pytest.raises(ConfigError, match=r"--ignore-config rope_scaling\.mscale"):
        config_from_json(raw)
    assert config_from_json(without(raw, ["rope_scaling.mscale"])) == config_from_json(gpt_oss_random.CONFIG)


def test_gpt2_has_no_experts_to_be_packed():
    raw = PUBLISHED["gpt2"].to_json() | {"quantization_config": {"quant_method": "mxfp4"}}
    with pytest.raises(ConfigError, match="targets is missing"):
        config_from_json(raw)


def test_an_end_of_text_that_the_model_does_not_have_ends_nothing(tmp_path, demo):
    """As every GPT-2 has that was trained from scratch with transformers' default ids and a small vocabulary."""
    shutil.copytree(demo, tmp_path / "demo")
    (tmp_path / "demo" / "generation_config.json").write_text('{"eos_token_id": [99999999, 8191]}')
    with gptjax.load(tmp_path / "demo") as lm:
        assert lm.eos_ids == (8191,)
        assert len(lm.generate([5], max_tokens=2).token_ids) == 2
    assert "the model has no token 99999999" in describe(tmp_path / "demo")["generation"]
