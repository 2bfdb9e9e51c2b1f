"""`lm.chat` with a model that speaks ChatML, and the format that `load` is given."""

import dataclasses

import pytest

import gptjax
from gptjax import RequestError
from gptjax.config import GenerationDefaults, GPT2Config
from gptjax.diagnostics.info import describe
from gptjax.models import registry
from gptjax.models.params import random_params
from gptjax.text.chat_formats import FORMATS, ChatOptions
from tests.text.chat_material import chat_tokenizer, template

ASK = [{"role": "user", "content": "Well?"}]
CONFIG = GPT2Config(
    vocab_size=8211,
    context_length=160,
    width=12,
    num_layers=1,
    num_heads=3,
    mlp_width=20,
    activation="gelu_tanh",
    norm_epsilon=1e-5,
    scale_attention=True,
    scale_attention_by_layer=False,
    tied_head=True,
)


def test_a_model_answers_in_its_own_format(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, chat_template=template("qwen3"))
    assert tokenizer.vocab_size == CONFIG.vocab_size
    model = registry.build(CONFIG, dtype="float32")
    end = tokenizer.special_ids["<|im_end|>"]
    lm = gptjax.LanguageModel(
        model, random_params(model), tokenizer=tokenizer, defaults=GenerationDefaults(), max_length=128
    )
    assert lm.chat_format.name == "qwen3"
    # A bias as large as this leaves one choice.
    turn = lm.chat(ASK, enable_thinking=False, max_tokens=5, logit_bias={end: 100.0}, seed=1)
    assert (turn.finish_reason, turn.text, turn.completion.token_ids) == ("stop", "", (end,))
    prompt = FORMATS["qwen3"].render(ASK, tokenizer, ChatOptions(enable_thinking=False), max_length=128)
    assert turn.completion.usage.prompt_tokens == len(prompt)
    chunks = list(lm.stream_chat(ASK, max_tokens=5, logit_bias={end: -100.0}, seed=2))
    assert chunks[-1].completion.finish_reason == "length"
    assert "".join(chunk.text for chunk in chunks) == chunks[-1].completion.text
    with pytest.raises(RequestError, match="reasoning_effort has no meaning in the chat format qwen3"):
        lm.chat(ASK, reasoning_effort="low")
    with pytest.raises(RequestError, match="enable_thinking is 'no'; expected True or False"):
        lm.chat(ASK, enable_thinking="no")
    other = gptjax.LanguageModel(
        model,
        lm.params,
        tokenizer=tokenizer,
        defaults=GenerationDefaults(),
        max_length=128,
        chat_format="chatml",
    )
    assert other.chat_format.name == "chatml"


def test_a_wrong_format_is_refused_before_the_weights_are_read(monkeypatch):
    monkeypatch.setattr("gptjax.api.load_params", lambda *_: pytest.fail("they were read"))
    with pytest.raises(RequestError, match="unknown chat format 'alpaca'; choose one of harmony, chatml"):
        gptjax.load("gpt2-tales", chat_format="alpaca")
    with pytest.raises(RequestError, match="lacks special tokens of the chat format chatml"):
        gptjax.load("gpt2-tales", chat_format="chatml")


def test_info_says_the_format():
    assert describe("gpt-oss-tales")["chat_format"] == "harmony"
    assert describe("gpt2-tales")["chat_format"].startswith("none: this model has no chat format")


def test_the_options_of_a_turn_are_those_of_the_interface():
    of_all = {"parallel_tool_calls"}  # which only readers look at
    assert {field.name for field in dataclasses.fields(ChatOptions)} - of_all == set().union(
        *(known.options for known in FORMATS.values())
    )
