"""A request to the engine, checked before anything runs."""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.config.generation import LEAST_REPETITION_PENALTY, MOST_REPETITION_PENALTY, MOST_TEMPERATURE
from gptjax.errors import CapacityError, RequestError
from gptjax.structured import Grammar
from gptjax.support.quoting import quoted

MAX_STOPS = 16  # stop strings of one request
MAX_STOP_LENGTH = 1000  # characters of one stop string
MAX_STOP_IDS = 256
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
TOO_COMPLEX = -2  # instead of a token
_SEEDS = 1 << 32


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. The defaults are greedy.

    Order: repetition penalty, presence and frequency penalty, logit bias, temperature, top-k, top-p, min-p.
    """

    temperature: float = 0.0  # 0 is argmax
    top_k: int = 0  # draw from the k most likely tokens; 0 is off
    top_p: float = 1.0  # draw from the fewest tokens whose probability reaches p
    min_p: float = 0.0  # draw from tokens at least p times as likely as the most likely
    repetition_penalty: float = 1.0  # over prompt and output, as in the CTRL paper
    presence_penalty: float = 0.0  # over the output, once a token
    frequency_penalty: float = 0.0  # over the output, for each occurrence
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)  # token id -> added to its logit
    seed: int | None = None  # None draws a new one
    top_logprobs: int = 0  # alternatives reported with each token

    def check(self, vocab_size: int) -> None:
        """Raises `RequestError` naming the first setting that is out of range."""
        _number("temperature", self.temperature, low=0, high=MOST_TEMPERATURE)
        _whole("top_k", self.top_k, low=0)
        _number("top_p", self.top_p, low=0, high=1, above=True)
        _number("min_p", self.min_p, low=0, high=1)
        penalty = self.repetition_penalty
        _number("repetition_penalty", penalty, low=LEAST_REPETITION_PENALTY, high=MOST_REPETITION_PENALTY)
        _number("presence_penalty", self.presence_penalty, low=-100, high=100)
        _number("frequency_penalty", self.frequency_penalty, low=-100, high=100)
        _whole("top_logprobs", self.top_logprobs, low=0, high=min(MAX_TOP_LOGPROBS, vocab_size))
        if self.seed is not None:
            _whole("seed", self.seed, low=0, high=_SEEDS - 1)
        if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MAX_BIASES:
            raise RequestError(f"logit_bias must map at most {MAX_BIASES} token ids to numbers")
        for token, bias in self.logit_bias.items():
            _whole("a token id of logit_bias", token, low=0, high=vocab_size - 1)
            _number(f"logit_bias[{token}]", bias, low=-100, high=100)

    @property
    def truncates(self) -> bool:
        """Whether top-k, top-p or min-p exclude any token."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalises(self) -> bool:
        """Whether any penalty is on."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt, and how to continue it."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    params: SamplingParams
    stop_ids: tuple[int, ...] = ()  # a token of these ends the output; it is not part of the text
    stop: tuple[str, ...] = ()  # text that ends the output and is not part of it
    grammar: Grammar | None = None  # what the output must be, up to one of `stop_ids`

    @property
    def seed(self) -> int:
        """The seed in use; `with_seed` fixes it."""
        return self.params.seed or 0

    def with_seed(self) -> "Request":
        """The request, with a seed drawn if none was given."""
        if self.params.seed is not None:
            return self
        return dataclasses.replace(self, params=dataclasses.replace(self.params, seed=secrets.randbelow(_SEEDS)))

    def check(self, *, vocab_size: int, max_length: int) -> None:
        """Raises `RequestError` or `CapacityError` if the request cannot be run."""
        check_prompt(self.prompt_ids, vocab_size=vocab_size, max_length=max_length)
        _whole("max_tokens", self.max_tokens, low=1)
        self.params.check(vocab_size)
        if len(self.stop) > MAX_STOPS:
            raise RequestError(f"{len(self.stop)} stop strings were given; at most {MAX_STOPS} are allowed")
        for stop in self.stop:
            if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_LENGTH:
                raise RequestError(f"a stop must be text of 1 to {MAX_STOP_LENGTH} characters, found {quoted(stop)}")
        if len(self.stop_ids) > MAX_STOP_IDS:
            raise RequestError(f"{len(self.stop_ids)} stop ids were given; at most {MAX_STOP_IDS} are allowed")
        for token in self.stop_ids:
            _whole("a stop id", token, low=0)
        if self.grammar is not None and not any(token < vocab_size for token in self.stop_ids):
            raise RequestError("a grammar needs a token that ends the text: give stop_ids, or leave out ignore_eos")

    def room(self, max_length: int) -> int:
        """The most tokens that can be generated: the last one needs no place in the cache."""
        return min(self.max_tokens, max_length - len(self.prompt_ids) + 1)


class Token(NamedTuple):
    """One token that a request was given. (A tuple, as there are thousands a second.)"""

    request: int  # its number
    token_id: int  # -1 if the model's logits were not finite, `TOO_COMPLEX` if its grammar failed
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), most likely first


class CheckedIds(tuple[int, ...]):
    """A prompt's ids that `check_prompt` found in order, so that nobody has to look at each of thousands again."""

    limits: tuple[int, int]  # vocab_size and max_length
    array_T: np.ndarray  # int32, read-only

    def __array__(self, dtype: np.dtype[Any] | None = None, copy: bool | None = None) -> np.ndarray:
        """For NumPy, which needs 50 times as long for a tuple."""
        return np.array(self.array_T, dtype, copy=copy)

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, which needs 10 times as long for a tuple."""
        return _checked, (self.array_T.tobytes(), self.limits)


def check_prompt(token_ids: Sequence[int], *, vocab_size: int, max_length: int) -> CheckedIds:
    """Returns a prompt's ids. Raises `RequestError` or `CapacityError` for those that the model cannot take."""
    if isinstance(token_ids, CheckedIds) and token_ids.limits == (vocab_size, max_length):
        return token_ids
    if not token_ids:
        raise RequestError("the prompt is empty: give at least one token (a text starts with tokenizer.bos_id)")
    # Looking at a hundred thousand tokens one by one takes long.
    array_T = np.array(token_ids) if set(map(type, token_ids)) == {int} else None
    fine = array_T is not None and array_T.dtype == np.int64 and array_T.min() >= 0 and array_T.max() < vocab_size
    for position, token in enumerate(() if fine else token_ids):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise RequestError(
                f"token id {quoted(token)} at position {position} is not a whole number from 0 to {vocab_size - 1}"
            )
    if len(token_ids) > max_length:
        raise CapacityError(
            f"the prompt has {len(token_ids)} tokens, but max_length is {max_length}: shorten the prompt by "
            f"{len(token_ids) - max_length}, or load the model with a larger max_length if its context allows"
        )
    array_T = np.array(token_ids if array_T is None else array_T, np.int32)
    return _checked(array_T.tobytes(), (vocab_size, max_length), token_ids)


def _checked(data: bytes, limits: tuple[int, int], token_ids: Sequence[int] | None = None) -> CheckedIds:
    """Ids that were checked, from an array's bytes."""
    array_T = np.frombuffer(data, np.int32)  # read-only
    checked = CheckedIds(array_T.tolist() if token_ids is None else token_ids)
    checked.limits, checked.array_T = limits, array_T
    return checked


def _whole(name: str, value: object, *, low: int, high: int | None = None) -> None:
    wanted = f"at least {low}" if high is None else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise RequestError(f"{name} must be a whole number {wanted}, found {quoted(value)}")


def _number(name: str, value: object, *, low: float, high: float, above: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (above and value == low):  # type: ignore[operator]
        wanted = f"above {low} and at most {high}" if above else f"from {low} to {high}"
        raise RequestError(f"{name} must be a number {wanted}, found {quoted(value)}")
