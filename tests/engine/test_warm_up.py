"""`warm_up` compiles few programs, and then no request waits for another one."""

import dataclasses
import threading

import jax
import pytest

from gptjax.engine import executor
from gptjax.engine.compilation import Later
from gptjax.engine.engine import Engine
from gptjax.engine.request import Request
from gptjax.engine.settings import Features
from gptjax.scheduling.policy import Policy
from tests.compilations import compilations
from tests.engine.test_engine import MIXED, MODEL, made_params
from tests.server.worker_material import until

# As in test_executor.py, so that what is compiled here is there on disk, and the other way round.
SHAPE = {"batch": 3, "max_length": 300, "policy": Policy(slots=3, chunk=64, pieces=3), "pages": (9,)}
EVERY = {
    "temperature": 0.9,
    "top_k": 50,
    "top_p": 0.95,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.2,
    "logit_bias": {3: 1.0, 8: -2.0},
    "top_logprobs": 4,
}


@pytest.fixture(autouse=True)
def _nothing_is_there_from_before():
    """What is read from the disk counts as compiled."""
    jax.clear_caches()


def _run(engine: Engine, requests: list[Request]) -> list[tuple[int, int]]:
    """Adds a request with every step, and runs all to their ends. Returns all tokens, with their requests' numbers."""
    left, waiting, drawn = {}, list(requests), []
    while left or waiting:
        if waiting:
            request = waiting.pop()
            left[engine.add(request)] = request.room(engine.max_length)
        for token in engine.step():
            drawn.append((token.request, token.token_id))
            left[token.request] -= 1
            if not left[token.request]:
                engine.end(token.request)
                del left[token.request]
    return sorted(drawn, key=lambda each: each[0])  # stable


def test_no_request_waits_for_a_compilation():
    """All features alone and together, in every number of rows, from shared pages, and after being set aside."""
    engine = Engine(MODEL, made_params(), **SHAPE)
    with compilations() as compiled:
        engine.warm_up()
    # Two sizes of calls; one to three prompts that end in one; steps and draws of 1, 2 and 3 rows; copies; counts; and
    # the marker that says how far the device is.
    assert len(compiled) == 2 + 3 + 2 * 3 + 3
    alone = [
        dataclasses.replace(MIXED[0], params=dataclasses.replace(MIXED[0].params, **{name: value}))
        for name, value in EVERY.items()
    ]
    every = [dataclasses.replace(each, params=dataclasses.replace(each.params, **EVERY)) for each in MIXED]
    long = [dataclasses.replace(MIXED[1], max_tokens=150)] * 4
    with compilations() as compiled:
        for requests in ([alone[0]], alone[::-1], MIXED, every, [*alone, *every, *MIXED], long, MIXED[::-1]):
            _run(engine, requests)
        assert compiled == []


class Held:
    """Instead of `Later`: compiles when it is told to."""

    def __init__(self, parts):
        self.parts = parts


def test_the_largest_programs_stand_in_for_those_that_are_not_compiled_yet(monkeypatch):
    """Requests get the same tokens, and none waits for a compilation, before and after."""
    monkeypatch.setattr(executor, "Later", Held)
    engine = Engine(MODEL, made_params(), **SHAPE)
    with compilations() as compiled:
        engine.warm_up_largest()
    assert len(compiled) == 1 + 1 + 2 * 1 + 3
    sizes = _sizes(engine, monkeypatch)
    with compilations() as compiled:
        before = _run(engine, MIXED)
        assert sizes == {64, 3}
        Later(engine._executor._later.parts).wait()
        assert len(compiled) == 1 + 2 + 2 * 2
    sizes.clear()
    with compilations() as compiled:
        numbers = len({number for number, _ in before})
        after = [(number - numbers, token) for number, token in _run(engine, MIXED)]
        assert compiled == []
        assert sizes == {32, 64, 1, 2, 3}
    assert before == after


@pytest.mark.thorough  # levels of features on a GPU: test_prompts_in_parts.py, too
def test_all_features_stand_in_for_few(monkeypatch):
    """On a GPU, several sets of features are compiled. (Here on a CPU, without the branches that it has instead.)"""
    levels = (Features(draws=True), Features(draws=True, truncates=True), Features.everything())
    expected = _run(Engine(MODEL, made_params(), **SHAPE), MIXED)
    jax.clear_caches()
    monkeypatch.setattr(executor, "Later", Held)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        engine = Engine(MODEL, made_params(), **SHAPE, levels=levels)
    with compilations() as compiled:
        engine.warm_up_largest()
    assert len(compiled) == 1 + 1 + 2 * 1 + 3
    used, settings_of = set(), executor.settings_of

    def spied(requests, vocab_size, features, **how):
        used.add(features)
        return settings_of(requests, vocab_size, features, **how)

    monkeypatch.setattr(executor, "settings_of", spied)
    with compilations() as compiled:
        assert _run(engine, MIXED) == expected
        assert used == set(levels[2:])
        Later(engine._executor._later.parts).wait()
        assert len(compiled) == 2 + 1 + 2 + 2 * 4  # draws of all rows; a call; fewer prompts that end; fewer rows
    used.clear()
    number = len({number for number, _ in expected})
    with compilations() as compiled:
        assert [(each - number, token) for each, token in _run(engine, MIXED)] == expected
        assert used == set(levels)
        assert compiled == []


def test_a_device_that_fails_meanwhile_ends_it_quietly(caplog):
    def fails(_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: planted\nand where")

    later = Later([(fails, lambda: pytest.fail("it was not compiled"))])
    assert not later.wait()
    assert [record.message.partition(": ")[2] for record in caplog.records] == ["RESOURCE_EXHAUSTED: planted"]


def _sizes(engine, monkeypatch) -> set[int]:
    """The sizes of the calls that an engine runs from now on."""
    sizes, run = set(), engine._executor.run

    def spied(plan, requests, *more):
        calls = [*plan.prefill, *([plan.decode] if plan.decode else [])]
        sizes.update(call.size for call in calls)
        return run(plan, requests, *more)

    monkeypatch.setattr(engine._executor, "run", spied)
    return sizes


def test_all_is_compiled_first_if_the_sizes_of_calls_must_not_depend_on_load(monkeypatch):
    monkeypatch.setattr(executor, "Later", None)  # not called
    policy = Policy.same_bits(slots=2, chunk=32)
    engine = Engine(MODEL, made_params(), batch=2, max_length=100, policy=policy, pages=(9,))
    engine.warm_up_largest()
    with compilations() as compiled:
        _run(engine, [dataclasses.replace(each, prompt_ids=each.prompt_ids[:60], max_tokens=9) for each in MIXED])
        assert compiled == []
    assert engine.wait_until_compiled()


class _Program:
    """A program whose compilation waits for `go`, or fails."""

    out_info = None

    def __init__(self, go=None, failure=None):
        self.go, self.failure, self.begun = go, failure, threading.Event()

    def lower(self):
        return self

    def compile(self):
        self.begun.set()
        assert self.go is None or self.go.wait(60)
        if self.failure is not None:
            raise self.failure


def _later(*parts):
    """`Later` of programs, and a set of the numbers of the parts that are done."""
    done = set()

    def part(number, of_part):
        return lambda compilation: [compilation(each) for each in of_part], lambda: done.add(number)

    return Later([part(*each) for each in enumerate(parts)]), done


def test_a_part_is_done_when_all_of_its_programs_are():
    go = threading.Event()
    later, done = _later([_Program()], [_Program(), _Program(go)])
    go.set()
    assert later.wait()
    assert done == {0, 1}


def test_what_fails_is_left_out():
    later, done = _later([_Program(), _Program(failure=RuntimeError("out of memory"))], [_Program()])
    assert not later.wait()
    assert done == {1}


@pytest.mark.parametrize("submitted", [False, True])
def test_nothing_begins_after_a_stop(submitted):
    go = threading.Event()
    first, never = _Program(go), [_Program(go) for _ in range(500)]
    later, done = _later([first], *([each] for each in never), [_Program(go)])
    assert first.begun.wait(60)
    if submitted:
        until(lambda: len(later._compilation.compiled) == 502)
    later.stop()
    go.set()
    assert not later.wait()
    assert len(done) < 502
