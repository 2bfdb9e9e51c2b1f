"""Conversations in the form of OpenAI's chat API, as harmony messages.

| OpenAI's chat API | harmony |
|---|---|
| (always) | a system message: identity, knowledge cutoff, `current_date`, effort, built-in tools, channels |
| `system` and `developer` at the beginning, function tools | one developer message, texts joined by an empty line |
| `response_format` with a schema | its `# Response Formats`, at the end |
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

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from gptjax.errors import RequestError
from gptjax.support.quoting import quoted
from gptjax.text.fields import (
    check_ids,
    check_name,
    read_answer,
    read_call,
    read_call_id,
    read_content,
    read_date,
    read_list,
    read_messages,
    read_object,
    read_reasoning,
    read_role,
)
from gptjax.text.harmony.messages import (
    FUNCTIONS,
    DeveloperContent,
    Message,
    Namespace,
    ResponseFormat,
    SystemContent,
)
from gptjax.text.harmony.rendering import render_messages
from gptjax.text.harmony.special import CONSTRAIN
from gptjax.text.harmony.tools import read_tools
from gptjax.text.tokenizer import Tokenizer
from gptjax.text.writer import LONGEST

EarlierAnalysis = Literal["dropped", "openai-harmony", "kept"]
"""What `render` does with the analysis of earlier turns."""

_EFFORTS = ("low", "medium", "high")
_PHASES = {"commentary": "commentary", "final_answer": "final"}


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]] = (),
    reasoning_effort: str = "medium",
    current_date: str | None = None,
    *,
    response_format: ResponseFormat | None = None,
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
      response_format: the form of the answer, which the developer message then describes.
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
    talk = conversation(messages, tools, reasoning_effort, current_date, response_format)
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
    response_format: ResponseFormat | None = None,
) -> list[Message]:
    """The harmony messages that `render` renders, nothing dropped. Arguments and errors as there."""
    if reasoning_effort not in _EFFORTS:
        raise RequestError(f"reasoning_effort is {quoted(reasoning_effort)}; expected one of {', '.join(_EFFORTS)}")
    if current_date is not None:
        read_date(current_date)
    functions, builtin = read_tools(tools)
    chat = _Chat(builtin)
    for index, message in enumerate(read_messages(messages)):
        chat.add(message, f"messages[{index}]")
    system = SystemContent(current_date=current_date, reasoning_effort=reasoning_effort, tools=builtin)
    opening = [Message("system", system)]
    instructions = "\n\n".join(chat.instructions) or None
    if instructions or functions or response_format:
        offered = (Namespace(FUNCTIONS, functions=functions),) if functions else ()
        opening.append(Message("developer", DeveloperContent(instructions, offered, response_format)))
    return opening + chat.messages


class _Chat:
    """Takes messages one by one. `instructions` are those before any other message."""

    def __init__(self, builtin: Iterable[Namespace]) -> None:
        self.messages: list[Message] = []
        self.instructions: list[str] = []
        self._calls: dict[str, Message] = {}
        self._builtin = frozenset(recipients(builtin))

    def add(self, value: object, where: str) -> None:
        message = read_object(value, where)
        role = read_role(message, where)
        match role:
            case "system" | "developer":
                self._add_instructions(read_content(message, where))
            case "user":
                self.messages.append(Message("user", read_content(message, where), _name(message, where)))
            case "assistant":
                self._add_assistant(message, where)
            case _:
                self._add_result(message, where)

    def _add_instructions(self, text: str) -> None:
        if text and self.messages:
            self.messages.append(Message("developer", DeveloperContent(text)))
        elif text:
            self.instructions.append(text)

    def _add_assistant(self, message: Mapping[str, Any], where: str) -> None:
        name = _name(message, where)
        reasoning = read_reasoning(message, where)
        content = read_answer(message, where)
        calls = read_list(message.get("tool_calls"), f"{where}.tool_calls")
        channel = _channel(message, where) or ("commentary" if calls else "final")
        if reasoning:
            self.messages.append(Message("assistant", reasoning, name, "analysis"))
        if content or (content is not None and reasoning is None and not calls):
            self.messages.append(Message("assistant", content, name, channel))
        ids = [self._add_call(call, name, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
        check_ids(ids, where)

    def _add_call(self, value: object, author: str | None, where: str) -> str:
        call_id, name, arguments = read_call(value, where)
        if name in self._builtin:
            message = Message("assistant", arguments, author, "analysis", name, "code")
        else:
            recipient = f"{FUNCTIONS}.{name}"
            message = Message("assistant", arguments, author, "commentary", recipient, f"{CONSTRAIN}json")
        self._calls[call_id] = message
        self.messages.append(message)
        return call_id

    def _add_result(self, message: Mapping[str, Any], where: str) -> None:
        call = self._calls[read_call_id(message, where, self._calls)]
        self.messages.append(Message("tool", read_content(message, where), call.recipient, call.channel, "assistant"))


def recipients(tools: Iterable[Namespace]) -> Iterable[str]:
    """The recipients of calls to built-in tools: "browser.search" and the like, or "python"."""
    for tool in tools:
        yield from [f"{tool.name}.{function.name}" for function in tool.functions] or [tool.name]


def _name(message: Mapping[str, Any], where: str) -> str | None:
    return None if message.get("name") is None else check_name(message["name"], f"{where}.name")


def _channel(message: Mapping[str, Any], where: str) -> str | None:
    phase = message.get("phase")
    if phase is None:
        return None
    if not isinstance(phase, str) or phase not in _PHASES:
        raise RequestError(f"{where}.phase is {quoted(phase)}; expected one of {', '.join(_PHASES)}")
    return _PHASES[phase]
