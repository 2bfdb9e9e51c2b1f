"""Readers of turns that are written as text.

| reader | answer | reasoning | calls |
|---|---|---|---|
| `PlainReader` | all text | | |
| `TaggedReader` | the rest | in `<think>`, at the beginning | JSON in `<tool_call>` |
| `JsonReader` | all text, if it is not a call | | the whole text, if it is JSON that calls an offered tool |

All give the same result however the text is split into tokens. A call that cannot be read is part of the answer, as the
model wrote it, so nothing is lost and nothing breaks.
"""

import json
from typing import Final

from gptjax.errors import RequestError
from gptjax.text.chat_formats.conversation import normal_arguments
from gptjax.text.chat_formats.interface import ChatOptions, ToolCall, new_call_id
from gptjax.text.fields import check_name
from gptjax.text.overlap import overlap
from gptjax.text.tokenizer import Tokenizer

THINK: Final = ("<think>", "</think>")
CALL: Final = ("<tool_call>", "</tool_call>")
PYTHON_TAG: Final = "<|python_tag|>"


class Tokens:
    """Turns tokens into text. Special tokens are left out, except for those that a reader wants to see."""

    def __init__(self, tokenizer: Tokenizer, begin: str | None) -> None:
        """`begin`: the special token that begins a message."""
        self._special = tokenizer.special_ids
        self._begin = None if begin is None else self._special.get(begin)
        self._shown: dict[int, str] = {}
        self._decoder = tokenizer.stream()

    def show(self, *tags: str) -> None:
        """Makes these texts visible in vocabularies that have them as special tokens."""
        self._shown |= {self._special[tag]: tag for tag in tags if tag in self._special}

    def begins(self, token_id: int) -> bool:
        """Whether a token begins another message."""
        return token_id == self._begin

    def push(self, token_id: int) -> str:
        """The text that became certain with this token."""
        tag = self._shown.get(token_id)
        return self._decoder.push(token_id) if tag is None else self._decoder.finish() + tag

    def finish(self) -> str:
        """The rest of the text."""
        return self._decoder.finish()


class PlainReader:
    """A `TurnReader` of turns that are nothing but an answer, and the base of the others."""

    phase = "final_answer"

    def __init__(self, tokens: Tokens) -> None:
        self.ended = False
        self.dropped = 0
        self._tokens = tokens
        self._reasoning: list[str] = []
        self._fresh = ""  # reasoning not taken yet
        self._calls: list[ToolCall] = []

    def push(self, token_id: int) -> str:
        """Returns the answer text that became certain with this token."""
        self.ended = self.ended or self._tokens.begins(token_id)
        return "" if self.ended else self._take(self._tokens.push(token_id))

    def finish(self) -> str:
        """Returns the rest of the answer text."""
        return self._take(self._tokens.finish()) + self._end()

    def ended_by(self, token_id: int) -> None:
        """Does nothing: `finish` has read everything."""

    def take_reasoning(self) -> str:
        """Returns the reasoning added since it was last called."""
        fresh, self._fresh = self._fresh, ""
        return fresh

    @property
    def reasoning(self) -> str:
        """All reasoning so far."""
        return "".join(self._reasoning)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls so far."""
        return tuple(self._calls)

    def _take(self, text: str) -> str:
        """Reads more text, and returns the answer's part of it."""
        return text

    def _end(self) -> str:
        """The rest of the answer, at the end of the text."""
        return ""


class TaggedReader(PlainReader):
    """A `TurnReader` for reasoning and calls in tags.

    Newlines between a tag and the text next to it belong to neither. Reasoning can only be the first thing in a turn.
    """

    def __init__(self, tokens: Tokens, *, thinks: bool, calls: bool, thinking: bool = False) -> None:
        """`thinking`: the prompt has begun the reasoning."""
        super().__init__(tokens)
        tokens.show(*THINK, *CALL)
        self._reads_calls = calls
        self._inside = "think" if thinking else "start" if thinks else "answer"
        self._held = ""  # text that may be the beginning of a tag
        self._space: list[str] = []  # before the first text
        self._call: list[str] = []
        self._newlines = 0  # not passed on yet, since a tag may follow
        self._after_tag = thinking  # whether newlines are dropped
        self._answered = False

    def _take(self, text: str) -> str:
        self._held += text
        answer, more = "", True
        while more:
            said, more = self._start() if self._inside == "start" else self._read()
            answer += said
        return answer

    def _start(self) -> tuple[str, bool]:
        """Waits for `<think>`, or for anything else but white space."""
        text = self._held.lstrip()
        self._space.append(self._held[: len(self._held) - len(text)])
        self._held = text
        if text.startswith(THINK[0]):
            self._drop(sum(map(len, self._space)) + len(THINK[0]))
            self._inside, self._held, self._after_tag = "think", text.removeprefix(THINK[0]), True
        elif THINK[0].startswith(text):
            return "", False
        else:
            self._inside, self._held = "answer", "".join(self._space) + text
        return "", True

    def _read(self) -> tuple[str, bool]:
        """Reads up to the next tag: what it adds to the answer, and whether there may be more."""
        tag = {"think": THINK[1], "call": CALL[1], "answer": CALL[0] if self._reads_calls else ""}[self._inside]
        at = self._held.find(tag) if tag else -1
        if at < 0:
            end = len(self._held) - overlap(self._held, tag)
            text, self._held = self._held[:end], self._held[end:]
            return self._add(text), False
        text, self._held = self._held[:at], self._held[at + len(tag) :]
        return self._add(text) + self._pass(tag), True

    def _add(self, text: str) -> str:
        """Adds a text to the part that it is inside, and returns the answer's share of it."""
        if self._inside == "call":
            self._call.append(text)
            return ""
        text = self._trimmed(text)
        if self._inside == "think":
            self._reasoning.append(text)
            self._fresh += text
            return ""
        self._answered = self._answered or bool(text)
        return text

    def _pass(self, tag: str) -> str:
        """Goes on after a tag, and returns the answer's share of what it ends."""
        if tag == CALL[1]:
            return self._end_call(tag)
        if tag == THINK[1]:
            self._drop(len(tag))
            self._after_tag = True
        self._inside = "call" if tag == CALL[0] else "answer"
        return ""

    def _end_call(self, closing: str) -> str:
        text, self._call, self._inside = "".join(self._call), [], "answer"
        written = CALL[0] + text + closing
        call = parse_call(text)
        if call is None:
            return self._add(written)
        self._calls.append(call)
        self._drop(len(written))
        self._after_tag = not self._answered
        return ""

    def _drop(self, characters: int) -> None:
        """Drops so many, and the newlines before them."""
        self.dropped += characters + self._newlines
        self._newlines = 0

    def _trimmed(self, text: str) -> str:
        """More text, without newlines after a tag, and without the last ones as long as a tag may follow."""
        if self._after_tag:
            body = text.lstrip("\n")
            self.dropped += len(text) - len(body)
            text, self._after_tag = body, not body
        body = text.rstrip("\n")
        before, self._newlines = self._newlines, len(text) - len(body)
        if body:
            return "\n" * before + body
        self._newlines += before
        return ""

    def _end(self) -> str:
        held, self._held = self._held, ""
        if self._inside == "start":
            self._inside, held = "answer", "".join(self._space) + held
        answer = self._add(held)
        if self._inside == "call":
            answer += self._end_call("")
        if self._inside == "think" or self._calls:
            self._drop(0)
        newlines, self._newlines = self._newlines, 0
        return answer + "\n" * newlines


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
        self._calls.append(call)
        self.dropped += len(text)
        return ""

    def _flush(self) -> str:
        text, self._held = "".join(self._held), []
        return text


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


def read_plain(tokens: Tokens, _: ChatOptions) -> PlainReader:
    """The reader of a format without reasoning and calls."""
    return PlainReader(tokens)


def read_calls(tokens: Tokens, options: ChatOptions) -> PlainReader:
    """The reader of a format with calls in tags. Without tools, tags are text."""
    return TaggedReader(tokens, thinks=False, calls=True) if options.tools else PlainReader(tokens)


def read_thoughts_and_calls(tokens: Tokens, options: ChatOptions) -> TaggedReader:
    """The reader of a format with reasoning and calls in tags."""
    return TaggedReader(tokens, thinks=True, calls=bool(options.tools))


def read_on(tokens: Tokens, options: ChatOptions) -> TaggedReader:
    """The reader of a format whose prompt begins the reasoning."""
    return TaggedReader(tokens, thinks=True, calls=bool(options.tools), thinking=True)


def read_json_calls(tokens: Tokens, options: ChatOptions) -> PlainReader:
    """The reader of a format whose calls are the whole turn."""
    offered = frozenset(tool["function"]["name"] for tool in options.tools)
    return JsonReader(tokens, offered) if offered else PlainReader(tokens)
