"""Which chat format a tokenizer has, and what every format refuses."""

import copy
import datetime
import json
import random

import pytest

from gptjax.errors import CapacityError, RequestError
from gptjax.text import Tokenizer, load_tokenizer
from gptjax.text.chat_formats import FORMATS, ChatOptions, choose_format
from gptjax.text.chat_formats.known import TEMPLATES, fingerprint
from tests.fuzz import rounds
from tests.oracles.chat_cases import Cases
from tests.text.chat_material import SPECIAL, TEMPLATE_FILES, chat_tokenizer, prompt, template, tool
from tests.text.harmony_material import TALES

USER = {"role": "user", "content": "Hi"}
TEXT_FORMATS = sorted(set(FORMATS) - {"harmony"})
WITH_TOOLS = sorted(name for name in TEXT_FORMATS if "tools" in FORMATS[name].options)
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return chat_tokenizer(tmp_path_factory.mktemp("chat"))


# The choice


def having(tokenizer: Tokenizer, chat_template: str) -> Tokenizer:
    found = copy.copy(tokenizer)
    found.chat_template = chat_template
    return found


@pytest.mark.parametrize("file", sorted(TEMPLATE_FILES))
def test_a_published_template_is_recognised(tokenizer, file):
    text = template(file).removesuffix("\n")
    name = TEMPLATES[fingerprint(text)]
    assert file in (name, f"{name}-first", f"{name}-second")
    assert choose_format(having(tokenizer, text)) is choose_format(having(tokenizer, text + "\n")) is FORMATS[name]


def test_a_template_is_recognised_in_a_checkpoints_files(tmp_path):
    assert choose_format(chat_tokenizer(tmp_path, chat_template=template("qwen3"))).name == "qwen3"
    (tmp_path / "chat_template.jinja").write_text(template("llama-3.2"))
    assert choose_format(load_tokenizer(tmp_path)).name == "llama-3.2"


def test_another_template_is_refused_by_name_and_can_be_overridden(tokenizer):
    """Not even a space may differ."""
    other = having(tokenizer, template("chatml") + " ")
    digest = fingerprint(other.chat_template)
    with pytest.raises(
        RequestError, match=rf"does not know .* {digest[:12]}.*--chat-format.*chat_format=.*chatml, smollm2"
    ):
        choose_format(other)
    assert choose_format(other, "chatml") is FORMATS["chatml"]
    with pytest.raises(RequestError, match="unknown chat format 'alpaca'; choose one of harmony, chatml, "):
        choose_format(other, "alpaca")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("chatnl", "chatml"),
        ("ChatML", "chatml"),
        ("llama3", "llama-3"),
        ("Llama-3.1", "llama-3.1"),
        ("smollm", "smollm2"),
    ],
)
def test_a_chat_format_of_a_close_name_is_offered(tokenizer, name, near):
    with pytest.raises(RequestError, match=rf"unknown chat format '{name}' \(did you mean {near}\?\); choose one of "):
        choose_format(tokenizer, name)


def test_a_tokenizer_without_a_template_has_no_chat_format(tokenizer):
    with pytest.raises(
        RequestError, match=r"has no chat format: its tokenizer has no chat template.*name one with --chat-"
    ):
        choose_format(tokenizer)


def test_harmony_is_recognised_by_its_tokens():
    assert choose_format(having(TALES, "unknown")).name == "harmony"


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_needs_its_special_tokens(demo, name):
    with pytest.raises(RequestError, match=r"lacks .*special tokens"):
        choose_format(demo, name)
    with pytest.raises(RequestError, match=r"lacks .*special tokens"):
        FORMATS[name].render([USER], demo, ChatOptions(), max_length=100)


def test_stops_are_the_formats_own(tokenizer):
    def stops(name):
        return {tokenizer.decode([token], special=True) for token in FORMATS[name].stop_ids(tokenizer)}

    assert stops("qwen3") == {"<|im_end|>", "<|endoftext|>"}
    assert stops("llama-3.1") == {"<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"}
    assert stops("llama-2") == stops("zephyr") == {"</s>"}
    assert stops("deepseek-r1") == {"<｜end▁of▁sentence｜>"}


# Prompts


@pytest.mark.parametrize("name", TEXT_FORMATS)
def test_texts_never_become_special_tokens(tokenizer, name):
    """Neither in messages, nor in tools, names, arguments or results."""
    special = set(tokenizer.special_ids.values())
    counts = []
    for text in ("a", "".join([*SPECIAL, "<|endoftext|>"])):
        messages = [{"role": "user", "content": text}]
        tools = []
        if name in WITH_TOOLS:
            tools = [{"type": "function", "function": {"name": "f", "description": text, "parameters": {text: {}}}}]
            call = {**CALL, "function": {"name": "f", "arguments": json.dumps({text: text})}}
            result = {"role": "tool", "tool_call_id": "1", "content": text}
            messages += [{"role": "assistant", "reasoning_content": text, "tool_calls": [call]}, result]
        ids = FORMATS[name].render(messages, tokenizer, ChatOptions(tools=tools), max_length=10_000)
        counts.append([token for token in ids if token in special])
    assert counts[0] == counts[1]


def test_default_system_messages_are_the_templates(tokenizer):
    assert prompt(tokenizer, "smollm2", [USER]).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
    )
    assert prompt(tokenizer, "qwen2.5", [USER]).startswith(
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud."
    )
    own = prompt(tokenizer, "qwen2.5", [{"role": "developer", "content": "Be brief."}, USER])
    assert own == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt(tokenizer, "qwen3", [USER]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_dates(tokenizer):
    today = datetime.date.today()
    assert "Today Date: 26 Jul 2024\n" in prompt(tokenizer, "llama-3.1", [USER])
    assert f"Today Date: {today:%d} " in prompt(tokenizer, "llama-3.2", [USER])
    assert "Today Date: 05 Feb 2025\n" in prompt(tokenizer, "llama-3.1", [USER], current_date="2025-02-05")
    with pytest.raises(RequestError, match="expected a date like 2025-06-28"):
        prompt(tokenizer, "llama-3.1", [USER], current_date="tomorrow")
    with pytest.raises(RequestError, match="always has a date"):
        prompt(tokenizer, "llama-3.2", [USER], current_date=None)


def test_thinking_can_be_turned_off(tokenizer):
    end = "<|im_start|>assistant\n"
    assert prompt(tokenizer, "qwen3", [USER], enable_thinking=True).endswith(end)
    assert prompt(tokenizer, "qwen3", [USER], enable_thinking=False).endswith(f"{end}<think>\n\n</think>\n\n")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("tools", [tool("f")]),
        ("reasoning_effort", "low"),
        ("current_date", "2025-06-28"),
        ("current_date", "today"),
        ("enable_thinking", False),
    ],
)
def test_an_option_that_a_format_does_not_have_is_refused(tokenizer, name, option, value):
    known, options = FORMATS[name], ChatOptions(**{option: value})
    speaks = TALES if name == "harmony" else tokenizer
    if option in known.options:
        assert known.render([USER], speaks, options, max_length=999)
        return
    with pytest.raises(RequestError, match=f"{option} has no meaning in the chat format {name}"):
        known.render([USER], speaks, options, max_length=999)


# Bad input

ASSISTANT = {"role": "assistant", "content": "x"}


@pytest.mark.parametrize("name", TEXT_FORMATS)
@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "messages has no message: add one"),
        ("Hi", "messages is 'Hi'"),
        ([3], r"messages\[0\] is 3"),
        ([{"role": "king", "content": "x"}], r"messages\[0\] has the role 'king'"),
        ([{"role": "user"}], r"messages\[0\].content is missing"),
        ([USER, {"role": "assistant"}, USER], r"messages\[1\].content is missing"),
        ([USER, {"role": "assistant", "content": None}, USER], r"messages\[1\].content is missing"),
        ([{"role": "user", "content": "\ud800"}], r"messages\[0\].content has a lone surrogate"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            r"messages\[0\].content\[0\] is of the type 'image_url'",
        ),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], r"messages\[0\] (is about tools|has 'tool_calls')"),
        ([USER, {**ASSISTANT, "function_call": {"name": "f"}}], r"messages\[1\].function_call"),
    ],
)
def test_bad_messages_are_refused(tokenizer, name, messages, says):
    with pytest.raises(RequestError, match=says):
        prompt(tokenizer, name, messages)


@pytest.mark.parametrize("name", sorted(set(TEXT_FORMATS) - set(WITH_TOOLS)))
def test_a_format_without_tools_refuses_messages_about_them(tokenizer, name):
    for message in ({**ASSISTANT, "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "1", "content": "x"}):
        with pytest.raises(RequestError, match=rf"messages\[1\] is about tools, which the chat format {name} does not"):
            prompt(tokenizer, name, [USER, message, USER])


def nested(levels: int) -> dict:
    found: dict = {}
    for _ in range(levels):
        found = {"a": found}
    return found


@pytest.mark.parametrize("name", WITH_TOOLS)
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("{", "is '{'; expected a JSON object"),
        ("[]", "expected a JSON object"),
        ("NaN", "expected a JSON object"),
        ('{"a": 1e999}', "expected a JSON object"),
        ('{"a": "\\ud800"}', "expected a JSON object"),
        ('{"a": ' + "[" * 50_000, "expected a JSON object"),
        ({"a": 1}, "expected a string"),
    ],
)
def test_bad_arguments_are_refused(tokenizer, name, arguments, says):
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(
        RequestError, match=r"messages\[1\].tool_calls\[0\].function.arguments .*" + says.replace("[", r"\[")
    ):
        prompt(tokenizer, name, [USER, {"role": "assistant", "tool_calls": [call]}])


@pytest.mark.parametrize("name", WITH_TOOLS)
@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ("f", "tools is 'f'"),
        ([3], r"tools\[0\] is 3"),
        ([{"type": "browser"}], r"tools\[0\] has the type 'browser'; expected function"),
        ([{"type": "function"}], r"tools\[0\].function is missing"),
        ([tool("a b")], r"tools\[0\].function.name is 'a b'"),
        ([tool("f"), tool("f")], r"tools\[1\] is the second function f"),
        ([{"type": "function", "function": {"name": "f", "description": 3}}], r"tools\[0\].function.description is 3"),
        (
            [{"type": "function", "function": {"name": "f", "parameters": []}}],
            r"tools\[0\].function.parameters is \[\]",
        ),
        ([{**tool("f"), "more": {1: 2}}], r"tools\[0\] holds \{1: 2\}, which JSON cannot say"),
        ([{**tool("f"), "more": float("inf")}], r"tools\[0\] holds inf"),
        ([{**tool("f"), "more": {"a": {1, 2}}}], r"tools\[0\] holds \{1, 2\}"),
        ([{**tool("f"), "more": ["\ud800"]}], r"tools\[0\] holds"),
        ([{**tool("f"), "more": 1 << 20_000}], r"tools\[0\] holds a number of 20001 bits"),
        ([{**tool("f"), "more": nested(200)}], r"tools\[0\] is nested more than 100 levels deep"),
        ([{**tool("f"), "more": [[0] * 1000] * 300}], "tools hold more than 250,000 values"),
    ],
)
def test_bad_tools_are_refused(tokenizer, name, tools, says):
    with pytest.raises(RequestError, match=says):
        prompt(tokenizer, name, [USER], tools=tools)


def test_tools_nested_as_deep_as_allowed_are_written(tokenizer):
    options = ChatOptions(tools=[{**tool("f"), "more": nested(95)}])
    for name in WITH_TOOLS:
        ids = FORMATS[name].render([USER], tokenizer, options, max_length=100_000)
        assert tokenizer.decode(ids).count('"a": {') == 95


def test_llama_describes_tools_in_the_users_first_message(tokenizer):
    with pytest.raises(RequestError, match=r"messages\[0\] must be the user's"):
        prompt(tokenizer, "llama-3.1", [ASSISTANT, USER], tools=[tool("f")])


@pytest.mark.parametrize("name", TEXT_FORMATS)
def test_a_conversation_too_long_is_refused_before_it_is_encoded(tokenizer, name):
    seen = []

    def encode(text: str, **how: bool) -> list[int]:
        seen.append(len(text))
        return tokenizer.encode(text, **how)

    counting = copy.copy(tokenizer)
    counting.encode = encode
    for messages in ([{"role": "user", "content": "word " * 400_000}], [USER, ASSISTANT] * 20_000 + [USER]):
        seen.clear()
        with pytest.raises(CapacityError, match="max_length is 1000"):
            FORMATS[name].render(messages, counting, ChatOptions(), max_length=1000)
        assert sum(seen) < 100_000


def test_a_prompt_may_have_exactly_max_length_tokens(tokenizer):
    for name in TEXT_FORMATS:
        count = len(FORMATS[name].render([USER], tokenizer, ChatOptions(), max_length=1000))
        FORMATS[name].render([USER], tokenizer, ChatOptions(), max_length=count)
        with pytest.raises(CapacityError, match=f"more than {count - 1} tokens"):
            FORMATS[name].render([USER], tokenizer, ChatOptions(), max_length=count - 1)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", TEXT_FORMATS)
def test_nothing_but_the_named_errors_is_raised(tokenizer, name):
    chance = random.Random(name)
    values = [None, True, -1, 1.5, "", "x", "\ud800", [], {}, ["x"], {"type": "text", "text": "x"}, b"x", {1}, 10**5000]
    keys = ["role", "content", "tool_calls", "tool_call_id", "reasoning_content", "name", "id", "function", "arguments"]
    keys += ["type", "parameters", "description", "text", "phase", "refusal"]

    def changed(value):
        if chance.random() < 0.06:
            return chance.choice(values)
        if isinstance(value, dict):
            found = {key: changed(each) for key, each in value.items() if chance.random() > 0.03}
            return found | ({chance.choice(keys): chance.choice(values)} if chance.random() < 0.05 else {})
        if isinstance(value, list):
            found = [changed(each) for each in value if chance.random() > 0.05]
            return found + (found[:1] if chance.random() < 0.05 else [])
        return value

    fine = 0
    for seed in range(rounds(3000)):
        cases = Cases(seed, tools="tools" in FORMATS[name].options, alternates=name.startswith(("llama-2", "mistral")))
        messages, tools = cases.conversation(), cases.offered()
        options = ChatOptions(tools=changed(tools), enable_thinking=changed(None))
        try:
            ids = FORMATS[name].render(changed(messages), tokenizer, options, max_length=2000)
        except (RequestError, CapacityError) as error:
            assert len(str(error)) < 600
        else:
            assert ids
            fine += 1
    assert fine
