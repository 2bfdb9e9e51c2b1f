"""Harmony as a chat format; `gptjax.text.harmony` has its rendering and parsing."""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from gptjax.errors import RequestError
from gptjax.text import harmony
from gptjax.text.chat_formats.calls import Calls
from gptjax.text.chat_formats.interface import (
    DEFAULT,
    CallPart,
    ChatOptions,
    ToolCall,
    check_options,
    date_of,
)
from gptjax.text.fields import check_name
from gptjax.text.harmony.builtin import BUILTIN
from gptjax.text.harmony.header import NOBODY
from gptjax.text.harmony.messages import CHANNELS, FUNCTIONS
from gptjax.text.harmony.special import START, special_ids
from gptjax.text.tokenizer import Tokenizer
from gptjax.text.writer import LONGEST

_ENDS: Final = ("<|return|>", "<|call|>", "<|endoftext|>")  # of a turn; `<|end|>` ends a message only
_PREFIX: Final = f"{FUNCTIONS}."
# Models sometimes omit the space or mark between a name and one of these.
_GLUED: Final = ("json", "code", *CHANNELS)


class Harmony:
    """A `ChatFormat`: GPT-OSS's."""

    name = "harmony"
    options = frozenset(("tools", "reasoning_effort", "current_date", "response_format"))
    begin = START
    one_message_a_turn = False

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises `RequestError` if the tokenizer lacks harmony's special tokens."""
        special_ids(tokenizer)

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The tokens that end a turn."""
        return tuple(tokenizer.special_ids[token] for token in _ENDS if token in tokenizer.special_ids)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        options: ChatOptions,
        *,
        max_length: int = LONGEST,
    ) -> list[int]:
        """The token ids to generate a turn from; see `harmony.render`. The effort is "medium" unless given."""
        check_options(self.name, self.options, options)
        date = datetime.date.today() if options.current_date == DEFAULT else date_of(options)
        return harmony.render(
            messages,
            tokenizer,
            options.tools,
            "medium" if options.reasoning_effort is None else options.reasoning_effort,
            None if date is None else date.isoformat(),
            response_format=options.response_format,
            max_length=max_length,
        )

    def reader(self, tokenizer: Tokenizer, options: ChatOptions) -> "HarmonyReader":
        """A reader of the turn."""
        return HarmonyReader(tokenizer, offered=offered_names(options.tools), one_call=not options.parallel_tool_calls)


class HarmonyReader:
    """A `TurnReader`.

    A message to `functions.NAME` or to an offered tool is a call, in any channel. Any other message, whatever its
    recipient, is reasoning if it is in the analysis channel, and otherwise part of the answer, which users see. An
    empty line separates messages.

    Attributes:
      ended: whether the turn is over because the model began another role's message, or made its one call.
      phase: of the answer's text so far: "commentary" if its last message precedes calls, else "final_answer".
      dropped: always 0, since whatever is neither answer nor reasoning begins with a special token.
    """

    dropped = 0

    def __init__(self, tokenizer: Tokenizer, *, offered: frozenset[str] = frozenset(), one_call: bool = False) -> None:
        """`offered`: the names of the offered tools, from `offered_names`. `one_call`: the first call ends the turn."""
        self.ended = False
        self.phase = "final_answer"
        self._parser = harmony.StreamParser(tokenizer, names=offered)
        self._offered = offered
        self._one_call = one_call
        self._calls = Calls()
        self._call: int | None = None  # the last message that is one
        self._reasoning: list[str] = []
        self._fresh = ""  # reasoning not taken yet
        self._sources: dict[bool, int] = {}  # the last message of reasoning (True) and answer (False)

    def push(self, token_id: int) -> str:
        """Returns the answer text that this token completes."""
        return self._read(self._parser.push(token_id))

    def finish(self) -> str:
        """Returns the rest of the answer text."""
        return self._read(self._parser.finish())

    def ended_by(self, token_id: int) -> None:
        """Call after `finish`, with the token that ended the turn: `<|call|>` makes even a textless header a call."""
        self._read(self._parser.ended_by(token_id))

    def take_reasoning(self) -> str:
        """Returns the reasoning added since it was last called."""
        fresh, self._fresh = self._fresh, ""
        return fresh

    def take_calls(self) -> tuple[CallPart, ...]:
        """Returns what was added to calls since it was last called."""
        return self._calls.take()

    @property
    def reasoning(self) -> str:
        """All reasoning so far."""
        return "".join(self._reasoning)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The complete calls; after `finish`, also one that was cut short and may be malformed."""
        return tuple(self._calls.whole)

    def _read(self, events: Iterable[harmony.Event]) -> str:
        answer = ""
        for event in events:
            self.ended = self.ended or event.role != "assistant"
            if self.ended:
                continue
            if (name := self._tool(event.recipient)) is not None:
                self._read_call(event, name)
                continue
            if not event.text:
                continue
            channel = event.channel or "final"  # models glue words to it
            reasoning = channel.startswith("analysis")
            gap = "\n\n" if self._sources.get(reasoning, event.index) != event.index else ""
            self._sources[reasoning] = event.index
            if reasoning:
                self._fresh += gap + event.text
                self._reasoning.append(gap + event.text)
            else:
                self.phase = "commentary" if channel.startswith("commentary") else "final_answer"
                answer += gap + event.text
        return answer

    def _read_call(self, event: harmony.Event, name: str) -> None:
        if self._call != event.index:
            self._call = event.index
            self._calls.begin(name)
        self._calls.add(event.text)
        if event.ended:
            self._calls.end()
            self.ended = self._one_call

    def _tool(self, recipient: str | None) -> str | None:
        """The tool that a recipient names; None if it is not a tool, or if a prompt could not repeat the name."""
        if recipient is None:
            return None
        name = recipient.removeprefix(_PREFIX)
        if name not in self._offered:
            name = next((plain for word in _GLUED if (plain := name.removesuffix(word)) in self._offered), name)
        if not recipient.startswith(_PREFIX) and (name in NOBODY or name not in self._offered):
            return None
        try:
            return check_name(name, "the tool")
        except RequestError:
            return None


def offered_names(tools: Iterable[Mapping[str, Any]] | None) -> frozenset[str]:
    """The names that tool calls can have. `tools` are not checked again: `prompt` has accepted them."""
    names: set[str] = set()
    for tool in tools or ():
        kind = tool["type"]
        names.update([tool["function"]["name"]] if kind == "function" else harmony.recipients([BUILTIN[kind]]))
    return frozenset(names)
