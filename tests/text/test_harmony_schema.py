"""JSON schemas as harmony writes them. The expected texts are openai-harmony 0.0.8's, quirks included."""

from typing import Any

import pytest

from gptjax.errors import RequestError
from gptjax.text.harmony import Function
from gptjax.text.harmony.schema import type_of


def fields(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


STRING = {"type": "string"}


@pytest.mark.parametrize(
    ("schema", "written"),
    [
        ({}, "any"),
        (True, "any"),
        ({"type": "null"}, "any"),
        ({"type": None, "oneOf": None}, "any"),
        ({"type": "object", "properties": None, "required": None, "description": None}, "{\n}"),
        (fields(a=STRING | dict.fromkeys(("title", "description", "enum", "oneOf", "nullable"))), "{\na?: string,\n}"),
        (fields(a={"oneOf": [{"type": None}, {**STRING, "description": None}]}), "{\na?:\n | any\n | string\n,\n}"),
        ({"type": "array", "items": None}, "any[]"),
        ({"type": []}, "any"),
        ({"type": ["integer", "null"]}, "number | null"),
        ({"type": "integer", "enum": [1, 2]}, "number"),
        ({"type": "string", "enum": ["a", 1, "b"]}, '"a" | "b"'),
        ({"type": "string", "enum": [1]}, "string"),
        ({"type": "array"}, "Array<any>"),
        ({"type": "array", "items": {"type": "array", "items": STRING}}, "string[][]"),
        ({"type": "array", "items": [STRING]}, "any[]"),
        ({"anyOf": [STRING]}, "any"),
        ({"type": "object"}, "{\n}"),
        ({"oneOf": []}, ""),
        ({"oneOf": [STRING, {"type": "number", "nullable": True}]}, "\n | string\n | number | null"),
        (
            {"oneOf": [{"type": "string", "enum": ["a"], "default": "a", "description": "one"}, {"default": 'q"'}]},
            '\n | "a" // one default: "a"\n | any // default: "q""',
        ),
        ({"oneOf": [True, fields(a=STRING)]}, "\n | any\n | {\n   a?: string,\n   }"),
        ({**fields(a=STRING, b={}), "required": ["b"], "description": "both"}, "// both\n{\na?: string,\nb: any,\n}"),
        (fields(a=fields(b=fields())), "{\na?: {\n    b?: {\n        },\n    },\n}"),
        (fields(a={**fields(), "description": "deep"}), "{\n// deep\na?:     // deep\n{\n    },\n}"),
        (fields(a={"type": "array", "items": fields(b=True)}), "{\na?: {\n    b?: any,\n    }[],\n}"),
        (
            fields(a={"title": "A", "description": "it is", "examples": ["x", 1], "nullable": True, "type": "string"}),
            '{\n// A\n//\n// it is\n// Examples:\n// - "x"\na?: string | null,\n}',
        ),
        (fields(a={"enum": ["null"], "nullable": True, "type": "string", "examples": []}), '{\na?: "null",\n}'),
        (
            fields(a={"type": "string", "default": 'q"'}, b={**STRING, "enum": ["b"], "default": "b"}),
            '{\na?: string, // default: "q"",\nb?: "b", // default: b\n}'.replace('"",', '""'),
        ),
        (
            fields(a={"oneOf": [{**STRING, "description": "s", "default": 1}, {"type": "number"}], "description": "s"}),
            "{\na?:\n | string // default: 1\n | number\n,\n}",
        ),
        (
            fields(
                a={"oneOf": [{**STRING, "description": "t"}, {"description": "u"}], "description": "s", "title": "A"}
            ),
            "{\n// A\n//\n// s\na?:\n | string\n | any // u\n,\n}",
        ),
        (
            fields(
                a={"oneOf": [{"enum": ["x"], "default": "x"}, {"description": "s"}], "description": "s", "default": "x"}
            ),
            '{\n// s\n// default: "x"\na?:\n | any // default: x\n | any\n,\n}',
        ),
        (fields(a={"oneOf": [], "default": "x", "enum": ["x"]}), "{\n// default: x\na?:\n,\n}"),
        (fields(a={"oneOf": [{"oneOf": [STRING]}]}), "{\na?:\n | \n    | string\n,\n}"),
    ],
)
def test_types(schema: Any, written: str) -> None:
    assert "".join(type_of(schema)) == written


@pytest.mark.parametrize(
    ("default", "written"),
    [
        (None, "null"),
        (True, "true"),
        (-1, "-1"),
        (2**64 - 1, "18446744073709551615"),
        (2**64, "1.8446744073709552e19"),
        (-(2**63) - 1, "-9.223372036854776e18"),
        (1.0, "1.0"),
        (1e15, "1000000000000000.0"),
        (1e16, "1e16"),
        (-0.0001, "-0.0001"),
        (-1.25e-05, "-0.0000125"),
        (1e-06, "1e-6"),
        (5e-324, "5e-324"),
        ([1, None, {"b": "é\n\x7f", "a": 1e-07}], '[1,null,{"b":"é\\n\x7f","a":1e-7}]'),
    ],
)
def test_defaults(default: Any, written: str) -> None:
    assert "".join(type_of(fields(a={"default": default}))) == f"{{\na?: any, // default: {written}\n}}"


LOOP: dict[str, Any] = {"type": "object"}
LOOP["properties"] = {"a": LOOP}


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ("text", "the parameters of f are str; expected a JSON schema"),
        (fields(a={"type": 3}), "the parameters of f.properties.a.type is 3; expected a type's name"),
        ({"type": "object", "properties": ["a"]}, r"properties is \['a'\]"),
        ({"properties": {"a": "string"}}, "properties.a is 'string'; expected a schema"),
        (fields(a={"required": True}), "properties.a.required is True; expected a list of names"),
        ({"items": 3}, "items is 3"),
        ({"items": {"items": {"type": [1]}}}, r"items.items.type is \[1\]"),
        ({"oneOf": {}}, r"oneOf is \{\}"),
        ({"oneOf": [{}, None]}, r"oneOf\[1\] is None"),
        ({"nullable": "yes"}, "nullable is 'yes'; expected true or false"),
        ({"default": float("nan")}, "default: nan .* is not JSON"),
        ({"default": 10**400}, "is not JSON"),
        ({"default": {1}}, r"default: \{1\} \(set\) is not JSON"),
        ({"default": [b""]}, r"default\[0\]: b'' \(bytes\) is not JSON"),
        ({"x-note": "\ud800"}, "is not JSON"),
        ({"default": {1: 2}}, "default have the key 1"),
        (fields(**{"\ud800": {}}), "have the key"),
        (LOOP, "nest deeper than 64 levels"),
    ],
)
def test_errors(schema: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        Function("f", "", schema)
