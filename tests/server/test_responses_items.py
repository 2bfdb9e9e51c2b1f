"""`/v1/responses`: the items of a turn, and how they are read when they are sent back."""

import base64

import pytest

from gptjax.server.ipc.events import Failed
from gptjax.server.openai.responses.input import read_input
from tests.server.responses_material import ANSWER, CALL, NAMESPACE, THOUGHT, WEATHER, events, respond, talking
from tests.server.server_material import GPT_OSS, USER, chat, fault, ids, make, post, saying, tokenizer

PREAMBLE = "<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant"
MORE = "<|channel|>commentary<|message|>One more thing.<|end|><|start|>assistant"
ASKED = {"type": "function_call", "call_id": "call_x", "name": "weather", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "call_x", "output": "rain"}


def prompt_of(service):
    return tokenizer(GPT_OSS).decode(service.worker.requests[-1].prompt_ids, special=True)


def input_prompt(items, **fields):
    service = talking(ANSWER)
    assert respond(service, input=items, tools=[WEATHER], **fields).status_code == 200
    return prompt_of(service)


def chat_prompt(messages):
    service = talking(ANSWER)
    tool = {"type": "function", "function": {name: WEATHER[name] for name in ("name", "description", "parameters")}}
    assert chat(service, messages=messages, tools=[tool]).status_code == 200
    return prompt_of(service)


def called(**more):
    function = {"name": "weather", "arguments": "{}"}
    return {"role": "assistant", "tool_calls": [{"id": "call_x", "type": "function", "function": function}], **more}


TOLD = {"role": "tool", "tool_call_id": "call_x", "content": "rain"}


@pytest.mark.parametrize(
    "empty",
    [
        {"type": "reasoning", "summary": [], "content": []},
        {"type": "reasoning", "summary": []},
        {"type": "reasoning", "summary": [], "content": None, "encrypted_content": None},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": ""}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": ""}]},
    ],
)
def test_empty_reasoning_renders_nothing(empty):
    """LangChain sends such an item on every turn."""
    assert input_prompt([USER, empty, ASKED, RESULT]) == chat_prompt([USER, called(content=None), TOLD])
    assert read_input([USER, empty, ASKED], None).places == ["input[0]", "input[2]"]


@pytest.mark.parametrize("content", ["", [], [{"type": "output_text", "text": ""}]])
def test_an_empty_message_of_a_turn_that_says_more_renders_nothing(content):
    """As of a chat message whose content is empty, beside calls or reasoning."""
    empty = {"type": "message", "role": "assistant", "content": content}
    assert input_prompt([USER, empty, ASKED, RESULT]) == chat_prompt([USER, called(content=""), TOLD])
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    silent = {"role": "assistant", "content": "", "reasoning_content": "Hm."}
    assert input_prompt([USER, thought, empty, USER]) == chat_prompt([USER, silent, USER])
    assert input_prompt([USER, empty, USER]) == chat_prompt([USER, {"role": "assistant", "content": ""}, USER])


def test_codex_sends_metadata_of_its_own():
    assert respond(talking(ANSWER), client_metadata={"x-codex-installation-id": "1"}).status_code == 200


def test_reasoning_comes_before_its_call():
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    expected = chat_prompt([USER, called(content=None, reasoning_content="Hm."), TOLD])
    assert input_prompt([USER, thought, ASKED, RESULT]) == expected
    summary = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}
    assert input_prompt([USER, summary, ASKED, RESULT]) == expected


@pytest.mark.parametrize("phase", ["commentary", None, "absent"])
def test_a_preamble_is_one_again(phase):
    """In chat, text with calls is a preamble; items say so by their phase, unless the client has dropped that."""
    preamble = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me look."}]}
    preamble |= {} if phase == "absent" else {"phase": phase}
    found = read_input([USER, preamble, ASKED, RESULT], None).messages
    assert found[1] == {"role": "assistant", "content": "Let me look.", "phase": "commentary"}


@pytest.mark.parametrize("items", [[], [USER], [{"type": "function_call_output", "call_id": "c", "output": ""}]])
def test_an_answer_is_not_a_preamble(items):
    answer = {"role": "assistant", "content": "It was late."}
    for phase in ({}, {"phase": "final_answer"}, {"phase": None}):
        found = read_input([USER, answer | phase, *items, *([USER, ASKED] if items else [])], None).messages
        assert found[1] == answer
    found = read_input([USER, answer | {"phase": "final_answer"}, ASKED], None).messages
    assert "phase" not in found[1]


def test_what_was_generated_says_its_phase():
    body = respond(talking(THOUGHT + PREAMBLE + CALL), tools=[WEATHER]).json()
    assert [(item["type"], item.get("phase")) for item in body["output"]] == [
        ("reasoning", None),
        ("message", "commentary"),
        ("function_call", None),
    ]
    body = respond(talking(PREAMBLE + MORE + ANSWER)).json()
    assert [(item["phase"], item["content"][0]["text"]) for item in body["output"]] == [
        ("commentary", "Let me look.\n\nOne more thing."),
        ("final_answer", "It was late."),
    ]
    found = events(respond(talking(PREAMBLE + THOUGHT + ANSWER), stream=True))
    items = [event["item"] for event in found if event["type"] == "response.output_item.added"]
    assert [item.get("phase") for item in items] == ["commentary", None, "final_answer"]
    assert found[-1]["response"]["output"][0]["phase"] == "commentary"


def test_text_without_a_channel_is_the_answer():
    (item,) = respond(talking("It was late.<|return|>")).json()["output"]
    assert (item["phase"], item["content"][0]["text"]) == ("final_answer", "It was late.")


def test_encrypted_reasoning_comes_and_goes():
    """As Codex asks, which then sends items back with nothing else in them."""
    fields = {"include": ["reasoning.encrypted_content"], "store": False}
    body = respond(talking(THOUGHT + CALL), tools=[WEATHER], **fields).json()
    reasoning = body["output"][0]
    assert reasoning["content"][0]["text"] == "The king is old."
    kept = {"type": "reasoning", "summary": [], "content": None, "encrypted_content": reasoning["encrypted_content"]}
    expected = chat_prompt([USER, called(content=None, reasoning_content="The king is old."), TOLD])
    assert input_prompt([USER, kept, ASKED, RESULT]) == expected
    found = events(respond(talking(THOUGHT + ANSWER), stream=True, **fields))
    done = [event["item"] for event in found if event["type"] == "response.output_item.done"]
    assert done[0]["encrypted_content"] == reasoning["encrypted_content"]
    assert "encrypted_content" not in respond(talking(THOUGHT + ANSWER)).json()["output"][0]


def damaged_ones():
    good = respond(talking(THOUGHT + ANSWER), include=["reasoning.encrypted_content"]).json()["output"][0]
    good = good["encrypted_content"]
    yield from [good[:-1], good[:-8], good + "A", good.swapcase(), good.replace("-", "_", 1), good[9:], good[:9]]
    yield from [good[:9] + "é" + good[9:], good[:9] + "\ud800", " " + good, good + "\n", "gAAAAABo", 3, ["a"], {"a": 1}]
    yield good[:9] + base64.urlsafe_b64encode(b"\0\0\0\0\xff").decode()
    yield "x" * 100_000


def test_damaged_reasoning_is_refused_by_name():
    for value in damaged_ones():
        item = {"type": "reasoning", "summary": [], "encrypted_content": value}
        error = fault(respond(talking(ANSWER), input=[USER, item]))
        assert "input[1].encrypted_content" in error["message"], value
        assert error["param"] == "input"
    # What is there in plain is taken.
    item = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}], "encrypted_content": "other's"}
    assert respond(talking(ANSWER), input=[USER, item]).status_code == 200


def test_a_refusal_is_what_was_answered():
    refused = {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "I can't."}]}
    assert "I can't." in input_prompt([USER, refused, USER])
    assert "input[0].content[0]" in fault(respond(talking(ANSWER), input=[refused | {"role": "user"}]))["message"]
    broken = refused | {"content": [{"type": "refusal", "refusal": None}]}
    assert "input[1].content[0].refusal" in fault(respond(talking(ANSWER), input=[USER, broken]))["message"]


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"reasoning": {"effort": "enormous"}}, "reasoning.effort", "reasoning.effort is 'enormous'"),
        ({"reasoning": {"effort": 3}}, "reasoning.effort", "reasoning.effort must be a string"),
        ({"tools": [{"type": "function", "name": 3}]}, "tools", "tools[0].name"),
        ({"tools": [WEATHER, {"type": "file_search"}]}, "tools", "tools[1] has the type 'file_search'"),
        ({"tools": [{"type": "namespace", "name": "n"}]}, "tools", "tools[0].tools must be a list, found null"),
        ({"tools": [{"type": "namespace", "name": 3, "tools": []}]}, "tools", "tools[0].name must be a string"),
        ({"tools": [NAMESPACE | {"description": 3}]}, "tools", "tools[0].description must be a string"),
        (
            {"tools": [NAMESPACE | {"tools": [{"type": "custom", "name": "f"}]}]},
            "tools",
            "tools[0].tools[0] has the type",
        ),
        ({"tools": [NAMESPACE | {"name": "a b"}]}, "tools", "'a b.list'"),
        ({"tools": [NAMESPACE, NAMESPACE]}, "tools", "tools[1].tools[0] is the second function files.list"),
        ({"tools": [{"type": "web_search"}, WEATHER | {"name": "a b"}]}, "tools", "tools[1].name is 'a b'"),
        ({"tools": [NAMESPACE, WEATHER | {"strict": True, "parameters": {"not": {}}}]}, "tools", "tools[1].parameters"),
        ({"tools": [{"type": "web_search"}, {"type": "custom"}]}, "tools", "tools[1] has the type 'custom'"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {"type": 3}}]}, "tools", "tools[0]"),
        ({"tools": [WEATHER | {"strict": "yes"}]}, "tools", "tools[0].strict"),
        ({"input": [USER, {"role": "wizard", "content": "a"}]}, "input", "input[1] has the role 'wizard'"),
        ({"input": [USER, ASKED | {"name": "a b"}]}, "input", "input[1].name"),
        ({"input": [USER, ASKED | {"name": None}]}, "input", "input[1].name must be a string, found null"),
        ({"input": [USER, ASKED | {"arguments": {}}]}, "input", "input[1].arguments must be a string"),
        ({"input": [USER, ASKED | {"call_id": 3}]}, "input", "input[1].call_id must be a string"),
        ({"input": [USER, RESULT]}, "input", "input[1].call_id is 'call_x'"),
        ({"input": [USER, ASKED, RESULT | {"output": 3}]}, "input", "input[2].output must be a string"),
        ({"input": [USER, {"role": "user", "content": 3}]}, "input", "input[1].content must be a string"),
        ({"input": [USER, {"role": "user", "content": "\ud800"}]}, "input", "input[1].content has a lone surrogate"),
        ({"input": [USER, {"role": "assistant", "content": "a", "phase": "x"}]}, "input", "input[1].phase is 'x'"),
        ({"input": [{"type": "item", "id": "a"}]}, "input", "input[0] has the type 'item'"),
        ({"instructions": "Be kind.", "input": [USER, USER | {"role": "x"}]}, "input", "input[1] has the role"),
        ({"include": ["message.output_text"]}, "include", "'message.output_text' is not supported"),
        ({"include": ["reasoning"]}, "include", "'reasoning' is not supported"),
        ({"include": "reasoning.encrypted_content"}, "include", "include must be a list"),
        ({"include": [[]]}, "include", "a list is not supported"),
        ({"text": {"verbosity": "loud"}}, "text.verbosity", "'loud'"),
        ({"text": {"verbosity": ["low"]}}, "text.verbosity", "a list"),
        ({"metadata": {"a": 1}}, "metadata", "metadata must be"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "metadata must be"),
        ({"metadata": {"a": "b" * 513}}, "metadata", "metadata must be"),
        ({"metadata": "a"}, "metadata", "metadata must be"),
        ({"user": 3}, "user", "user must be a string"),
        ({"prompt_cache_key": "a" * 600}, "prompt_cache_key", "at most"),
        ({"parallel_tool_calls": 0}, "parallel_tool_calls", "must be true or false"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs requires include"),
        ({"top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "'resp_1' not found"),
        ({"truncation": "some"}, "truncation", "'some'"),
        ({"store": 1}, "store", "must be true or false"),
        ({"input": "a b c d " * 1000}, "input", ""),
    ],
)
def test_an_error_names_its_field(fields, param, said):
    error = fault(respond(talking(ANSWER), **fields))
    assert said in error["message"]
    assert error["param"] == param
    assert "messages[" not in error["message"]
    assert ".tool_calls" not in error["message"]


@pytest.mark.parametrize(
    ("name", "value", "otherwise"),
    [
        ("parallel_tool_calls", False, True),
        ("text", {"verbosity": "low", "format": {"type": "text"}}, {"verbosity": "medium", "format": {"type": "text"}}),
        ("metadata", {"a": "b"}, {}),
        ("user", "me", None),
        ("safety_identifier", "me", None),
        ("prompt_cache_key", "mine", None),
        ("instructions", "Be kind.", None),
        ("temperature", 0.5, None),
        ("top_p", 0.5, None),
        ("max_output_tokens", 99, None),
        ("tool_choice", "none", "auto"),
        ("tools", [WEATHER | {"strict": True}], []),
        ("reasoning", {"effort": "high", "summary": None}, {"effort": "medium", "summary": None}),
    ],
)
def test_what_was_sent_is_repeated(name, value, otherwise):
    assert respond(talking(ANSWER), **{name: value}).json()[name] == value
    assert respond(talking(ANSWER), **{name: None}).json()[name] == otherwise
    found = events(respond(talking(ANSWER), stream=True, **{name: value}))
    assert found[0]["response"][name] == found[-1]["response"][name] == value


def test_an_error_in_a_stream_is_an_event():
    service = make(lambda _: [*ids(THOUGHT, GPT_OSS), Failed("it broke", "not_finite")], name=GPT_OSS)
    *_, error, failed = events(post(service, "/v1/responses", {"input": "Hello", "stream": True}))
    assert {name: error[name] for name in ("type", "code", "message", "param")} == {
        "type": "error",
        "code": "not_finite",
        "message": "it broke",
        "param": None,
    }
    assert error["error"]["message"] == "it broke"  # what openai-python raises
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "it broke"}


def test_a_script_of_nothing_fails_as_an_event():
    service = make(saying("", name=GPT_OSS), name=GPT_OSS)
    *_, error, failed = events(post(service, "/v1/responses", {"input": "Hello", "stream": True}))
    assert (error["type"], failed["type"]) == ("error", "response.failed")


@pytest.mark.parametrize("text", [THOUGHT + PREAMBLE + CALL, PREAMBLE + THOUGHT + CALL, PREAMBLE + MORE + CALL])
@pytest.mark.parametrize("keeps", [True, False])
def test_a_conversation_goes_on_as_in_chat(text, keeps):
    """Clients send back what was generated, with its phases or without."""
    body = respond(talking(text), tools=[WEATHER]).json()
    items = [item if keeps else {name: item[name] for name in item if name != "phase"} for item in body["output"]]
    prompt = input_prompt([USER, *items, RESULT | {"call_id": items[-1]["call_id"]}])
    assert "<|channel|>commentary<|message|>Let me look." in prompt
    assert "<|channel|>final" not in prompt.rsplit("<|start|>assistant", 1)[0]
    if "The king is old." in text:
        assert "<|channel|>analysis<|message|>The king is old.<|end|>" in prompt
