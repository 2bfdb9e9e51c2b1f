"""`generation_config.json`: what is read, what changes nothing, and what is refused when it would count."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gptjax.config import GenerationDefaults, generation_defaults, overridden, read_generation_config
from gptjax.errors import ConfigError, GptjaxError, RequestError

GREEDY = GenerationDefaults()
SAMPLED = GenerationDefaults(temperature=1.0)


def defaults_in(directory: Path, override: Mapping[str, Any] | bool | None = None) -> GenerationDefaults:
    return generation_defaults(overridden(read_generation_config(directory), override), directory)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (None, None, GREEDY),
        ({}, None, GREEDY),
        ({"eos_token_id": 7}, None, dataclasses.replace(GREEDY, eos_ids=(7,))),
        ({"eos_token_id": 7}, {}, dataclasses.replace(GREEDY, eos_ids=(7,))),
        ({"eos_token_id": 7}, {"eos_token_id": [5, 0]}, dataclasses.replace(GREEDY, eos_ids=(5, 0))),
        (None, {"eos_token_id": 0}, dataclasses.replace(GREEDY, eos_ids=(0,))),
        ({"temperature": 0.5, "do_sample": True}, None, GREEDY),
        (None, {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1}, GREEDY),
        (None, {"do_sample": False, "temperature": 0.5}, GREEDY),
        (None, {"do_sample": True}, SAMPLED),
        (None, {"do_sample": True, "top_k": 0, "min_p": 0.0, "top_p": None}, SAMPLED),
        (
            None,
            {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 2},
            GenerationDefaults(temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=2.0),
        ),
        (None, {"max_length": 50, "transformers_version": "5", "pad_token_id": 1, "num_beams": 1}, GREEDY),
        ({"eos_token_id": 7}, {"eos_token_id": None}, dataclasses.replace(GREEDY, eos_ids=(7,))),
    ],
)
def test_generation_defaults(tmp_path, config, generation, expected):
    for name, raw in {"config.json": config, "generation_config.json": generation}.items():
        if raw is not None:
            (tmp_path / name).write_text(json.dumps(raw), encoding="utf-8")
    assert defaults_in(tmp_path) == expected


# Settings of `transformers.GenerationConfig` (5.23) and of files on the Hub that change nothing here.
NEUTRAL: list[dict[str, Any]] = [
    {"do_sample": False, "temperature": 0.0},
    {"do_sample": False, "top_p": 0.0, "top_k": 50, "typical_p": 0.5, "min_p": 0.1, "epsilon_cutoff": 0.1},
    {"temperature": 0.0, "top_p": 0, "top_k": None},
    {"do_sample": None},
    {"suppress_tokens": [], "begin_suppress_tokens": [], "bad_words_ids": [], "sequence_bias": {}, "stop_strings": []},
    {"suppress_tokens": None, "bad_words_ids": None, "forced_eos_token_id": None, "watermarking_config": None},
    {"num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0, "length_penalty": 2.0, "early_stopping": True},
    {"num_return_sequences": 1, "guidance_scale": 1.0, "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0},
    {"min_length": 0, "min_new_tokens": 0, "penalty_alpha": 0.0, "token_healing": False, "low_memory": True},
    {"renormalize_logits": True, "remove_invalid_values": True, "max_length": 20, "max_new_tokens": 5},
    {
        "use_cache": True,
        "cache_implementation": "static",
        "compile_config": {"mode": "x"},
        "prompt_lookup_num_tokens": 3,
    },
    {"assistant_early_exit": None, "num_assistant_tokens": 20, "return_dict_in_generate": True, "output_scores": True},
    {"_from_model_config": True, "transformers_version": "4.46.0", "pad_token_id": 0, "bos_token_id": 0},
    {"repetition_penalty": 1.0, "generation_kwargs": {}, "trust_remote_code": False},
]


@pytest.mark.parametrize("raw", NEUTRAL)
def test_neutral_values_are_neutral_in_every_spelling(tmp_path, raw):
    (tmp_path / "generation_config.json").write_text(json.dumps(raw), encoding="utf-8")
    defaults = defaults_in(tmp_path)
    defaults.check()
    assert defaults == GREEDY


DRAWN_NEUTRAL: list[dict[str, Any]] = [
    {"top_k": 0, "top_p": 1, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0, "min_p": 0, "top_h": None},
    {"temperature": 1, "top_p": None, "penalty_alpha": None},
    {"top_k": -1, "top_h": 0},
    {"top_k": 0.0},
]


@pytest.mark.parametrize("raw", DRAWN_NEUTRAL)
def test_neutral_values_where_tokens_are_drawn(tmp_path, raw):
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, **raw}), encoding="utf-8")
    defaults = defaults_in(tmp_path)
    defaults.check()
    assert defaults == SAMPLED


def test_an_end_in_config_json_that_is_no_token_is_said_of_that_file(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": "</s>"}')
    defaults = defaults_in(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json's eos_token_id is '</s>'"):
        defaults.check()
    assert defaults_in(tmp_path, {"eos_token_id": 3}) == GenerationDefaults(eos_ids=(3,))


def test_a_top_p_of_0_is_greedy(tmp_path):
    """transformers keeps the one most likely token."""
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "top_p": 0.0, "temperature": 0.5}')
    assert defaults_in(tmp_path) == GREEDY


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"eos_token_id": [1, None]}, "eos_token_id is [1, None]"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eos_token_id": True}, "eos_token_id is True"),
        ({"something_new": 1}, "something_new"),
        ({"num_beams": 4, "suppress_tokens": [5]}, "num_beams, suppress_tokens"),
        ({"num_beams": 5}, "num_beams"),
        ({"forced_eos_token_id": 0}, "forced_eos_token_id"),
        ({"guidance_scale": 0}, "guidance_scale"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5"),
        ({"do_sample": True, "temperature": 0}, "temperature is 0"),
        ({"do_sample": True, "temperature": 1e9}, "temperature is 1000000000.0"),
        ({"do_sample": True, "top_k": 1.5}, "top_k is 1.5"),
        ({"do_sample": True, "typical_p": 0.9}, "typical_p"),
        ({"do_sample": True, "top_h": 0.4}, "top_h"),
        ({"do_sample": "yes"}, "do_sample is 'yes'"),
        ({"repetition_penalty": -1}, "repetition_penalty is -1"),
        ({"repetition_penalty": 1e-38}, "repetition_penalty is 1e-38"),
        ({"repetition_penalty": True}, "repetition_penalty is True"),
        ({"\x1b[2J" * 10**5: 1}, "x1b[2J"),
    ],
)
def test_generation_defaults_that_cannot_be_used(tmp_path, raw, message):
    """They are read, so that a model can be loaded, and refused when something is to be generated."""
    (tmp_path / "generation_config.json").write_text(json.dumps(raw), encoding="utf-8")
    defaults = defaults_in(tmp_path)
    with pytest.raises(ConfigError) as caught:
        defaults.check()
    text = str(caught.value)
    assert message in text and "generation_config.json" in text and "--no-generation-config" in text
    assert "\x1b" not in text and len(text) < 1000
    assert isinstance(caught.value, GptjaxError)


def test_what_a_caller_gives_or_does_not_need_is_not_refused(tmp_path):
    raw = {"do_sample": True, "top_p": 1.5, "typical_p": 0.5}
    (tmp_path / "generation_config.json").write_text(json.dumps(raw), encoding="utf-8")
    defaults = defaults_in(tmp_path)
    defaults.check(draws=False)
    defaults.check(["top_p", "typical_p"])
    with pytest.raises(ConfigError, match="typical_p") as caught:
        defaults.check(["top_p"])
    assert "top_p is" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (None, GenerationDefaults(eos_ids=(5, 6), repetition_penalty=2.0)),
        (False, GenerationDefaults(eos_ids=(5, 6))),
        ({}, GenerationDefaults(eos_ids=(5, 6))),
        ({"do_sample": True, "top_k": 3}, GenerationDefaults(eos_ids=(5, 6), temperature=1.0, top_k=3)),
        ({"eos_token_id": 9}, GenerationDefaults(eos_ids=(9,))),
    ],
)
def test_other_settings_in_place_of_the_files(tmp_path, override, expected):
    raw = {"eos_token_id": [5, 6], "num_beams": 3, "repetition_penalty": 2.0}
    (tmp_path / "generation_config.json").write_text(json.dumps(raw), encoding="utf-8")
    found = defaults_in(tmp_path, override)
    assert dataclasses.replace(found, faults=()) == expected
    assert bool(found.faults) == (override is None)


@pytest.mark.parametrize("override", [True, "no", 1, ["temperature"]])
def test_overrides_that_are_none(tmp_path, override):
    with pytest.raises(RequestError, match="generation_config must be a dict"):
        defaults_in(tmp_path, override)
