"""The system prompt, messages and tools of `/v1/messages`, in the form of OpenAI's chat API, which chat formats read.

| Anthropic's API | OpenAI's chat API |
|---|---|
| `system`, and messages with that role, unless `clear_at` says that they are over | system messages |
| texts of a user, in a row | one user message |
| `tool_result` | a tool message; an error begins with "Error: " |
| `tool_reference` in it | a text; the tool, whose `defer_loading` had kept it from the model, is now offered |
| `thinking` | reasoning: its text or, if that was omitted, what its signature holds |
| an assistant's text before a `tool_use` of the same message | a message of the phase "commentary" |
| `tool_use` | a tool call |

A user's texts in a row and those of the system are joined unchanged. `cache_control`, `citations` and the like have no
effect on a prompt.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

from gptjax.errors import GptjaxError
from gptjax.server.anthropic.options import read_effort_of_turn
from gptjax.server.errors import ApiError, as_json, bad_request, of_gptjax
from gptjax.server.http.fields import Fields, check_text
from gptjax.server.openai.responses.encrypted import verified
from gptjax.server.openai.responses.input import Input, joined
from gptjax.server.openai.responses.tools import Tools

# Claude Code's first system text, about itself. It may differ between requests, which then would not begin alike.
_BILLING: Final = "x-anthropic-billing-header:"
_IGNORED: Final = frozenset(("type", "cache_control", "citations", "caller", "toolset_name"))  # keys of blocks
_OF_TOOLS: Final = frozenset(
    """name description input_schema strict defer_loading
    type cache_control eager_input_streaming input_examples allowed_callers""".split()
)  # the second line: no effect
_MESSAGE: Final = re.compile(r"\bmessages\[(\d+)\]")
# Fields as the errors of chat formats name them, and in this route. The first match is replaced.
_NAMES: Final = {
    ".tool_calls[0].function.name": ".name",
    ".tool_calls[0].function.arguments": ".input",
    ".tool_calls[0].id": ".id",
    ".tool_calls": ".id",
    ".tool_call_id": ".tool_use_id",
    "].parameters": "].input_schema",
}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation that was read."""

    given: Input
    effort: str | None  # of this turn, if a message says so

    def explained(self, error: GptjaxError) -> ApiError:
        """A chat format's error, with this route's names."""
        found, message, places = of_gptjax(error), str(error), self.given.places
        if (place := _MESSAGE.search(message)) and int(place[1]) < len(places):
            message = message.replace(place[0], places[int(place[1])], 1)
        if old := next((name for name in _NAMES if name in message), None):
            message = message.replace(old, _NAMES[old], 1)
        return bad_request(message, found.param, found.code)


def read_conversation(system: object, messages: object, *, one_message_a_turn: bool) -> Conversation:
    """The conversation as chat messages. Raises `ApiError`."""
    found, effort = Input([], []), None
    for text in _texts(system, "system"):
        found.messages.append({"role": "system", "content": text})
        found.places.append("system")
    if not isinstance(messages, list) or not messages:
        raise bad_request("messages must be a non-empty list", "messages")
    last_user = max((index for index, message in enumerate(messages) if _role(message) == "user"), default=-1)
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        read = list(_read_message(message, where))
        if _role(message) == "system":
            effort = read_effort_of_turn(message.get("output_config"), f"{where}.output_config") or effort
            read = [] if _is_over(message, where) and index < last_user else read
        read = _with_one_text(read) if one_message_a_turn else read
        found.messages.extend(each for each, _ in read)
        found.places.extend(place for _, place in read)
    if not found.messages:
        raise bad_request("messages are all empty")
    if found.messages[-1]["role"] == "assistant":
        raise bad_request("messages end with the assistant's, which this server does not continue: leave it out")
    return Conversation(joined(found) if one_message_a_turn else found, effort)


def _role(message: object) -> object:
    return message.get("role") if isinstance(message, Mapping) else None


def _is_over(message: Mapping[str, Any], where: str) -> bool:
    """Whether a system message ends with its turn."""
    until = message.get("clear_at")
    if until not in (None, "never", "next_user_message"):
        raise bad_request(f"{where}.clear_at is {as_json(until)}; expected never or next_user_message")
    return until == "next_user_message"


def _texts(system: object, where: str) -> Iterator[str]:
    """The system prompt, if there is any: one text."""
    if system is None:
        return
    if isinstance(system, str):
        text = check_text(system, where)
    else:
        blocks = [_text(block, place) for block, place in _blocks(system, where)]
        text = "".join(block for block in blocks if not block.startswith(_BILLING))
    if text:
        yield text


def _read_message(message: object, where: str) -> Iterator[tuple[dict[str, Any], str]]:
    """A message as chat messages, each with its place."""
    if not isinstance(message, Mapping):
        raise bad_request(f"{where} must be an object, found {as_json(message)}")
    role, content = message.get("role"), message.get("content")
    known = ("role", "content", "clear_at", "output_config") if role == "system" else ("role", "content")
    if unknown := [key for key in message if key not in known]:
        raise bad_request(f"{where} has {as_json(unknown[0])}, which is not known here")
    if role == "system":
        for text in _texts(content, f"{where}.content"):
            yield {"role": "system", "content": text}, where
    elif role == "user":
        yield from _read_user(content, f"{where}.content")
    elif role == "assistant":
        yield from _read_assistant(content, f"{where}.content")
    else:
        raise bad_request(f"{where}.role is {as_json(role)}; expected user, assistant or system")


def _read_user(content: object, where: str) -> Iterator[tuple[dict[str, Any], str]]:
    if isinstance(content, str):
        yield {"role": "user", "content": check_text(content, where)}, where
        return
    blocks = _blocks(content, where)
    if not blocks:
        raise bad_request(f"{where} is empty")
    for are_results, group in itertools.groupby(blocks, lambda each: each[0].get("type") == "tool_result"):
        if are_results:
            yield from (_read_result(block, place) for block, place in group)
        else:
            texts = [(_text(block, place), place) for block, place in group]
            yield {"role": "user", "content": "".join(text for text, _ in texts)}, texts[0][1]


def _read_result(block: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str]:
    _check_keys(block, where, ("tool_use_id", "content", "is_error"))
    call_id = check_text(block.get("tool_use_id"), f"{where}.tool_use_id")
    content = block.get("content")
    if isinstance(content, str):
        text = check_text(content, f"{where}.content")
    else:
        parts = [] if content is None else _blocks(content, f"{where}.content")
        text = "".join(_result_text(part, place) for part, place in parts)
    failed = block.get("is_error")
    if not isinstance(failed, bool | None):
        raise bad_request(f"{where}.is_error must be true or false, found {as_json(failed)}")
    return {"role": "tool", "tool_call_id": call_id, "content": f"Error: {text}" if failed else text}, where


def _result_text(block: Mapping[str, Any], where: str) -> str:
    if block.get("type") != "tool_reference":
        return _text(block, where)
    return f"The tool {check_text(block.get('tool_name'), f'{where}.tool_name')} is available now.\n"


def references(messages: object) -> set[str]:
    """The tools that the results of searches name. The messages have been read."""
    found = set()
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content")
        for block in content if isinstance(content, list) else []:
            parts = block.get("content") if block["type"] == "tool_result" else None
            for part in parts if isinstance(parts, list) else []:
                found |= {part["tool_name"]} if part["type"] == "tool_reference" else set()
    return found


def _read_assistant(content: object, where: str) -> Iterator[tuple[dict[str, Any], str]]:
    if isinstance(content, str):
        yield {"role": "assistant", "content": check_text(content, where)}, where
        return
    blocks = _blocks(content, where)
    last_call = max((index for index, (block, _) in enumerate(blocks) if block.get("type") == "tool_use"), default=-1)
    is_silent = True
    for index, (block, place) in enumerate(blocks):
        if (message := _read_said(block, place, is_preamble=index < last_call)) is not None:
            is_silent = False
            yield message, place
    if is_silent:
        yield {"role": "assistant", "content": ""}, where


def _read_said(block: Mapping[str, Any], where: str, *, is_preamble: bool) -> dict[str, Any] | None:
    """A block of an assistant's as a message; None if it is empty."""
    match block.get("type"):
        case "thinking":
            _check_keys(block, where, ("thinking", "signature"))
            thinking = verified(check_text(block.get("thinking"), f"{where}.thinking"), block.get("signature"), where)
            return {"role": "assistant", "reasoning_content": thinking, "content": None} if thinking else None
        case "tool_use":
            _check_keys(block, where, ("id", "name", "input"))
            return {"role": "assistant", "content": None, "tool_calls": [_read_call(block, where)]}
        case _:
            text = _text(block, where)
            phase = {"phase": "commentary"} if is_preamble else {}
            return {"role": "assistant", "content": text, **phase} if text else None


def _is_said(read: tuple[dict[str, Any], str]) -> bool:
    """Whether a chat message is a text of the assistant's."""
    return read[0]["role"] == "assistant" and bool(read[0]["content"])


def _with_one_text(read: Sequence[tuple[dict[str, Any], str]]) -> list[tuple[dict[str, Any], str]]:
    """Chat messages of one message, where an assistant's texts in a row, which some servers split, are one again."""
    found: list[tuple[dict[str, Any], str]] = []
    for is_text, group in itertools.groupby(read, _is_said):
        texts = list(group)
        if is_text:
            text = "".join([message["content"] for message, _ in texts])
            texts = [({**texts[-1][0], "content": text}, texts[0][1])]
        found += texts
    return found


def _read_call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    call_id, name = (check_text(block.get(key), f"{where}.{key}") for key in ("id", "name"))
    given = block.get("input")
    if not isinstance(given, dict):
        raise bad_request(f"{where}.input must be an object, found {as_json(given)}")
    try:
        arguments = check_text(json.dumps(given, ensure_ascii=False), f"{where}.input")
    except RecursionError:
        raise bad_request(f"{where}.input is nested too deep") from None
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _blocks(content: object, where: str) -> list[tuple[Mapping[str, Any], str]]:
    """Content blocks, which are at least objects, with their places."""
    if not isinstance(content, list):
        raise bad_request(f"{where} must be a string or a list of blocks, found {as_json(content)}")
    found = [(block, f"{where}[{index}]") for index, block in enumerate(content)]
    for block, place in found:
        if not isinstance(block, Mapping):
            raise bad_request(f"{place} must be an object, found {as_json(block)}")
    return found


def _text(block: Mapping[str, Any], where: str) -> str:
    if block.get("type") != "text":
        kind = as_json(block.get("type"))
        raise bad_request(f"{where} has the type {kind}, which is not supported here: the model reads only text")
    _check_keys(block, where, ("text",))
    return check_text(block.get("text"), f"{where}.text")


def _check_keys(block: Mapping[str, Any], where: str, known: Collection[str]) -> None:
    for key in block:
        if key not in known and key not in _IGNORED:
            raise bad_request(f"{where} has {as_json(key)}, which is not known here; expected {', '.join(known)}")


def read_tools(given: object, referenced: Collection[str]) -> Tools:
    """`tools`; deferred ones are offered only if they are `referenced`. Raises `ApiError`."""
    found = Tools()
    if given is not None and not isinstance(given, list):
        raise bad_request(f"tools must be a list, found {as_json(given)}", "tools")
    for index, tool in enumerate(given or []):
        where = f"tools[{index}]"
        function = _read_tool(tool, where)
        if not tool.get("defer_loading") or function["name"] in referenced:
            found.add(function, where, strict=bool(tool.get("strict")))
    return found


def _read_tool(tool: object, where: str) -> dict[str, Any]:
    """A tool as a function."""
    if not isinstance(tool, Mapping):
        raise bad_request(f"{where} must be an object, found {as_json(tool)}", "tools")
    if tool.get("type") not in (None, "custom"):
        kind = as_json(tool["type"])
        raise bad_request(f"{where} has the type {kind}: only tools with an input_schema of their own work", "tools")
    if unknown := [key for key in tool if key not in _OF_TOOLS]:
        raise bad_request(f"{where} has {as_json(unknown[0])}, which is not known here", "tools")
    for flag in ("strict", "defer_loading"):
        if not isinstance(tool.get(flag), bool | None):
            raise bad_request(f"{where}.{flag} must be true or false, found {as_json(tool[flag])}", "tools")
    name, schema = check_text(tool.get("name"), f"{where}.name"), tool.get("input_schema")
    if not isinstance(schema, dict):
        raise bad_request(f"{where}.input_schema must be an object, found {as_json(schema)}", "tools")
    function = {"name": name, "description": tool.get("description"), "parameters": schema}
    return {key: value for key, value in function.items() if value is not None}


def read_tool_choice(fields: Fields) -> tuple[str | dict[str, Any] | None, bool]:
    """`tool_choice` in the form of OpenAI's chat API, and whether a turn may have several calls. Raises `ApiError`."""
    if "tool_choice" not in fields:
        return None, True
    options = fields.options("tool_choice")
    kind, name = options.take("type"), options.text("name")
    parallel = not options.flag("disable_parallel_tool_use")
    options.finish(())
    match kind:
        case "auto" | "none":
            return str(kind), parallel
        case "any":
            return "required", parallel
        case "tool" if name is not None:
            return {"type": "function", "function": {"name": name}}, parallel
        case "tool":
            raise bad_request("tool_choice.name is missing: it says which tool to call")
    raise bad_request(f"tool_choice.type is {as_json(kind)}; expected auto, any, tool or none")
