"""JSON schemas in the TypeScript-like form that harmony describes functions in.

The exact form is `json_schema_to_typescript` of openai-harmony 0.0.8 (`encoding.rs`), quirks included: GPT-OSS was
trained on that text. So `anyOf`, `allOf`, `$ref` and `const` become "any", and a oneOf that is the schema itself quotes
a string default that a oneOf of a property leaves bare.
"""

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from gptjax.errors import RequestError
from gptjax.text.vocabulary import is_text

# More than schemas of functions have, less than openai-harmony's and Python's own limits.
_DEEPEST = 64

Schema = Mapping[str, Any]


def _are_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# What is read of a schema; the rest may be anything.
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
    """Raises RequestError, beginning with `where`, for what is no JSON or no schema."""
    _check_json(schema, where, 0)
    _check_keywords(schema, where)


def _check_json(value: object, where: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise RequestError(f"{where[:80]}... nest deeper than {_DEEPEST} levels: write a flatter schema.")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str) or not is_text(key):
                raise RequestError(f"{where} have the key {reprlib.repr(key)}: write one that is text.")
            _check_json(item, f"{where}.{key}", depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]", depth + 1)
    elif not _is_scalar(value):
        raise RequestError(f"{where}: {reprlib.repr(value)} ({type(value).__name__}) is no JSON: write a JSON schema.")


def _is_scalar(value: object) -> bool:
    if isinstance(value, str):
        return is_text(value)
    try:
        return value is None or (isinstance(value, int | float) and math.isfinite(value))
    except OverflowError:  # an integer that no float holds
        return False


def _check_keywords(schema: object, where: str) -> None:
    if isinstance(schema, bool):  # "anything" and "nothing" are schemas
        return
    if not isinstance(schema, dict):
        raise RequestError(f"{where} is {reprlib.repr(schema)}: write a schema, an object.")
    for key, (fits, wanted) in _KEYWORDS.items():
        if key in schema and not fits(schema[key]):
            raise RequestError(f"{where}.{key} is {reprlib.repr(schema[key])}: write {wanted}.")
    for name, part in schema.get("properties", {}).items():
        _check_keywords(part, f"{where}.properties.{name}")
    for index, part in enumerate(schema.get("oneOf", [])):
        _check_keywords(part, f"{where}.oneOf[{index}]")
    if not isinstance(schema.get("items", True), list):
        _check_keywords(schema.get("items", True), f"{where}.items")


def type_of(schema: object, indent: str = "") -> str:
    """The type that a checked schema describes; lines after the first begin with `indent`."""
    if not isinstance(schema, dict):
        return "any"
    if "oneOf" in schema:
        return "".join(f"\n{indent} | {_variant(each, indent, quote_enum=True)}" for each in schema["oneOf"])
    kind = schema.get("type")
    if isinstance(kind, list):
        return " | ".join("number" if each == "integer" else each for each in kind) or "any"
    if kind == "object":
        return _object(schema, indent)
    if kind == "string":
        return " | ".join(f'"{each}"' for each in schema.get("enum", []) if isinstance(each, str)) or "string"
    if kind == "array":
        return f"{type_of(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    return {"number": "number", "integer": "number", "boolean": "boolean"}.get(str(kind), "any")


def _object(schema: Schema, indent: str) -> str:
    note = _note(schema["description"], indent) if "description" in schema else ""
    required = set(schema.get("required", []))
    fields = [
        _field(name if name in required else f"{name}?", part if isinstance(part, dict) else {}, indent)
        for name, part in schema.get("properties", {}).items()
    ]
    return f"{note}{{\n{''.join(fields)}{indent}}}"


def _field(name: str, schema: Schema, indent: str) -> str:
    notes = f"{_note(schema['title'], indent)}{indent}//\n" if "title" in schema else ""
    if "description" in schema and "oneOf" not in schema:
        notes += _note(schema["description"], indent)
    if schema.get("examples"):
        notes += _note("Examples:", indent)
        notes += "".join(_note(f'- "{each}"', indent) for each in schema["examples"] if isinstance(each, str))
    if "oneOf" in schema:
        return notes + _alternatives(name, schema, indent)
    kind = _or_null(schema, type_of(schema, f"{indent}    "))
    default = f" // {_default(schema)}" if "default" in schema else ""
    return f"{notes}{indent}{name}: {kind},{default}\n"


def _alternatives(name: str, schema: Schema, indent: str) -> str:
    """A field with a oneOf. A description is not said twice, and the first variant's gives way to the field's."""
    variants = [each if isinstance(each, dict) else {} for each in schema["oneOf"]]
    description = schema.get("description")
    above = "description" in schema and not (variants and variants[0].get("description") == description)
    out = _note(schema["description"], indent) if above else ""
    if "default" in schema:
        out += _note(_default(schema), indent)
    out += f"{indent}{name}:\n"
    for index, each in enumerate(variants):
        described = not (index == 0 and above) and each.get("description") != description
        out += f"{indent} | {_variant(each, indent, described=described)}\n"
    return f"{out}{indent},\n"


def _variant(schema: object, indent: str, *, described: bool = True, quote_enum: bool = False) -> str:
    if not isinstance(schema, dict):
        return "any"
    comments = [schema["description"]] if described and "description" in schema else []
    if "default" in schema:
        comments.append(_default(schema, quote_enum=quote_enum))
    kind = _or_null(schema, type_of(schema, f"{indent}   "))
    return f"{kind} // {' '.join(comments)}" if comments else kind


def _note(text: str, indent: str) -> str:
    return f"{indent}// {text}\n"


def _or_null(schema: Schema, kind: str) -> str:
    return f"{kind} | null" if schema.get("nullable") and "null" not in kind else kind


def _default(schema: Schema, *, quote_enum: bool = False) -> str:
    value = schema["default"]
    if not isinstance(value, str):
        return f"default: {_json(value)}"
    if not schema.get("enum"):
        return f'default: "{value}"'
    return f"default: {_json(value) if quote_enum else value}"


def _json(value: object) -> str:
    """As Rust's serde_json writes it: compact, and with numbers as below."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_json(key)}:{_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_json, value)) + "]"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _number(value)
    return json.dumps(value, ensure_ascii=False)


def _number(value: int | float) -> str:
    """Integers beyond 64 bits are floats, 0.00001 is written out, and exponents have no plus and no zeros in front."""
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return str(value)
    text = repr(float(value))
    mantissa, _, exponent = text.partition("e")
    if not exponent:
        return text
    return format(Decimal(text), "f") if int(exponent) == -5 else f"{mantissa}e{int(exponent)}"
