"""Every answer, object by object, is what OpenAI's own library declares: all its fields, none of another type."""

import json

import pytest

from gptjax.server.ipc.events import Failed
from tests.server.server_material import GPT2, GPT_OSS, USER, ask, make, post, saying

pytestmark = pytest.mark.clients

TURN = (
    "<|channel|>analysis<|message|>The king is old.<|end|><|start|>assistant"
    "<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant"
    '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>'
)
ANSWER = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>It was late.<|return|>"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
FLAT = {"type": "function", "name": "weather", "parameters": PARAMETERS}
CHATS = [
    {},
    {"logprobs": True, "top_logprobs": 2},
    {"n": 2, "tools": [TOOL], "parallel_tool_calls": False},
    {"max_tokens": 3},
    {"reasoning_effort": "low", "tool_choice": "none", "tools": [TOOL]},
]
COMPLETIONS = [{}, {"logprobs": 2, "echo": True}, {"n": 2, "max_tokens": 1}, {"echo": True, "max_tokens": 0}]
RESPONSES = [
    {},
    {"tools": [FLAT], "parallel_tool_calls": False, "include": ["reasoning.encrypted_content"]},
    {"max_output_tokens": 4},
    {"instructions": "Be kind.", "metadata": {"a": "b"}, "user": "me", "text": {"verbosity": "low"}, "temperature": 1},
    {"reasoning": {"effort": "high", "summary": "auto"}, "store": True, "tools": [FLAT | {"strict": True}]},
    {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "store": False, "truncation": "auto"},
]


def check(kind, value):
    """An object, against a type of the library's; by itself it would take anything."""
    from pydantic import TypeAdapter

    found = TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    said = json.loads(TypeAdapter(kind).dump_json(found, warnings="error", exclude_unset=True, by_alias=True))
    assert said == value


def streamed(response):
    assert response.status_code == 200
    data = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(each) for each in data]


@pytest.mark.parametrize("fields", COMPLETIONS)
def test_completions(fields):
    from openai.types import Completion

    body = {"prompt": ["a", "b"], "model": GPT2} | fields
    check(Completion, declared(post(make(), "/v1/completions", body).json()))
    for chunk in streamed(post(make(), "/v1/completions", body | {"stream": True})):
        check(Completion, declared(chunk))


def declared(completion):
    """As it is declared. OpenAI's own servers send null for what has no value, too: a reason before the end of a
    stream, and the log-probability of an echoed prompt's first token.
    """
    for choice in completion["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        for name, nothing in (("token_logprobs", 0.0), ("top_logprobs", {})):
            values = (choice["logprobs"] or {}).get(name)
            if values and values[0] is None:
                values[0] = nothing
    return completion


@pytest.mark.parametrize("text", [TURN, ANSWER])
@pytest.mark.parametrize("fields", CHATS)
def test_chats(fields, text):
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    service = make(saying(text, name=GPT_OSS), name=GPT_OSS)
    body = {"messages": [USER], "model": GPT_OSS} | fields
    check(ChatCompletion, post(service, "/v1/chat/completions", body).json())
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in streamed(post(service, "/v1/chat/completions", body)):
        check(ChatCompletionChunk, chunk)


@pytest.mark.parametrize("text", [TURN, ANSWER])
@pytest.mark.parametrize("fields", RESPONSES)
def test_responses(fields, text):
    from openai.types.responses import Response, ResponseStreamEvent

    service = make(saying(text, name=GPT_OSS), name=GPT_OSS)
    body = {"input": "Hello", "model": GPT_OSS} | fields
    check(Response, post(service, "/v1/responses", body).json())
    for event in streamed(post(service, "/v1/responses", body | {"stream": True})):
        check(ResponseStreamEvent, event)


def test_stored_items():
    from openai.types.responses import Response, ResponseItemList

    service = make(saying(TURN, name=GPT_OSS), name=GPT_OSS)
    stored = post(service, "/v1/responses", {"input": "Hello", "tools": [FLAT]}).json()
    check(Response, ask(service, "GET", f"/v1/responses/{stored['id']}").json())
    result = {"type": "function_call_output", "call_id": stored["output"][-1]["call_id"], "output": "rain"}
    more = {"previous_response_id": stored["id"], "input": [result, USER], "tools": [FLAT]}
    later = post(service, "/v1/responses", more).json()
    found = ask(service, "GET", f"/v1/responses/{later['id']}/input_items").json()
    kinds = ["message", "function_call_output", "function_call", "message", "reasoning", "message"]
    assert [item["type"] for item in found["data"]] == kinds
    check(ResponseItemList, found)


def test_a_response_that_fails():
    from openai.types.responses import ResponseStreamEvent

    service = make(lambda _: [5, Failed("it broke", "not_finite")], name=GPT_OSS)
    found = streamed(post(service, "/v1/responses", {"input": "Hello", "stream": True}))
    assert [event["type"] for event in found[-2:]] == ["error", "response.failed"]
    for event in found:
        check(ResponseStreamEvent, event)


def test_models():
    from openai.types import Model

    service = make()
    check(Model, ask(service, "GET", f"/v1/models/{GPT2}").json())
    (model,) = ask(service, "GET", "/v1/models").json()["data"]
    check(Model, model)
