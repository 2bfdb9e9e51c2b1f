"""One turn of a conversation as it is generated: what each token added to reasoning and answer, and which are whose."""

import dataclasses
from collections.abc import Mapping

from gptjax.chat import ChatCompletion, TurnReader, chat_chunks
from gptjax.engine.output import Chunk
from gptjax.text import Tokenizer

ScoredToken = tuple[int, float, Mapping[int, float]]
"""Token id, log-probability, and the most likely with theirs."""


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one token added."""

    text: str
    reasoning: str
    phase: str  # of the text, "commentary" or "final_answer"
    answer_tokens: tuple[ScoredToken, ...]  # those that the answer's text is made of
    whole: ChatCompletion | None  # with the last one


class Turn:
    """Tells which tokens are the answer's and which the reasoning's; `reader` is the decoder of the row.

    A token whose bytes are half a character, or that may begin a stop string, goes with the text that it becomes a part
    of; special tokens, and the words of headers, are nobody's.
    """

    def __init__(self, reader: TurnReader, tokenizer: Tokenizer) -> None:
        self.reader = reader
        self.reasoning_tokens = 0
        self._special = frozenset(tokenizer.special_ids.values())
        self._silent: list[ScoredToken] = []  # since the last text

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
        if piece.text or piece.reasoning or is_special:
            self._silent.clear()
        return Delta(piece.text, piece.reasoning, self.reader.phase, mine, piece.completion)
