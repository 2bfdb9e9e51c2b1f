"""How workers begin and end: warm-up, drain, stop, death, and logits that are not finite."""

import contextlib
import logging
import threading
import time
import weakref

import jax
import numpy as np
import pytest

import gptjax
from gptjax.engine import programs
from gptjax.models import registry
from gptjax.server.ipc.events import AnyWorker, Failed, Finished, Unavailable
from gptjax.server.worker import own_engine
from gptjax.server.worker.worker import Worker
from tests.server.worker_material import PATIENCE, Reader, remote_of, request_of, until
from tests.shallow import shallow

REQUESTS = [request_of(1, 5, 30), request_of(2, 70, 25, temperature=1.0), request_of(3, 40, 20)]


@pytest.fixture
def small(monkeypatch):
    """Two slots, and one program for all kinds of sampling, to be compiled soon."""
    monkeypatch.setattr(own_engine, "_LEVELS", own_engine._LEVELS[-1:])
    return shallow("gpt2-tales", max_length=96, max_batch=2)


@pytest.fixture(params=["in this process", "in another"])
def fresh(request, small):
    """Makes workers that a test may bring to their ends."""
    with contextlib.ExitStack() as stack:

        def make() -> AnyWorker:
            worker = Worker(small, max_queue=8, chunk=32)
            worker.start()
            stack.callback(worker.stop)
            if request.param == "in another":
                return stack.enter_context(remote_of(worker, small, max_queue=8))
            return worker

        yield make


def test_draining_waits_for_open_requests(fresh):
    worker = fresh()
    readers = [Reader(worker, request_of(n, 40, 20)) for n in range(5)]  # two slots: three of them wait
    worker.drain(PATIENCE)
    assert all(reader.ended.is_set() for reader in readers)
    assert all(reader.end == Finished("length", 40, 0, 20) for reader in readers)
    with pytest.raises(Unavailable, match="shutting down"):
        Reader(worker, request_of(1, 5))
    state = worker.state
    assert state.alive
    assert not state.ready
    assert (state.busy, state.queued) == (0, 0)


def test_what_is_open_when_the_time_is_over_fails(fresh):
    worker = fresh()
    worker.wait_until_ready()
    hold = threading.Event()
    # Longer than the time that they are given. (A reader that is slow holds up a worker only in its own process.)
    running = Reader(worker, request_of(1, 40, 250), on_token=lambda _: hold.wait(0.1))
    others = [Reader(worker, request_of(n, 40, 250)) for n in range(4)]
    assert running.begun.wait(PATIENCE)
    worker.drain(0.02)
    for reader in (running, *others):
        assert reader.ended.is_set()
        assert reader.end.kind == "drained"
        assert "shutting down" in reader.end.message
    state = worker.state
    assert (state.busy, state.queued, state.alive) == (0, 0, True)
    worker.stop()
    assert not worker.state.alive


def test_stopping_fails_what_is_open(fresh):
    worker = fresh()
    readers = [Reader(worker, request_of(n, 40, 250), on_token=lambda _: time.sleep(0.02)) for n in range(5)]
    assert readers[0].begun.wait(PATIENCE)
    worker.stop()
    assert all(reader.end == Failed("the server was stopped", "stopped") for reader in readers)
    state = worker.state
    assert (state.alive, state.ready, state.error, state.busy, state.queued) == (False, False, None, 0, 0)
    with pytest.raises(Unavailable, match="stopped"):
        Reader(worker, request_of(1, 5))
    worker.cancel(readers[0].ticket)
    worker.stop()
    worker.drain(1)


def test_a_worker_that_dies_fails_all_and_shows_it(fresh, monkeypatch):
    worker = fresh()
    worker.wait_until_ready()
    running = [Reader(worker, request_of(n, 5, 250), on_token=lambda _: time.sleep(0.01)) for n in range(2)]
    assert all(reader.begun.wait(PATIENCE) for reader in running)
    waiting = [Reader(worker, request_of(n, 5, 250)) for n in range(3)]

    def broken(*_):
        raise FloatingPointError("a planted fault")

    monkeypatch.setattr(programs, "sample", broken)
    for reader in (*running, *waiting):
        assert reader.end.kind == "died"
        assert "FloatingPointError: a planted fault" in reader.end.message
    until(lambda: not worker.state.alive)
    state = worker.state
    assert (state.alive, state.ready, state.busy, state.queued) == (False, False, 0, 0)
    assert state.error == "FloatingPointError: a planted fault"
    with pytest.raises(Unavailable, match="died: FloatingPointError: a planted fault"):
        Reader(worker, request_of(1, 5))
    for call in (worker.stop, lambda: worker.drain(1), lambda: worker.cancel(running[0].ticket)):
        call()  # nothing hangs


def _alone(worker: AnyWorker) -> list:
    """The tokens that each of `REQUESTS` gets by itself."""
    found = []
    for request in REQUESTS:
        reader = Reader(worker, request)
        reader.wait()
        found.append(reader.tokens)
    return found


def test_a_failure_of_the_device_disturbs_no_request(fresh, monkeypatch, caplog):
    worker = fresh()
    expected = _alone(worker)
    calls, original = 0, programs.advance

    def failing(model, params, slots, *others):
        nonlocal calls
        calls += 1
        if calls in (5, 40):
            jax.tree.map(lambda leaf: leaf.delete(), slots)
            raise jax.errors.JaxRuntimeError("INTERNAL: planted")
        return original(model, params, slots, *others)

    assert worker.wait_until_compiled()  # what fails can only be called
    monkeypatch.setattr(programs, "advance", failing)
    readers = [Reader(worker, request) for request in REQUESTS]
    assert all(isinstance(reader.end, Finished) for reader in readers)
    assert [reader.tokens for reader in readers] == expected
    state = worker.state
    assert (state.alive, state.ready, state.error, state.losses) == (True, True, None, 2)
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["the device failed; open requests go on where they were"] * 2


def test_a_device_that_fails_again_and_again_ends_all_requests(fresh, monkeypatch):
    worker = fresh()
    worker.wait_until_ready()

    def failing(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: planted")

    assert worker.wait_until_compiled()  # what fails can only be called
    monkeypatch.setattr(programs, "sample", failing)
    readers = [Reader(worker, request_of(n, 5, 80)) for n in range(4)]
    ends = {reader.end for reader in readers}
    assert {end.kind for end in ends} == {"died"}
    assert all("INTERNAL: planted; the device failed 3 times in a row" in end.message for end in ends)
    assert not worker.state.alive
    assert worker.state.error == "JaxRuntimeError: INTERNAL: planted; the device failed 3 times in a row"


def test_a_device_without_memory_ends_its_requests_and_goes_on_once_it_has_some(fresh, monkeypatch, caplog):
    worker = fresh()
    expected = _alone(worker)
    assert worker.wait_until_compiled()  # what fails can only be called
    is_full, given, kept = threading.Event(), [], []

    def full_at_times(original):
        def function(*arguments, **named):
            if is_full.is_set():
                given.extend(weakref.ref(each.cache.k[0]) for each in arguments if isinstance(each, programs.Slots))
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: planted")
            return original(*arguments, **named)

        return function

    def create_pools(*arguments, **named):
        kept.extend(each for each in given if each() is not None)
        return original(*arguments, **named)

    original = registry.create_pools
    monkeypatch.setattr(registry, "create_pools", create_pools)
    for module, name in ((programs, "advance"), (own_engine.Engine, "restart")):
        monkeypatch.setattr(module, name, full_at_times(getattr(module, name)))
    is_full.set()
    readers = [Reader(worker, request) for request in REQUESTS]
    assert {reader.end.kind for reader in readers} == {"out_of_memory"}
    assert all("ran out of memory" in reader.end.message and "--max-length" in reader.end.message for reader in readers)
    meanwhile = Reader(worker, request_of(4, 5))
    assert meanwhile.end.kind == "out_of_memory"
    until(lambda: not worker.state.ready)
    is_full.clear()
    until(lambda: isinstance(Reader(worker, request_of(5, 5)).end, Finished))
    assert given and not kept, "nothing of what failed is in the way of new pools"
    again = [Reader(worker, request) for request in REQUESTS]
    assert [reader.end.reason for reader in again] == ["length"] * 3
    assert [reader.tokens for reader in again] == expected
    assert (worker.state.alive, worker.state.error) == (True, None)
    (warning,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.startswith("all requests end: ") and "ran out of memory" in warning


def test_a_worker_that_dies_while_it_compiles_says_so(fresh, monkeypatch):
    def broken(*_):
        raise MemoryError("planted")

    broken.lower = broken.trace = broken  # programs are compiled before they are called
    monkeypatch.setattr(programs, "prefill", broken)
    worker = fresh()
    with pytest.raises(Unavailable, match=r"CapacityError: .*memory"):
        worker.wait_until_ready()
    assert not worker.state.alive


def test_requests_may_come_before_all_is_compiled(fresh):
    worker = fresh()
    reader = Reader(worker, request_of(1, 5, 3))
    assert reader.end == Finished("length", 5, 0, 3)
    assert worker.state.ready


def test_a_worker_that_was_not_started_takes_nothing(small):
    worker = Worker(small)
    with pytest.raises(Unavailable, match="not started"):
        Reader(worker, request_of(1, 5))
    assert not worker.state.alive
    worker.stop()


def test_logits_that_are_not_finite_end_their_request_only(small):
    poisoned = {**small.params}
    poisoned["position_embedding"] = poisoned["position_embedding"].at[45].set(np.nan)
    broken = gptjax.LanguageModel(
        small.model, poisoned, tokenizer=small.tokenizer, defaults=small.defaults, max_length=96, max_batch=2
    )
    worker = Worker(broken, chunk=32)
    worker.start()
    bad, good = Reader(worker, request_of(1, 40, 20)), Reader(worker, request_of(2, 5, 30))
    assert bad.end.kind == "not_finite"
    assert "not finite" in bad.end.message
    assert len(bad.tokens) == 6  # of positions 40 to 45
    assert good.end == Finished("length", 5, 0, 30)
    again = Reader(worker, request_of(2, 5, 30))
    assert again.end == good.end
    assert again.tokens == good.tokens
    worker.stop()
