"""Reads the fields of a request, with errors that name the place."""

from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.errors import RequestError
from gptjax.support.quoting import quoted
from gptjax.text.vocabulary import is_text

# The limit for one request: several times as many as the largest collections of tools, and checked in half a second.
MOST_VALUES = 250_000


def check_amount(value: object, where: str) -> None:
    """Raises RequestError if lists and objects hold more than `MOST_VALUES` values."""
    left, seen = [value], 0
    while left:
        item = left.pop()
        if isinstance(item, dict | list | tuple):
            seen += len(item)
            if seen > MOST_VALUES:
                raise RequestError(f"{where} hold more than {MOST_VALUES:,} values: send fewer, or smaller ones")
            left += item.values() if isinstance(item, dict) else item


def read_list(value: object, where: str) -> Sequence[Any]:
    """A list or tuple; None counts as empty."""
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise RequestError(f"{where} is {_given(value)}; expected a list")
    return value


def read_object(value: object, where: str) -> Mapping[str, Any]:
    """A dict."""
    if not isinstance(value, Mapping):
        raise RequestError(f"{where} is {_given(value)}; expected an object (for a Pydantic model, its model_dump())")
    return value


def read_string(value: object, where: str) -> str:
    """A string without lone surrogates."""
    if not isinstance(value, str):
        raise RequestError(f"{where} is {_given(value)}; expected a string")
    if not is_text(value):
        raise RequestError(f"{where} has a lone surrogate, which is not a character: read it with errors='replace'")
    return value


def read_text(value: object, where: str, *, refusals: bool = False) -> str | None:
    """The text of a content: a string, or text parts (with `refusals`, also refusals), joined; None if absent."""
    if value is None or isinstance(value, str):
        return value and read_string(value, where)
    if not isinstance(value, list | tuple):
        raise RequestError(f"{where} is {_given(value)}; expected a string or a list of text parts")
    kinds = ("text", "refusal") if refusals else ("text",)
    return "".join(_part(part, f"{where}[{index}]", kinds) for index, part in enumerate(value))


def _part(value: object, where: str, kinds: tuple[str, ...]) -> str:
    part = read_object(value, where)
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in kinds:
        raise RequestError(
            f"{where} is of the type {_given(kind)}: the model reads only text; send parts like "
            '{"type": "text", "text": "..."}'
        )
    return read_string(part.get(kind), f"{where}.{kind}")


def _given(value: object) -> str:
    return "missing" if value is None else quoted(value)
