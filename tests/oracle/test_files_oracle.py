"""Configuration and tokenizer files compared with transformers: keys that it reads or ignores, and ids of texts."""

import json
import random
from typing import Any

import pytest

from gptjax.config import GenerationDefaults, config_from_json, generation_defaults, read_generation_config
from gptjax.config.rope import Yarn
from gptjax.text import load_tokenizer
from tests.oracles.older_tokenizer import ADDED, DIALOGUE, NAMED, SPEAKERS, old_layout

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

GPT2 = dict(model_type="gpt2", vocab_size=101, n_positions=37, n_embd=60, n_head=5, n_layer=3)
YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_ctx": 20},
        {"hidden_size": 60, "num_attention_heads": 5},
        {"max_position_embeddings": 37, "n_ctx": 1},
        {"n_inner": 52, "intermediate_size": 53},
        {"max_seq_len_cached": None, "unsloth_fixed": True},
        {"eos_token_id": 50256, "bos_token_id": 50256},
        {"do_sample": True, "max_length": 50, "temperature": 0.5},
    ],
)
def test_gpt2_configs(changes):
    theirs = transformers.GPT2Config.from_dict(GPT2 | changes)
    ours = config_from_json(GPT2 | changes)
    assert ours.context_length == theirs.n_positions
    assert (ours.width, ours.num_heads, ours.num_layers) == (theirs.n_embd, theirs.n_head, theirs.n_layer)
    assert ours.mlp_width == (theirs.n_inner or 4 * theirs.n_embd)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": YARN},
        {"rope_scaling": YARN, "initial_context_length": 16},
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 8}, "initial_context_length": 16},
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 8}, "experts_per_token": 3},
        {"rope_scaling": None},
    ],
)
def test_gpt_oss_configs(changes):
    sizes = transformers.GptOssConfig().to_dict() | {"max_position_embeddings": 64}
    raw: dict[str, Any] = {
        key: value for key, value in sizes.items() if key not in ("rope_parameters", "sliding_window")
    }
    theirs = transformers.GptOssConfig.from_dict(json.loads(json.dumps(raw | changes)))
    ours = config_from_json(raw | changes)
    yarn = ours.rope.scaling
    assert isinstance(yarn, Yarn) and yarn.original_length == theirs.rope_parameters["original_max_position_embeddings"]
    assert yarn.factor == theirs.rope_parameters["factor"]
    assert ours.experts_per_token == theirs.num_experts_per_tok
    assert {window for window in ours.windows if window} == {theirs.sliding_window}


def test_the_defaults_of_a_generation_config_are_neutral(tmp_path):
    """Written out, as `GenerationConfig().to_dict()` has them and as version 4 filled them in."""
    for raw in (
        transformers.GenerationConfig().to_dict(),
        transformers.GenerationConfig._get_default_generation_params(),
    ):
        (tmp_path / "generation_config.json").write_text(json.dumps(raw))
        defaults = generation_defaults(read_generation_config(tmp_path), tmp_path)
        defaults.check()
        assert defaults == GenerationDefaults()


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": ADDED, "special_tokens_map": NAMED | SPEAKERS},
        {"added_tokens": ADDED},
        {"special_tokens_map": NAMED | SPEAKERS},
        {"added_tokens": ADDED, "tokenizer_config": NAMED | SPEAKERS},
        {"added_tokens": ADDED, "special_tokens_map": {"eos_token": {"content": "<eos>", "lstrip": True}}},
        {"special_tokens_map": {"eos_token": {"content": "<eos>", "lstrip": True}}},
        {"special_tokens_map": {"eos_token": "Hello"}},
        {"special_tokens_map": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<pad>"}},
        {"tokenizer_config": {"add_bos_token": True, "add_eos_token": True}},
        {
            "tokenizer_config": {
                "added_tokens_decoder": {"50257": {"content": "<bos>", "special": True, "rstrip": True}}
            }
        },
    ],
)
def test_tokenizers_of_the_older_layout(tmp_path, files):
    theirs = transformers.GPT2Tokenizer.from_pretrained(old_layout(tmp_path, **files))
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
    pick = random.Random(1)
    parts = [*ADDED, "<|endoftext|>", " ", "\n", "Hi", "Hello", "\x1c", "é", "1"]
    for text in [DIALOGUE, *("".join(pick.choices(parts, k=8)) for _ in range(50))]:
        assert ours.encode(text, special=True) == theirs(text, add_special_tokens=False).input_ids
        if not text.startswith("<|endoftext|>") and not text.endswith("<|endoftext|>"):
            assert ours.prompt(text, special=True) == theirs(text).input_ids
