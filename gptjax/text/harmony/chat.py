"""Conversations in the form of OpenAI's chat API, as harmony messages.

| there | here |
|---|---|
| (always) | a system message: identity, knowledge cutoff, `current_date`, effort, built-in tools, channels |
| `system` and `developer` at the beginning, function tools | one developer message, the texts joined by an empty line |
| `system` and `developer` later on | a developer message in that place |
| `user`, with its `name` | a user message, `user:name` |
| `assistant`: `reasoning_content` or `reasoning` | an assistant message in the analysis channel |
| `assistant`: `content` | one in the final channel; beside tool calls a preamble, in the commentary channel |
| `assistant`: each of `tool_calls` | one to `functions.NAME`, in the commentary channel, `<|constrain|>json` |
| `tool` | from the tool that `tool_call_id` names, to the assistant, in the channel of the call |

Calls of the built-in tools go to `browser.search` and the like, or `python`, in the analysis channel, as `code`. Text
parts are joined as they are; an empty content beside reasoning or calls is left out. What has no place in harmony
(what only answers have, names of system messages) is not read; other
keys are refused.

GPT-OSS's published chat template differs from the format's documentation and from openai-harmony, which are followed
here. The template writes ` json` for `<|constrain|>json`; quotes tools' results as JSON strings; takes text beside tool
calls for analysis, though users see it; loses the second call of a message and later system messages; and drops the
analysis of all past turns, where openai-harmony 0.0.8 drops that before the first final message.
"""

import datetime
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gptjax.errors import RequestError
from gptjax.text.harmony.fields import read_list, read_object, read_string, read_text
from gptjax.text.harmony.messages import FUNCTIONS, ROLES, DeveloperContent, Message, Namespace, SystemContent
from gptjax.text.harmony.rendering import check_name, render_messages
from gptjax.text.harmony.special import CONSTRAIN
from gptjax.text.harmony.tools import read_tools
from gptjax.text.tokenizer import Tokenizer

_EFFORTS = ("low", "medium", "high")
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning")
# In the messages that OpenAI's API answers with, without a place in harmony.
_OF_ANSWERS = ("function_call", "refusal", "annotations", "audio", "id")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]] = (),
    reasoning_effort: str = "medium",
    current_date: str | None = None,
) -> list[int]:
    """The prompt for the assistant's next turn, up to `<|start|>assistant`; `StreamParser` reads what follows.

    Args:
        messages: as in OpenAI's chat API; text only. See this module's table.
        tokenizer: one with harmony's special tokens; whatever the texts say, they become none of them.
        tools: `{"type": "function", "function": {"name", "description", "parameters"}}`, and `{"type": "browser"}` or
            `{"type": "python"}` for the built-in ones.
        reasoning_effort: "low", "medium" or "high".
        current_date: like "2025-06-28"; None leaves the line out.

    Raises:
        RequestError: says which message or tool is not as it should be, or what the tokenizer lacks.
    """
    return render_messages(conversation(messages, tools, reasoning_effort, current_date), tokenizer)


def conversation(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    reasoning_effort: str = "medium",
    current_date: str | None = None,
) -> list[Message]:
    """The harmony messages that `render` renders, nothing dropped. Arguments and errors as there."""
    if reasoning_effort not in _EFFORTS:
        raise RequestError(f"reasoning_effort is {reasoning_effort!r}: write one of {', '.join(_EFFORTS)}.")
    _check_date(current_date)
    functions, builtin = read_tools(tools)
    chat = _Chat(builtin)
    for index, message in enumerate(read_list(messages, "messages")):
        chat.add(message, f"messages[{index}]")
    if all(message.role != "user" for message in chat.messages):
        raise RequestError("messages has no message of the role user: add one, for the model to reply to.")
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
    raise RequestError(f"current_date is {date!r}: write a date like 2025-06-28.")


class _Chat:
    """Takes messages one after the other. `instructions` are those before any other message."""

    def __init__(self, builtin: Iterable[Namespace]) -> None:
        self.messages: list[Message] = []
        self.instructions: list[str] = []
        self._calls: dict[str, Message] = {}
        self._builtin = frozenset(_recipients(builtin))

    def add(self, value: object, where: str) -> None:
        message = read_object(value, where)
        for key, given in message.items():
            if key not in (*_KEYS, *_OF_ANSWERS) and given:
                raise RequestError(
                    f"{where} has {reprlib.repr(key)}, which has no meaning here; write {', '.join(_KEYS)}."
                )
        match message.get("role"):
            case "system" | "developer":
                self._add_instructions(_content(message, where))
            case "user":
                self.messages.append(Message("user", _content(message, where), _name(message, where)))
            case "assistant":
                self._add_assistant(message, where)
            case "tool":
                self._add_result(message, where)
            case role:
                raise RequestError(f"{where} has the role {reprlib.repr(role)}: write one of {', '.join(ROLES)}.")

    def _add_instructions(self, text: str) -> None:
        if text and self.messages:
            self.messages.append(Message("developer", DeveloperContent(text)))
        elif text:
            self.instructions.append(text)

    def _add_assistant(self, message: Mapping[str, Any], where: str) -> None:
        if message.get("function_call") is not None:
            raise RequestError(f"{where}.function_call is no longer part of the API: write tool_calls.")
        name = _name(message, where)
        reasoning = _reasoning(message, where)
        content = read_text(message.get("content"), f"{where}.content")
        calls = read_list(message.get("tool_calls"), f"{where}.tool_calls")
        if content is None and not reasoning and not calls:
            raise RequestError(f"{where} says nothing: write content, reasoning_content or tool_calls.")
        if reasoning:
            self.messages.append(Message("assistant", reasoning, name, "analysis"))
        if content or (content is not None and not reasoning and not calls):
            self.messages.append(Message("assistant", content, name, "commentary" if calls else "final"))
        ids = [self._add_call(call, name, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
        if len(set(ids)) < len(ids):
            raise RequestError(f"{where}.tool_calls has an id twice: give each call its own.")

    def _add_call(self, value: object, author: str | None, where: str) -> str:
        call = read_object(value, where)
        if call.get("type", "function") != "function":
            raise RequestError(f"{where} has the type {call['type']!r}: write a call of a function.")
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
                f"{where}.tool_call_id is {call_id!r}, which no tool call before it has: write the id of the call "
                "whose result this is, and keep the assistant's message with the call."
            )
        self.messages.append(Message("tool", _content(message, where), call.recipient, call.channel, "assistant"))


def _recipients(tools: Iterable[Namespace]) -> Iterable[str]:
    for tool in tools:
        yield from [f"{tool.name}.{function.name}" for function in tool.functions] or [tool.name]


def _content(message: Mapping[str, Any], where: str) -> str:
    text = read_text(message.get("content"), f"{where}.content")
    if text is None:
        raise RequestError(f"{where}.content is missing: write a string, or a list of text parts.")
    return text


def _name(message: Mapping[str, Any], where: str) -> str | None:
    return None if message.get("name") is None else check_name(message["name"], f"{where}.name")


def _reasoning(message: Mapping[str, Any], where: str) -> str | None:
    """Clients use either key, and some servers send both."""
    for key in ("reasoning_content", "reasoning"):
        if message.get(key) is not None:
            return read_string(message[key], f"{where}.{key}")
    return None
