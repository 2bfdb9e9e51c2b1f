"""A turn of a conversation: what a model writes in harmony, as reasoning, answer and tool calls."""

import dataclasses
import datetime
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from gptjax.engine.output import Chunk, Completion
from gptjax.errors import RequestError
from gptjax.text import Tokenizer, harmony
from gptjax.text.harmony.rendering import check_name

TODAY: Final = "today"
_FUNCTIONS: Final = "functions."


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A tool that the model wants to be called."""

    id: str  # unlike any other of the conversation
    name: str  # the function's, or "python", "browser.search" and the like for built-in tools
    arguments: str  # JSON for functions, as the model wrote it: it may be malformed

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


class TurnReader:
    """Takes the tokens of one turn and tells answer, reasoning and tool calls apart; a detokenizer for the engine.

    The answer is what users are to see: the final channel, and messages to nobody in the commentary channel. Where a
    model does not keep to channels, its text is the answer. An empty line stands between messages.

    Attributes:
        phase: where the last of the answer came from: "commentary" for what precedes calls, or else "final_answer".
    """

    def __init__(self, tokenizer: Tokenizer, *, used_ids: frozenset[str] = frozenset()) -> None:
        """`used_ids`: those of the conversation's tool calls so far."""
        self.phase = "final_answer"
        self._parser = harmony.StreamParser(tokenizer)
        self._used_ids = used_ids
        self._reasoning: list[str] = []
        self._fresh = ""  # reasoning that was not yet taken
        self._sources: dict[bool, int] = {}  # the message that reasoning (True) and answer (False) came from last

    def push(self, token_id: int) -> str:
        """The answer's text that became certain with this token."""
        return self._read(self._parser.push(token_id))

    def finish(self) -> str:
        """The rest of it."""
        return self._read(self._parser.finish())

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
        calls = [
            (name, str(message.content))
            for message in self._parser.messages
            if message.role == "assistant" and (name := _tool(message.recipient)) is not None
        ]
        free = (number for number in itertools.count() if f"call_{number}" not in self._used_ids)
        return tuple(ToolCall(f"call_{next(free)}", name, arguments) for name, arguments in calls)

    def _read(self, events: Iterable[harmony.Event]) -> str:
        answer = ""
        for event in events:
            if not event.text or _is_for_tools(event):
                continue
            reasoning = event.channel == "analysis"
            gap = "\n\n" if self._sources.get(reasoning, event.index) != event.index else ""
            self._sources[reasoning] = event.index
            if reasoning:
                self._fresh += gap + event.text
                self._reasoning.append(gap + event.text)
            else:
                self.phase = "commentary" if event.channel == "commentary" else "final_answer"
                answer += gap + event.text
        return answer


def _is_for_tools(event: harmony.Event) -> bool:
    """Whether users are not to see it: a call, or what the model takes for a tool's result."""
    return _tool(event.recipient) is not None if event.role == "assistant" else event.recipient is not None


def _tool(recipient: str | None) -> str | None:
    """The tool that a recipient names; None where it is everybody, or no name that a conversation can go on with."""
    if recipient is None or recipient == "all":
        return None
    try:
        return check_name(recipient.removeprefix(_FUNCTIONS), "the tool")
    except RequestError:
        return None


def chat_chunks(chunks: Iterable[Chunk], reader: TurnReader) -> Iterator[ChatChunk]:
    """The chunks of a generation that `reader` is the detokenizer of, as those of a turn."""
    for chunk in chunks:
        completion = None
        if chunk.completion is not None:
            calls = reader.tool_calls
            reason = chunk.completion.finish_reason
            completion = ChatCompletion(
                text=chunk.completion.text,
                reasoning=reader.reasoning,
                tool_calls=calls,
                finish_reason="tool_calls" if calls and reason == "stop" else reason,
                completion=chunk.completion,
            )
        yield ChatChunk(chunk.text, reader.take_reasoning(), chunk.token_id, completion)


def prompt(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Mapping[str, Any]],
    reasoning_effort: str,
    current_date: str | None,
) -> list[int]:
    """The token ids to generate a turn from. Raises `RequestError`; see `harmony.render`."""
    date = datetime.date.today().isoformat() if current_date == TODAY else current_date
    return harmony.render(messages, tokenizer, tools, reasoning_effort, date)


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a turn; `<|end|>` ends a message only."""
    ends = ("<|return|>", "<|call|>", "<|endoftext|>")
    return tuple(tokenizer.special_ids[token] for token in ends if token in tokenizer.special_ids)


def call_ids(messages: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """The ids of the tool calls in checked messages."""
    return frozenset(str(call.get("id")) for message in messages for call in message.get("tool_calls") or ())
