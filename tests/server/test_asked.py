"""What unchanged clients send beside the usual: what it becomes in the prompt, or why it is refused."""

import json

import pytest

from tests.server.responses_material import ANSWER, NAMESPACE, WEATHER, respond, talking
from tests.server.server_material import GPT_OSS, USER, chat, complete, events, fault, make, saying, tokenizer
from tests.text.chat_material import chat_tokenizer, template

CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
TOLD = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}
TOOL = {"type": "function", "function": {name: WEATHER[name] for name in ("name", "description", "parameters")}}
SYSTEM = {"role": "system", "content": "Be kind."}


def prompt(route=chat, **fields):
    service = talking(ANSWER)
    assert (found := route(service, **fields)).status_code == 200, found.text
    return tokenizer(GPT_OSS).decode(service.worker.requests[-1].prompt_ids, special=True)


def called(**more):
    return [USER, {"role": "assistant", "content": None, "tool_calls": [CALL], **more}, TOLD]


THOUGHT = prompt(messages=called(reasoning_content="Hm. So."), tools=[TOOL])


@pytest.mark.parametrize(
    "thought",
    [
        {"reasoning": "Hm. So."},
        {"reasoning_content": "Hm. So.", "provider_specific_fields": {"reasoning": "Hm. So."}},
        {"thinking_blocks": [{"type": "thinking", "thinking": "Hm. ", "signature": "x"}, {"thinking": "So."}]},
        {"thinking_blocks": [{"type": "redacted_thinking", "data": "x"}], "reasoning": "Hm. So."},
        {"reasoning_details": [{"type": "reasoning.text", "text": "Hm. So."}, {"type": "reasoning.encrypted"}]},
        {"reasoning_content": "", "thinking_blocks": [{"thinking": ""}], "reasoning_details": [{"text": "Hm. So."}]},
        {"reasoning_content": "Hm. So.", "reasoning_details": [{"text": "Not this."}], "cache_control": {"type": "x"}},
    ],
)
def test_reasoning_comes_back_under_any_of_its_names(thought):
    assert "Hm. So." in THOUGHT
    assert prompt(messages=called(**thought), tools=[TOOL]) == THOUGHT


@pytest.mark.parametrize(
    ("thought", "says"),
    [
        ({"thinking_blocks": "Hm."}, "messages[1].thinking_blocks is 'Hm.'; expected a list"),
        ({"thinking_blocks": ["Hm."]}, "messages[1].thinking_blocks[0] is 'Hm.'; expected an object"),
        ({"reasoning_details": [{"text": 3}]}, "messages[1].reasoning_details[0].text is 3; expected a string"),
    ],
)
def test_malformed_reasoning_is_refused(thought, says):
    error = fault(chat(talking(ANSWER), messages=called(**thought), tools=[TOOL]))
    assert error["param"] == "messages"
    assert says in error["message"]


@pytest.mark.parametrize(
    ("fields", "place", "says"),
    [
        ({"reasoning": {"max_tokens": 9}}, "reasoning.max_tokens", "is not a field"),
        ({"reasoning": {"effort": 9}}, "reasoning.effort", "must be a string"),
        ({"chat_template_kwargs": {"colour": 9}}, "chat_template_kwargs.colour", "is not a field"),
        ({"chat_template_kwargs": 9}, "chat_template_kwargs", "must be an object, found 9"),
        ({"stream": True, "stream_options": {"include_usage": 9}}, "stream_options.include_usage", "true or false"),
    ],
)
def test_an_error_within_an_object_names_its_place(fields, place, says):
    error = fault(chat(talking(ANSWER), **fields))
    assert error["param"] == place
    assert place in error["message"] and says in error["message"]


def test_hints_change_nothing():
    plain = prompt(messages=[SYSTEM, USER], tools=[TOOL])
    hint = {"cache_control": {"type": "ephemeral"}}
    parts = [{"type": "text", "text": USER["content"], **hint}]
    marked = [SYSTEM | hint, {"role": "user", "content": parts}]
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    assert prompt(messages=marked, tools=[TOOL | hint], client_metadata={"a": "b"}, **options) == plain
    assert complete(make(), client_metadata={"a": "b"}).status_code == 200
    (*_, last) = events(chat(talking(ANSWER), **options))
    assert last["usage"]["completion_tokens"] > 0
    error = fault(chat(talking(ANSWER), stream=True, stream_options={"continuous_usage_stats": 1}))
    assert "continuous_usage_stats must be true or false" in error["message"]


@pytest.mark.parametrize("route", [chat, respond])
def test_an_effort_is_the_nearest_that_the_model_has(route):
    for asked, got in (("minimal", "low"), ("low", "low"), ("xhigh", "high"), (None, "medium")):
        assert f"Reasoning: {got}\n" in prompt(route, reasoning={"effort": asked, "summary": "auto"})
    for bad, says in (("none", "always reasons"), ("max", "low, medium, high")):
        error = fault(route(talking(ANSWER), reasoning={"effort": bad}))
        assert says in error["message"]
        assert error["param"] == ("reasoning.effort" if route is respond else "reasoning_effort")


def test_an_effort_has_two_names_in_chat():
    assert "Reasoning: low\n" in prompt(reasoning={"effort": "low"}, reasoning_effort="low")
    assert "Reasoning: high\n" in prompt(reasoning={}, reasoning_effort="xhigh")
    for fields, says in (
        ({"reasoning": {"effort": "low"}, "reasoning_effort": "high"}, "are different"),
        ({"reasoning": "low"}, "must be an object"),
        ({"reasoning": {"effort": 3}}, "must be a string"),
        ({"reasoning": {"max_tokens": 3}}, "max_tokens"),
    ):
        assert says in fault(chat(talking(ANSWER), **fields))["message"]


@pytest.mark.parametrize("route", [chat, respond])
def test_no_effort_is_no_thinking_where_that_can_be_chosen(route, tmp_path):
    text = chat_tokenizer(tmp_path, chat_template=template("qwen3"))
    service = make(lambda _: text.encode("Yes.<|im_end|>", special=True), text=text)
    assert route(service, reasoning={"effort": "none"}).status_code == 200
    assert text.decode(service.worker.requests[-1].prompt_ids, special=True).endswith("</think>\n\n")
    for fields in ({"reasoning": {"effort": "low"}}, {"chat_template_kwargs": {"enable_thinking": True}}):
        fault(route(service, **({"reasoning": {"effort": "none"}} | fields)))


@pytest.mark.parametrize("messages", [[SYSTEM], [{"role": "assistant", "content": "Hi."}], [*called()[1:]]])
def test_a_conversation_needs_no_user(messages):
    found = prompt(messages=messages, tools=[TOOL])
    assert "<|start|>user" not in found
    assert found.endswith("<|end|><|start|>assistant" if messages[-1] is not TOLD else "rain<|end|><|start|>assistant")


FORM = {"name": "pet", "description": "A pet.\nOf ours.", "schema": {"type": "object", "required": None, "é": "ü"}}
ABOUT = '# Response Formats\n\n## pet\n\n// A pet.\n// Of ours.\n{"type":"object","required":null,"é":"ü"}<|end|>'


@pytest.mark.parametrize("flat", [True, False])
def test_harmony_describes_the_form_of_the_answer(flat):
    """As in "Structured output" of openai/harmony's docs/format.md."""

    def asked(form, **more):
        if flat:
            tools = [WEATHER] if "tools" in more else []
            given = {"input": more.get("messages", [USER]), "text": {"format": {"type": "json_schema", **form}}}
            return prompt(respond, tools=tools, **given)
        return prompt(response_format={"type": "json_schema", "json_schema": form}, **more)

    assert f"<|start|>developer<|message|>{ABOUT}<|start|>user" in asked(FORM)
    assert f"# Instructions\n\nBe kind.\n\n{ABOUT}" in asked(FORM, messages=[SYSTEM, USER])
    assert f"}} // namespace functions\n\n{ABOUT}" in asked(FORM, tools=[TOOL])
    assert "## response\n\n{}<|end|>" in asked({"schema": {}})
    assert "Response Formats" not in prompt(response_format={"type": "json_object"})


@pytest.mark.parametrize(
    ("more", "says"),
    [({"name": "a b"}, "'a b'"), ({"description": 3}, "is 3")],
)
def test_what_describes_a_form_is_checked(more, says):
    form = {"type": "json_schema", "json_schema": FORM | more}
    error = fault(chat(talking(ANSWER), response_format=form))
    assert (error["param"], says in error["message"]) == ("response_format", True), error
    error = fault(respond(talking(ANSWER), text={"format": {"type": "json_schema", **FORM, **more}}))
    assert (error["param"], says in error["message"]) == ("text", True), error


# What Codex CLI offers.
CODEX = [WEATHER, NAMESPACE, {"type": "web_search", "external_web_access": False}]


def test_functions_of_a_namespace_are_offered_and_called():
    found = prompt(respond, tools=CODEX)
    assert "// files: Of the user.\n// \n// All.\ntype files.list = (_: {" in found
    assert "\n\ntype files.read = () => any;" in found
    turn = "<|channel|>commentary to=functions.files.read <|constrain|>json<|message|><|call|>"
    for stream in (False, True):
        service = make(saying(turn, ANSWER, name=GPT_OSS), name=GPT_OSS)
        response = respond(service, tools=CODEX, stream=stream)
        body = json.loads(response.text.split("data: ")[-2])["response"] if stream else response.json()
        (call,) = body["output"]
        assert (call["namespace"], call["name"], call["arguments"]) == ("files", "read", "{}")
        assert body["tools"][1] == NAMESPACE
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "x"}
    again = prompt(respond, input=[USER, call, result], tools=CODEX)
    assert (
        "<|start|>assistant to=functions.files.read<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"
        in again
    )


def test_tools_that_clients_offer_unasked_are_left_out_with_a_warning():
    for stream in (False, True):
        response = respond(talking(ANSWER), tools=[*CODEX, CODEX[-1]], stream=stream)
        assert response.headers["x-gptjax-warning"].endswith(": web_search")
        assert "x-gptjax-warning" not in respond(talking(ANSWER), tools=[WEATHER], stream=stream).headers
    assert prompt(respond, tools=CODEX) == prompt(respond, tools=CODEX[:2])
    assert "no tools are offered" in fault(respond(talking(ANSWER), tools=CODEX[2:], tool_choice="required"))["message"]
