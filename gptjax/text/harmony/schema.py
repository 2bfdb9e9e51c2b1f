"""JSON schemas in the TypeScript-like form in which harmony describes functions.

The exact form is that of `json_schema_to_typescript` in openai-harmony 0.0.8 (`encoding.rs`), quirks included: GPT-OSS
was trained on that text. So `anyOf`, `allOf`, `$ref` and `const` become "any", and a top-level oneOf quotes a string
default that a property's oneOf leaves bare.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from gptjax.errors import RequestError
from gptjax.support.quoting import quoted
from gptjax.text.fields import MOST_VALUES
from gptjax.text.vocabulary import is_text

# Deeper than functions' schemas, shallower than the limits of openai-harmony and Python.
_DEEPEST = 64
_SIMPLE = {"number": "number", "integer": "number", "boolean": "boolean", "array": "Array<any>"}

Schema = Mapping[str, Any]


def _are_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# The keywords that are read; others may hold anything. Null counts as absent: clients write it for an empty field.
_KEYWORDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "type": (lambda value: isinstance(value, str) or _are_strings(value), "a type's name or a list of them"),
    "properties": (lambda value: isinstance(value, dict), "an object of names and schemas"),
    "required": (_are_strings, "a list of names"),
    "items": (lambda value: isinstance(value, dict | list | bool), "a schema"),
    "oneOf": (lambda value: isinstance(value, list), "a list of schemas"),
    "enum": (lambda value: isinstance(value, list), "a list"),
    "examples": (lambda value: isinstance(value, list), "a list"),
    "title": (lambda value: isinstance(value, str), "a string"),
    "description": (lambda value: isinstance(value, str), "a string"),
    "nullable": (lambda value: isinstance(value, bool), "true or false"),
}


def check_schema(schema: object, where: str) -> None:
    """Raises RequestError, beginning with `where`, if it is not JSON, not a schema, or holds too many values."""
    _Check(where).schema(schema)


@dataclass(frozen=True, slots=True)
class _Place:
    """A place in a schema, made text only for an error: text for every value would cost more than the check."""

    parent: "_Place | None"
    step: str

    def __str__(self) -> str:
        steps, place = [], self
        while place.parent is not None:
            steps.append(place.step if len(place.step) < 80 else f"{place.step[:40]}...")
            place = place.parent
        shortened = steps if len(steps) <= 16 else [*steps[:8], "...", *steps[-4:]]
        return "".join([place.step, *reversed(shortened)])


class _Check:
    def __init__(self, where: str) -> None:
        self._root = _Place(None, where)
        self._left = MOST_VALUES

    def schema(self, schema: object) -> None:
        self._json(schema, self._root, 0)
        self._keywords(schema, self._root)

    def _json(self, value: object, at: _Place, depth: int) -> None:
        self._left -= 1
        if self._left < 0:
            raise RequestError(f"{self._root} hold more than {MOST_VALUES:,} values: use a smaller schema")
        if depth > _DEEPEST:
            raise RequestError(f"{at} ... nest deeper than {_DEEPEST} levels: use a flatter schema")
        if isinstance(value, dict):
            for key, item in value.items():
                if not isinstance(key, str) or not is_text(key):
                    raise RequestError(f"{at} have the key {quoted(key)}; expected text")
                self._json(item, _Place(at, f".{key}"), depth + 1)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                self._json(item, _Place(at, f"[{index}]"), depth + 1)
        elif not _is_scalar(value):
            raise RequestError(f"{at}: {quoted(value)} ({type(value).__name__}) is not JSON; expected a JSON schema")

    def _keywords(self, schema: object, at: _Place) -> None:
        if isinstance(schema, bool):  # "anything" and "nothing" are schemas
            return
        if not isinstance(schema, dict):
            raise RequestError(f"{at} is {quoted(schema)}; expected a schema (an object)")
        for key, (fits, wanted) in _KEYWORDS.items():
            if schema.get(key) is not None and not fits(schema[key]):
                raise RequestError(f"{at}.{key} is {quoted(schema[key])}; expected {wanted}")
        for name, part in (schema.get("properties") or {}).items():
            self._keywords(part, _Place(at, f".properties.{name}"))
        for index, part in enumerate(schema.get("oneOf") or []):
            self._keywords(part, _Place(at, f".oneOf[{index}]"))
        if isinstance(schema.get("items"), dict):
            self._keywords(schema["items"], _Place(at, ".items"))


def _is_scalar(value: object) -> bool:
    if isinstance(value, str):
        return is_text(value)
    try:
        return value is None or (isinstance(value, int | float) and math.isfinite(value))
    except OverflowError:  # an integer too large for a float
        return False


def _without_nulls(schema: object) -> dict[str, Any]:
    """The keywords of a schema without nulls, except for `default` and `items`; {} for true and false."""
    given = schema if isinstance(schema, dict) else {}
    return {key: value for key, value in given.items() if value is not None or key in ("default", "items")}


def type_of(schema: object, indent: str = "") -> Iterator[str]:
    """The type that a checked schema describes, in pieces; lines after the first begin with `indent`."""
    schema = _without_nulls(schema)
    if "oneOf" in schema:
        for each in schema["oneOf"]:
            yield f"\n{indent} | "
            yield from _variant(each, indent, quote_enum=True)
        return
    kind = schema.get("type")
    if isinstance(kind, list):
        yield from _joined(("number" if each == "integer" else each for each in kind), "any")
    elif kind == "object":
        yield from _object(schema, indent)
    elif kind == "string":
        yield from _joined((f'"{each}"' for each in schema.get("enum", []) if isinstance(each, str)), "string")
    elif kind == "array" and "items" in schema:
        yield from type_of(schema["items"], indent)
        yield "[]"
    else:
        yield _SIMPLE.get(str(kind), "any")


def _joined(kinds: Iterator[str], none: str) -> Iterator[str]:
    """Alternatives on one line; `none` if there are none, or only an empty one."""
    first = next(kinds, "")
    second = next(kinds, None)
    if second is None:
        yield first or none
        return
    yield f"{first} | {second}"
    for kind in kinds:
        yield f" | {kind}"


def _object(schema: Schema, indent: str) -> Iterator[str]:
    if "description" in schema:
        yield _note(schema["description"], indent)
    yield "{\n"
    required = set(schema.get("required", []))
    for name, part in schema.get("properties", {}).items():
        yield from _field(name if name in required else f"{name}?", _without_nulls(part), indent)
    yield f"{indent}}}"


def _field(name: str, schema: Schema, indent: str) -> Iterator[str]:
    if "title" in schema:
        yield f"{_note(schema['title'], indent)}{indent}//\n"
    if "description" in schema and "oneOf" not in schema:
        yield _note(schema["description"], indent)
    if schema.get("examples"):
        yield _note("Examples:", indent)
        yield from (_note(f'- "{each}"', indent) for each in schema["examples"] if isinstance(each, str))
    if "oneOf" in schema:
        yield from _alternatives(name, schema, indent)
        return
    yield f"{indent}{name}: "
    yield from _or_null(schema, type_of(schema, f"{indent}    "))
    yield ","
    if "default" in schema:
        yield " // "
        yield from _default(schema)
    yield "\n"


def _alternatives(name: str, schema: Schema, indent: str) -> Iterator[str]:
    """A field with a oneOf. No description is repeated, and the first variant's gives way to the field's."""
    variants = [_without_nulls(each) for each in schema["oneOf"]]
    description = schema.get("description")
    above = "description" in schema and not (variants and variants[0].get("description") == description)
    if above:
        yield _note(schema["description"], indent)
    if "default" in schema:
        yield f"{indent}// "
        yield from _default(schema)
        yield "\n"
    yield f"{indent}{name}:\n"
    for index, each in enumerate(variants):
        described = not (index == 0 and above) and each.get("description") != description
        yield f"{indent} | "
        yield from _variant(each, indent, described=described)
        yield "\n"
    yield f"{indent},\n"


def _variant(schema: object, indent: str, *, described: bool = True, quote_enum: bool = False) -> Iterator[str]:
    schema = _without_nulls(schema)
    yield from _or_null(schema, type_of(schema, f"{indent}   "))
    comment = " // "
    if described and "description" in schema:
        yield comment
        yield schema["description"]
        comment = " "
    if "default" in schema:
        yield comment
        yield from _default(schema, quote_enum=quote_enum)


def _note(text: str, indent: str) -> str:
    return f"{indent}// {text}\n"


def _or_null(schema: Schema, kind: Iterator[str]) -> Iterator[str]:
    """A type, with null added if nullable and not there yet. (No piece ends within a word.)"""
    if not schema.get("nullable"):
        yield from kind
        return
    said = False
    for piece in kind:
        said = said or "null" in piece
        yield piece
    if not said:
        yield " | null"


def _default(schema: Schema, *, quote_enum: bool = False) -> Iterator[str]:
    value = schema["default"]
    yield "default: "
    if not isinstance(value, str):
        yield from _json(value)
    elif not schema.get("enum"):
        yield f'"{value}"'
    else:
        yield json.dumps(value, ensure_ascii=False) if quote_enum else value


def _json(value: object) -> Iterator[str]:
    """JSON as Rust's serde_json writes it: compact, with numbers as below."""
    if isinstance(value, dict):
        for index, (key, item) in enumerate(value.items()):
            yield f"{',' if index else '{'}{json.dumps(key, ensure_ascii=False)}:"
            yield from _json(item)
        yield "}" if value else "{}"
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield "," if index else "["
            yield from _json(item)
        yield "]" if value else "[]"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield _number(value)
    else:
        yield json.dumps(value, ensure_ascii=False)


def _number(value: int | float) -> str:
    """Integers beyond 64 bits become floats, 0.00001 is written out, and exponents have no plus or leading zeros."""
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return str(value)
    text = repr(float(value))
    mantissa, _, exponent = text.partition("e")
    if not exponent:
        return text
    return format(Decimal(text), "f") if int(exponent) == -5 else f"{mantissa}e{int(exponent)}"
