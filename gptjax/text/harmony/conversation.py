"""Conversations in the form of OpenAI's chat API, as harmony messages.

| OpenAI's chat API | harmony |
|---|---|
| (always) | a system message: identity, knowledge cutoff, `current_date`, effort, built-in tools, channels |
| `system` and `developer` at the beginning, function tools | one developer message, texts joined by an empty line |
| later `system` and `developer` | a developer message in the same place |
| `user`, with its `name` | a user message, `user:name` |
| `assistant`: `reasoning_content` or `reasoning` | an assistant message in the analysis channel |
| `assistant`: `content`, else `refusal` | one in the final channel; with calls, a preamble in the commentary channel |
| `assistant`: `phase`, "commentary" or "final_answer" | the channel of the content, with or without calls |
| `assistant`: each of `tool_calls` | one to `functions.NAME`, in the commentary channel, `<|constrain|>json` |
| `tool` | from the tool that `tool_call_id` names, to the assistant, in the channel of the call |

Calls of the built-in tools go to `browser.search` and the like, or `python`, in the analysis channel, as `code`. Text
parts are joined unchanged. A content of None makes no message; an empty one makes one only if the turn has neither
reasoning (not even empty) nor calls. Keys without a place in harmony (those found only in answers, and the names of
system messages and of tools) are ignored. Other keys, and keys of other roles, are refused.

This follows the format's documentation and openai-harmony, from which GPT-OSS's published chat template differs. The
template writes ` json` for `<|constrain|>json`; quotes tool results as JSON strings; treats text next to tool calls as
analysis, though users see it; and loses a message's second call and later system messages.

`render`'s `earlier_analysis` says which analysis is dropped. "dropped", the default, drops all before the last final
message, as the format's guide, the template and vLLM do. "openai-harmony" does what openai-harmony 0.0.8 does by
default: it drops all before the first final message, and nothing while the assistant's last message is a call. "kept"
drops nothing.
"""

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from gptjax.errors import RequestError
from gptjax.support.quoting import quoted
from gptjax.text.harmony.fields import read_list, read_object, read_string, read_text
from gptjax.text.harmony.messages import FUNCTIONS, ROLES, DeveloperContent, Message, Namespace, SystemContent
from gptjax.text.harmony.rendering import check_name, render_messages
from gptjax.text.harmony.special import CONSTRAIN
from gptjax.text.harmony.tools import read_tools
from gptjax.text.harmony.writer import LONGEST
from gptjax.text.tokenizer import Tokenizer

EarlierAnalysis = Literal["dropped", "openai-harmony", "kept"]
"""What `render` does with the analysis of earlier turns."""

_EFFORTS = ("low", "medium", "high")
_KEYS = {
    "system": ("role", "content", "name"),
    "developer": ("role", "content", "name"),
    "user": ("role", "content", "name"),
    "assistant": ("role", "content", "name", "tool_calls", "reasoning_content", "reasoning", "refusal", "phase"),
    "tool": ("role", "content", "name", "tool_call_id"),
}
# Keys of messages in answers of OpenAI's API and LiteLLM that have no place in harmony.
_OF_ANSWERS = ("function_call", "annotations", "audio", "provider_specific_fields")
_PHASES = {"commentary": "commentary", "final_answer": "final"}
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]] = (),
    reasoning_effort: str = "medium",
    current_date: str | None = None,
    *,
    earlier_analysis: EarlierAnalysis = "dropped",
    max_length: int = LONGEST,
) -> list[int]:
    """The prompt for the assistant's next turn, up to `<|start|>assistant`; `StreamParser` reads what follows.

    Args:
      messages: as in OpenAI's chat API; text only. See this module's table.
      tokenizer: one with harmony's special tokens; text in messages never turns into them.
      tools: `{"type": "function", "function": {"name", "description", "parameters"}}`, and `{"type": "browser"}` or
        `{"type": "python"}` for the built-in ones.
      reasoning_effort: "low", "medium" or "high".
      current_date: like "2025-06-28"; None leaves the line out.
      earlier_analysis: "dropped" or "kept", or dropped the way "openai-harmony" does it. If it is kept, each prompt
        of a conversation begins with the previous one.
      max_length: the most tokens. A longer prompt is refused before it is complete.

    Raises:
      RequestError: a message or tool is invalid, or the tokenizer lacks harmony's special tokens.
      CapacityError: more than `max_length` tokens.
    """
    if earlier_analysis not in get_args(EarlierAnalysis):
        allowed = ", ".join(get_args(EarlierAnalysis))
        raise RequestError(f"earlier_analysis is {quoted(earlier_analysis)}; expected one of {allowed}")
    talk = conversation(messages, tools, reasoning_effort, current_date)
    if earlier_analysis == "dropped":
        talk = _without_earlier_analysis(talk)
    return render_messages(talk, tokenizer, drop_analysis=earlier_analysis == "openai-harmony", max_length=max_length)


def _without_earlier_analysis(messages: list[Message]) -> list[Message]:
    last = max((index for index, message in enumerate(messages) if message.channel == "final"), default=0)
    return [message for message in messages[:last] if message.channel != "analysis"] + messages[last:]


def conversation(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    reasoning_effort: str = "medium",
    current_date: str | None = None,
) -> list[Message]:
    """The harmony messages that `render` renders, nothing dropped. Arguments and errors as there."""
    if reasoning_effort not in _EFFORTS:
        raise RequestError(f"reasoning_effort is {quoted(reasoning_effort)}; expected one of {', '.join(_EFFORTS)}")
    _check_date(current_date)
    functions, builtin = read_tools(tools)
    chat = _Chat(builtin)
    for index, message in enumerate(read_list(messages, "messages")):
        chat.add(message, f"messages[{index}]")
    if all(message.role != "user" for message in chat.messages):
        raise RequestError("messages has no message with the role user: add one for the model to reply to")
    system = SystemContent(current_date=current_date, reasoning_effort=reasoning_effort, tools=builtin)
    opening = [Message("system", system)]
    instructions = "\n\n".join(chat.instructions) or None
    if instructions or functions:
        offered = (Namespace(FUNCTIONS, functions=functions),) if functions else ()
        opening.append(Message("developer", DeveloperContent(instructions, offered)))
    return opening + chat.messages


def _check_date(date: object) -> None:
    if date is None:
        return
    try:
        if isinstance(date, str) and _DATE.fullmatch(date):
            datetime.date.fromisoformat(date)
            return
    except ValueError:
        pass
    raise RequestError(f"current_date is {quoted(date)}; expected a date like 2025-06-28")


class _Chat:
    """Takes messages one by one. `instructions` are those before any other message."""

    def __init__(self, builtin: Iterable[Namespace]) -> None:
        self.messages: list[Message] = []
        self.instructions: list[str] = []
        self._calls: dict[str, Message] = {}
        self._builtin = frozenset(recipients(builtin))

    def add(self, value: object, where: str) -> None:
        message = read_object(value, where)
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise RequestError(f"{where} has the role {quoted(role)}; expected one of {', '.join(ROLES)}")
        self._check_keys(message, role, where)
        match role:
            case "system" | "developer":
                self._add_instructions(_content(message, where))
            case "user":
                self.messages.append(Message("user", _content(message, where), _name(message, where)))
            case "assistant":
                self._add_assistant(message, where)
            case _:
                self._add_result(message, where)

    def _check_keys(self, message: Mapping[str, Any], role: str, where: str) -> None:
        """Refuses unknown keys, unless they are empty. (Any message may have an id.)"""
        keys = _KEYS[role]
        for key, given in message.items():
            if key not in keys and key != "id" and given and not (role == "assistant" and key in _OF_ANSWERS):
                raise RequestError(f"{where} has {quoted(key)}, which has no meaning here; expected {', '.join(keys)}")

    def _add_instructions(self, text: str) -> None:
        if text and self.messages:
            self.messages.append(Message("developer", DeveloperContent(text)))
        elif text:
            self.instructions.append(text)

    def _add_assistant(self, message: Mapping[str, Any], where: str) -> None:
        if message.get("function_call") is not None:
            raise RequestError(f"{where}.function_call is no longer part of the API: use tool_calls")
        name = _name(message, where)
        reasoning = _reasoning(message, where)
        content = _answer(message, where)
        calls = read_list(message.get("tool_calls"), f"{where}.tool_calls")
        channel = _channel(message, where) or ("commentary" if calls else "final")
        if reasoning:
            self.messages.append(Message("assistant", reasoning, name, "analysis"))
        if content or (content is not None and reasoning is None and not calls):
            self.messages.append(Message("assistant", content, name, channel))
        ids = [self._add_call(call, name, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
        if len(set(ids)) < len(ids):
            raise RequestError(f"{where}.tool_calls has an id twice: give each call its own")

    def _add_call(self, value: object, author: str | None, where: str) -> str:
        call = read_object(value, where)
        if call.get("type") not in (None, "function"):
            raise RequestError(f"{where} has the type {quoted(call['type'])}; expected function")
        call_id = read_string(call.get("id"), f"{where}.id")
        function = read_object(call.get("function"), f"{where}.function")
        name = check_name(function.get("name"), f"{where}.function.name")
        arguments = read_string(function.get("arguments"), f"{where}.function.arguments")
        if name in self._builtin:
            message = Message("assistant", arguments, author, "analysis", name, "code")
        else:
            recipient = f"{FUNCTIONS}.{name}"
            message = Message("assistant", arguments, author, "commentary", recipient, f"{CONSTRAIN}json")
        self._calls[call_id] = message
        self.messages.append(message)
        return call_id

    def _add_result(self, message: Mapping[str, Any], where: str) -> None:
        call_id = read_string(message.get("tool_call_id"), f"{where}.tool_call_id")
        call = self._calls.get(call_id)
        if call is None:
            raise RequestError(
                f"{where}.tool_call_id is {quoted(call_id)}, which no earlier tool call has: use the id of the call "
                "that this is the result of, and keep the assistant's message with the call"
            )
        self.messages.append(Message("tool", _content(message, where), call.recipient, call.channel, "assistant"))


def recipients(tools: Iterable[Namespace]) -> Iterable[str]:
    """The recipients of calls to built-in tools: "browser.search" and the like, or "python"."""
    for tool in tools:
        yield from [f"{tool.name}.{function.name}" for function in tool.functions] or [tool.name]


def _content(message: Mapping[str, Any], where: str) -> str:
    text = read_text(message.get("content"), f"{where}.content")
    if text is None:
        raise RequestError(f"{where}.content is missing; expected a string or a list of text parts")
    return text


def _name(message: Mapping[str, Any], where: str) -> str | None:
    return None if message.get("name") is None else check_name(message["name"], f"{where}.name")


def _answer(message: Mapping[str, Any], where: str) -> str | None:
    """The content, or else the refusal."""
    content = read_text(message.get("content"), f"{where}.content", refusals=True)
    refusal = message.get("refusal")
    if refusal is None:
        return content
    refused = read_string(refusal, f"{where}.refusal")
    return content or refused


def _channel(message: Mapping[str, Any], where: str) -> str | None:
    phase = message.get("phase")
    if phase is None:
        return None
    if not isinstance(phase, str) or phase not in _PHASES:
        raise RequestError(f"{where}.phase is {quoted(phase)}; expected one of {', '.join(_PHASES)}")
    return _PHASES[phase]


def _reasoning(message: Mapping[str, Any], where: str) -> str | None:
    """Clients use either key, and some servers send both."""
    for key in ("reasoning_content", "reasoning"):
        if message.get(key) is not None:
            return read_string(message[key], f"{where}.{key}")
    return None
