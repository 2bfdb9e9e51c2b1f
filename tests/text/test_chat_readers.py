"""What a turn's tokens become, in the formats whose messages are text."""

import json
import random
import re

import pytest

from gptjax.text import Tokenizer
from gptjax.text.chat_formats import FORMATS, ChatOptions
from gptjax.text.chat_formats.calls import Calls
from tests.fuzz import rounds
from tests.text.chat_material import BEGIN_THE_THOUGHT, chat_tokenizer, read, tool
from tests.text.harmony_material import assembled

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
CALLED = [("weather", '{"city": "Zürich"}')]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return chat_tokenizer(tmp_path_factory.mktemp("tags"))


@pytest.fixture(scope="module")
def tagless(tmp_path_factory) -> Tokenizer:
    """One whose tags are ordinary words."""
    return chat_tokenizer(tmp_path_factory.mktemp("words"), tags=False)


def result(tokenizer, name, text, *offered):
    """The answer, the reasoning, and the calls of a turn."""
    reader, answer = read(tokenizer, name, tokenizer.encode(text), *offered)
    for call in reader.tool_calls:
        assert re.fullmatch("call_[0-9a-f]{24}", call.id)
    assert assembled(reader.take_calls()) == [(call.id, call.name, call.arguments) for call in reader.tool_calls]
    assert reader.take_calls() == ()
    return answer, reader.reasoning, [(call.name, call.arguments) for call in reader.tool_calls]


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"harmony", *BEGIN_THE_THOUGHT}))
def test_text_is_the_answer(tokenizer, name):
    text = "\n It's 1 < 2, naïve 👩‍👩‍👧!\n\n"
    assert result(tokenizer, name, text) == (text, "", [])
    assert result(tokenizer, name, text, "weather") == (text, "", [])


@pytest.mark.parametrize(
    ("name", "text", "answer", "reasoning", "calls"),
    [
        ("qwen2.5", CALL, "", "", CALLED),
        ("qwen2.5", f"I look.\n{CALL}\n{CALL}", "I look.", "", CALLED * 2),
        ("qwen2.5", f"{CALL}\nWell.\n", "Well.", "", CALLED),
        ("qwen2.5", f"One\n{CALL}\ntwo", "One\ntwo", "", CALLED),
        ("qwen2.5", CALL.removesuffix("</tool_call>"), "", "", CALLED),
        ("qwen2.5", '<tool_call>{"name":"f"}</tool_call>', "", "", [("f", "{}")]),
        ("qwen2.5", '<tool_call>{"name":"f","arguments":"{\\"a\\":1}"}</tool_call>', "", "", [("f", '{"a": 1}')]),
        (
            "qwen2.5",
            '<tool_call>{"name":"f","parameters":{"a":[1.5,null]}}</tool_call>',
            "",
            "",
            [("f", '{"a": [1.5, null]}')],
        ),
        ("qwen2.5", "<think>\nHm.\n</think>\n\nYes.", "<think>\nHm.\n</think>\n\nYes.", "", []),
        ("qwen3", "<think>\nHm.\n\nSo.\n</think>\n\nYes.\n", "Yes.\n", "Hm.\n\nSo.", []),
        ("qwen3", "\n<think>\n\n</think>\n\nYes.", "Yes.", "", []),
        ("qwen3", f"<think>Hm.</think>\n\nI look.\n\n{CALL}", "I look.", "Hm.", CALLED),
        ("qwen3", f"<think>\nMaybe {CALL}\n</think>\n\n{CALL}", "", f"Maybe {CALL}", CALLED),
        ("qwen3", "<think>\nHm.\n", "", "Hm.", []),
        ("qwen3", "Yes. <think>No.</think>", "Yes. <think>No.</think>", "", []),
        ("qwen3", " <thin", " <thin", "", []),
        ("qwen3", "\n\nYes.</think>", "\n\nYes.</think>", "", []),
        ("qwen3-thinking", "Hm.\n</think>\n\nYes.", "Yes.", "Hm.", []),
        ("qwq", f"Hm.\n</think>\n\nI look.\n{CALL}", "I look.", "Hm.", CALLED),
        ("qwq-preview", f"Hm.\n{CALL}", "Hm.", "", CALLED),
        ("deepseek-r1", "<think>\nHm.\n</think>\n\nYes.", "Yes.", "Hm.", []),
        ("deepseek-r1", "Yes.", "Yes.", "", []),
        ("deepseek-r1-thinking", "Hm.\n</think>\n\nYes.", "Yes.", "Hm.", []),
        ("deepseek-r1-0528", "<think>\nHm.\n</think>\nYes.", "Yes.", "Hm.", []),
        ("qwen3-instruct", f"<think>{CALL}", "<think>", "", CALLED),
        ("llama-3.1", '{"name": "weather", "parameters": {"city": "Zürich"}}', "", "", CALLED),
        ("llama-3.1", '\n<|python_tag|>{"name": "weather", "arguments": {"city": "Zürich"}} ', "", "", CALLED),
        ("llama-3.2", '{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', "", []),
        ("llama-3.2", '{"a": 1} is JSON.', '{"a": 1} is JSON.', "", []),
        ("llama-3.2", "  <", "  <", "", []),
    ],
)
def test_reasoning_and_calls_come_apart(tokenizer, tagless, name, text, answer, reasoning, calls):
    for each in (tokenizer, tagless):
        assert result(each, name, text, "weather") == (answer, reasoning, calls)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "Hello",
        '{"name": "f", "arguments": {"a": }}',
        '{"name": "f", "arguments": {"a": 1}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "x"}',
        '{"name": "f", "arguments": 7}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": 1e999}}',
        '{"name": "f", "arguments": {"a": "\\ud800"}}',
        '{"name": "\\ud800", "arguments": {}}',
        '{"name": "a b", "arguments": {}}',
        '{"name": "<f>"}',
        '{"name": 3}',
        '{"arguments": {}}',
        '["f"]',
        "[" * 20_000,
        '{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}",
    ],
)
@pytest.mark.parametrize("end", ["</tool_call>", ""])
def test_a_malformed_call_is_part_of_the_answer(tokenizer, body, end):
    text = f"I call:\n<tool_call>\n{body}{end}"
    assert result(tokenizer, "qwen3", text, "f") == (text, "", [])
    after = f"{text} \n{CALL}"
    if end:
        assert result(tokenizer, "qwen3", after, "f") == (f"{text} ", "", CALLED)
    assert result(tokenizer, "llama-3.1", body, "f", "<f>") == (body, "", [])


def test_without_tools_tags_and_json_are_text(tokenizer):
    for name in ("qwen2.5", "qwen3", "qwen3-instruct"):
        assert result(tokenizer, name, CALL) == (CALL, "", [])
    text = '{"name": "f", "parameters": {}}'
    assert result(tokenizer, "llama-3.1", text) == (text, "", [])


def test_a_turn_ends_where_another_message_begins(tokenizer):
    ids = tokenizer.encode("Yes.<|im_start|>user\nNo.", special=True)
    reader, answer = read(tokenizer, "qwen3", ids)
    assert (answer, reader.ended) == ("Yes.", True)
    reader, _ = read(tokenizer, "qwen3", tokenizer.encode("Yes."))
    assert not reader.ended
    reader, answer = read(tokenizer, "deepseek-r1", tokenizer.encode("Yes.<｜User｜>No.", special=True))
    assert (answer, reader.ended) == ("Yes.", True)


PIECES = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    CALL,
    "<",
    "</tool",
    "<thi",
    "\n",
    "\n\n",
    " ",
    "Hi",
    "é👩‍👩‍👧",
]
PIECES += ['{"name": "weather", ', '"arguments": {}}', '{"name": "weather"}', "{", "<|python_tag|>", "_call>", "}"]


@pytest.mark.parametrize(
    "name", ["qwen2.5", "qwen3", "qwen3-thinking", "llama-3.1", "deepseek-r1", "deepseek-r1-thinking"]
)
def test_nothing_depends_on_how_the_text_is_split(tokenizer, tagless, name):
    chance = random.Random(name)
    for _ in range(rounds(2000)):
        text = "".join(chance.choices(PIECES, k=chance.randint(0, 9)))
        wanted = result(tokenizer, name, text, "weather")
        singly = [token for letter in text for token in tokenizer.encode(letter)]
        cuts = sorted(chance.choices(range(len(text) + 1), k=3))
        parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        for ids in (singly, [token for part in parts for token in tokenizer.encode(part)]):
            reader, answer = read(tokenizer, name, ids, "weather")
            assert (answer, reader.reasoning) == wanted[:2]
            assert [(call.name, call.arguments) for call in reader.tool_calls] == wanted[2]
        assert result(tagless, name, text, "weather") == wanted
        # No character is lost or doubled.
        assert len(answer) + len(reader.reasoning) + reader.dropped == len(text)


def test_a_stream_passes_on_what_is_certain(tokenizer):
    options = ChatOptions(tools=[tool("weather")])
    reader = FORMATS["qwen3"].reader(tokenizer, options)
    seen = []
    for token in tokenizer.encode(f"<think>\nHm, so.\n</think>\n\nI look\n{CALL}"):
        text = reader.push(token)
        seen.append((text, reader.take_reasoning(), len(reader.tool_calls)))
    assert "".join(text for text, _, _ in seen) == "I look"
    assert "".join(reasoning for _, reasoning, _ in seen) == "Hm, so."
    assert not any("<" in text + reasoning for text, reasoning, _ in seen)
    assert seen[-1][2] == 1  # the call is there with its last token
    assert reader.finish() == ""
    assert reader.take_reasoning() == ""


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "qwen3-instruct", "llama-3.1"])
def test_turns_come_back_as_they_are_rendered(tokenizer, name):
    known = FORMATS[name]
    tools = [tool("weather"), tool("time")]
    options = ChatOptions(tools=tools)
    question = [{"role": "user", "content": "How is it?"}]
    first = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich", "n": 2}'}}
    turns = [
        {"role": "assistant", "content": "It is fine."},
        {"role": "assistant", "content": None, "tool_calls": [first]},
    ]
    if name != "llama-3.1":
        turns.append({"role": "assistant", "content": "I look.", "tool_calls": [first, {**first, "id": "b"}]})
    prompt = known.render(question, tokenizer, options, max_length=10_000)
    for turn in turns:
        if name == "qwen3":
            turn |= {"reasoning_content": "Hm.\nSo."}
        more = [{"role": "tool", "tool_call_id": call["id"], "content": "sun"} for call in turn.get("tool_calls", ())]
        whole = known.render([*question, turn, *more], tokenizer, options, max_length=10_000)
        assert whole[: len(prompt)] == prompt
        ends = known.stop_ids(tokenizer)
        written = whole[len(prompt) :]
        written = written[: next(at for at, token in enumerate(written) if token in ends)]
        reader, answer = read(tokenizer, name, written, "weather", "time")
        assert (answer, reader.reasoning) == (turn["content"] or "", turn.get("reasoning_content", ""))
        assert [call.name for call in reader.tool_calls] == ["weather"] * len(turn.get("tool_calls", ()))
        for call in reader.tool_calls:
            assert json.loads(call.arguments) == {"city": "Zürich", "n": 2}


def test_endless_white_space_and_newlines_take_linear_time(tokenizer):
    for name, text in (("qwen3", " " * 200_000), ("qwen2.5", "\n" * 200_000), ("llama-3.1", " " * 200_000)):
        newline = tokenizer.encode(text[0])
        reader = FORMATS[name].reader(tokenizer, ChatOptions(tools=[tool("weather")]))
        assert "".join(reader.push(newline[0]) for _ in range(200_000)) + reader.finish() == text
    calls = Calls()
    calls.begin("weather")
    for _ in range(200_000):
        calls.add(" " * 40)
    calls.add("{}")
    calls.end()
    assert calls.whole[0].arguments == " " * 8_000_000 + "{}"
