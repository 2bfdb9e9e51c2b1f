"""The input of `/v1/responses`, in the form of chat completions, which chat formats read."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from gptjax.errors import GptjaxError
from gptjax.server.errors import ApiError, as_json, bad_request, of_gptjax
from gptjax.server.http.fields import check_text
from gptjax.server.openai.responses.encrypted import decrypted
from gptjax.server.openai.responses.tools import whole_name

# For each type of content part, the field with its text.
_TEXTS: Final = {kind: "text" for kind in ("input_text", "output_text", "text", "reasoning_text", "summary_text")}
_OF_ANSWERS: Final = {**_TEXTS, "refusal": "refusal"}
_ROLES: Final = ("system", "developer", "user", "assistant")
_PHASES: Final = ("commentary", "final_answer")
_MESSAGE: Final = re.compile(r"\bmessages(?:\[(\d+)\])?")
# Fields of messages as the errors of chat formats name them, and in this route. The first match is replaced.
_NAMES: Final = {
    ".tool_calls[0].function": "",
    ".tool_calls[0].id": ".call_id",
    ".tool_call_id": ".call_id",
    ".tool_calls[0]": "",
    "reasoning_effort": "reasoning.effort",
}
_PARAMS: Final = {"reasoning_effort": "reasoning.effort", "tools": "tools"}


@dataclasses.dataclass(frozen=True)
class Input:
    """A conversation as chat messages."""

    messages: list[dict[str, Any]]
    places: list[str]  # for each message, the field that it comes from, like "input[2]"

    def only(self, kept: Sequence[int]) -> "Input":
        """Those of the messages at these places."""
        return Input([self.messages[place] for place in kept], [self.places[place] for place in kept])

    def explained(self, error: GptjaxError) -> ApiError:
        """A chat format's error about the messages, with this route's field names."""
        found, message, param = of_gptjax(error), str(error), "input"
        if place := _MESSAGE.search(message):
            name = self.places[int(place[1])] if place[1] and int(place[1]) < len(self.places) else "input"
            message = message.replace(place[0], name, 1)
            param = name.partition("[")[0]
        if old := next((name for name in _NAMES if name in message), None):
            message = message.replace(old, _NAMES[old], 1)
        return bad_request(message, _PARAMS.get(found.param or "", param), found.code)


def read_input(given: object, instructions: str | None, *, before: int = 0) -> Input:
    """`input`, a string or a list of items, after `instructions`. Raises `ApiError`.

    The first items, `before` of them, are not the request's own.
    """
    found = Input([], [])
    if instructions:
        found.messages.append({"role": "system", "content": instructions})
        found.places.append("instructions")
    if isinstance(given, str):
        found.messages.append({"role": "user", "content": check_text(given, "input")})
        found.places.append("input")
        return found
    if not isinstance(given, list) or not given:
        raise bad_request("input must be a string or a non-empty list of items", "input")
    preambles = _preambles(given)
    for index, item in enumerate(given):
        where = f"input[{index - before}]" if index >= before else "previous_response_id"
        follows_reasoning = index > 0 and _kind(given[index - 1])[0] == "reasoning"
        message = _read_item(item, where, is_preamble=index in preambles, follows_reasoning=follows_reasoning)
        if message is not None:
            found.messages.append(message)
            found.places.append(where)
    return found


def joined(given: Input) -> Input:
    """The conversation with every turn of the assistant's as one message: its reasoning, then text, then calls."""
    found = Input([], [])
    for message, place in zip(given.messages, given.places, strict=True):
        last = found.messages[-1] if found.messages else {}
        if last.get("role") == message["role"] == "assistant" and _follows(message, last):
            more = {name: value for name, value in message.items() if value is not None}
            calls = more.pop("tool_calls", ())
            last |= more
            if calls:
                last.setdefault("tool_calls", []).extend(calls)  # in place, as there may be thousands
        else:
            own = {"tool_calls": [*message["tool_calls"]]} if message.get("tool_calls") else {}
            found.messages.append({**message, **own})
            found.places.append(place)
    return found


def _follows(message: Mapping[str, Any], last: Mapping[str, Any]) -> bool:
    """Whether a message is the next part of the turn: text follows reasoning, and calls follow either and calls."""
    if message.get("tool_calls"):
        return True
    said = last.get("content") is not None or last.get("tool_calls")
    return not said and message.get("reasoning_content") is None


def _preambles(items: Sequence[object]) -> frozenset[int]:
    """The assistant's messages that precede a call of the same turn, for clients that drop `phase`."""
    found, leads_to_call = set(), False
    for index in reversed(range(len(items))):
        kind, role = _kind(items[index])
        if kind == "function_call":
            leads_to_call = True
        elif (kind, role) == ("message", "assistant"):
            found |= {index} if leads_to_call else set()
        elif kind != "reasoning":
            leads_to_call = False
    return frozenset(found)


def _kind(item: object) -> tuple[object, object]:
    return (item.get("type", "message"), item.get("role")) if isinstance(item, Mapping) else (None, None)


def _read_item(item: object, where: str, *, is_preamble: bool, follows_reasoning: bool) -> dict[str, Any] | None:
    """An item as a message; None for an empty one, and for an empty text next to reasoning or calls."""
    if not isinstance(item, Mapping):
        raise bad_request(f"{where} must be an object, found {as_json(item)}", "input")
    match item.get("type", "message"):
        case "message":
            message = _read_message(item, where, is_preamble=is_preamble)
            silent = message["role"] == "assistant" and not message["content"]
            return None if silent and (is_preamble or follows_reasoning) else message
        case "reasoning":
            text = _read_reasoning(item, where)
            return {"role": "assistant", "reasoning_content": text, "content": None} if text else None
        case "function_call":
            call_id, name, arguments = (_text(item, name, where) for name in ("call_id", "name", "arguments"))
            if item.get("namespace") is not None:
                name = whole_name(_text(item, "namespace", where), name)
            call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        case "function_call_output":
            output = _read_content(item.get("output"), f"{where}.output", _TEXTS)
            return {"role": "tool", "tool_call_id": _text(item, "call_id", where), "content": output}
        case kind:
            raise bad_request(f"{where} has the type {as_json(kind)}, which is not supported", "input", "unsupported")


def _read_message(item: Mapping[str, Any], where: str, *, is_preamble: bool) -> dict[str, Any]:
    role, phase = item.get("role"), item.get("phase")
    if role not in _ROLES:  # here, as a message may be left out of the prompt, where it would be noticed
        raise bad_request(f"{where} has the role {as_json(role)}; expected one of {', '.join(_ROLES)}", "input")
    if phase is not None and phase not in _PHASES:
        raise bad_request(f"{where}.phase is {as_json(phase)}; expected one of {', '.join(_PHASES)}", "input")
    content = _read_content(item.get("content"), f"{where}.content", _OF_ANSWERS if role == "assistant" else _TEXTS)
    message = {"role": role, "content": content}
    if role == "assistant" and (phase == "commentary" or (phase is None and is_preamble)):
        message["phase"] = "commentary"
    return message


def _read_reasoning(item: Mapping[str, Any], where: str) -> str:
    """The reasoning, from the first field that has any; some servers send only a summary."""
    if content := item.get("content"):
        return _read_content(content, f"{where}.content", _TEXTS)
    if encrypted := item.get("encrypted_content"):
        return decrypted(encrypted, f"{where}.encrypted_content")
    return _read_content(item.get("summary") or "", f"{where}.summary", _TEXTS)


def _read_content(content: object, where: str, texts: Mapping[str, str]) -> str:
    """A text, or its joined parts. `texts` has the allowed types of parts, and their fields."""
    if isinstance(content, str):
        return _checked(content, where)
    if not isinstance(content, list):
        raise bad_request(f"{where} must be a string or a list of text parts, found {as_json(content)}", "input")
    return "".join(_read_part(part, f"{where}[{index}]", texts) for index, part in enumerate(content))


def _read_part(part: object, where: str, texts: Mapping[str, str]) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str) or kind not in texts:
        raise bad_request(f"{where} has the type {as_json(kind)}: the model reads only text", "input")
    return _text(part, texts[kind], where)


def _text(values: Mapping[str, Any], name: str, where: str) -> str:
    return _checked(values.get(name), f"{where}.{name}")


def _checked(value: object, where: str) -> str:
    try:
        return check_text(value, where)
    except ApiError as error:
        raise bad_request(str(error), "input") from None
