"""Readers of turns that are written as text.

| reader | answer | reasoning | calls |
|---|---|---|---|
| `PlainReader` | all text | | |
| `TaggedReader` (tagged.py) | the rest | in `<think>`, at the beginning | JSON in `<tool_call>` |
| `JsonReader` (json_calls.py) | all text, if it is not a call | | all text, if it is JSON that calls an offered tool |

All give the same result however the text is split into tokens. A call that cannot be read is part of the answer, as the
model wrote it, so nothing is lost and nothing breaks.
"""

from gptjax.text.chat_formats.calls import Calls
from gptjax.text.chat_formats.interface import CallPart, ChatOptions, ToolCall
from gptjax.text.tokenizer import Tokenizer


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
        self._calls = Calls()

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

    def take_calls(self) -> tuple[CallPart, ...]:
        """Returns the calls read since it was last called, whole: until its end, a text may turn out not to be one."""
        return self._calls.take()

    @property
    def reasoning(self) -> str:
        """All reasoning so far."""
        return "".join(self._reasoning)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls so far."""
        return tuple(self._calls.whole)

    def _take(self, text: str) -> str:
        """Reads more text, and returns the answer's part of it."""
        return text

    def _end(self) -> str:
        """The rest of the answer, at the end of the text."""
        return ""


def read_plain(tokens: Tokens, _: ChatOptions) -> PlainReader:
    """The reader of a format without reasoning and calls."""
    return PlainReader(tokens)
