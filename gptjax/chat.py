"""One turn of a conversation, split into reasoning, answer and tool calls."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from gptjax.engine.output import Chunk, Completion
from gptjax.text.chat_formats import ToolCall, TurnReader


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
