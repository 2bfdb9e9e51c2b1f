"""Token ids back to harmony messages, one by one."""

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass, replace

from gptjax.text.harmony.header import Header
from gptjax.text.harmony.messages import Message
from gptjax.text.harmony.special import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START, special_ids
from gptjax.text.tokenizer import Tokenizer

_ENDS = (END, CALL, RETURN, "<|endoftext|>")
# Characters. Names may have 64 of them, in an author and in a recipient; anything longer is text without a header.
_LONGEST_HEADER = 512
_WORD = re.compile(r"[a-z]*")


@dataclass(frozen=True, slots=True)
class Event:
    """A step of one message. The first has no text and follows the header; for a call, it waits for the first text."""

    index: int
    """Which message of the stream, counted from 0."""
    role: str
    channel: str | None
    """ "analysis", "commentary" or "final"; whatever the model wrote instead; or None."""
    recipient: str | None
    """Like "functions.get_weather" if the text is the arguments of a call."""
    content_type: str | None
    """Like "<|constrain|>json"."""
    text: str
    """The next part of the text; never half a character."""
    ended: bool = False
    """Whether this completes the message."""


class StreamParser:
    """Reads what a model writes after a prompt of `render`, or any other harmony stream.

    Malformed streams are never an error:
    - Text without a header is an assistant message without a channel, and so is the text of a header that ends without
      `<|message|>` (minus what can be read as a header).
    - `<|start|>` and `<|channel|>` end a message that lacks its `<|end|>`; the latter begins an assistant message.
    - A mark that comes twice in a header, or before any text, begins the header again. What it said before stays unless
      it now says something else.
    - Words that have no place in a header are dropped. So are other special tokens, and a header cut short by the end
      of the stream.

    openai-harmony agrees if the stream is well-formed, with one exception: it takes any lone word after the channel for
    a recipient, as in `<|channel|>final <|constrain|>json`, which models write. Here a recipient needs `to=`, unless it
    is `functions.NAME` or one of `names`.

    Attributes:
      messages: the complete ones.

    Raises:
      RequestError: the tokenizer lacks harmony's special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, names: Set[str] = frozenset()) -> None:
        """`names`: of the offered tools."""
        special = special_ids(tokenizer)
        self._ends = frozenset(special[token] for token in _ENDS if token in special)
        self._start, self._channel = special[START], special[CHANNEL]
        self._constrain, self._message = special[CONSTRAIN], special[MESSAGE]
        self.messages: list[Message] = []
        self._decoder = tokenizer.stream()
        self._call = special[CALL]
        self._cut: Header | None = None  # the last header, if it ended without text
        self._names = names
        self._header = self._new_header()
        self._current: Message | None = None  # None while its header is read
        self._pieces: list[str] = []
        self._begun = False  # whether the message's first event was sent

    def push(self, token_id: int) -> list[Event]:
        """The events of one more token; any id that is not negative."""
        if token_id in self._ends:
            return [*self._end(), *self.ended_by(token_id)]
        if token_id == self._start:
            return self._start_header()
        if token_id == self._channel:
            return self._start_channel()
        if self._current is None:
            return self._push_header(token_id)
        return self._say(self._decoder.push(token_id))

    def finish(self) -> list[Event]:
        """The events of a stream that ends without `<|end|>`."""
        if self._current is None:
            half = self._decoder.finish()
            self._header.add("" if self._header.marked else half)
            message, text = self._header.salvage()
            # The rest of a header cut short is at most a word.
            if _WORD.fullmatch(text) and (self._header.marked or message.recipient):
                self._cut, self._header = self._header, self._new_header()
                return []
        return self._end()

    def ended_by(self, token_id: int) -> list[Event]:
        """The events of a call without text, if `<|call|>` ended its header; after `finish`, if it ended the stream."""
        cut, self._cut = self._cut, None
        message = None if cut is None else cut.read()
        if token_id != self._call or message is None or message.role != "assistant" or message.recipient is None:
            return []
        return [*self._begin(message), *self._end()]

    def _new_header(self) -> Header:
        return Header(explicit=False, names=self._names)

    def _start_header(self) -> list[Event]:
        before, events = self._broken_off(), self._end()
        self._header = Header(explicit=True, names=self._names, before=before)
        return events

    def _start_channel(self) -> list[Event]:
        events: list[Event] = []
        if self._current is not None and self._current.recipient is not None and not self._begun:
            self._current = None  # the header of a call without text continues
        elif self._current is not None:
            events = self._end()
        if self._header.channel is not None:
            before = self._broken_off()
            events += self._end()
            if before is not None:
                self._header = before.again()
        else:
            self._header.add(self._decoder.finish())
        self._header.begin("channel")
        return events

    def _broken_off(self) -> Header | None:
        """The header, if a mark that begins another leaves it without text."""
        if self._current is not None:
            return None
        self._header.add(self._decoder.finish())
        fits = self._header.length <= _LONGEST_HEADER
        return self._header if fits and self._header.is_broken_off() else None

    def _push_header(self, token_id: int) -> list[Event]:
        if token_id == self._message:
            self._header.add(self._decoder.finish())
            return self._begin(self._header.read())
        if token_id == self._constrain:
            self._header.add(self._decoder.finish())
            self._header.begin("constrain")
            return []
        self._header.add(self._decoder.push(token_id))
        return self._begin(*self._header.salvage()) if self._header.length > _LONGEST_HEADER else []

    def _begin(self, message: Message, text: str = "") -> list[Event]:
        self._current = message
        self._pieces = []
        self._begun = False
        # A call waits for its text: until then another mark may begin its header again.
        return [*([] if message.recipient else self._first(message)), *self._say(text)]

    def _say(self, text: str) -> list[Event]:
        if not text or self._current is None:
            return []
        self._pieces.append(text)
        return [*self._first(self._current), self._event(self._current, text)]

    def _first(self, message: Message) -> list[Event]:
        """The event that begins a message, once."""
        begun, self._begun = self._begun, True
        return [] if begun else [self._event(message, "")]

    def _end(self) -> list[Event]:
        """Ends the message, or what should have been its header."""
        tail, events = self._decoder.finish(), []
        if self._current is None:
            self._header.add(tail)
            tail = ""
            if not self._header.is_broken_off():
                events = self._begin(*self._header.salvage())
        if self._current is None:
            self._cut, self._header = self._header, self._new_header()
            return []
        self._cut = None
        events += [*self._first(self._current), self._event(self._current, tail, ended=True)]
        self.messages.append(replace(self._current, content="".join([*self._pieces, tail])))
        self._header, self._current = self._new_header(), None
        return events

    def _event(self, message: Message, text: str, *, ended: bool = False) -> Event:
        return Event(
            len(self.messages),
            message.role,
            message.channel,
            message.recipient,
            message.content_type,
            text,
            ended,
        )


def parse(token_ids: Iterable[int], tokenizer: Tokenizer) -> list[Message]:
    """The messages of a whole stream; see `StreamParser`, also for errors."""
    parser = StreamParser(tokenizer)
    for token_id in token_ids:
        parser.push(token_id)
    parser.finish()
    return parser.messages
