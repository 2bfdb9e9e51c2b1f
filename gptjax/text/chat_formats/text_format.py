"""Formats whose messages are texts between special tokens: all but harmony."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptjax.errors import RequestError
from gptjax.text.chat_formats.conversation import Conversation, read_conversation
from gptjax.text.chat_formats.interface import ChatOptions, TurnReader, check_options
from gptjax.text.chat_formats.readers import Tokens, read_plain
from gptjax.text.tokenizer import Tokenizer
from gptjax.text.writer import LONGEST, Writer


class Mark(str):
    """A special token of a prompt. All other strings of a prompt are plain text."""

    __slots__ = ()


@dataclass(frozen=True)
class TextFormat:
    """A `ChatFormat`.

    A prompt begins with one BOS if the format or the tokenizer says so.
    """

    name: str
    parts: Callable[[Conversation], Iterable[str]]
    """The text of a prompt, in pieces: marks and plain texts. Raises RequestError."""
    marks: tuple[str, ...]
    """The special tokens that it needs."""
    ends: tuple[str, ...]
    """The special tokens that end a turn."""
    begin: str | None = None
    has_bos: bool = False
    """Whether a prompt begins with the tokenizer's BOS, if there is one, even where other texts do not. (A format that
    names its BOS has it in `parts`.)"""
    options: frozenset[str] = frozenset()
    read: Callable[[Tokens, ChatOptions], TurnReader] = read_plain
    """Makes the reader of a turn."""

    one_message_a_turn = True

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises `RequestError` if the tokenizer lacks special tokens of this format."""
        missing = [mark for mark in self.marks if mark not in tokenizer.special_ids]
        if missing:
            raise RequestError(
                f"the tokenizer lacks special tokens of the chat format {self.name}: {', '.join(missing)}; use the "
                "format that the model was trained with"
            )

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The tokens that end a turn."""
        return tuple(tokenizer.special_ids[token] for token in self.ends if token in tokenizer.special_ids)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        options: ChatOptions,
        *,
        max_length: int = LONGEST,
    ) -> list[int]:
        """The token ids to generate a turn from; see `ChatFormat`."""
        self.check(tokenizer)
        check_options(self.name, self.options, options)
        if options.current_date is None and "current_date" in self.options:
            raise RequestError(f"the chat format {self.name} always has a date: give a current_date, or leave it out")
        talk = read_conversation(messages, options, name=self.name, tools="tools" in self.options)
        writer = Writer(tokenizer, max_length)
        parts = iter(self.parts(talk))
        first = next(parts)
        if (bos := _own_bos(tokenizer, always=self.has_bos)) is not None and first != bos:
            writer.mark(bos)
        for is_mark, pieces in itertools.groupby(itertools.chain([first], parts), lambda part: isinstance(part, Mark)):
            if is_mark:
                for mark in pieces:
                    writer.mark(mark)
            else:
                writer.text(pieces)
        return writer.ids

    def reader(self, tokenizer: Tokenizer, options: ChatOptions) -> TurnReader:
        """A reader of the turn."""
        return self.read(Tokens(tokenizer, self.begin), options)


def _own_bos(tokenizer: Tokenizer, *, always: bool) -> str | None:
    """The tokenizer's BOS; None if it has none, or, unless `always`, if it does not put that before every text."""
    if tokenizer.bos_id is None or not (always or tokenizer.prompt("a")[0] == tokenizer.bos_id):
        return None
    return next((token for token, number in tokenizer.special_ids.items() if number == tokenizer.bos_id), None)
