"""Conversations in the form of OpenAI's chat API, checked, for every format but harmony, which reads its own.

`developer` is another name for `system`. Content parts are joined unchanged, and a missing content next to calls or
reasoning is an empty one. Names of users, and keys found only in answers, have no place in these formats and are
ignored, as the published templates ignore them.
"""

import datetime
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gptjax.errors import RequestError
from gptjax.support.quoting import quoted
from gptjax.text.chat_formats.interface import ChatOptions, date_of
from gptjax.text.fields import (
    check_amount,
    check_ids,
    check_name,
    read_answer,
    read_call,
    read_call_id,
    read_content,
    read_list,
    read_messages,
    read_object,
    read_reasoning,
    read_role,
    read_string,
)
from gptjax.text.vocabulary import is_text

_DEEPEST: Final = 100  # levels of a tool or of arguments
_LARGEST_BITS: Final = 10_000  # Python refuses to print integers of more than 4,300 digits


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call of the assistant's."""

    name: str
    arguments: str
    """A JSON object, spaced as `json.dumps` does."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message."""

    role: str
    """ "system", "user", "assistant" or "tool"."""
    content: str
    where: str
    """Its name in errors, like "messages[2]"."""
    reasoning: str | None = None
    calls: tuple[Call, ...] = ()

    @property
    def answer(self) -> str:
        """The content after its last `</think>`, or all of it."""
        return self.content.split("</think>")[-1]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, with the options that change how they are written."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    date: datetime.date | None = None
    """None is what the template says."""
    thinking: bool | None = None


def read_conversation(messages: object, options: ChatOptions, *, name: str, tools: bool) -> Conversation:
    """Reads messages and options; `tools` is whether the format `name` has tools. Raises RequestError."""
    found: list[Message] = []
    ids: set[str] = set()
    for index, value in enumerate(read_messages(messages)):
        where = f"messages[{index}]"
        given = read_object(value, where)
        role = read_role(given, where)
        if not tools and (role == "tool" or given.get("tool_calls")):
            raise RequestError(f"{where} is about tools, which the chat format {name} does not have: leave it out")
        if role == "assistant":
            found.append(_read_assistant(given, where, ids))
            continue
        if role == "tool":
            read_call_id(given, where, ids)
        found.append(Message("system" if role == "developer" else role, read_content(given, where), where))
    return Conversation(tuple(found), read_tools(options.tools), date_of(options), options.enable_thinking)


def _read_assistant(message: Mapping[str, Any], where: str, ids: set[str]) -> Message:
    reasoning, content = read_reasoning(message, where), read_answer(message, where)
    read = [
        (f"{where}.tool_calls[{index}]", read_call(call, f"{where}.tool_calls[{index}]"))
        for index, call in enumerate(read_list(message.get("tool_calls"), f"{where}.tool_calls"))
    ]
    check_ids([call_id for _, (call_id, _, _) in read], where)
    ids.update(call_id for _, (call_id, _, _) in read)
    if content is None and reasoning is None and not read:
        raise RequestError(f"{where}.content is missing; expected a string or a list of text parts")
    calls = tuple(Call(name, _arguments(text, f"{place}.function.arguments")) for place, (_, name, text) in read)
    return Message("assistant", content or "", where, reasoning, calls)


def _arguments(text: str, where: str) -> str:
    """Arguments as the templates write them: parsed, and written again. No text at all means none."""
    arguments = normal_arguments(text) if text.strip() else "{}"
    if arguments is None:
        raise RequestError(f"{where} is {quoted(text)}; expected a JSON object")
    return arguments


def normal_arguments(text: str) -> str | None:
    """A JSON object, spaced as `json.dumps` does; None if the text is not one."""
    try:
        value = json.loads(text)
        # A number may be too large or not a number at all, and an escape may be half a character.
        normal = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return normal if isinstance(value, dict) and is_text(normal) else None


def read_tools(tools: object) -> tuple[Mapping[str, Any], ...]:
    """Functions, whole, since the templates write everything that a tool says. Raises RequestError."""
    check_amount(tools, "tools")
    found: dict[str, Mapping[str, Any]] = {}
    for index, value in enumerate(read_list(tools, "tools")):
        where = f"tools[{index}]"
        tool = read_object(value, where)
        if tool.get("type") != "function":
            raise RequestError(f"{where} has the type {quoted(tool.get('type'))}; expected function")
        function = read_object(tool.get("function"), f"{where}.function")
        name = check_name(function.get("name"), f"{where}.function.name")
        if name in found:
            raise RequestError(f"{where} is the second function {name}: give each its own name")
        if function.get("description") is not None:
            read_string(function["description"], f"{where}.function.description")
        if function.get("parameters") is not None:
            read_object(function["parameters"], f"{where}.function.parameters")
        _check_json(tool, where)
        found[name] = {key: tool[key] for key in tool if key != "cache_control"}  # a hint to servers
    return tuple(found.values())


def _check_json(value: object, where: str) -> None:
    """Raises RequestError for anything that JSON cannot say."""
    level = [value]
    for _ in range(_DEEPEST):
        values, level = level, []
        for item in values:
            if isinstance(item, dict):
                level += [*item.keys(), *item.values()]
                fine = all(isinstance(key, str) for key in item)
            elif isinstance(item, list | tuple):
                level += item
                fine = True
            elif isinstance(item, str):
                fine = is_text(item)
            elif isinstance(item, float):
                fine = math.isfinite(item)
            else:
                fine = item is None or (isinstance(item, int) and item.bit_length() <= _LARGEST_BITS)
            if not fine:
                raise RequestError(f"{where} holds {quoted(item)}, which JSON cannot say")
    if level:
        raise RequestError(f"{where} is nested more than {_DEEPEST} levels deep")


def as_json(value: Mapping[str, Any], indent: int | None = None) -> Iterator[str]:
    """JSON in pieces, with the spaces of jinja's `tojson` as transformers defines it."""
    return json.JSONEncoder(ensure_ascii=False, indent=indent).iterencode(value)
