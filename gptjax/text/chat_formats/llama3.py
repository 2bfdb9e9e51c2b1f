"""The formats of Llama 3, 3.1, 3.2 and 3.3.

    <|start_header_id|>ROLE<|end_header_id|>

    TEXT<|eot_id|>

Texts lose the white space at their ends. Since 3.1 there is always a system message, which has dates, and there are
tools: described in the user's first message, called as JSON, with results from `ipython`, quoted as JSON strings. As in
the published templates, a message with a call is written without its text. 3.1 and 3.3 have the same template, which
says that it is 26 July 2024 unless it is told the date; that of 3.2 asks the clock.
"""

import datetime
import json
from collections.abc import Iterator
from typing import Final

from gptjax.errors import RequestError
from gptjax.text.chat_formats.conversation import Conversation, Message, as_json
from gptjax.text.chat_formats.text_format import Mark

BOS: Final = Mark("<|begin_of_text|>")
START_HEADER: Final = Mark("<|start_header_id|>")
END_HEADER: Final = Mark("<|end_header_id|>")
END: Final = Mark("<|eot_id|>")
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_ABOUT_TOOLS: Final = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    'answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument '
    "name and its value}.Do not use variables.\n\n"
)


def llama3(talk: Conversation) -> Iterator[str]:
    """A prompt in Llama 3's format."""
    yield BOS
    for message in talk.messages:
        yield from _message(message.role, message.content.strip())
    yield from _header("assistant")


def llama31(talk: Conversation, default_date: str | None = "26 Jul 2024") -> Iterator[str]:
    """A prompt in the format of Llama 3.1 and later; without a `default_date` it is today."""
    system, messages = "", talk.messages
    if messages[0].role == "system":
        system, messages = messages[0].content.strip(), messages[1:]
    date = default_date
    if talk.date is not None or date is None:
        date = _written(talk.date or datetime.date.today())
    environment = "Environment: ipython\n" if talk.tools else ""
    about = f"{environment}Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"
    yield BOS
    yield from _message("system", about, system)
    if talk.tools:
        if not messages:
            raise RequestError("messages has only a system message: this format describes tools in the user's first")
        first, messages = messages[0], messages[1:]
        if first.role != "user":
            raise RequestError(f"{first.where} must be the user's: this format describes tools in the first message")
        yield from (*_header("user"), _ABOUT_TOOLS)
        for tool in talk.tools:
            yield from as_json(tool, indent=4)
            yield "\n\n"
        yield from (first.content.strip(), END)
    for message in messages:
        yield from _later(message)
    yield from _header("assistant")


def _later(message: Message) -> Iterator[str]:
    if message.role == "tool":
        yield from _message("ipython", json.dumps(message.content, ensure_ascii=False))
    elif message.calls:
        if len(message.calls) > 1:
            raise RequestError(f"{message.where}.tool_calls has {len(message.calls)} calls: this format has one a turn")
        call = message.calls[0]
        yield from _message("assistant", '{"name": "', call.name, '", "parameters": ', call.arguments, "}")
    else:
        yield from _message(message.role, message.content.strip())


def _header(role: str) -> tuple[str, ...]:
    return START_HEADER, role, END_HEADER, "\n\n"


def _message(role: str, *texts: str) -> Iterator[str]:
    yield from (*_header(role), *texts, END)


def _written(date: datetime.date) -> str:
    """A date like "26 Jul 2024", in English whatever the locale."""
    return f"{date.day:02} {_MONTHS[date.month - 1]} {date.year:04}"
