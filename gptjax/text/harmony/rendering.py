"""Harmony messages as token ids, as openai-harmony 0.0.8 writes them (`encoding.rs`)."""

import re
from collections.abc import Sequence

from gptjax.errors import RequestError
from gptjax.text.harmony.messages import (
    CHANNELS,
    FUNCTIONS,
    ROLES,
    DeveloperContent,
    Message,
    Namespace,
    SystemContent,
)
from gptjax.text.harmony.schema import type_of
from gptjax.text.harmony.special import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, START, special_ids
from gptjax.text.tokenizer import Tokenizer

# Headers are words between spaces and special tokens. OpenAI's API has this rule for the names of users.
_NAME = re.compile(r"(?!to=)[^\s<|\\/>]+")
_CONTENT_TYPE = re.compile(r"(<\|constrain\|> ?)?[^\s<|>]+")


def render_messages(
    messages: Sequence[Message], tokenizer: Tokenizer, *, drop_analysis: bool = True, completion: bool = True
) -> list[int]:
    """The ids of a conversation. Text is encoded as plain text: only the format's own marks are special tokens.

    Args:
        messages: in order, the system message first.
        tokenizer: one with harmony's special tokens.
        drop_analysis: leave out the analysis before the first message in the final channel, if the assistant's last
            message is a final one (openai-harmony's `auto_drop_analysis`).
        completion: end with the beginning of the assistant's next message, for the model to go on.

    Raises:
        RequestError: a tokenizer without harmony, or a message that the format cannot carry.
    """
    writer = _Writer(tokenizer)
    for index, message in enumerate(messages):
        _check(message, f"Message {index}")
    has_functions = any(
        tool.name == FUNCTIONS and tool.functions
        for message in messages
        if isinstance(message.content, DeveloperContent)
        for tool in message.content.tools
    )
    for message in _without_analysis(messages) if drop_analysis else messages:
        _write_header(writer, message)
        writer.text(_text(message.content, has_functions))
        writer.mark(CALL if message.role == "assistant" and message.recipient else END)
    if completion:
        writer.mark(START)
        writer.text("assistant")
    return writer.ids


class _Writer:
    """Collects ids; marks and text never mix."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.ids: list[int] = []
        self._special = special_ids(tokenizer)
        self._encode = tokenizer.encode

    def mark(self, token: str) -> None:
        self.ids.append(self._special[token])

    def text(self, text: str) -> None:
        self.ids.extend(self._encode(text))


def check_name(name: object, what: str) -> str:
    """A name that can stand in a header. Raises RequestError, beginning with `what`, for another."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(rf"{what} is {name!r}: write a word without spaces and < | \ / >.")
    return name


def _check(message: Message, what: str) -> None:
    if message.role not in ROLES:
        raise RequestError(f"{what} has the role {message.role!r}: write one of {', '.join(ROLES)}.")
    fitting = {"system": str | SystemContent, "developer": str | DeveloperContent}.get(message.role, str)
    if not isinstance(message.content, fitting):
        kind = type(message.content).__name__
        raise RequestError(f"{what} has a {kind} as content, which a {message.role} message cannot carry: write text.")
    if message.channel is not None and message.channel not in CHANNELS:
        raise RequestError(f"{what} has the channel {message.channel!r}: write one of {', '.join(CHANNELS)}.")
    if message.role == "tool" and (message.name is None or message.name.partition(":")[0] in ROLES):
        raise RequestError(f"{what} has the name {message.name!r}: write the tool's, as in 'functions.get_weather'.")
    for field, name in (("name", message.name), ("recipient", message.recipient)):
        if name is not None:
            check_name(name, f"The {field} of {what[0].lower()}{what[1:]}")
    if message.content_type is not None and not _CONTENT_TYPE.fullmatch(message.content_type):
        raise RequestError(f"{what} has the content type {message.content_type!r}: write one like '{CONSTRAIN}json'.")


def _without_analysis(messages: Sequence[Message]) -> list[Message]:
    last = next((message for message in reversed(messages) if message.role == "assistant"), None)
    if last is None or last.channel != "final":
        return list(messages)
    first_final = next(index for index, message in enumerate(messages) if message.channel == "final")
    early = [message for message in messages[:first_final] if message.channel != "analysis"]
    return [*early, *messages[first_final:]]


def _write_header(writer: _Writer, message: Message) -> None:
    writer.mark(START)
    if message.role == "tool":
        writer.text(message.name or "")
    else:
        writer.text(message.role)
        writer.text(f":{message.name}" if message.name else "")
    if message.recipient and message.recipient != "all":
        writer.text(f" to={message.recipient}")
    if message.channel:
        writer.mark(CHANNEL)
        writer.text(message.channel)
    if message.content_type:
        _write_content_type(writer, message.content_type)
    writer.mark(MESSAGE)


def _write_content_type(writer: _Writer, content_type: str) -> None:
    if content_type.startswith(CONSTRAIN):
        writer.text(" ")
        writer.mark(CONSTRAIN)
        writer.text(content_type.removeprefix(CONSTRAIN))
    else:
        writer.text(f" {content_type}")


def _text(content: str | SystemContent | DeveloperContent, has_functions: bool) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, DeveloperContent):
        instructions = [] if content.instructions is None else ["# Instructions", content.instructions]
        return "\n\n".join(instructions + _tools(content.tools))
    about = [
        content.model_identity,
        content.knowledge_cutoff and f"Knowledge cutoff: {content.knowledge_cutoff}",
        content.current_date and f"Current date: {content.current_date}",
    ]
    sections = ["\n".join(line for line in about if line)]
    sections += [f"Reasoning: {content.reasoning_effort}"] if content.reasoning_effort else []
    sections += _tools(content.tools)
    if content.channels:
        names = ", ".join(content.channels)
        sections.append(f"# Valid channels: {names}. Channel must be included for every message.")
        if has_functions:
            sections[-1] += f"\nCalls to these tools must go to the commentary channel: '{FUNCTIONS}'."
    return "\n\n".join(section for section in sections if section)


def _tools(tools: Sequence[Namespace]) -> list[str]:
    """The sections that describe tools, in the order of their names."""
    return ["# Tools", *(_tool(tool) for tool in sorted(tools, key=lambda tool: tool.name))] if tools else []


def _tool(tool: Namespace) -> str:
    lines = [f"## {tool.name}\n"]
    about = _lines(tool.description or "")
    if not tool.functions:
        return "\n".join(lines + about)
    lines += [f"// {line}" for line in about]
    lines.append(f"namespace {tool.name} {{\n")
    for function in tool.functions:
        lines += [f"// {line}" for line in _lines(function.description)]
        arguments = "" if function.parameters is None else f"_: {type_of(function.parameters)}"
        lines.append(f"type {function.name} = ({arguments}) => any;\n")
    lines.append(f"}} // namespace {tool.name}")
    return "\n".join(lines)


def _lines(text: str) -> list[str]:
    """Rust's `lines`: at "\\n" and "\\r\\n" only, none after a last one (Python's splitlines knows ten more)."""
    lines = text.split("\n")
    ended = [line.removesuffix("\r") for line in lines[:-1]]
    return [*ended, lines[-1]] if lines[-1] else ended
