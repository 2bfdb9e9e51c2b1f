"""The worker: many requests on one engine, each with the bits that it gets alone, and an end for each of them."""

import contextlib
import functools
import itertools
import threading
import time

import numpy as np
import pytest

from gptjax.engine import free_of_load, programs
from gptjax.engine.request import Request, SamplingParams, Token
from gptjax.errors import CapacityError, RequestError
from gptjax.server.ipc.events import AnyWorker, Finished, QueueFull, Ticket
from gptjax.server.worker.worker import Worker
from tests.fuzz import rounds
from tests.server.worker_material import (
    CHUNK,
    MAX_LENGTH,
    PATIENCE,
    REQUESTS,
    SLOTS,
    Alone,
    Reader,
    ids_of,
    remote_of,
    request_of,
    submit,
    until,
)
from tests.shallow import shallow
from tests.thinned import thorough

TIMES = rounds(20)  # that each cancellation is tried
UNREAD = itertools.count(100)  # for prompts that no page holds

# A worker in another process is the same worker behind a channel, so one model sees both, and the others one of them.
# GPT-OSS has a layer with a window of 128 positions. "One by one" is as on CPUs where bits depend on the load.
PLACES = [
    ("gpt2-tales", "in this process"),
    ("gpt2-tales", "in another"),
    thorough(("gpt-oss-tales", "in another")),
    thorough(("gpt-oss-tales, one by one", "in this process")),
]


@functools.cache
def _model(name):
    return shallow(name.partition(", ")[0], max_length=MAX_LENGTH, max_batch=SLOTS)


@functools.cache
def _alone(name):
    return Alone(_model(name))


@pytest.fixture(scope="module", params=PLACES, ids=lambda place: f"{place[1]}-{place[0]}")
def place(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param[0].endswith("one by one"):
            patch.setattr(free_of_load, "is_free_of_load", lambda model, rows=1: False)
        yield request.param


@pytest.fixture(scope="module")
def started(place):
    """A worker that is ready, for all tests that leave it as it was; and itself, if it is seen through a channel."""
    model, is_near = _model(place[0]), place[1] == "in this process"
    worker = Worker(model, max_queue=3 if is_near else 1 << 60, chunk=CHUNK)
    worker.start()
    worker.wait_until_ready()
    with contextlib.nullcontext(worker) if is_near else remote_of(worker, model, max_queue=3) as found:
        yield found, worker
    worker.stop()


@pytest.fixture
def worker(started):
    """The same, all of whose slots are free again when the test is over."""
    found, _ = started
    assert found.state.ready
    yield found
    until(lambda: found.state.busy == found.state.queued == 0)
    assert found.state.alive


@pytest.fixture
def packs(started):
    """Whether prompts share calls, and parts of their pages: where that does not change their bits."""
    return started[1]._policy.packed


@pytest.fixture(scope="module")
def alone(place):
    """What a request gives by itself."""
    return _alone(place[0])


@pytest.mark.thorough
def test_requests_that_come_and_go_get_the_bits_they_get_alone(worker, alone):
    for order in (range(len(REQUESTS)), np.random.default_rng(0).permutation(len(REQUESTS)).tolist()):
        readers = {number: submit(worker, REQUESTS[number]) for number in order}
        for number, reader in readers.items():
            request, end = REQUESTS[number], reader.end
            assert reader.tokens == alone(REQUESTS[number]), number
            assert end.reason == "length"
            assert end.prompt_tokens == len(request.prompt_ids)
            assert end.completion_tokens == len(reader.tokens) == request.room(MAX_LENGTH)
            assert [type(event) for event in reader.events] == [Token] * len(reader.tokens) + [Finished]
            assert reader.threads == {worker._thread.name}


def test_a_stop_id_is_delivered_and_ends_the_request(worker, alone):
    tokens = [token for token, _, _ in alone(REQUESTS[0])]
    at = next(i for i in range(3, len(tokens)) if tokens[i] not in tokens[:i])
    reader = Reader(worker, request_of(1, 5, 30, stop_ids=[tokens[at]]))
    assert reader.end == Finished("stop", 5, 0, at + 1)
    assert reader.tokens == alone(REQUESTS[0])[: at + 1]


def test_a_request_without_a_seed_gets_one(worker):
    readers = [Reader(worker, request_of(1, 5, 20, temperature=1.5, seed=None)) for _ in range(2)]
    assert readers[0].wait()[:-1] != readers[1].wait()[:-1]


def test_running_streams_wait_for_one_chunk_at_most(worker, monkeypatch, packs):
    """Between two chunks of a prompt there is always a step of those that run."""
    happened = []
    calls = -(-2 * 290 // CHUNK) if packs else 2 * 6  # four whole chunks, 32 of the rest, and 2
    for name in ("prefill", "advance"):
        original = getattr(programs, name)
        monkeypatch.setattr(programs, name, lambda *a, name=name, f=original: (happened.append(name), f(*a))[1])
    running = Reader(worker, request_of(1, 5, 200))
    assert running.begun.wait(PATIENCE)
    happened.clear()
    others = [Reader(worker, request_of(n, 290, 2)) for n in (21, 22)]
    for other in others:
        other.wait()
    assert not running.ended.is_set()
    worker.cancel(running.ticket)
    between = "".join(name[0] for name in happened)
    assert between.count("p") == calls
    assert "pp" not in between


def test_a_prompt_by_itself_is_read_without_waiting_for_steps(worker):
    reader = Reader(worker, request_of(31, 290, 3))
    assert reader.end == Finished("length", 290, 0, 3)


CANCELLED = {
    "queued": lambda worker: _cancel_queued(worker),
    "prefill": lambda worker: _cancel_in_prefill(worker),
    "decode": lambda worker: _cancel_in_decode(worker),
    "finishing": lambda worker: _cancel_while_finishing(worker),
    "ended": lambda worker: _cancel_after_the_end(worker),
}


def _cancel_queued(worker: AnyWorker) -> None:
    running = [Reader(worker, request_of(n, 5, 290)) for n in range(SLOTS)]
    until(lambda: worker.state.busy == SLOTS)
    waiting = Reader(worker, request_of(9, 5))
    worker.cancel(waiting.ticket)
    assert worker.state.queued == 0
    assert waiting.end == Finished("cancelled", 5, 0, 0)
    for reader in running:
        worker.cancel(reader.ticket)
        assert reader.end.reason == "cancelled"


def _cancel_in_prefill(worker: AnyWorker) -> None:
    reading = threading.Event()
    go_on = threading.Event()
    original = programs.prefill

    def held(model, params, slots, call, *sizes):
        positions = call[sum(sizes) :].reshape(4, -1)[-1]  # of the call's tiles
        if CHUNK in positions:
            reading.set()
            assert go_on.wait(PATIENCE)
        return original(model, params, slots, call, *sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "prefill", held)
        reader = Reader(worker, request_of(next(UNREAD), 290))
        assert reading.wait(PATIENCE)
        worker.cancel(reader.ticket)
        go_on.set()
        assert reader.end == Finished("cancelled", 290, 0, 0)


def _cancel_in_decode(worker: AnyWorker) -> None:
    beside = Reader(worker, request_of(3, 5, 290))
    reader = Reader(worker, request_of(2, 5, 290), on_token=lambda r: len(r.events) == 3 and worker.cancel(r.ticket))
    assert reader.end == Finished("cancelled", 5, 0, 3)  # no token after that
    worker.cancel(beside.ticket)
    assert beside.end.reason == "cancelled"


def _cancel_while_finishing(worker: AnyWorker) -> None:
    reader = Reader(worker, request_of(2, 5, 3), on_token=lambda r: len(r.events) == 3 and worker.cancel(r.ticket))
    assert reader.end == Finished("length", 5, 0, 3)


def _cancel_after_the_end(worker: AnyWorker) -> None:
    reader = Reader(worker, request_of(2, 5, 1))
    reader.wait()
    worker.cancel(reader.ticket)
    worker.cancel(reader.ticket)
    worker.cancel(Ticket(10**9))  # there is none
    assert reader.end == Finished("length", 5, 0, 1)


@pytest.mark.parametrize("phase", CANCELLED)
def test_cancellation_frees_the_slot_in_every_phase(worker, alone, phase):
    for _ in range(TIMES):
        CANCELLED[phase](worker)
        until(lambda: worker.state.busy == worker.state.queued == 0)
        until(lambda: not worker._open)
    # All slots work as before.
    readers = [Reader(worker, REQUESTS[0]) for _ in range(SLOTS)]
    assert all(reader.wait() and reader.tokens == alone(REQUESTS[0]) for reader in readers)


def test_cancelling_twice_ends_once(worker):
    reader = Reader(worker, request_of(2, 5, 290))
    assert reader.begun.wait(PATIENCE)
    for _ in range(3):
        worker.cancel(reader.ticket)
    assert reader.end.reason == "cancelled"
    until(lambda: worker.state.busy == 0)
    assert [type(event) for event in reader.events].count(Finished) == 1


def test_a_reader_that_raises_is_cancelled_and_hurts_nobody(worker, alone):
    def raises(_):
        raise RuntimeError("the event loop is closed")

    readers = [Reader(worker, REQUESTS[0]), Reader(worker, request_of(2, 5, 290), on_token=raises)]
    assert readers[0].end.reason == "length"
    assert readers[0].tokens == alone(REQUESTS[0])
    assert readers[1].end.reason == "cancelled"


def test_many_threads_at_once(worker, alone):
    """Requests and cancellations from all sides; each has one end, and those left alone have their bits."""
    results = []

    def client(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(4):
            number = int(rng.integers(len(REQUESTS)))
            reader = submit(worker, REQUESTS[number])
            if rng.random() < 0.4:
                time.sleep(rng.random() * 0.05)
                worker.cancel(reader.ticket)
            results.append((number, reader, reader.end))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(results) == 24
    for number, reader, end in results:
        assert reader.tokens == alone(REQUESTS[number])[: len(reader.tokens)]
        assert end.reason == "cancelled" or len(reader.tokens) == len(alone(REQUESTS[number]))
        assert sum(not isinstance(event, Token) for event in reader.events) == 1


def test_a_full_queue_says_when_to_come_again(worker):
    readers = [Reader(worker, request_of(n, 5, 290)) for n in range(SLOTS)]
    until(lambda: worker.state.busy == SLOTS)
    readers += [Reader(worker, request_of(n, 5, 290)) for n in range(3)]
    before = worker.state
    assert before.queued == 3
    with pytest.raises(QueueFull, match=r"3 requests are already waiting; try again in \d+ s") as raised:
        Reader(worker, request_of(9, 5))
    assert 1 <= raised.value.retry_after <= 60
    assert worker.state.requests == before.requests  # it was not taken
    worker.cancel(readers[-1].ticket)
    readers.append(Reader(worker, request_of(9, 5, 290)))  # there is room at once
    for reader in readers:
        worker.cancel(reader.ticket)
        assert reader.end.reason == "cancelled"


def test_what_cannot_run_is_refused(worker):
    before = worker.state.requests
    with pytest.raises(CapacityError, match="the prompt has 301 tokens"):
        Reader(worker, request_of(1, 301))
    with pytest.raises(RequestError, match="the prompt is empty"):
        Reader(worker, request_of(1, 0))
    with pytest.raises(RequestError, match="temperature"):
        Reader(worker, request_of(1, 5, temperature=-1.0))
    with pytest.raises(RequestError, match="max_tokens"):
        Reader(worker, request_of(1, 5, 0))
    assert worker.state.requests == before


def test_the_state_tells_what_goes_on(worker):
    before = worker.state
    assert (before.slots, before.busy, before.cache_used, before.error) == (SLOTS, 0, 0.0, None)
    reader = Reader(worker, request_of(1, 105, 150))
    assert reader.begun.wait(PATIENCE)
    state = worker.state
    assert state.busy == 1
    places = 128 * SLOTS * -(-MAX_LENGTH // 128)  # whole pages for each slot
    assert 105 / places < state.cache_used <= 255 / places
    assert reader.end.completion_tokens == 150
    after = worker.state
    assert after.requests - before.requests == 1
    assert after.tokens_total - before.tokens_total == 150


def test_an_idle_worker_lives_without_working(worker):
    began, mine, everyone = time.monotonic(), time.thread_time(), time.process_time()
    ages = [worker.state.heartbeat_age]

    def beats() -> bool:
        ages.append(worker.state.heartbeat_age)
        return ages[-1] < ages[-2] and ages[-2] > 0.5  # it sleeps for a second at a time

    until(beats)
    working = time.process_time() - everyone - (time.thread_time() - mine)
    assert working < 0.2 * (time.monotonic() - began)


def _shared(seed: int, *lengths: int) -> list[tuple[int, ...]]:
    """Prompts of growing length, each the beginning of the next."""
    ids = ids_of(seed, max(lengths))
    return [ids[:length] for length in lengths]


def test_the_next_turn_goes_on_where_the_prompt_was_read_to(worker, alone, packs):
    """Bits as alone, though the sliding layers have gone on meanwhile."""
    first, second, third = _shared(41, 140, 230, 280)
    # 12 tokens in the second page are not worth copying it; 102 are, where parts of a chunk are shared.
    for prompt, cached in ((first, 0), (second, 128), (third, 230 if packs else 192)):
        request = Request(prompt, 20, SamplingParams(seed=3, temperature=1.0))
        reader = Reader(worker, request)
        assert reader.end == Finished("length", len(prompt), cached, 20)
        assert reader.tokens == alone(request)


def test_a_prompt_is_shared_with_slots_that_are_busy_and_beside_each_other(worker, alone):
    long = Reader(worker, Request(ids_of(51, 140), 150, SamplingParams(seed=1, temperature=1.0)))
    assert long.begun.wait(PATIENCE)
    others = [Request(ids_of(51, 128) + ids_of(n, 20), 20, SamplingParams(seed=n, temperature=1.0)) for n in (1, 2, 3)]
    readers = [Reader(worker, request) for request in others]
    for reader, request in zip(readers, others, strict=True):
        assert reader.end == Finished("length", 148, 128, 20)
        assert reader.tokens == alone(request)
    long.wait()
    assert long.tokens == alone(Request(ids_of(51, 140), 150, SamplingParams(seed=1, temperature=1.0)))


def test_a_prefix_is_reused_but_never_all_of_a_prompt(worker, alone, packs):
    for prompt, shared, chunks in (
        (ids_of(61, 63), 0, 0),
        (ids_of(61, 100), 63, 0),  # less than a chunk
        (ids_of(61, 64), 63, 0),  # held, but its last token, or its last chunk, must give logits
        (ids_of(61, 65), 64, 64),
        ((*ids_of(61, 63), 1, 2, 3), 63, 0),
        ((*ids_of(61, 15), 1, 2, 3), 0, 0),  # fewer than are worth copying a page
    ):
        cached = shared if packs else chunks
        request = Request(prompt, 5, SamplingParams(seed=1))
        reader = Reader(worker, request)
        assert reader.end.cached_tokens == cached
        assert reader.tokens == alone(request)


def test_a_conversation_outlives_others_as_long_as_there_are_pages(worker, packs):
    first, second = _shared(71, 70, 140)
    Reader(worker, Request(first, 3, SamplingParams(seed=1))).wait()
    for n in range(SLOTS):  # a page each, of three for every slot
        Reader(worker, request_of(710 + n, 70, 3)).wait()
    assert Reader(worker, Request(second, 3, SamplingParams(seed=1))).end.cached_tokens == (70 if packs else 64)
    for n in range(3 * SLOTS):  # three pages each
        Reader(worker, request_of(720 + n, 290, 3)).wait()
    assert Reader(worker, Request(second, 3, SamplingParams(seed=1))).end.cached_tokens == 0
