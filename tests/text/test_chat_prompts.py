"""How prompts begin, and what they keep of earlier turns, format by format."""

import pytest

from gptjax.text import Tokenizer, load_tokenizer, tokenizer_from_gguf
from gptjax.text.chat_formats import FORMATS, ChatOptions, choose_format
from tests.text.chat_material import BEGIN_THE_THOUGHT, SPECIAL, chat_tokenizer, prompt, template
from tests.text.family_material import gguf_metadata
from tests.text.text_material import demo_json, with_added, write_json

USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return chat_tokenizer(tmp_path_factory.mktemp("chat"))


OWN_BOS = {
    **dict.fromkeys(["llama-2", "mistral-v0.1", "mistral-v0.2"], "<s>"),
    **dict.fromkeys(["llama-3", "llama-3.1", "llama-3.2"], "<|begin_of_text|>"),
    **dict.fromkeys(["deepseek-r1", "deepseek-r1-thinking", "deepseek-r1-0528"], "<｜begin▁of▁sentence｜>"),
}


@pytest.mark.parametrize("adds", ["<s>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", None])
def test_there_is_one_bos_if_the_format_or_the_tokenizer_has_one(tmp_path, adds):
    """llama.cpp does so, too."""
    file = with_added(demo_json(), SPECIAL)
    ids = {token["content"]: token["id"] for token in file["added_tokens"]}
    if adds:
        special = {adds: {"id": adds, "ids": [ids[adds]], "tokens": [adds]}}
        single = [{"SpecialToken": {"id": adds, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        file["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": special,
        }
    write_json(tmp_path, "tokenizer.json", file)
    write_json(tmp_path, "tokenizer_config.json", {"bos_token": adds} if adds else {})
    tokenizer = load_tokenizer(tmp_path)
    for name in sorted(set(FORMATS) - {"harmony"}):
        bos = OWN_BOS.get(name, adds)
        if adds in (None, bos):  # no tokenizer of the format adds another one
            ids = FORMATS[name].render([USER], tokenizer, ChatOptions(), max_length=500)
            marks = [tokenizer.decode([token], special=True) for token in ids]
            assert sum(mark in ("<s>", *OWN_BOS.values()) for mark in marks) == (bos is not None)
            assert bos is None or marks[0] == bos


def test_a_template_with_the_tokenizers_bos_has_it_even_where_texts_do_not(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, bos_token="<s>")
    start = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt(tokenizer, "chatml", [USER]) == start
    assert prompt(tokenizer, "hermes-2", [USER]) == f"<s>{start}"
    assert prompt(tokenizer, "hermes-3", [USER]) == (
        f"<s><|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{start}"
    )


def test_earlier_turns_lose_their_reasoning(tokenizer):
    said = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes.", "reasoning_content": "Hm."}
    for name in ("deepseek-r1", "deepseek-r1-thinking", "deepseek-r1-0528", "qwq", "qwq-first"):
        text = prompt(tokenizer, name, [USER, said, USER])
        assert ("Hm." in text, "Yes." in text) == (False, True)
        assert text.endswith("<think>\n") == (name in BEGIN_THE_THOUGHT)
    assert "Hm." in prompt(tokenizer, "qwq", [USER, said])
    assert "Hm." not in prompt(tokenizer, "qwq-first", [USER, said])


def test_system_messages_of_deepseek_come_first(tokenizer):
    system = [{"role": "system", "content": text} for text in ("Be brief.", "Be kind.")]
    messages = [system[0], USER, {"role": "assistant", "content": "Yes."}, system[1], USER]
    begin, user, assistant, end = SPECIAL[-4:]
    for name, ending in (("deepseek-r1", ""), ("deepseek-r1-thinking", "<think>\n")):
        assert prompt(tokenizer, name, messages) == (
            f"{begin}Be kind.{user}Hi{assistant}Yes.{end}{user}Hi{assistant}{ending}"
        )
    later = prompt(tokenizer, "deepseek-r1-0528", messages)
    assert later == f"{begin}Be brief.\n\nBe kind.{user}Hi{assistant}Yes.{end}{user}Hi{assistant}"


def test_a_template_is_recognised_in_a_gguf_file():
    file = with_added(demo_json(), SPECIAL)
    metadata = gguf_metadata(file, "deepseek-r1-qwen")
    bos = metadata["tokenizer.ggml.tokens"].index("<｜begin▁of▁sentence｜>")
    more = {"bos_token_id": bos, "add_bos_token": True}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    tokenizer = tokenizer_from_gguf(metadata | {"tokenizer.chat_template": template("deepseek-r1-thinking")})
    assert choose_format(tokenizer).name == "deepseek-r1-thinking"
    text = "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>\n"
    assert prompt(tokenizer, "deepseek-r1-thinking", [USER]) == text
    assert prompt(tokenizer, "hermes-2", [USER]).count("<｜begin▁of▁sentence｜>") == 1
