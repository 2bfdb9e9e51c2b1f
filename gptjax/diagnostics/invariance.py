"""Whether a request's tokens and log-probabilities depend on what else an engine computes.

Each request is computed alone, and then next to others that come and go at random, some with the same beginning, and
in a cache that is too small for all of them. Bits are compared, not rounded numbers.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Final

from gptjax.engine.engine import Engine
from gptjax.engine.output import NOT_FINITE
from gptjax.engine.pools import default_policy, least_pages, pages_for, pool_kinds
from gptjax.engine.request import Request, SamplingParams, Token
from gptjax.errors import GptjaxError, RequestError
from gptjax.models.params import Params
from gptjax.models.registry import Model

LENGTH: Final = 640  # positions of a request, at most
_OUTPUT: Final = 24  # tokens of a request, at most
_SHARE: Final = 0.4  # of the positions that all slots could use, as the cache's size
_JOINS, _PAUSES, _GOES_ON = 0.6, 0.15, 0.3  # probabilities before a step
Given = list[tuple[int, float]]  # tokens that a request was given, with their log-probabilities


@dataclasses.dataclass(frozen=True)
class Trial:
    """Requests computed in one way, compared with another way."""

    max_batch: int
    in_company: bool  # else one request at a time, compared with `max_batch` 1
    requests: int
    tokens: int
    different: int  # requests that were given other bits
    first: int | None  # the first token of a request at which that was seen, from 0
    largest: float  # difference of log-probabilities, of tokens that are the same


def trials(
    model: Model, params: Params, *, requests: int, max_batches: Sequence[int], seed: int = 0
) -> Iterator[Trial]:
    """For each `max_batch`, requests one at a time against those at `max_batch` 1, then in company against alone.

    Args:
      requests: how many.

    Raises:
      RequestError: no requests, or no `max_batch`, or one below 1.
      GptjaxError: the model's logits are not finite.
    """
    if requests < 1 or not max_batches or min(max_batches) < 1:
        raise RequestError(f"found {requests} requests at max_batch {list(max_batches)}: each must be at least 1")
    asked = _requests(model, requests, random.Random(seed))
    reference = _alone(model, params, 1, asked)
    for max_batch in max_batches:
        alone = reference if max_batch == 1 else _alone(model, params, max_batch, asked)
        if max_batch > 1:
            yield _compared(max_batch, False, reference, alone)
        company = _in_company(model, params, max_batch, asked, random.Random(seed + 1))
        yield _compared(max_batch, True, alone, company)


def _length(model: Model) -> int:
    return min(LENGTH, model.config.context_length)


def _requests(model: Model, count: int, rng: random.Random) -> list[Request]:
    """Greedy and sampled, of all lengths; half of them begin like others."""
    length, vocabulary = _length(model), model.config.vocab_size
    beginning = [rng.randrange(vocabulary) for _ in range(length)]
    found = []
    for number in range(count):
        shared = rng.randrange(length // 2) if number % 2 else 0
        own = 1 + rng.randrange(length - shared - 1)
        ids = beginning[:shared] + [rng.randrange(vocabulary) for _ in range(own)]
        sampling = SamplingParams(seed=number, temperature=rng.choice([0.0, 0.7, 1.0]), top_p=rng.choice([0.9, 1.0]))
        found.append(Request(tuple(ids[: length - 1]), 1 + rng.randrange(_OUTPUT), sampling))
    return found


def _alone(model: Model, params: Params, max_batch: int, requests: Sequence[Request]) -> list[Given]:
    """What each request is given if no other runs, and nothing is left of those before."""
    length = _length(model)
    policy = default_policy(model, slots=max_batch)
    engine = Engine(model, params, batch=max_batch, max_length=length, policy=policy)
    found = []
    for request in requests:
        number, given = engine.add(request), Given()
        while len(given) < request.room(engine.max_length):
            given += map(_bits, engine.step())
        engine.end(number)
        found.append(given)
    return found


def _in_company(
    model: Model, params: Params, max_batch: int, requests: Sequence[Request], rng: random.Random
) -> list[Given]:
    """What each request is given if they come in any order and pause, with beginnings kept and little room.

    One that pauses may be set aside for others, and is computed again when it goes on.
    """
    length = _length(model)
    policy = default_policy(model, slots=max_batch, reuse=True)
    each = pool_kinds(model, max_length=length, policy=policy)
    wanted = pages_for(each, int(_SHARE * max_batch * length), page=policy.page)
    pages = [max(pair) for pair in zip(wanted, least_pages(each), strict=True)]
    engine = Engine(model, params, batch=max_batch, max_length=length, policy=policy, pages=pages)
    waiting = list(range(len(requests)))
    rng.shuffle(waiting)
    found = [Given() for _ in requests]
    running: dict[int, int] = {}
    pausing: set[int] = set()
    while waiting or running:
        while waiting and engine.room and (not running or rng.random() < _JOINS):
            which = waiting.pop()
            running[engine.add(requests[which])] = which
        for number in sorted(pausing):
            if len(pausing) == len(running) or rng.random() < _GOES_ON:
                engine.hold(number, False)
                pausing.remove(number)
        if len(pausing) + 1 < len(running) and rng.random() < _PAUSES:
            number = rng.choice(sorted(running.keys() - pausing))
            engine.hold(number, True)
            pausing.add(number)
        for token in engine.step():
            given = found[running[token.request]]
            given.append(_bits(token))
            if len(given) == requests[running[token.request]].room(engine.max_length):
                engine.end(token.request)
                del running[token.request]
                pausing.discard(token.request)
    return found


def _bits(token: Token) -> tuple[int, float]:
    if token.token_id < 0:
        raise GptjaxError(NOT_FINITE)
    return token.token_id, token.logprob


def _compared(max_batch: int, in_company: bool, expected: Sequence[Given], found: Sequence[Given]) -> Trial:
    different, first, largest = 0, None, 0.0
    for one, other in zip(expected, found, strict=True):
        place = next((i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)
        if place is None:
            continue
        different += 1
        first = place if first is None else min(first, place)
        # After another token, the log-probabilities are of other texts.
        if one[place][0] == other[place][0]:
            largest = max(largest, abs(one[place][1] - other[place][1]))
    return Trial(max_batch, in_company, len(expected), sum(map(len, expected)), different, first, largest)
