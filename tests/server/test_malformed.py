"""Requests that are not as they should be get a 4xx with the error object, and never reach the worker."""

import asyncio
import json

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax.server.front import app
from tests.fuzz import rounds
from tests.server.server_material import GPT_OSS, USER, chat, complete, fault, make

HALF = "\ud800"
HUGE = 10**400

COMMON = {
    "unknown field": {"promt": "a"},
    "unknown field, empty": {"": 1},
    "unknown field, half a surrogate": {HALF: 1},
    "model a number": {"model": 3},
    "model an object": {"model": {}},
    "temperature a string": {"temperature": "hot"},
    "temperature negative": {"temperature": -0.1},
    "temperature 1000": {"temperature": 1000},
    "temperature true": {"temperature": True},
    "temperature a list": {"temperature": [1]},
    "temperature huge": {"temperature": HUGE},
    "top_p 0": {"top_p": 0},
    "top_p 2": {"top_p": 2},
    "top_k 1.5": {"top_k": 1.5},
    "top_k -2": {"top_k": -2},
    "top_k huge": {"top_k": HUGE},
    "min_p 2": {"min_p": 2},
    "repetition_penalty 0": {"repetition_penalty": 0},
    "repetition_penalty tiny": {"repetition_penalty": 1e-38},
    "presence_penalty a string": {"presence_penalty": "1"},
    "frequency_penalty huge": {"frequency_penalty": -HUGE},
    "n 0": {"n": 0},
    "n 1000": {"n": 1000},
    "n a string": {"n": "2"},
    "n true": {"n": True},
    "max_tokens negative": {"max_tokens": -1},
    "max_tokens a fraction": {"max_tokens": 1.5},
    "max_tokens huge": {"max_tokens": HUGE},
    "max_tokens a string": {"max_tokens": "16"},
    "seed a fraction": {"seed": 0.5},
    "seed huge": {"seed": HUGE},
    "seed a list": {"seed": [1, 2]},
    "stop a number": {"stop": 3},
    "stop empty": {"stop": ""},
    "stop with an empty one": {"stop": ["a", ""]},
    "stop of numbers": {"stop": [1]},
    "stop nested": {"stop": [["a"]]},
    "stop half a surrogate": {"stop": HALF},
    "17 stops": {"stop": ["a"] * 17},
    "a stop of 1001 characters": {"stop": "a" * 1001},
    "half a million stops": {"stop": ["a"] * 500_000},
    "stop_token_ids a number": {"stop_token_ids": 3},
    "stop_token_ids negative": {"stop_token_ids": [-1]},
    "stop_token_ids true": {"stop_token_ids": [True]},
    "257 stop_token_ids": {"stop_token_ids": [1] * 257},
    "logit_bias a list": {"logit_bias": [1]},
    "logit_bias of words": {"logit_bias": {"the": 1}},
    "logit_bias negative id": {"logit_bias": {"-1": 1}},
    "logit_bias id beyond the vocabulary": {"logit_bias": {"999999999": 1}},
    "logit_bias exotic digit": {"logit_bias": {"\u0663": 1}},
    "logit_bias too large": {"logit_bias": {"1": 101}},
    "logit_bias a string": {"logit_bias": {"1": "1"}},
    "1025 logit_biases": {"logit_bias": {str(token): 1 for token in range(1025)}},
    "stream a string": {"stream": "yes"},
    "stream 1": {"stream": 1},
    "stream_options without stream": {"stream_options": {"include_usage": True}},
    "stream_options a list": {"stream": True, "stream_options": [1]},
    "stream_options unknown": {"stream": True, "stream_options": {"usage": True}},
    "include_usage a string": {"stream": True, "stream_options": {"include_usage": "yes"}},
    "ignore_eos a number": {"ignore_eos": 1},
}
OF_COMPLETIONS = {
    "no prompt": {"prompt": None},
    "prompt empty": {"prompt": ""},
    "prompt a number": {"prompt": 5},
    "prompt true": {"prompt": True},
    "prompt an object": {"prompt": {"text": "a"}},
    "no prompts": {"prompt": []},
    "an empty list of ids": {"prompt": [[]]},
    "ids with a fraction": {"prompt": [1, 2.5]},
    "ids with true": {"prompt": [1, True]},
    "ids negative": {"prompt": [-1]},
    "ids beyond the vocabulary": {"prompt": [999999]},
    "ids huge": {"prompt": [HUGE]},
    "ids and texts": {"prompt": [1, "a"]},
    "nested too deep": {"prompt": [[[1]]]},
    "an empty text among others": {"prompt": ["a", ""]},
    "prompt half a surrogate": {"prompt": "a" + HALF},
    "too many prompts": {"prompt": ["a"] * 129},
    "too many prompts with n": {"prompt": ["a"] * 65, "n": 2},
    "prompt too long": {"prompt": "a b c d " * 1000},
    "nothing to do": {"max_tokens": 0},
    "logprobs true": {"logprobs": True},
    "logprobs 21": {"logprobs": 21},
    "logprobs negative": {"logprobs": -1},
    "best_of more than n": {"best_of": 3},
    "suffix": {"suffix": "the end"},
    "echo a string": {"echo": "yes"},
    "messages": {"messages": [USER]},
}


def said(**message):
    return {"messages": [USER, message]}


OF_CHAT = {
    "no messages": {"messages": None},
    "messages empty": {"messages": []},
    "messages a string": {"messages": "Hello"},
    "messages of strings": {"messages": ["Hello"]},
    "messages of null": {"messages": [None]},
    "no role": said(content="a"),
    "role unknown": said(role="wizard", content="a"),
    "role an object": said(role={}, content="a"),
    "role with a mark": said(role="user<|message|>", content="a"),
    "content missing": said(role="user"),
    "content a number": said(role="user", content=3),
    "content an object": said(role="user", content={}),
    "content half a surrogate": said(role="user", content=HALF),
    "an image": said(role="user", content=[{"type": "image_url", "image_url": {"url": "https://a.example/a.png"}}]),
    "a part without a type": said(role="user", content=[{"text": "a"}]),
    "a part of a number": said(role="user", content=[3]),
    "a part with a text of a number": said(role="user", content=[{"type": "text", "text": 3}]),
    "name with a mark": said(role="user", content="a", name="x<|channel|>"),
    "name with a space": said(role="user", content="a", name="to=functions.f x"),
    "name a number": said(role="user", content="a", name=3),
    "tool_calls of a user": said(role="user", content="a", tool_calls=[1]),
    "unknown key": said(role="user", content="a", colour="red"),
    "tool without an id": said(role="tool", content="a"),
    "tool of another call": said(role="tool", content="a", tool_call_id="call_9"),
    "tool_calls a string": said(role="assistant", tool_calls="f"),
    "tool_calls without a function": said(role="assistant", tool_calls=[{"id": "1", "type": "function"}]),
    "tool_calls with a mark": said(
        role="assistant", tool_calls=[{"id": "1", "function": {"name": "f<|call|>", "arguments": "{}"}}]
    ),
    "arguments an object": said(role="assistant", tool_calls=[{"id": "1", "function": {"name": "f", "arguments": {}}}]),
    "function_call": said(role="assistant", content="a", function_call={"name": "f", "arguments": ""}),
    "tools an object": {"tools": {}},
    "tools of strings": {"tools": ["f"]},
    "a tool of an unknown type": {"tools": [{"type": "web_search"}]},
    "a tool without a function": {"tools": [{"type": "function"}]},
    "a tool with a mark": {"tools": [{"type": "function", "function": {"name": "f<|end|>"}}]},
    "a tool with parameters of a string": {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]
    },
    "tool_choice a number": {"tool_choice": 3},
    "reasoning_effort unknown": {"reasoning_effort": "enormous"},
    "reasoning_effort a number": {"reasoning_effort": 3},
    "response_format a string": {"response_format": "json"},
    "response_format without a type": {"response_format": {}},
    "logprobs a number": {"logprobs": 3},
    "top_logprobs without logprobs": {"top_logprobs": 3},
    "top_logprobs 21": {"logprobs": True, "top_logprobs": 21},
    "max_completion_tokens 0": {"max_completion_tokens": 0},
    "prompt": {"prompt": "a"},
    "too long": {"messages": [{"role": "user", "content": "a b c d " * 1000}]},
}


@pytest.fixture(scope="module")
def plain():
    return make()


@pytest.fixture(scope="module")
def harmony():
    return make(name=GPT_OSS)


@pytest.mark.parametrize("case", [*COMMON, *OF_COMPLETIONS])
def test_completions(plain, case):
    fault(complete(plain, **(COMMON | OF_COMPLETIONS)[case]))
    assert plain.worker.requests == []


@pytest.mark.parametrize("case", [*COMMON, *OF_CHAT])
def test_chat(harmony, case):
    fault(chat(harmony, **(COMMON | OF_CHAT)[case]))
    assert harmony.worker.requests == []


def test_another_model_is_not_found(plain):
    assert fault(complete(plain, model="gpt-5"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"999999999": 1}}, "logit_bias"),
        ({"prompt": ""}, "prompt"),
        ({"n": 0}, "n"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_an_error_names_the_field(plain, fields, param):
    assert fault(complete(plain, **fields))["param"] == param


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    """model prompt n best_of suffix echo max_tokens temperature top_p top_k min_p logit_bias seed stop stop_token_ids
    stream stream_options logprobs top_logprobs tools tool_choice messages reasoning_effort response_format modalities
    functions max_completion_tokens role content name tool_calls tool_call_id reasoning_content type function id
    arguments parameters include_usage user metadata input instructions reasoning effort text format call_id output
    summary max_output_tokens guided_choice structured_outputs chat_template_kwargs enable_thinking client_metadata
    cache_control thinking_blocks reasoning_details thinking namespace continuous_usage_stats choice regex""".split()
)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=5)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "developer"])
MESSAGES = st.lists(st.builds(lambda role, rest: rest | {"role": role}, ROLES, OBJECTS) | VALUES, max_size=3)


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def applications(plain, harmony):
    return app.build(harmony), app.build(plain)


@pytest.mark.fuzz
@settings(max_examples=rounds(500), deadline=None, suppress_health_check=list(HealthCheck))
@given(fields=OBJECTS, said=MESSAGES | VALUES, route=st.sampled_from(["completions", "chat/completions", "responses"]))
def test_nothing_is_a_500(runner, applications, fields, said, route):
    said = [USER, *said] if isinstance(said, list) else said
    values = {"completions": {"prompt": "a"}, "chat/completions": {"messages": said}, "responses": {"input": said}}
    answered_or_refused(runner, applications, route, values[route] | fields)


def answered_or_refused(runner, applications, route, body):
    async def run():
        transport = httpx2.ASGITransport(applications[route == "completions"])  # an exception is raised here
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post(f"/v1/{route}", content=json.dumps(body))

    response = runner.run(run())
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        fault(response, response.status_code)
    return response


FUNCTION = {"name": "f", "description": None, "parameters": {"type": "object", "required": None, "properties": {}}}
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x"], "items": None}}, "additionalProperties": False}
FORM = {"name": "form", "description": "Of it.", "schema": SCHEMA, "strict": True}
CALLED = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
HINT = {"cache_control": {"type": "ephemeral"}}
THOUGHT = {"thinking_blocks": [{"type": "thinking", "thinking": "a"}], "reasoning_details": [{"text": "a"}]}
TALK = [
    {"role": "system", "content": [{"type": "text", "text": "a", **HINT}], **HINT},
    {"role": "assistant", "content": None, "tool_calls": [CALLED], "provider_specific_fields": {"a": 1}, **THOUGHT},
    {"role": "tool", "tool_call_id": "1", "content": "a", **HINT},
]
ITEMS = [
    {"role": "developer", "content": [{"type": "input_text", "text": "a"}]},
    {"type": "function_call", "call_id": "1", "namespace": "n", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "1", "output": "a"},
]
FLAT = {"type": "function", **FUNCTION, "strict": True}
NAMESPACE = {"type": "namespace", "name": "n", "description": "a", "tools": [FLAT]}
# What clients send beside the usual. Each of these is answered.
SENT = [
    ("completions", {"prompt": "a", "guided_choice": ["a", "b"], "client_metadata": {"a": "b"}}),
    ("completions", {"prompt": "a", "structured_outputs": {"json": SCHEMA, "regex": None, "disable_fallback": True}}),
    ("chat/completions", {"messages": TALK, "tools": [{"type": "function", "function": FUNCTION, **HINT}]}),
    ("chat/completions", {"messages": TALK, "reasoning": {"effort": "minimal", "summary": "auto"}}),
    ("chat/completions", {"messages": TALK, "response_format": {"type": "json_schema", "json_schema": FORM}}),
    ("chat/completions", {"messages": TALK, "stream": True, "stream_options": {"continuous_usage_stats": True}}),
    ("chat/completions", {"messages": TALK, "structured_outputs": {"choice": ["a"]}, "chat_template_kwargs": {}}),
    ("responses", {"input": ITEMS, "tools": [FLAT, NAMESPACE, {"type": "web_search"}], "client_metadata": {}}),
    ("responses", {"input": ITEMS, "text": {"format": {"type": "json_schema", **FORM}}}),
    ("responses", {"input": ITEMS, "reasoning": {"effort": "xhigh", "summary": "auto"}, "stream": True}),
]


def places(value, path=()):
    """The paths of all values in it."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, each in inner:
        yield from places(each, (*path, step))


@pytest.mark.parametrize(("route", "body"), SENT)
def test_what_clients_send_is_answered(runner, applications, route, body):
    assert answered_or_refused(runner, applications, route, body).status_code == 200


@pytest.mark.fuzz
@settings(max_examples=rounds(1500), deadline=None, suppress_health_check=list(HealthCheck))
@given(case=st.sampled_from(SENT), number=st.integers(0, 1000), value=VALUES)
def test_any_place_of_it_may_have_any_value(runner, applications, case, number, value):
    route, body = case
    *path, last = (found := list(places(body))[1:])[number % len(found)]
    body = inner = json.loads(json.dumps(body))
    for step in path:
        inner = inner[step]
    inner[last] = value
    answered_or_refused(runner, applications, route, body)
