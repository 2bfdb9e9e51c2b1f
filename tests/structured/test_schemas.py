"""JSON schemas: what comes out is valid by a library that is not ours, and what cannot be compiled is named."""

import json
import random
import re
from pathlib import Path

import jsonschema
import pytest

from gptjax.errors import RequestError
from gptjax.structured import Grammar
from gptjax.structured.matching import Compiler
from tests.fuzz import rounds
from tests.structured.walks import compiler, tokenizer, walk, walked

SELECTION = json.loads((Path(__file__).parents[1] / "data" / "json_schemas" / "selection.json").read_text())
VALIDATORS = {"draft7": jsonschema.Draft7Validator, "draft2020-12": jsonschema.Draft202012Validator}
CASES = [(draft, *case) for draft, cases in SELECTION.items() for case in cases]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_texts_of_the_test_suites_schemas_are_valid():
    compiled = refused = texts = 0
    for draft, file, description, schema in CASES:
        try:
            grammar = Grammar.of_json_schema(schema)
        except RequestError as error:
            refused += 1
            keyword, place = re.match(r"the JSON schema has '(.+)' at (#[^:]*): ", str(error)).groups()
            assert keyword in _at(schema, place), (file, description)
            continue
        compiled += 1
        for value in walked(grammar, 4):
            texts += 1
            assert VALIDATORS[draft](schema).is_valid(value), (file, description, value)
    assert compiled > 70
    assert refused > 60
    assert texts > 3.5 * compiled


def _at(schema, place):
    for step in place.removeprefix("#").split("/")[1:]:
        schema = schema[int(step)] if isinstance(schema, list) else schema[step.replace("~1", "/").replace("~0", "~")]
    return schema


def test_a_schema_with_several_types():
    found = walked(Grammar.of_json_schema(PERSON), 20)
    assert len(found) > 15
    for value in found:
        jsonschema.validate(value, PERSON)


def test_a_union_whose_branches_exclude_each_other_is_kept():
    """Tools often have such a `oneOf`. One whose branches overlap would need what llguidance does not do."""
    branches = [
        {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"], "additionalProperties": False}
        for kind in ("cat", "dog")
    ]
    schema = {"oneOf": branches, "discriminator": {"propertyName": "kind"}}
    found = walked(Grammar.of_json_schema(schema), 10)
    assert {value["kind"] for value in found} == {"cat", "dog"}
    with pytest.raises(RequestError, match=r"has 'oneOf' at #/properties/a: .*oneOf"):
        Grammar.of_json_schema({"properties": {"a": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}})


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"not": {"type": "string"}}, "'not' at #:"),
        ({"properties": {"a/b": {"items": {"contains": {}}}}}, "'contains' at #/properties/a~1b/items:"),
        ({"anyOf": [{"type": "string"}, {"uniqueItems": True}]}, "'uniqueItems' at #/anyOf/1:"),
        ({"if": {}, "not": {}}, "'if' at #:"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"propertyNames": {}}}}, "'propertyNames' at #/$defs/a:"),
        ({"type": "strin"}, "'type' at #:"),
        ({"required": [None]}, "'required' at #:"),
        ({"type": "string", "format": "of my own"}, "'format' at #:"),
        ({"type": "string", "pattern": "(?=a)"}, "'pattern' at #:"),
        ({"$ref": "https://example.com/schema"}, "'$ref' at #:"),
        ({"minimum": 3, "maximum": 2, "type": "integer"}, "'minimum' at #:"),
        ({"$ref": "#"}, "'$ref' at #: no text can be"),
        ({"items": {"$id": "a", "$ref": "#/b"}}, "at #:"),
    ],
)
def test_a_fault_is_named_with_its_place(schema, expected):
    with pytest.raises(RequestError) as caught:
        Grammar.of_json_schema(schema)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("schema", [[], "object", 3, None, {"const": float("nan")}, {1: {}, "a": {2}}])
def test_what_is_no_schema_is_refused(schema):
    with pytest.raises(RequestError):
        Grammar.of_json_schema(schema)


def test_a_schema_has_bounds():
    deep = {}
    for _ in range(200):
        deep = {"items": deep}
    with pytest.raises(RequestError, match="levels deep"):
        Grammar.of_json_schema(deep)
    with pytest.raises(RequestError, match="characters"):
        Grammar.of_json_schema({"enum": ["a" * 10_000] * 20})
    with pytest.raises(RequestError, match="'const' at #"):
        Grammar.of_json_schema({"const": "\ud800"})


def test_white_space_is_bounded():
    """A schema cannot loosen it either."""
    schema = {"type": "array", "x-guidance": {"whitespace_pattern": "[ ]*"}, "items": {"type": "null"}}
    grammar = Grammar.of_json_schema(schema)
    for space, fits in ((" ", True), ("\n" + " " * 16, True), ("  ", False), ("\n\n", False), ("\n" + " " * 17, False)):
        matcher = compiler().matcher(grammar, (), tokenizer().encode(f"[{space}null]"))
        assert (matcher.failure is None) == fits, space


def test_special_tokens_are_never_part_of_a_string():
    """GPT-2's end of text is spelled in letters that a string may have."""
    text = tokenizer("gpt-oss-tales")
    vocabulary = Compiler(text, text.vocab_size)
    matcher = vocabulary.matcher(Grammar.of_json_schema({"type": "string"}), text.eos_ids, text.encode('"a'))
    for special in text.special_ids.values():
        copy = vocabulary.matcher(Grammar.of_json_schema({"type": "string"}), (), text.encode('"a'))
        copy.take(special)
        assert copy.failure is not None
    assert matcher.failure is None
    matcher.take(text.encode("<|end|>")[0])  # the same as plain text
    assert matcher.failure is None


def test_random_schemas_are_compiled_or_refused():
    """Whatever is in them, nothing but a `RequestError` may come out."""
    chance = random.Random(7)
    keywords = """type properties required items enum const anyOf oneOf allOf not if pattern format minimum multipleOf
    minLength maxItems prefixItems additionalProperties patternProperties $ref $defs $id $schema x-guidance""".split()
    values = [None, True, -1, 1e300, 0.1, "", "string", "object", "#", "#/$defs/a", "[", "(a+)+", [], [None], {}, ["a"]]

    def made(depth: int):
        if depth == 0 or chance.random() < 0.3:
            return chance.choice(values)
        if chance.random() < 0.2:
            return [made(depth - 1) for _ in range(chance.randrange(3))]
        return {chance.choice(keywords): made(depth - 1) for _ in range(chance.randrange(4))}

    outcomes = {True: 0, False: 0}
    for _ in range(rounds(1000)):
        schema = {chance.choice(keywords): made(3) for _ in range(chance.randrange(4))}
        try:
            grammar = Grammar.of_json_schema(schema)
            compiler().prepare(grammar)
        except RequestError as error:
            outcomes[False] += 1
            assert "#" in str(error), schema
        else:
            outcomes[True] += 1
            walk(grammar, 0, most=5)
    assert min(outcomes.values()) > 0
