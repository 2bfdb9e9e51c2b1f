"""A turn of a conversation: what a model writes in harmony, as reasoning, answer and tool calls."""

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
# Models omit the space or mark between a name and these.
_GLUED: Final = ("json", "code", *CHANNELS)


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A tool that the model wants to be called."""

    id: str  # "call_" and 24 random hexadecimal digits: unlike any other, of other conversations too
    name: str  # the function's, or "python", "browser.search" and the like for built-in tools
    arguments: str  # JSON for functions, as the model wrote it: it may be malformed; "{}" if it wrote none

    def to_json(self) -> dict[str, Any]:
        """As in the messages of OpenAI's chat API."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclasses.dataclass(frozen=True)
class ChatCompletion:
    """A whole turn of the assistant."""

    text: str  # the answer
    reasoning: str  # what came before it
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str  # "stop", "length", "tool_calls" or "error"
    completion: Completion  # the tokens of all of it, with usage and timings; its text is the answer

    @property
    def message(self) -> dict[str, Any]:
        """The turn as a message that the next call's `messages` can go on with."""
        says_more = self.reasoning or self.tool_calls
        message: dict[str, Any] = {"role": "assistant", "content": self.text or (None if says_more else "")}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.to_json() for call in self.tool_calls]
        return message


@dataclasses.dataclass(frozen=True)
class ChatChunk:
    """What one token added. Reasoning and answer come apart, and either may be empty."""

    text: str
    reasoning: str
    token_id: int
    completion: ChatCompletion | None  # with the last chunk
    phase: str  # of the text, as in OpenAI's Responses: "commentary" if it precedes calls, else "final_answer"


class TurnReader:
    """Takes the tokens of one turn and tells answer, reasoning and tool calls apart; a detokenizer for the engine.

    A message to `functions.NAME` or to a tool that was offered is a call, in any channel. Of other messages, whomever
    they are for, those in the analysis channel are reasoning, and the rest are the answer, which users are to see. An
    empty line separates messages.

    Attributes:
        ended: whether the turn is over, because the model began a message of somebody else.
        phase: of the answer's text so far: "commentary" if its last message precedes calls, else "final_answer".
    """

    def __init__(self, tokenizer: Tokenizer, *, offered: frozenset[str] = frozenset()) -> None:
        """`offered`: the names of tools, from `offered_names`."""
        self.ended = False
        self.phase = "final_answer"
        self._parser = harmony.StreamParser(tokenizer, names=offered)
        self._offered = offered
        self._ids: list[str] = []  # of calls, in their order
        self._reasoning: list[str] = []
        self._fresh = ""  # reasoning that was not yet taken
        self._sources: dict[bool, int] = {}  # the message that reasoning (True) and answer (False) came from last

    def push(self, token_id: int) -> str:
        """The answer's text that became certain with this token."""
        return self._read(self._parser.push(token_id))

    def finish(self) -> str:
        """The rest of it."""
        return self._read(self._parser.finish())

    def ended_by(self, token_id: int) -> None:
        """After `finish`, the token that ended the turn: `<|call|>` makes a call also of a header without a text."""
        self._parser.ended_by(token_id)

    def take_reasoning(self) -> str:
        """The reasoning since the last call."""
        fresh, self._fresh = self._fresh, ""
        return fresh

    @property
    def reasoning(self) -> str:
        """All of it, so far."""
        return "".join(self._reasoning)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Those that are complete; after `finish` also one that was cut short, and may be malformed."""
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
        """The tool that a recipient calls; None if it is not a tool, or has a name that a prompt cannot repeat."""
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
    """The names that calls of tools can bear. `tools` are not checked again: `prompt` has accepted them."""
    names: set[str] = set()
    for tool in tools or ():
        kind = tool["type"]
        names.update([tool["function"]["name"]] if kind == "function" else harmony.recipients([BUILTIN[kind]]))
    return frozenset(names)


def chat_chunks(chunks: Iterable[Chunk], reader: TurnReader) -> Iterator[ChatChunk]:
    """The chunks of a generation that `reader` is the detokenizer of, as those of a turn."""
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
