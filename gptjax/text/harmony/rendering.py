"""Harmony messages as token ids, as openai-harmony 0.0.8 writes them (`encoding.rs`)."""

import re
from collections.abc import Iterable, Iterator, Sequence

from gptjax.errors import RequestError
from gptjax.support.quoting import quoted
from gptjax.text.fields import ROLES, check_name
from gptjax.text.harmony.messages import (
    CHANNELS,
    FUNCTIONS,
    DeveloperContent,
    Message,
    Namespace,
    ResponseFormat,
    SystemContent,
)
from gptjax.text.harmony.schema import type_of
from gptjax.text.harmony.special import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, START, special_ids
from gptjax.text.tokenizer import Tokenizer
from gptjax.text.writer import LONGEST, Writer

_CONTENT_TYPE = re.compile(r"(<\|constrain\|> ?)?[^\s<|>]+")


def render_messages(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    drop_analysis: bool = True,
    completion: bool = True,
    max_length: int = LONGEST,
) -> list[int]:
    """The ids of a conversation. Text is encoded as plain text: only the format's own marks are special tokens.

    Args:
      messages: in order, the system message first.
      tokenizer: one with harmony's special tokens.
      drop_analysis: leave out the analysis before the first message in the final channel, if the assistant's last
        message is in that channel (openai-harmony's `auto_drop_analysis`).
      completion: end with the beginning of the assistant's next message, for the model to continue.
      max_length: the most tokens; see `Writer`.

    Raises:
      RequestError: a tokenizer without harmony, or a message that the format cannot carry.
      CapacityError: more than `max_length` tokens.
    """
    special_ids(tokenizer)  # raises if one is missing
    writer = Writer(tokenizer, max_length)
    for index, message in enumerate(messages):
        _check(message, f"message {index}")
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


def _check(message: Message, what: str) -> None:
    if message.role not in ROLES:
        raise RequestError(f"{what} has the role {quoted(message.role)}; expected one of {', '.join(ROLES)}")
    fitting = {"system": str | SystemContent, "developer": str | DeveloperContent}.get(message.role, str)
    if not isinstance(message.content, fitting):
        kind = type(message.content).__name__
        raise RequestError(f"{what} has a {kind} as content, which a {message.role} message cannot have; expected text")
    if message.channel is not None and message.channel not in CHANNELS:
        raise RequestError(f"{what} has the channel {quoted(message.channel)}; expected one of {', '.join(CHANNELS)}")
    if message.role == "tool" and (message.name is None or message.name.partition(":")[0] in ROLES):
        raise RequestError(
            f"{what} has the name {quoted(message.name)}; expected the tool's, as in 'functions.get_weather'"
        )
    for field, name in (("name", message.name), ("recipient", message.recipient)):
        if name is not None:
            check_name(name, f"the {field} of {what}")
    if message.content_type is not None and not _CONTENT_TYPE.fullmatch(message.content_type):
        raise RequestError(
            f"{what} has the content type {quoted(message.content_type)}; expected one like '{CONSTRAIN}json'"
        )


def _without_analysis(messages: Sequence[Message]) -> list[Message]:
    last = next((message for message in reversed(messages) if message.role == "assistant"), None)
    if last is None or last.channel != "final":
        return list(messages)
    first_final = next(index for index, message in enumerate(messages) if message.channel == "final")
    early = [message for message in messages[:first_final] if message.channel != "analysis"]
    return [*early, *messages[first_final:]]


def _write_header(writer: Writer, message: Message) -> None:
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


def _write_content_type(writer: Writer, content_type: str) -> None:
    if content_type.startswith(CONSTRAIN):
        writer.text(" ")
        writer.mark(CONSTRAIN)
        writer.text(content_type.removeprefix(CONSTRAIN))
    else:
        writer.text(f" {content_type}")


def _text(content: str | SystemContent | DeveloperContent, has_functions: bool) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, DeveloperContent):
        sections: list[Iterable[str]] = []
        if content.instructions is not None:
            sections.append((f"# Instructions\n\n{content.instructions}",))
        if content.tools:
            sections.append(_tools(content.tools))
        if content.response_format is not None:
            sections.append(_response_format(content.response_format))
        yield from _joined(sections)
    else:
        yield from _system(content, has_functions)


def _system(content: SystemContent, has_functions: bool) -> Iterator[str]:
    about = [
        content.model_identity,
        content.knowledge_cutoff and f"Knowledge cutoff: {content.knowledge_cutoff}",
        content.current_date and f"Current date: {content.current_date}",
    ]
    sections: list[Iterable[str]] = [("\n".join(line for line in about if line),)] if any(about) else []
    if content.reasoning_effort:
        sections.append((f"Reasoning: {content.reasoning_effort}",))
    if content.tools:
        sections.append(_tools(content.tools))
    if content.channels:
        names = ", ".join(content.channels)
        note = f"\nCalls to these tools must go to the commentary channel: '{FUNCTIONS}'." if has_functions else ""
        sections.append((f"# Valid channels: {names}. Channel must be included for every message.{note}",))
    yield from _joined(sections)


def _joined(sections: Iterable[Iterable[str]]) -> Iterator[str]:
    for index, section in enumerate(sections):
        yield "\n\n" if index else ""
        yield from section


def _response_format(form: ResponseFormat) -> Iterator[str]:
    """As the format's guide has it; openai-harmony does not write it."""
    yield f"# Response Formats\n\n## {form.name}\n\n"
    yield from (f"// {line}\n" for line in _lines(form.description))
    yield form.schema


def _tools(tools: Sequence[Namespace]) -> Iterator[str]:
    """The sections that describe tools, in order of name; nothing if there are none."""
    if tools:
        yield "# Tools"
    for tool in sorted(tools, key=lambda tool: tool.name):
        yield "\n\n"
        yield from _tool(tool)


def _tool(tool: Namespace) -> Iterator[str]:
    yield f"## {tool.name}\n"
    about = _lines(tool.description or "")
    if not tool.functions:
        yield from (f"\n{line}" for line in about)
        return
    yield from (f"\n// {line}" for line in about)
    yield f"\nnamespace {tool.name} {{\n"
    for function in tool.functions:
        yield from (f"\n// {line}" for line in _lines(function.description))
        yield f"\ntype {function.name} = ("
        if function.parameters is not None:
            yield "_: "
            yield from type_of(function.parameters)
        yield ") => any;\n"
    yield f"\n}} // namespace {tool.name}"


def _lines(text: str) -> Iterator[str]:
    """The lines as Rust's `lines` splits them: only at "\\n" and "\\r\\n" (Python's splitlines has ten more)."""
    start = 0
    while (end := text.find("\n", start)) >= 0:
        yield text[start:end].removesuffix("\r")
        start = end + 1
    if start < len(text):
        yield text[start:]
