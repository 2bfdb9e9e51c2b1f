"""Turns a request's tokens into text, decides when it ends, and collects its result."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from gptjax.engine.request import TOO_COMPLEX, Request, Token
from gptjax.text.overlap import overlap

NOT_FINITE = (
    "the model's logits were not finite (NaN or infinity), so no token could be drawn: the weights may be damaged, or "
    "values may overflow in this dtype; try dtype='float32', and check the checkpoint with `gptjax info`"
)
_GRAMMAR_FAILED = (
    "the grammar is too complex: which tokens may come next could not be found within the limits; make it simpler"
)


class Decoder(Protocol):
    """Turns the tokens of one output into text: a `Detokenizer`, or one that leaves some of the text out."""

    @property
    def ended(self) -> bool:
        """Whether the text is complete, so that generation can stop."""

    def push(self, token_id: int, /) -> str:
        """The text that became certain with this token."""

    def finish(self) -> str:
        """The rest of the text."""


def failure_of(token_id: int) -> str:
    """What a negative token id means."""
    return _GRAMMAR_FAILED if token_id == TOO_COMPLEX else NOT_FINITE


@dataclasses.dataclass(frozen=True)
class Usage:
    """Numbers of tokens read and written."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """The sum of both."""
        return self.prompt_tokens + self.completion_tokens


@dataclasses.dataclass(frozen=True)
class Timings:
    """Wall-clock seconds. The first call of a process also pays for compilation."""

    time_to_first_token: float  # from the request's admission: prefill and the first draw
    decode: float  # from the first token to the last

    def tokens_per_second(self, completion_tokens: int) -> float:
        """Tokens per second after the first token; 0 if there are no more."""
        return (completion_tokens - 1) / self.decode if self.decode > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Completion:
    """The result for one prompt."""

    text: str  # without special tokens and stop strings; "" if the checkpoint has no tokenizer
    token_ids: tuple[int, ...]  # every token drawn, including the one that ended the text
    logprobs: tuple[float, ...]  # the model's own log-probability of each token
    top_logprobs: tuple[dict[int, float], ...]  # most likely first; empty unless requested
    finish_reason: str  # "stop" (end-of-text or a stop), "length", or "error"
    error: str | None  # what went wrong, if finish_reason is "error"
    seed: int  # reproduces the draws
    usage: Usage
    timings: Timings
    stop: str | None = None  # the stop string that ended the text, if one did


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One token's worth of a stream. `text` may be empty while characters or a possible stop are incomplete."""

    text: str
    token_id: int  # -1 if no token could be drawn; the completion's `error` then says why
    logprob: float
    top_logprobs: dict[int, float]
    completion: Completion | None  # the whole result, on the last chunk only

    @property
    def finish_reason(self) -> str | None:
        """Why the stream ended; None before the last chunk."""
        return None if self.completion is None else self.completion.finish_reason


class StopFinder:
    """Cuts a streamed text at the first stop string to complete, however the text is split into pieces.

    Attributes:
      found: that stop string, once it is complete.
    """

    def __init__(self, stops: Sequence[str]):
        self.found: str | None = None
        self._stops = stops
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that is certain, and whether a stop was found. Holds back what may be the beginning of a stop."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.found = min(found)
            self._held = ""
            return text[:at], True
        held = max((overlap(text, stop) for stop in self._stops), default=0)
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut], False

    def finish(self) -> str:
        """The text held back, at the end of the output."""
        held, self._held = self._held, ""
        return held


class Output:
    """Collects a request's tokens, from its admission to its end."""

    def __init__(
        self,
        request: Request,
        *,
        max_length: int,
        detokenizer: Decoder | None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._request = request
        self._room = request.room(max_length)
        self._detokenizer = detokenizer
        self._stops = StopFinder(request.stop)
        self._clock = clock
        self._began = self._first = clock()
        self._text: list[str] = []
        self._tokens: list[Token] = []

    def push(self, token: Token) -> Chunk:
        """Takes the next token. The chunk's `completion` is set on the last one."""
        if token.token_id < 0:
            return self._chunk(token, self._flush(), "error")
        if not self._tokens:
            self._first = self._clock()
        self._tokens.append(token)
        if token.token_id in self._request.stop_ids:
            return self._chunk(token, self._flush(), "stop")
        piece = self._detokenizer.push(token.token_id) if self._detokenizer is not None else ""
        text, stopped = self._stops.push(piece)
        if stopped:
            return self._chunk(token, text, "stop")
        if self._detokenizer is not None and self._detokenizer.ended:
            return self._chunk(token, text + self._flush(), "stop")
        if len(self._tokens) == self._room:
            return self._chunk(token, text + self._flush(), "length")
        return self._chunk(token, text, None)

    def _flush(self) -> str:
        """The rest of the text: bytes that never became a character, and what might have been the start of a stop."""
        tail, _ = self._stops.push(self._detokenizer.finish() if self._detokenizer is not None else "")
        return tail + self._stops.finish()

    def _chunk(self, token: Token, text: str, finish_reason: str | None) -> Chunk:
        self._text.append(text)
        completion = None if finish_reason is None else self._completion(finish_reason, token.token_id)
        if token.token_id < 0:
            return Chunk(text, token.token_id, 0.0, {}, completion)  # its numbers mean nothing
        return Chunk(text, token.token_id, token.logprob, self._top(token), completion)

    def _top(self, token: Token) -> dict[int, float]:
        return dict(token.top[: self._request.params.top_logprobs]) if token.top else {}

    def _completion(self, finish_reason: str, last: int) -> Completion:
        asked = self._request.params.top_logprobs > 0
        return Completion(
            text="".join(self._text),
            token_ids=tuple(token.token_id for token in self._tokens),
            logprobs=tuple(token.logprob for token in self._tokens),
            top_logprobs=tuple(self._top(token) for token in self._tokens) if asked else (),
            finish_reason=finish_reason,
            error=failure_of(last) if finish_reason == "error" else None,
            seed=self._request.seed,
            usage=Usage(len(self._request.prompt_ids), len(self._tokens)),
            timings=Timings(self._first - self._began, self._clock() - self._first),
            stop=self._stops.found,
        )
