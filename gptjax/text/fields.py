"""Reads the fields of a request, with errors that name the place."""

import datetime
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gptjax.errors import RequestError
from gptjax.support.quoting import quoted
from gptjax.text.vocabulary import is_text

# The limit for one request: several times as many as the largest collections of tools, and checked in half a second.
MOST_VALUES = 250_000
# OpenAI's API has this rule for users' names, and harmony's headers need it: words between spaces and special tokens.
_NAME = re.compile(r"(?!to=)[^\s<|\\/>]+")
_LONGEST_NAME = 256
ROLES = ("system", "developer", "user", "assistant", "tool")
_KEYS = {
    "system": ("role", "content", "name"),
    "developer": ("role", "content", "name"),
    "user": ("role", "content", "name"),
    "assistant": (
        *("role", "content", "name", "tool_calls", "reasoning_content", "reasoning", "refusal", "phase"),
        *("thinking_blocks", "reasoning_details"),
    ),
    "tool": ("role", "content", "name", "tool_call_id"),
}
# Keys of messages in answers of OpenAI's API and LiteLLM that have no place in a prompt.
_OF_ANSWERS = ("function_call", "annotations", "audio", "provider_specific_fields")
# Keys that any message may have: the second asks other servers to keep what they read, which is done here anyway.
_OF_ALL = ("id", "cache_control")
# Lists of parts in which LiteLLM and OpenRouter put reasoning, too, and the fields with their texts.
_REASONING_PARTS = {"thinking_blocks": "thinking", "reasoning_details": "text"}
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


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


def check_name(name: object, what: str) -> str:
    """A name that every format can write. Raises RequestError, beginning with `what`, for any other."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not is_text(name):
        raise RequestError(rf"{what} is {quoted(name)}; expected a word without spaces and < | \ / >")
    if len(name) > _LONGEST_NAME:
        raise RequestError(f"{what} is {quoted(name)}, of {len(name)} characters; expected at most {_LONGEST_NAME}")
    return name


def read_date(date: object) -> datetime.date:
    """A date like "2025-06-28"."""
    try:
        if isinstance(date, str) and _DATE.fullmatch(date):
            return datetime.date.fromisoformat(date)
    except ValueError:
        pass
    raise RequestError(f"current_date is {quoted(date)}; expected a date like 2025-06-28")


# The messages of OpenAI's chat API.


def read_role(message: Mapping[str, Any], where: str) -> str:
    """A message's role. Refuses keys that it cannot have, unless they are empty."""
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(f"{where} has the role {quoted(role)}; expected one of {', '.join(ROLES)}")
    keys = _KEYS[role]
    for key, given in message.items():
        if key not in keys and key not in _OF_ALL and given and not (role == "assistant" and key in _OF_ANSWERS):
            raise RequestError(f"{where} has {quoted(key)}, which has no meaning here; expected {', '.join(keys)}")
    if role == "assistant" and message.get("function_call") is not None:
        raise RequestError(f"{where}.function_call is no longer part of the API: use tool_calls")
    return role


def read_content(message: Mapping[str, Any], where: str) -> str:
    """The text of a message that must have one."""
    text = read_text(message.get("content"), f"{where}.content")
    if text is None:
        raise RequestError(f"{where}.content is missing; expected a string or a list of text parts")
    return text


def read_answer(message: Mapping[str, Any], where: str) -> str | None:
    """The content of an assistant's message, or else the refusal."""
    content = read_text(message.get("content"), f"{where}.content", refusals=True)
    refusal = message.get("refusal")
    if refusal is None:
        return content
    refused = read_string(refusal, f"{where}.refusal")
    return content or refused


def read_reasoning(message: Mapping[str, Any], where: str) -> str | None:
    """The reasoning of an assistant's message. Clients use any of these keys, and some servers send several."""
    found = None
    for key in ("reasoning_content", "reasoning"):
        if message.get(key) is not None and (found := read_string(message[key], f"{where}.{key}")):
            return found
    for key, field in _REASONING_PARTS.items():
        parts = [
            read_string(part[field], f"{where}.{key}[{index}].{field}")
            for index, value in enumerate(read_list(message.get(key), f"{where}.{key}"))
            if (part := read_object(value, f"{where}.{key}[{index}]")).get(field) is not None  # others are encrypted
        ]
        if parts and (found := "".join(parts)):
            return found
    return found


def read_call(value: object, where: str) -> tuple[str, str, str]:
    """The id, name and arguments of a tool call."""
    call = read_object(value, where)
    if call.get("type") not in (None, "function"):
        raise RequestError(f"{where} has the type {quoted(call['type'])}; expected function")
    call_id = read_string(call.get("id"), f"{where}.id")
    function = read_object(call.get("function"), f"{where}.function")
    name = check_name(function.get("name"), f"{where}.function.name")
    return call_id, name, read_string(function.get("arguments"), f"{where}.function.arguments")


def check_ids(ids: Collection[str], where: str) -> None:
    """Raises RequestError if two calls of a message have the same id."""
    if len(set(ids)) < len(ids):
        raise RequestError(f"{where}.tool_calls has an id twice: give each call its own")


def read_call_id(message: Mapping[str, Any], where: str, earlier: Collection[str]) -> str:
    """The id of the earlier call that a tool's message is the result of."""
    call_id = read_string(message.get("tool_call_id"), f"{where}.tool_call_id")
    if call_id not in earlier:
        raise RequestError(
            f"{where}.tool_call_id is {quoted(call_id)}, which no earlier tool call has: use the id of the call "
            "that this is the result of, and keep the assistant's message with the call"
        )
    return call_id


def read_messages(value: object) -> Sequence[Any]:
    """The list of messages, which has at least one."""
    messages = read_list(value, "messages")
    if not messages:
        raise RequestError("messages has no message: add one for the model to reply to")
    return messages
