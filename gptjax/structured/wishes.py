"""Reads what requests say of the form of a turn, in the form of OpenAI's chat API."""

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from gptjax.errors import RequestError
from gptjax.structured.grammar import Grammar, as_grammar
from gptjax.structured.turns import Wishes, turn_grammar
from gptjax.support.quoting import quoted
from gptjax.text import Tokenizer
from gptjax.text.chat_formats import ChatFormat, ChatOptions
from gptjax.text.fields import check_name, read_string
from gptjax.text.harmony.messages import ResponseFormat

GUIDED: Final = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
"""Fields that vLLM has for the form of a text."""


def grammar_of_turn(
    chat_format: ChatFormat,
    tokenizer: Tokenizer,
    options: ChatOptions,
    response_format: object = None,
    tool_choice: object = None,
    grammar: object = None,
) -> Grammar | None:
    """The grammar of a turn; None if it may be anything.

    Args:
      response_format: as in OpenAI's chat API, like `tool_choice`; or what `read_response_format` returned.
      grammar: of the answer, instead of `response_format`: what `as_grammar` takes.

    Raises:
      RequestError: one of them is not as it should be, or a schema cannot be compiled.
    """
    form = response_format
    answer = form if isinstance(form, Grammar) else read_response_format(form)
    if grammar is not None:
        if answer is not None:
            raise RequestError("response_format and another grammar were both given: choose one")
        answer = as_grammar(grammar)
    return turn_grammar(chat_format, tokenizer, options, Wishes(answer, read_tool_choice(tool_choice)))


def read_response_format(given: object, name: str = "response_format") -> Grammar | None:
    """What an answer must be; None for any text. A schema may lie in `json_schema`, or beside the type."""
    if given is None or given == "text":
        return None
    form = _object(given, name)
    kind = form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar.of_json_object()
    if kind != "json_schema":
        raise RequestError(f"{name} has the type {quoted(kind)}; expected text, json_object or json_schema")
    where = name
    if "json_schema" in form:
        where = f"{name}.json_schema"
        form = _object(form["json_schema"], where)
    if not isinstance(form.get("strict"), bool | None):
        raise RequestError(f"{where}.strict must be true or false, found {quoted(form['strict'])}")
    return _named(f"{where}.schema", form.get("schema"))


def described(given: object) -> ResponseFormat | None:
    """What a prompt can say of a `response_format`, which `read_response_format` has read; None if that has no schema.

    Raises:
      RequestError: its name or its description is not one.
    """
    if not isinstance(given, Mapping) or given.get("type") != "json_schema":
        return None
    form = given.get("json_schema", given)
    name, about = form.get("name"), form.get("description")
    return ResponseFormat(
        "response" if name is None else check_name(name, "the name of the response_format"),
        "" if about is None else read_string(about, "the description of the response_format"),
        json.dumps(form["schema"], ensure_ascii=False, separators=(",", ":")),
    )


def read_tool_choice(given: object) -> str | None:
    """ "required", or the name of the function that must be called; None if the model chooses."""
    if given in (None, "auto", "none"):
        return None
    if given == "required":
        return "required"
    choice = given if isinstance(given, Mapping) else {}
    function = choice.get("function", choice)
    name = function.get("name") if isinstance(function, Mapping) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise RequestError("tool_choice must be 'auto', 'none', 'required', or an object that names a function")
    return name


def read_guided(given: Mapping[str, Any]) -> Grammar | None:
    """What a field of `GUIDED` asks for: at most one of them is given."""
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)} were both given: choose one")
    for name, value in given.items():
        if name == "structured_outputs":
            return _read_structured(value, name)
        return _of_kind(name.removeprefix("guided_"), value, name)
    return None


def _read_structured(given: object, name: str) -> Grammar | None:
    """vLLM's `structured_outputs`: one of several kinds. Those that are null or false ask for nothing."""
    options = {key: value for key, value in _object(given, name).items() if value is not None and value is not False}
    options.pop("disable_fallback", None)  # there is none
    if unknown := [key for key in options if key not in _KINDS]:
        raise RequestError(f"{name} has {quoted(unknown[0])}; expected one of {', '.join(_KINDS)}")
    if len(options) > 1:
        raise RequestError(f"{name} has both {' and '.join(options)}: choose one")
    for kind, value in options.items():
        return _of_kind(kind, value, f"{name}.{kind}")
    return None


def _of_kind(kind: str, value: Any, name: str) -> Grammar:
    try:
        return _KINDS[kind](value)
    except (RequestError, ValueError, RecursionError) as error:
        raise RequestError(f"{name}: {error}") from None


def _of_json(given: Any) -> Grammar:
    return Grammar.of_json_schema(json.loads(given) if isinstance(given, str) else given)


def _of_json_object(wanted: object) -> Grammar:
    if wanted is not True:
        raise RequestError(f"it must be true or false, found {quoted(wanted)}")
    return Grammar.of_json_object()


_KINDS: Final[Mapping[str, Callable[[Any], Grammar]]] = {
    "json": _of_json,
    "json_object": _of_json_object,
    "regex": Grammar.of_regex,
    "choice": Grammar.of_choice,
    "grammar": Grammar.of_lark,
}


def _named(name: str, schema: Any) -> Grammar:
    try:
        return Grammar.of_json_schema(schema)
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from None


def _object(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RequestError(f"{name} must be an object, found {type(value).__name__}")
    return value
