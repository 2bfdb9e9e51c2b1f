"""Structured output through the server. The worker draws at random whatever a request's grammar allows."""

import dataclasses
import json
import random
import sys

import jsonschema
import pytest

from gptjax.structured import library, places
from tests.fuzz import rounds
from tests.server.drawn_material import drawing
from tests.server.server_material import GPT2, GPT_OSS, chat, complete, events, fault, make, post, tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "kind": {"enum": ["a", "b"]}, "n": {"type": "integer"}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
BAD = {"type": "object", "properties": {"a": {"not": {}}}}


def tool(name: str, parameters=SCHEMA, **more) -> dict:
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters, **more}}


def drawn(name: str = GPT_OSS, seed: int = 0):
    return make(drawing(name, seed), name=name)


def finished(response) -> dict:
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] in ("stop", "tool_calls"), choice
    return choice["message"]


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_is_valid_by_its_schema(seed):
    message = finished(chat(drawn(seed=seed), response_format=FORM, temperature=1.5))
    jsonschema.validate(json.loads(message["content"]), SCHEMA)


def test_reasoning_stays_free():
    found = [finished(chat(drawn(seed=seed), response_format=FORM)) for seed in range(12)]
    assert any(message.get("reasoning_content") for message in found)


def test_any_json_object():
    assert isinstance(json.loads(finished(chat(drawn(), response_format={"type": "json_object"}))["content"]), dict)


def test_a_stream_is_the_same():
    found = events(chat(drawn(seed=3), response_format=FORM, stream=True))
    content = "".join(choice["delta"].get("content") or "" for each in found for choice in each["choices"])
    assert content == finished(chat(drawn(seed=3), response_format=FORM))["content"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "g"}}])
def test_a_call_is_forced(choice, seed):
    tools = [tool("f"), tool("g"), tool("h", BAD)]
    message = finished(chat(drawn(seed=seed), tools=tools, tool_choice=choice))
    (call,) = message["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert isinstance(arguments, dict)
    assert call["function"]["name"] in ({"f", "g", "h"} if choice == "required" else {"g"})
    if call["function"]["name"] != "h":  # whose schema cannot be compiled, and which is not strict
        jsonschema.validate(arguments, SCHEMA)


def test_strict_arguments_are_valid_whenever_the_model_calls():
    called = 0
    for seed in range(12):
        message = finished(chat(drawn(seed=seed), tools=[tool("f", strict=True), tool("g")]))
        for call in message.get("tool_calls", ()):
            called += 1
            jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
    assert called


def test_tools_that_are_not_strict_are_not_constrained():
    service = make(lambda request: [] if request.grammar else tokenizer(GPT_OSS).encode("a"), name=GPT_OSS)
    chat(service, tools=[tool("f"), tool("g", strict=False)], max_tokens=1).raise_for_status()


def test_responses():
    form = {"type": "json_schema", "name": "thing", "schema": SCHEMA, "strict": True}
    found = post(drawn(), "/v1/responses", {"input": "a", "text": {"format": form}}).json()
    assert found["text"]["format"] == form
    text = "".join(part["text"] for item in found["output"] if item["type"] == "message" for part in item["content"])
    jsonschema.validate(json.loads(text), SCHEMA)
    flat = {"type": "function", "name": "f", "parameters": SCHEMA, "strict": True}
    for choice in ("required", {"type": "function", "name": "f"}):
        found = post(drawn(), "/v1/responses", {"input": "a", "tools": [flat], "tool_choice": choice}).json()
        assert found["tool_choice"] == choice
        (call,) = [item for item in found["output"] if item["type"] == "function_call"]
        jsonschema.validate(json.loads(call["arguments"]), SCHEMA)
    error = fault(post(drawn(), "/v1/responses", {"input": "a", "tools": [flat | {"parameters": BAD}]}))
    assert error["param"] == "tools"
    assert "'not' at #/properties/a" in error["message"]


@pytest.mark.parametrize("name", [GPT2, GPT_OSS])
def test_the_names_that_vllm_has(name):
    def text(**fields):
        return complete(drawn(name), **fields, max_tokens=200).json()["choices"][0]["text"]

    jsonschema.validate(json.loads(text(guided_json=SCHEMA)), SCHEMA)
    jsonschema.validate(json.loads(text(guided_json=json.dumps(SCHEMA))), SCHEMA)
    assert text(guided_regex="(yes|no)") in ("yes", "no")
    choices = ['é😀 "/\n', "<|end|>", "n|o"]
    assert {text(guided_choice=choices, seed=seed) for seed in range(9)} <= set(choices)
    assert text(structured_outputs={"choice": ["one"], "json": None, "json_object": False}) == "one"
    jsonschema.validate(json.loads(text(structured_outputs={"json": SCHEMA, "disable_fallback": True})), SCHEMA)
    assert text(structured_outputs={"regex": "a{3}"}) == text(structured_outputs={"grammar": 'start: "aaa"'}) == "aaa"
    assert text(guided_grammar='start: "a" B\nB: /b{1,3}/').startswith("ab")
    if name == GPT_OSS:
        assert finished(chat(drawn(), guided_regex="(yes|no)"))["content"] in ("yes", "no")
        found = finished(chat(drawn(), structured_outputs={"json_object": True}))["content"]
        assert isinstance(json.loads(found), dict)


def test_keywords_that_are_null_are_absent():
    """As Pydantic and others write them."""
    nulls = dict.fromkeys(("description", "required", "enum", "$ref", "anyOf", "minimum", "items"))
    inner = {**nulls, "type": "array", "prefixItems": [{**nulls, "enum": ["a", None]}], "minItems": 1, "maxItems": 1}
    properties = {"x": inner, "c": {"const": None}}
    schema = {**nulls, "properties": properties, "required": ["x", "c"], "additionalProperties": False}
    asked = {"guided_json": schema | {"type": "object"}, "max_tokens": 200}
    found = {complete(drawn(GPT2, seed), **asked).json()["choices"][0]["text"] for seed in range(9)}
    assert {json.dumps(json.loads(each)) for each in found} == {'{"x": ["a"], "c": null}', '{"x": [null], "c": null}'}
    for strict in (True, False):
        given = tool("f", {**schema, "type": None}, strict=strict)
        (call,) = finished(chat(drawn(), tools=[given], tool_choice="required"))["tool_calls"]
        assert json.loads(call["function"]["arguments"]).keys() == {"x", "c"}


MALFORMED = [
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": BAD}}},
        "response_format",
        "'not' at #/prop",
    ),
    ({"response_format": {"type": "json_schema"}}, "response_format", "schema"),
    ({"response_format": {"type": "json_schema", "json_schema": 3}}, "response_format", "must be an object"),
    ({"response_format": {"type": "xml"}}, "response_format", "xml"),
    ({"response_format": FORM, "guided_regex": "a"}, "response_format", "choose one"),
    ({"guided_json": "{"}, "guided_json", "guided_json"),
    ({"guided_json": 3}, "guided_json", "object"),
    ({"guided_regex": "("}, "guided_regex", "unclosed"),
    ({"guided_grammar": "start: b"}, "guided_grammar", "b"),
    ({"guided_grammar": "start: start"}, "guided_grammar", "no text"),
    ({"guided_regex": "a", "guided_grammar": "b"}, "guided_regex", "choose one"),
    ({"guided_choice": []}, "guided_choice", "at least one"),
    ({"guided_choice": "ab"}, "guided_choice", "a list"),
    ({"guided_choice": ["a", ""]}, "guided_choice", "empty"),
    ({"guided_choice": ["a", 3]}, "guided_choice", "must be text"),
    ({"guided_choice": ["\ud800"]}, "guided_choice", "lone surrogate"),
    ({"structured_outputs": []}, "structured_outputs", "must be an object"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "choose one"),
    ({"structured_outputs": {"json": BAD}}, "structured_outputs", "structured_outputs.json: the JSON schema has 'not'"),
    ({"structured_outputs": {"json_object": 1}}, "structured_outputs", "true or false"),
    ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs", "'structural_tag'"),
    ({"structured_outputs": {"regex": "a"}, "guided_choice": ["a"]}, "guided_choice", "choose one"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [tool("f")]}, "tool_choice", "x"),
    ({"tool_choice": {"type": "function"}, "tools": [tool("f")]}, "tool_choice", "names a function"),
    ({"tools": [tool("f", BAD, strict=True)]}, "tools", "'not' at #/properties/a"),
    ({"tools": [tool("f", {"type": "array"}, strict=True)]}, "tools", "arguments are an object"),
]


@pytest.mark.parametrize(("fields", "param", "words"), MALFORMED)
def test_what_cannot_be_compiled_is_a_400_before_anything_streams(fields, param, words):
    for stream in (False, True):
        error = fault(chat(drawn(), stream=stream, **fields))
        assert error["param"] == param
        assert words in error["message"]


def test_a_model_without_a_tokenizer_takes_no_form():
    service = make()
    service = dataclasses.replace(service, served=dataclasses.replace(service.served, tokenizer=None))
    for fields in ({"guided_json": SCHEMA}, {"guided_regex": "a"}):
        assert "tokenizer" in fault(post(service, "/v1/completions", {"prompt": [1, 2], **fields}))["message"]


def test_a_built_in_tool_may_say_that_it_is_strict():
    given = {"input": "a", "tools": [{"type": "python", "strict": True}], "max_output_tokens": 1}
    post(make(name=GPT_OSS), "/v1/responses", given).raise_for_status()


def test_a_format_in_one_word_is_repeated_as_an_object():
    found = post(make(name=GPT_OSS), "/v1/responses", {"input": "a", "text": {"format": "text"}}).json()
    assert found["text"]["format"] == {"type": "text"}


def test_the_place_of_a_fault_is_not_looked_for_longer_than_a_second(monkeypatch):
    """Each try may compile what hundreds of references name."""
    monkeypatch.setattr(places, "_MOST_SECONDS", 0.0)
    error = fault(chat(drawn(), response_format={"type": "json_schema", "json_schema": {"schema": BAD}}))
    assert "the JSON schema at #" in error["message"]


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    library.library.cache_clear()
    try:
        assert "'structured'" in fault(chat(drawn(), response_format=FORM))["message"]
    finally:
        library.library.cache_clear()


def test_random_schemas_are_answered_or_refused():
    """Never a 500; what is refused names the field."""
    chance = random.Random(11)
    words = "type properties items not oneOf enum $ref pattern required format minimum if contains const".split()
    values = [None, True, 3, "object", "string", "#", [], {}, "[", ["a"], 1e300]

    def made(depth: int):
        if not depth or chance.random() < 0.3:
            return chance.choice(values)
        return {chance.choice(words): made(depth - 1) for _ in range(chance.randrange(4))}

    for _ in range(rounds(200)):
        schema = made(3)
        fields = chance.choice(
            [
                {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
                {"response_format": schema},
                {"guided_json": schema},
                {"tools": [tool("f", schema, strict=True)]},
                {"tools": [tool("f")], "tool_choice": schema},
            ]
        )
        service = make(drawing_or_plain(), name=GPT_OSS)
        response = chat(service, max_tokens=2, **fields)
        assert response.status_code in (200, 400), (fields, response.text)
        if response.status_code == 400:
            assert response.json()["error"]["param"] in (*fields, None), (fields, response.text)


def drawing_or_plain():
    draw = drawing(GPT_OSS)
    return lambda request: draw(request) if request.grammar else tokenizer(GPT_OSS).encode("a b")
