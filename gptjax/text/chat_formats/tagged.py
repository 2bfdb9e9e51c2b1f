"""The reader of turns with reasoning and calls in tags."""

from typing import Final

from gptjax.text.chat_formats.interface import ChatOptions
from gptjax.text.chat_formats.json_calls import parse_call
from gptjax.text.chat_formats.readers import PlainReader, Tokens
from gptjax.text.overlap import overlap

THINK: Final = ("<think>", "</think>")
CALL: Final = ("<tool_call>", "</tool_call>")


class TaggedReader(PlainReader):
    """A `TurnReader` for reasoning and calls in tags.

    Newlines between a tag and the text next to it belong to neither. Reasoning can only be the first thing in a turn.
    """

    def __init__(
        self, tokens: Tokens, *, thinks: bool, calls: bool, thinking: bool = False, one_call: bool = False
    ) -> None:
        """`thinking`: the prompt has begun the reasoning. `one_call`: the first call ends the turn."""
        super().__init__(tokens)
        tokens.show(*THINK, *CALL)
        self._reads_calls = calls
        self._one_call = one_call
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
        self._calls.add_whole(call)
        self._drop(len(written))
        self._after_tag = not self._answered
        if self._one_call:
            self.ended, self._held = True, ""
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
        if self._inside == "think" or self._calls.whole:
            self._drop(0)
        newlines, self._newlines = self._newlines, 0
        return answer + "\n" * newlines


def read_calls(tokens: Tokens, options: ChatOptions) -> PlainReader:
    """The reader of a format with calls in tags. Without tools, tags are text."""
    return _reader(tokens, options, thinks=False) if options.tools else PlainReader(tokens)


def read_thoughts_and_calls(tokens: Tokens, options: ChatOptions) -> TaggedReader:
    """The reader of a format with reasoning and calls in tags."""
    return _reader(tokens, options, thinks=True)


def read_on(tokens: Tokens, options: ChatOptions) -> TaggedReader:
    """The reader of a format whose prompt begins the reasoning."""
    return _reader(tokens, options, thinks=True, thinking=True)


def _reader(tokens: Tokens, options: ChatOptions, *, thinks: bool, thinking: bool = False) -> TaggedReader:
    calls, one_call = bool(options.tools), not options.parallel_tool_calls
    return TaggedReader(tokens, thinks=thinks, calls=calls, thinking=thinking, one_call=one_call)
