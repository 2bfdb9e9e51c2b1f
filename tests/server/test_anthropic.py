"""`/v1/messages`: what the model says comes as blocks, and errors as Anthropic's clients expect them."""

import json
import re

import pytest

from gptjax.server.ipc.events import Failed
from tests.server.anthropic_material import (
    SCHEMA,
    SIGNED,
    WEATHER,
    assistant,
    events,
    fault,
    message,
    result,
    said,
    text,
    used,
    user,
)
from tests.server.responses_material import ANSWER, CALL, LOOK, THOUGHT, talking
from tests.server.server_material import GPT2, GPT_OSS, USER, ask, ids, make, post, saying


def test_a_turn_is_its_blocks():
    service = talking(THOUGHT + LOOK + CALL)
    found = message(service, tools=[WEATHER]).json()
    thinking, words, call = found["content"]
    assert thinking == SIGNED
    assert words == {"type": "text", "text": "Let me look.", "citations": None}
    assert call["id"].startswith("call_")
    assert call == {"type": "tool_use", "id": call["id"], "name": "weather", "input": {"city": "Oslo"}}
    assert (found["stop_reason"], found["stop_sequence"], found["model"]) == ("tool_use", None, GPT_OSS)
    usage = found["usage"]
    prompt = len(service.worker.requests[-1].prompt_ids)
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (prompt - 2, 2)
    assert usage["output_tokens"] == len(ids(THOUGHT + LOOK + CALL, GPT_OSS))
    assert usage["output_tokens_details"] == {"thinking_tokens": len(ids("The king is old.", GPT_OSS))}


def accumulated(found):
    """What a client makes of the events, as Anthropic's documentation of streaming says."""
    first, *middle, delta, stop = found
    assert (first["type"], delta["type"], stop["type"]) == ("message_start", "message_delta", "message_stop")
    whole, pieces = first["message"], {}
    for event in middle:
        index = event["index"]
        if event["type"] == "content_block_start":
            assert index == len(whole["content"])
            whole["content"].append(event["content_block"])
        elif event["type"] == "content_block_delta":
            kind, value = event["delta"].items()
            assert kind[0] == "type"
            if kind[1] == "input_json_delta":
                pieces[index] = pieces.get(index, "") + value[1]
                whole["content"][index]["input"] = json.loads(pieces[index])
            else:
                whole["content"][index][value[0]] += value[1]
        else:
            assert event["type"] == "content_block_stop" and index == len(whole["content"]) - 1
    return whole | delta["delta"] | {name: value for name, value in delta.items() if name not in ("type", "delta")}


@pytest.mark.parametrize(
    ("answer", "fields"),
    [
        (THOUGHT + ANSWER, {}),
        (THOUGHT + LOOK + CALL, {"tools": [WEATHER], "context_management": {"edits": []}}),
        (THOUGHT + ANSWER, {"thinking": {"type": "adaptive", "display": "omitted"}}),
        (THOUGHT + ANSWER, {"thinking": {"type": "disabled"}}),
        (ANSWER, {"stop_sequences": ["was"]}),
        (CALL.replace("}", ""), {"tools": [WEATHER]}),
        ("<|channel|>final<|message|><|return|>", {}),
    ],
)
def test_a_stream_is_the_same(answer, fields):
    whole = said(answer, **fields)
    streamed = accumulated(events(message(talking(answer), stream=True, **fields)))
    for one in (whole, streamed):
        one.pop("id")
        for block in one["content"]:
            block.pop("id", None)
    assert streamed == whole


@pytest.mark.parametrize(
    ("answer", "fields", "expected"),
    [
        (ANSWER, {}, ("end_turn", None)),
        (ANSWER, {"max_tokens": 5}, ("max_tokens", None)),
        (THOUGHT * 20, {"max_tokens": 1000}, ("model_context_window_exceeded", None)),
        (ANSWER, {"stop_sequences": ["late", "was"]}, ("stop_sequence", "was")),
        (THOUGHT + CALL, {"tools": [WEATHER]}, ("tool_use", None)),
    ],
)
def test_why_a_turn_ended(answer, fields, expected):
    found = said(answer, **fields)
    assert (found["stop_reason"], found["stop_sequence"]) == expected


def test_thinking_that_is_not_wanted():
    omitted = said(THOUGHT + ANSWER, thinking={"type": "enabled", "budget_tokens": 2000, "display": "omitted"})
    assert omitted["content"][0] == SIGNED | {"thinking": ""}
    assert [block["type"] for block in omitted["content"]] == ["thinking", "text"]
    left_out = said(THOUGHT + ANSWER, thinking={"type": "disabled"})
    assert [block["type"] for block in left_out["content"]] == ["text"]


def test_arguments_that_are_no_json_can_be_sent_back():
    (call,) = said(CALL.replace("}", ""), tools=[WEATHER])["content"]
    assert call["input"] == {"INVALID_JSON": '{"city": "Oslo"'}
    content = [{**result("what?"), "tool_use_id": call["id"]}]
    messages = [USER, assistant(call), {"role": "user", "content": content}]
    assert message(talking(ANSWER), messages=messages).status_code == 200


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"tool_choice": {"type": "any"}, "tools": [WEATHER]}, "to=functions.weather"),
        ({"tool_choice": {"type": "tool", "name": "weather"}, "tools": [WEATHER]}, "to=functions.weather"),
        ({"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, '"final"'),
        ({"tools": [WEATHER | {"strict": True}]}, "to=functions.weather"),
    ],
)
def test_what_must_be_said_is_a_grammar(fields, where):
    service = talking(ANSWER)
    assert message(service, **fields).status_code == 200
    assert where in service.worker.requests[-1].grammar.source


def test_tokens_are_counted():
    service = talking(ANSWER)
    body = {"messages": [USER], "system": "Be kind.", "tools": [WEATHER], "model": GPT_OSS}
    counted = post(service, "/v1/messages/count_tokens", body)
    assert service.worker.requests == []
    message(service, **body)
    assert counted.json() == {"input_tokens": len(service.worker.requests[-1].prompt_ids)}


def test_a_prompt_that_is_too_long_is_counted_up_to_four_contexts():
    """Claude Code looks for both numbers."""
    service = talking(ANSWER)
    long, longer, longest = ({"messages": [{"role": "user", "content": "a b " * times}]} for times in (300, 1000, 9000))
    counted = post(service, "/v1/messages/count_tokens", long).json()["input_tokens"]
    too_long = "invalid_request_error", f"prompt is too long: {counted} tokens > 400 maximum"
    assert fault(message(service, **long)) == too_long
    for body in (longer, longest):
        found = fault(message(service, **body))
        assert re.fullmatch(r"prompt is too long: at least (1601|2250) tokens > 400 maximum", found[1])
        assert fault(post(service, "/v1/messages/count_tokens", body)) == found


FAULTS = [
    ({"max_tokens": None}, "max_tokens is missing"),
    ({"colour": "red"}, "'colour' is not a field"),
    ({"system": [{"type": "image"}]}, "system[0] has the type 'image'"),
    ({"messages": []}, "messages must be a non-empty list"),
    ({"messages": [USER, {"role": "assistant", "content": "Once"}]}, "messages end with the assistant's"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role is 'tool'"),
    ({"messages": [user()]}, "messages[0].content is empty"),
    ({"messages": [user({"type": "image", "source": {}})]}, "messages[0].content[0] has the type 'image'"),
    ({"messages": [user(text("a", colour=1))]}, "messages[0].content[0] has 'colour'"),
    (
        {"messages": [user(result("a"))]},
        "messages[0].content[0].tool_use_id is 'call_x', which no earlier tool call has",
    ),
    ({"messages": [USER, assistant(used() | {"name": "a b"}), USER]}, "messages[1].content[0].name is 'a b'"),
    ({"messages": [USER, assistant(used() | {"input": "{}"}), USER]}, "messages[1].content[0].input must be an object"),
    ({"messages": [USER, assistant(SIGNED | {"thinking": "No."}), USER]}, "messages[1].content[0] was changed"),
    (
        {"messages": [USER, assistant(SIGNED | {"thinking": "", "signature": "Eq"})]},
        "messages[1].content[0].signature ('Eq') is not what this",
    ),
    ({"messages": [USER, assistant(SIGNED | {"signature": 5}), USER]}, "messages[1].content[0].signature must be a"),
    (
        {"messages": [USER, assistant({"type": "redacted_thinking", "data": "a"}), USER]},
        "has the type 'redacted_thinking'",
    ),
    ({"messages": [USER, {"role": "system", "content": "a", "clear_at": "now"}]}, "messages[1].clear_at is 'now'"),
    (
        {"messages": [USER, {"role": "system", "output_config": {"effort": "huge"}}]},
        "messages[1].output_config.effort is 'huge'",
    ),
    ({"messages": [USER | {"clear_at": "never"}]}, "messages[0] has 'clear_at'"),
    ({"messages": [{"role": "system", "content": ""}]}, "messages are all empty"),
    ({"tools": [{"type": "web_search_20260318", "name": "web_search"}]}, "tools[0] has the type 'web_search_20260318'"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema must be an object"),
    ({"tools": [WEATHER | {"name": "a b"}]}, "tools[0].name is 'a b'"),
    ({"tools": [WEATHER | {"colour": 1}]}, "tools[0] has 'colour'"),
    ({"tools": [WEATHER | {"defer_loading": True}, WEATHER | {"name": "a b"}]}, "tools[1].name is 'a b'"),
    ({"tools": [WEATHER | {"strict": True, "input_schema": {"not": {}}}]}, "tools[0].input_schema: the JSON schema"),
    ({"tool_choice": "any"}, "tool_choice must be an object, found 'any'"),
    ({"tool_choice": {"type": "one"}}, "tool_choice.type is 'one'; expected auto, any, tool or none"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name is missing"),
    ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}}, "tool_choice.disable_parallel_tool_use must"),
    ({"tool_choice": {"type": "auto", "tools": []}}, "'tool_choice.tools' is not a field"),
    ({"tool_choice": {"type": "any"}}, "but no tools are offered"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type is 'between_tools'; expected one of enabled, adaptive"),
    ({"thinking": {}}, "thinking.type is null"),
    ({"thinking": "enabled"}, "thinking must be an object, found 'enabled'"),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens must be a whole number"),
    ({"thinking": {"type": "enabled", "colour": 1}}, "'thinking.colour' is not a field"),
    ({"messages": [USER, {"role": "system", "output_config": {"a": 1}}]}, "'messages[1].output_config.a' is not"),
    ({"output_config": {"effort": "huge"}}, "output_config.effort is 'huge'"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "output_config.format"),
    ({"container": "a"}, "container 'a' is not supported"),
    ({"stop_sequences": [""]}, "a stop must have 1 to"),
]


@pytest.fixture(scope="module")
def harmony():
    return make(name=GPT_OSS)


@pytest.mark.parametrize(("fields", "words"), FAULTS)
def test_an_error_names_the_place(harmony, fields, words):
    kind, found = fault(message(harmony, **fields))
    assert kind == "invalid_request_error" and words in found
    assert harmony.worker.requests == []


def test_errors_have_anthropics_form(harmony):
    assert fault(message(make()))[1].startswith(f"the model '{GPT2}' is not a chat model")
    assert fault(message(harmony, model="claude-x"), 404)[0] == "not_found_error"
    assert fault(ask(harmony, "GET", "/v1/messages"), 405)[0] == "invalid_request_error"
    assert fault(ask(harmony, "POST", "/v1/messages/batches"), 404)[0] == "not_found_error"
    assert fault(ask(harmony, "POST", "/v1/messages", options={"api_key": "a"}), 401)[0] == "authentication_error"
    full = make(name=GPT_OSS)
    full.worker.room = 0
    assert fault(message(full), 429)[0] == "rate_limit_error"
    full.worker.refusal = "the server is shutting down"
    assert fault(message(full), 503)[0] == "overloaded_error"
    broken = make(lambda _: [5, Failed("it broke", "not_finite")], name=GPT_OSS)
    assert fault(message(broken), 500) == ("api_error", "it broke")
    *_, last = events(message(broken, stream=True))
    assert last["error"] == {"type": "api_error", "message": "it broke"}


def test_the_key_may_come_as_anthropics_clients_send_it():
    service, body = talking(ANSWER), {"messages": [USER], "max_tokens": 9}
    for header in ({"x-api-key": "secret"}, {"authorization": "Bearer secret"}):
        more = {"options": {"api_key": "secret"}, "headers": header, "content": json.dumps(body)}
        assert ask(service, "POST", "/v1/messages", **more).status_code == 200
    wrong = {"options": {"api_key": "secret"}, "headers": {"x-api-key": "secre"}, "content": json.dumps(body)}
    fault(ask(service, "POST", "/v1/messages", **wrong), 401)


def test_silence_is_filled_with_pings():
    service = make(lambda _: [0.05, *ids(ANSWER, GPT_OSS)], name=GPT_OSS, ping_seconds=0.01)
    assert {"type": "ping"} in events(message(service, stream=True))


def test_other_names_of_the_model():
    service = make(saying(ANSWER, name=GPT_OSS), name=GPT_OSS, aliases=("claude-*", "gpt-5"))
    for name in ("claude-x", "gpt-5", GPT_OSS):
        assert message(service, model=name).json()["model"] == GPT_OSS
        assert ask(service, "GET", f"/v1/models/{name}").json()["id"] == GPT_OSS
    for name in ("claude", "gpt-5x"):
        fault(message(service, model=name), 404)
