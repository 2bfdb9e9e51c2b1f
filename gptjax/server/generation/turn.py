"""One turn of a conversation as it is generated: what each token adds to reasoning and answer."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gptjax.chat import ChatCompletion, chat_chunks
from gptjax.engine.options import make_request
from gptjax.engine.output import Chunk
from gptjax.errors import GptjaxError
from gptjax.server.errors import of_gptjax
from gptjax.server.generation.generation import Generation, Row
from gptjax.server.generation.service import Service
from gptjax.text import Tokenizer
from gptjax.text.chat_formats import CallPart, ChatOptions, TurnReader
from gptjax.text.chat_formats.calls import joined_parts

ScoredToken = tuple[int, float, Mapping[int, float]]
"""Token id, log-probability, and the most likely tokens with theirs."""


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one token added, or several of which all add reasoning or all add to the answer, and then calls."""

    text: str
    reasoning: str
    phase: str  # of the text, "commentary" or "final_answer"
    answer_tokens: tuple[ScoredToken, ...]  # the tokens that make up the answer's text
    calls: tuple[CallPart, ...]  # after the text
    whole: ChatCompletion | None  # with the last token

    def goes_on_with(self, later: "Delta") -> bool:
        """Whether both can be joined. (Some clients take a delta with reasoning for one without an answer.)"""
        if self.calls and (later.text or later.reasoning):
            return False
        if self.text and later.text:
            return self.phase == later.phase and not later.reasoning
        return not (self.reasoning and later.text) and not (self.text and later.reasoning)


class Turn:
    """Assigns tokens to the answer or the reasoning; `reader` is the decoder of the row.

    A token whose bytes are half a character, or that may begin a stop string, belongs to the text that it becomes part
    of; special tokens, the words of headers, tags and calls belong to neither.
    """

    def __init__(self, reader: TurnReader, tokenizer: Tokenizer) -> None:
        self.reader = reader
        self.reasoning_tokens = 0
        self._special = frozenset(tokenizer.special_ids.values())
        self._silent: list[ScoredToken] = []  # since the last text
        self._dropped = 0  # characters that the reader has dropped

    def add(self, chunk: Chunk) -> Delta:
        """Takes the next chunk of the row."""
        (piece,) = chat_chunks([chunk], self.reader)
        is_special = chunk.token_id in self._special
        if not is_special:
            self._silent.append((chunk.token_id, chunk.logprob, chunk.top_logprobs))
        mine: tuple[ScoredToken, ...] = ()
        if piece.text:
            mine = tuple(self._silent)
        elif piece.reasoning:
            self.reasoning_tokens += len(self._silent)
        if piece.text or piece.reasoning or is_special or self.reader.dropped > self._dropped:
            self._silent.clear()
        self._dropped = self.reader.dropped
        return Delta(piece.text, piece.reasoning, self.reader.phase, mine, self.reader.take_calls(), piece.completion)


def running_turn(
    service: Service, prompt_ids: Sequence[int], how: ChatOptions, options: Mapping[str, Any]
) -> tuple[Turn, Generation[Delta]]:
    """The one turn that a request asks for, and its generation, not yet started. Raises `ApiError`."""
    served = service.served
    tokenizer = served.text()
    turn = Turn(served.chat().reader(tokenizer, how), tokenizer)
    try:
        request = make_request(prompt_ids, options, served.defaults, served.turn_ends())
    except GptjaxError as error:
        raise of_gptjax(error) from None
    return turn, Generation(service, [Row(request, turn.reader, turn.add)])


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """Joins consecutive deltas, except where reasoning, preamble and answer follow each other."""
    groups: list[list[Delta]] = []
    for delta in deltas:
        if groups and all(before.goes_on_with(delta) for before in groups[-1]):
            groups[-1].append(delta)
        else:
            groups.append([delta])
    return [group[0] if len(group) == 1 else _one(group) for group in groups]


def _one(deltas: Sequence[Delta]) -> Delta:
    return Delta(
        text="".join([delta.text for delta in deltas]),
        reasoning="".join([delta.reasoning for delta in deltas]),
        phase=next((delta.phase for delta in deltas if delta.text), deltas[-1].phase),
        answer_tokens=tuple(token for delta in deltas for token in delta.answer_tokens),
        calls=joined_parts([part for delta in deltas for part in delta.calls]),
        whole=deltas[-1].whole,
    )
