"""What becomes of turns, over HTTP: calls, their ids, and messages that come back."""

import re

import pytest

from tests.server.server_material import GPT_OSS, USER, chat, fault, ids, make, saying, tokenizer

TOOL = {"type": "function", "function": {"name": "f"}}
CALL = "<|channel|>commentary to=functions.f<|message|><|call|>"


def talking(text):
    return make(saying(text, name=GPT_OSS), name=GPT_OSS)


def choices(text, **fields):
    return chat(talking(text), **fields).json()["choices"]


def test_choices_have_ids_of_their_own():
    calls = [choice["message"]["tool_calls"][0] for choice in choices(CALL, tools=[TOOL], n=2)]
    assert len({call["id"] for call in calls}) == 2
    assert all(re.fullmatch("call_[0-9a-f]{24}", call["id"]) for call in calls)
    assert [call["function"] for call in calls] == [{"name": "f", "arguments": "{}"}] * 2


@pytest.mark.parametrize(
    ("header", "fields", "name"),
    [
        ("final to=user", {"tools": [TOOL]}, None),
        ("commentary to=f", {"tools": [TOOL]}, "f"),
        ("commentary to=f", {"tools": [TOOL], "tool_choice": "none"}, None),
        ("commentary to=f", {}, None),
        ("commentary to=functions.f", {}, "f"),
        ("commentary to=python code", {"tools": [TOOL]}, None),
        ("commentary to=python code", {"tools": [{"type": "python"}]}, "python"),
        ("commentary to=functions.f<|channel|>commentary", {"tools": [TOOL]}, "f"),
    ],
)
def test_what_is_a_call_depends_on_what_was_offered(header, fields, name):
    (choice,) = choices(f"<|channel|>{header}<|message|>Hello.<|call|>", **fields)
    message = choice["message"]
    assert [call["function"]["name"] for call in message.get("tool_calls", [])] == ([name] if name else [])
    assert message["content"] == (None if name else "Hello.")
    assert choice["finish_reason"] == ("tool_calls" if name else "stop")


def test_the_word_of_another_ends_the_turn():
    written = "<|channel|>final<|message|>A.<|end|><|start|>user<|message|>And B?<|end|>"
    body = chat(talking(written + CALL), max_tokens=100).json()
    assert body["choices"][0]["message"]["content"] == "A."
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] < len(ids(written, GPT_OSS))


@pytest.mark.parametrize("role", ["user", "system", "developer"])
@pytest.mark.parametrize("value", [[1], "abc", 5, [{"id": "1"}]])
def test_calls_of_those_who_make_none(role, value):
    messages = [USER, {"role": role, "content": "x", "tool_calls": value}]
    error = fault(chat(talking("A"), messages=messages), 400)
    assert error["message"].startswith("messages[1] has 'tool_calls'")


@pytest.mark.parametrize("answer", [{"content": None}, {}, {"content": None, "refusal": "No."}])
def test_an_answer_that_comes_back_without_its_reasoning(answer):
    service = talking("<|channel|>final<|message|>A.<|return|>")
    assert chat(service, messages=[USER, {"role": "assistant", **answer}, USER]).status_code == 200
    prompt = tokenizer(GPT_OSS).decode(service.worker.requests[0].prompt_ids)
    assert ("No." in prompt) == ("refusal" in answer)
