"""A program fails on the device and takes the pools with it: every request gets the tokens of an undisturbed run."""

import dataclasses
import gc
import itertools

import jax
import numpy as np
import pytest
from jax.errors import JaxRuntimeError

import gptjax.engine.engine
from gptjax.engine import programs
from gptjax.engine.engine import Engine
from gptjax.engine.request import Request, SamplingParams
from gptjax.models import registry
from gptjax.scheduling.policy import Policy
from tests.engine.test_steps_per_dispatch import ALL, made  # noqa: F401 (a fixture)
from tests.thinned import thinned

SLOTS, MAX_LENGTH, CHUNK, VOCAB = 3, 300, 32, 101
STARTS = np.random.default_rng(0).integers(0, VOCAB, 200).tolist()


def _request(seed: int, length: int, max_tokens: int = 14, *, shared: int = 0, **params) -> Request:
    ids = STARTS[:shared] + np.random.default_rng(seed).integers(0, VOCAB, length - shared).tolist()
    return Request(tuple(ids), max_tokens, SamplingParams(**{"seed": seed, "temperature": 1.0} | params))


# More than there are slots. The third shares a page with the first, the last two also copy a part of the next.
REQUESTS = [
    _request(1, 185, shared=180),
    _request(2, 20, 25, **ALL),
    _request(3, 160, shared=140),
    _request(4, 5, 20),
    _request(5, 176, shared=175),
    _request(6, 180, shared=175),
]
# The calls of each program that fail. During 2 in a row, nobody may get a token.
CALLS = {"first": {1}, "two in a row": {2, 3}, "again later": {3, 20, 21}, "again and again": set(range(5, 400, 61))}
NAMES = ("prefill", "keep_logits", "sample", "advance", "decode")
FAULTS = [  # of a model's requests, with so many steps a dispatch
    pytest.param(model, steps, name, when, marks=[] if model == "gpt2" else pytest.mark.thorough)
    for model, steps, whens in (("gpt2", 4, CALLS), ("gpt-oss", 4, CALLS), ("gpt-oss", 1, ["again later"]))
    for name, when in [*itertools.product(NAMES, whens), ("copy_pages", "first")]
    if (name, steps) != ("decode", 1)  # which is never called
]


def _engine(made, steps: int) -> Engine:  # noqa: F811
    policy = Policy.same_bits(slots=SLOTS, chunk=CHUNK, steps=steps)  # cuts at a quarter of a page
    return Engine(*made, batch=SLOTS, max_length=MAX_LENGTH, policy=policy)


def _run(engine: Engine) -> list[list[tuple]]:
    """All tokens of the requests, of which two come later than the others."""
    given: dict[int, list[tuple]] = {}
    limits: dict[int, int] = {}
    waiting = list(REQUESTS)
    for turn in range(5000):
        while waiting and (len(waiting) > 2 or turn > 8):
            request = waiting.pop(0)
            number = engine.add(request)
            given[number], limits[number] = [], request.max_tokens
        for token in engine.step():
            given[token.request].append((token.token_id, token.logprob))
            if len(given[token.request]) == limits[token.request]:
                engine.end(token.request)
                del limits[token.request]
        if not waiting and not limits:
            _check_nothing_leaks(engine)
            return list(given.values())
    raise AssertionError("the tokens do not come")


def _check_nothing_leaks(engine: Engine) -> None:
    while engine._dispatched:
        engine.step()
    scheduler = engine._scheduler
    assert not (scheduler._running or scheduler._waiting or scheduler._in_flight)
    for pool in scheduler._allocators[0].pools:
        pool.check()
        assert pool.free + pool.idle == pool.size


@dataclasses.dataclass
class Fault:
    """Makes a program fail at some of its calls, with the loss of all that was donated to it."""

    calls: set[int]
    count: int = 0

    def planted(self, original):
        def program(*arguments, **named):
            self.count += 1
            if self.count in self.calls:
                for leaf in jax.tree.leaves([each for each in arguments if isinstance(each, programs.Slots)]):
                    leaf.delete()
                raise JaxRuntimeError(f"INTERNAL: planted at call {self.count}")
            return original(*arguments, **named)

        return program


@pytest.fixture(scope="module", params=thinned([1, 4], 4))
def undisturbed(request, made):  # noqa: F811
    """The steps of a dispatch, and all tokens."""
    return request.param, _run(_engine(made, request.param))


@pytest.mark.parametrize(("made", "undisturbed", "name", "when"), FAULTS, indirect=["made", "undisturbed"])
def test_after_a_failure_every_request_gets_the_tokens_of_an_undisturbed_run(
    made,  # noqa: F811
    undisturbed,
    name,
    when,
    monkeypatch,
):
    (steps, expected), calls = undisturbed, CALLS[when]
    fault = Fault(calls)
    monkeypatch.setattr(programs, name, fault.planted(getattr(programs, name)))
    engine = _engine(made, steps)
    assert _run(engine) == expected
    assert fault.count >= min(calls), "it was never called so often"
    assert engine.losses == sum(call <= fault.count for call in calls)


@pytest.mark.parametrize("reads", [{1}, {2, 3}, {4, 9, 10}], ids=str)
def test_a_failure_may_show_when_tokens_are_read_and_more_plans_are_under_way(
    made,  # noqa: F811
    undisturbed,
    reads,
    monkeypatch,
):
    steps, expected = undisturbed
    engine = _engine(made, steps)
    count, under_way, original = 0, [], jax.device_get

    def device_get(arrays):
        nonlocal count
        count += 1
        if count in reads:
            under_way.append(len(engine._scheduler._in_flight))
            for leaf in jax.tree.leaves(engine._executor._slots):
                leaf.delete()
            raise JaxRuntimeError("INTERNAL: planted")
        return original(arrays)

    monkeypatch.setattr(gptjax.engine.engine.jax, "device_get", device_get)
    assert _run(engine) == expected
    assert engine.losses == len(reads)
    assert steps == 1 or 9 not in reads or max(under_way) > 1


def test_a_failure_that_stays_is_raised_and_says_how_often(made, monkeypatch):  # noqa: F811
    engine = _engine(made, 1)
    fault = Fault(set(range(3, 1000)))
    monkeypatch.setattr(programs, "advance", fault.planted(programs.advance))
    with pytest.raises(JaxRuntimeError, match="planted at call 5") as raised:
        _run(engine)
    assert raised.value.__notes__ == ["the device failed 3 times in a row"]
    assert engine.losses == 3


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_new_pools_may_not_be_had_at_once(made, failures, monkeypatch):  # noqa: F811
    expected = _run(_engine(made, 1))
    engine = _engine(made, 1)
    monkeypatch.setattr(programs, "advance", Fault({7}).planted(programs.advance))
    left, original = failures - 1, registry.create_pools

    def create_pools(*arguments, **named):
        nonlocal left
        if left:
            left -= 1
            raise JaxRuntimeError("RESOURCE_EXHAUSTED: planted")
        return original(*arguments, **named)

    monkeypatch.setattr(registry, "create_pools", create_pools)
    if failures < 3:
        assert _run(engine) == expected
    else:
        with pytest.raises(JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            _run(engine)
    assert engine.losses == failures


def test_two_pools_are_never_there_at_once(made, monkeypatch):  # noqa: F811
    engine = _engine(made, 1)
    original = registry.create_pools
    before: list[int] = []

    def create_pools(*arguments, **named):
        gc.collect()
        before.append(sum(array.nbytes for array in jax.live_arrays()))
        return original(*arguments, **named)

    pool = sum(leaf.nbytes for leaf in jax.tree.leaves(engine._executor._slots.cache))
    gc.collect()
    live = sum(array.nbytes for array in jax.live_arrays())

    def sample(*_):  # it does not use the pools up
        monkeypatch.setattr(programs, "sample", real)
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: planted")

    real = programs.sample
    monkeypatch.setattr(programs, "sample", sample)
    monkeypatch.setattr(registry, "create_pools", create_pools)
    _run(engine)
    assert len(before) == 1 and before[0] < live - pool * 0.9


def test_other_errors_are_not_taken_for_failures_of_the_device(made, monkeypatch):  # noqa: F811
    def broken(*_):
        raise FloatingPointError("planted")

    engine = _engine(made, 1)
    monkeypatch.setattr(programs, "sample", broken)
    with pytest.raises(FloatingPointError, match="planted"):
        _run(engine)
    assert engine.losses == 0
