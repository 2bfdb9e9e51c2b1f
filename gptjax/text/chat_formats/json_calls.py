"""Tool calls as JSON, and the reader of turns that are nothing else."""

import json
from typing import Final

from gptjax.errors import RequestError
from gptjax.text.chat_formats.conversation import normal_arguments
from gptjax.text.chat_formats.interface import ChatOptions, ToolCall, new_call_id
from gptjax.text.chat_formats.readers import PlainReader, Tokens
from gptjax.text.fields import check_name

PYTHON_TAG: Final = "<|python_tag|>"


def parse_call(text: str) -> ToolCall | None:
    """A call written as `{"name": ..., "arguments": {...}}`, or with "parameters"; None if it is not one.

    A name that a prompt could not repeat is not one either. Arguments may be missing, or JSON in a string.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    given = value.get("arguments", value.get("parameters"))
    try:
        arguments = normal_arguments(given if isinstance(given, str) else json.dumps({} if given is None else given))
        name = check_name(value.get("name"), "the tool")
    except (RequestError, ValueError, RecursionError):
        return None
    return None if arguments is None else ToolCall(new_call_id(), name, arguments)


class JsonReader(PlainReader):
    """A `TurnReader` for turns that are either text, or a call as JSON, maybe after `<|python_tag|>`."""

    def __init__(self, tokens: Tokens, offered: frozenset[str]) -> None:
        """`offered`: the names of the tools; JSON that does not call one of them is text."""
        super().__init__(tokens)
        tokens.show(PYTHON_TAG)
        self._offered = offered
        self._head = ""  # as much of the text as decides what it is
        self._is_text: bool | None = None  # None: not decided
        self._held: list[str] = []  # what may be a call

    def _take(self, text: str) -> str:
        if self._is_text:
            return text
        self._held.append(text)
        if self._is_text is None:
            self._head = (self._head + text).lstrip()
            if self._head.startswith(("{", PYTHON_TAG)):
                self._is_text = False
            elif not PYTHON_TAG.startswith(self._head):
                self._is_text = True
                return self._flush()
        return ""

    def _end(self) -> str:
        text = self._flush()
        call = parse_call(text.strip().removeprefix(PYTHON_TAG))
        if call is None or call.name not in self._offered:
            return text
        self._calls.add_whole(call)
        self.dropped += len(text)
        return ""

    def _flush(self) -> str:
        text, self._held = "".join(self._held), []
        return text


def read_json_calls(tokens: Tokens, options: ChatOptions) -> PlainReader:
    """The reader of a format whose calls are the whole turn."""
    offered = frozenset(tool["function"]["name"] for tool in options.tools)
    return JsonReader(tokens, offered) if offered else PlainReader(tokens)
