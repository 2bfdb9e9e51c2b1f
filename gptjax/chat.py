"""One turn of a harmony conversation, split into reasoning, answer and tool calls."""

import dataclasses
import datetime
import itertools
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from gptjax.engine.output import Chunk, Completion
from gptjax.errors import RequestError
from gptjax.text import Tokenizer, harmony
from gptjax.text.harmony.builtin import BUILTIN
from gptjax.text.harmony.header import NOBODY
from gptjax.text.harmony.messages import CHANNELS, FUNCTIONS
from gptjax.text.harmony.rendering import check_name
from gptjax.text.harmony.writer import LONGEST

TODAY: Final = "today"
_PREFIX: Final = f"{FUNCTIONS}."
# Models sometimes omit the space or mark between a name and one of these.
_GLUED: Final = ("json", "code", *CHANNELS)


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A tool call that the model asks for."""

    id: str  # "call_" and 24 random hexadecimal digits, unique across conversations
    name: str  # a function's, or "python", "browser.search" and the like for built-in tools
    arguments: str  # JSON for functions, as the model wrote it, so possibly malformed; "{}" if it wrote none

    def to_json(self) -> dict[str, Any]:
        """The call in the form of OpenAI's chat API."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclasses.dataclass(frozen=True)
class ChatCompletion:
    """A complete assistant turn."""

    text: str  # the answer
    reasoning: str  # what came before the answer
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str  # "stop", "length", "tool_calls" or "error"
    completion: Completion  # all tokens of the turn, with usage and timings; its text is the answer

    @property
    def message(self) -> dict[str, Any]:
        """The turn as a message to append to the next call's `messages`."""
        says_more = self.reasoning or self.tool_calls
        message: dict[str, Any] = {"role": "assistant", "content": self.text or (None if says_more else "")}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.to_json() for call in self.tool_calls]
        return message


@dataclasses.dataclass(frozen=True)
class ChatChunk:
    """What one token added to answer and reasoning; either may be empty."""

    text: str
    reasoning: str
    token_id: int
    completion: ChatCompletion | None  # in the last chunk only
    phase: str  # of the text, as in OpenAI's Responses: "commentary" if it precedes calls, else "final_answer"


class TurnReader:
    """Splits the tokens of one turn into answer, reasoning and tool calls; a detokenizer for the engine.

    A message to `functions.NAME` or to an offered tool is a call, in any channel. Any other message, whatever its
    recipient, is reasoning if it is in the analysis channel, and otherwise part of the answer, which users see. An
    empty line separates messages.

    Attributes:
      ended: whether the turn is over because the model began another role's message.
      phase: of the answer's text so far: "commentary" if its last message precedes calls, else "final_answer".
    """

    def __init__(self, tokenizer: Tokenizer, *, offered: frozenset[str] = frozenset()) -> None:
        """`offered`: the names of the offered tools, from `offered_names`."""
        self.ended = False
        self.phase = "final_answer"
        self._parser = harmony.StreamParser(tokenizer, names=offered)
        self._offered = offered
        self._ids: list[str] = []  # of calls, in order
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
        self._parser.ended_by(token_id)

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
        """The complete calls; after `finish`, also one that was cut short and may be malformed."""
        messages = itertools.takewhile(lambda message: message.role == "assistant", self._parser.messages)
        calls = [
            (name, str(message.content)) for message in messages if (name := self._tool(message.recipient)) is not None
        ]
        self._ids += [f"call_{secrets.token_hex(12)}" for _ in range(len(calls) - len(self._ids))]
        return tuple(
            ToolCall(call_id, name, arguments if arguments.strip() else "{}")
            for call_id, (name, arguments) in zip(self._ids, calls, strict=False)
        )

    def _read(self, events: Iterable[harmony.Event]) -> str:
        answer = ""
        for event in events:
            self.ended = self.ended or event.role != "assistant"
            if self.ended or not event.text or self._tool(event.recipient) is not None:
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


def chat_chunks(chunks: Iterable[Chunk], reader: TurnReader) -> Iterator[ChatChunk]:
    """Turns the chunks of a generation, whose detokenizer is `reader`, into those of a chat."""
    for chunk in chunks:
        completion = None
        if chunk.completion is not None:
            reason = chunk.completion.finish_reason
            reader.ended_by(chunk.token_id)
            calls = reader.tool_calls
            completion = ChatCompletion(
                text=chunk.completion.text,
                reasoning=reader.reasoning,
                tool_calls=calls,
                finish_reason="tool_calls" if calls and reason == "stop" else reason,
                completion=chunk.completion,
            )
        yield ChatChunk(chunk.text, reader.take_reasoning(), chunk.token_id, completion, reader.phase)


def prompt(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Mapping[str, Any]],
    reasoning_effort: str,
    current_date: str | None,
    max_length: int = LONGEST,
) -> list[int]:
    """The token ids to generate a turn from. Raises `RequestError` and `CapacityError`; see `harmony.render`."""
    date = datetime.date.today().isoformat() if current_date == TODAY else current_date
    return harmony.render(messages, tokenizer, tools, reasoning_effort, date, max_length=max_length)


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a turn; `<|end|>` ends a message only."""
    ends = ("<|return|>", "<|call|>", "<|endoftext|>")
    return tuple(tokenizer.special_ids[token] for token in ends if token in tokenizer.special_ids)
