"""Reads what requests say of the form of a turn, in the form of OpenAI's chat API."""

import json
from collections.abc import Mapping
from typing import Any

from gptjax.errors import RequestError
from gptjax.structured.grammar import Grammar, as_grammar
from gptjax.structured.turns import Wishes, turn_grammar
from gptjax.support.quoting import quoted
from gptjax.text import Tokenizer
from gptjax.text.chat_formats import ChatFormat, ChatOptions


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
      response_format: as in OpenAI's chat API, like `tool_choice`.
      grammar: of the answer, instead of `response_format`: what `as_grammar` takes.

    Raises:
      RequestError: one of them is not as it should be, or a schema cannot be compiled.
    """
    answer = read_response_format(response_format)
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
    """What `guided_json`, `guided_regex` or `guided_grammar` asks for: at most one of them is given."""
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)} were both given: choose one")
    for name, value in given.items():
        try:
            if name == "guided_regex":
                return Grammar.of_regex(value)
            if name == "guided_grammar":
                return Grammar.of_lark(value)
            return _named(name, json.loads(value) if isinstance(value, str) else value)
        except (RequestError, ValueError, RecursionError) as error:
            raise RequestError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None
    return None


def _named(name: str, schema: Any) -> Grammar:
    try:
        return Grammar.of_json_schema(schema)
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from None


def _object(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RequestError(f"{name} must be an object, found {type(value).__name__}")
    return value
