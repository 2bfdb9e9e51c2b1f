"""The worker: many requests on one engine, each with the bits that it gets alone, and an end for each of them."""

import threading
import time

import jax
import numpy as np
import pytest

import gptjax
from gptjax.engine import steps
from gptjax.engine.engine import Engine
from gptjax.engine.generate import generate
from gptjax.engine.request import Request, SamplingParams
from gptjax.errors import CapacityError, RequestError
from gptjax.server.worker import Failed, Finished, QueueFull, Ticket, Token, Unavailable, Worker

SLOTS, MAX_LENGTH, CHUNK = 4, 300, 64
PATIENCE = 120  # seconds until a test gives up
TIMES = 20  # that each cancellation is tried


@pytest.fixture(scope="module", params=["gpt2-tales", "gpt-oss-tales"])
def model(request):
    """A demo; the second has rings of 128 places."""
    return gptjax.load(request.param, dtype="float32", max_length=MAX_LENGTH, max_batch=SLOTS)


@pytest.fixture(scope="module")
def started(model):
    """A worker that is ready, for all tests that leave it as it was."""
    worker = Worker(model, max_queue=3, chunk=CHUNK)
    worker.start()
    worker.wait_until_ready()
    yield worker
    worker.stop()


@pytest.fixture
def worker(started):
    """The same, all of whose slots are free again when the test is over."""
    assert started.state.ready
    yield started
    _until(lambda: started.state.busy == started.state.queued == 0)
    assert started.state.alive


@pytest.fixture
def fresh(lm):
    """Makes workers that a test may bring to their ends."""
    made = []
    small = gptjax.LanguageModel(
        lm.model, lm.params, tokenizer=lm.tokenizer, defaults=lm.defaults, max_length=96, max_batch=2
    )

    def make(**options) -> Worker:
        made.append(Worker(small, **{"max_queue": 8, "chunk": 32} | options))
        made[-1].start()
        return made[-1]

    yield make
    for worker in made:
        worker.stop()


class Reader:
    """What a client sees of one request."""

    def __init__(self, worker: Worker, request: Request, on_token=None):
        self.events = []
        self.ended = threading.Event()
        self.begun = threading.Event()  # the first token is there
        self._on_token = on_token
        self.worker = worker
        self.threads = set()
        self.ticket = worker.submit(request, self._deliver)

    def _deliver(self, event) -> None:
        self.threads.add(threading.current_thread().name)
        self.events.append(event)
        if isinstance(event, Token):
            self.begun.set()
            if self._on_token is not None:
                self._on_token(self)
        else:
            self.ended.set()

    def wait(self) -> list:
        """All events, when the last has come."""
        assert self.ended.wait(PATIENCE), "the request has no end"
        return self.events

    @property
    def tokens(self) -> list[tuple]:
        return [(token.token_id, token.logprob, token.top) for token in self.events if isinstance(token, Token)]

    @property
    def end(self) -> Finished | Failed:
        return self.wait()[-1]


def _until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.002)


def _ids(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 8000, length).tolist())


def _request(number: int, length: int, max_tokens: int = 12, stop_ids=(), **params) -> Request:
    return Request(_ids(number, length), max_tokens, SamplingParams(**{"seed": number} | params), tuple(stop_ids))


REQUESTS = [  # all kinds of sampling, one chunk and several, short and long outputs
    _request(1, 5, 30),
    _request(2, 150, 40, temperature=1.0),
    _request(3, 1, 7, temperature=0.7, top_k=9, top_p=0.9),
    _request(4, 280, 40, temperature=1.3, min_p=0.02),  # fills its row
    _request(5, 64, 3, repetition_penalty=1.4, presence_penalty=0.5),
    _request(6, 65, 20, temperature=2.0, logit_bias={7: 5.0, 3: -100.0}),
    _request(7, 300, top_logprobs=2),  # room for one token
    _request(8, 200, 60, temperature=1.0),
    _request(9, 128, 25, top_logprobs=5),
    _request(10, 33, 1),
]


def _alone(model, request: Request) -> list[tuple]:
    """Tokens, log-probabilities and alternatives from an engine that has nothing else to do."""
    engine = Engine(model.model, model.params, batch=SLOTS, max_length=MAX_LENGTH, chunk=CHUNK)
    chunks = [chunk for _, chunk in generate(engine, [request], None)]
    return [(chunk.token_id, chunk.logprob, tuple(chunk.top_logprobs.items())) for chunk in chunks]


@pytest.fixture(scope="module")
def alone(model):
    """What each of REQUESTS gives by itself."""
    return [_alone(model, request) for request in REQUESTS]


def _submit(worker: Worker, request: Request) -> Reader:
    """Submits, and again as long as the queue is full."""
    while True:
        try:
            return Reader(worker, request)
        except QueueFull:
            time.sleep(0.005)


def test_requests_that_come_and_go_get_the_bits_they_get_alone(worker, model, alone):
    for order in (range(len(REQUESTS)), np.random.default_rng(0).permutation(len(REQUESTS)).tolist()):
        readers = {number: _submit(worker, REQUESTS[number]) for number in order}
        for number, reader in readers.items():
            request, end = REQUESTS[number], reader.end
            assert reader.tokens == alone[number], number
            assert end.reason == "length"
            assert end.prompt_tokens == len(request.prompt_ids)
            assert end.completion_tokens == len(reader.tokens) == request.room(MAX_LENGTH)
            assert [type(event) for event in reader.events] == [Token] * len(reader.tokens) + [Finished]
            assert reader.threads == {"gptjax-worker"}


def test_chunks_of_the_usual_size_give_what_the_model_itself_gives(lm):
    small = gptjax.LanguageModel(
        lm.model, lm.params, tokenizer=lm.tokenizer, defaults=lm.defaults, max_length=128, max_batch=SLOTS
    )
    expected = small.generate("Once upon a time", max_tokens=20)
    worker = Worker(small)
    worker.start()
    request = Request(tuple(lm.tokenizer.encode("Once upon a time")), 20, SamplingParams(seed=0), lm.eos_ids)
    readers = [_submit(worker, each) for each in (request, _request(1, 100), request)]
    for reader in (readers[0], readers[2]):
        reader.wait()
        assert tuple(token for token, _, _ in reader.tokens) == expected.token_ids
        assert tuple(logprob for _, logprob, _ in reader.tokens) == expected.logprobs
    worker.stop()


def test_a_stop_id_is_delivered_and_ends_the_request(worker, alone):
    tokens = [token for token, _, _ in alone[0]]
    at = next(i for i in range(3, len(tokens)) if tokens[i] not in tokens[:i])
    reader = Reader(worker, _request(1, 5, 30, stop_ids=[tokens[at]]))
    assert reader.end == Finished("stop", 5, 0, at + 1)
    assert reader.tokens == alone[0][: at + 1]


def test_a_request_without_a_seed_gets_one(worker):
    readers = [Reader(worker, _request(1, 5, 20, temperature=1.5, seed=None)) for _ in range(2)]
    assert readers[0].wait()[:-1] != readers[1].wait()[:-1]


def test_running_streams_wait_for_one_chunk_at_most(worker, monkeypatch):
    """Between two chunks of a prompt there is always a step of those that run."""
    happened = []
    for name in ("prefill_chunk", "advance"):
        original = getattr(steps, name)
        monkeypatch.setattr(steps, name, lambda *a, name=name, f=original: (happened.append(name), f(*a))[1])
    running = Reader(worker, _request(1, 5, 200))
    assert running.begun.wait(PATIENCE)
    happened.clear()
    others = [Reader(worker, _request(n, 290, 2)) for n in (21, 22)]
    for other in others:
        other.wait()
    assert not running.ended.is_set()
    worker.cancel(running.ticket)
    between = "".join(name[0] for name in happened)
    assert between.count("p") == 2 * 5
    assert "pp" not in between


def test_a_prompt_by_itself_is_read_without_waiting_for_steps(worker):
    reader = Reader(worker, _request(31, 290, 3))
    assert reader.end == Finished("length", 290, 0, 3)


CANCELLED = {
    "queued": lambda worker: _cancel_queued(worker),
    "prefill": lambda worker: _cancel_in_prefill(worker),
    "decode": lambda worker: _cancel_in_decode(worker),
    "finishing": lambda worker: _cancel_while_finishing(worker),
    "ended": lambda worker: _cancel_after_the_end(worker),
}


def _cancel_queued(worker: Worker) -> None:
    running = [Reader(worker, _request(n, 5, 290)) for n in range(SLOTS)]
    _until(lambda: worker.state.busy == SLOTS)
    waiting = Reader(worker, _request(9, 5))
    worker.cancel(waiting.ticket)
    assert worker.state.queued == 0
    assert waiting.end == Finished("cancelled", 5, 0, 0)
    for reader in running:
        worker.cancel(reader.ticket)
        assert reader.end.reason == "cancelled"


def _cancel_in_prefill(worker: Worker) -> None:
    reading = threading.Event()
    go_on = threading.Event()
    original = steps.prefill_chunk

    def held(*arguments):
        if int(arguments[3][0]) == CHUNK:  # its second chunk
            reading.set()
            assert go_on.wait(PATIENCE)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "prefill_chunk", held)
        reader = Reader(worker, _request(int(time.monotonic_ns() % 1000) + 100, 290))
        assert reading.wait(PATIENCE)
        worker.cancel(reader.ticket)
        go_on.set()
        assert reader.end == Finished("cancelled", 290, 0, 0)


def _cancel_in_decode(worker: Worker) -> None:
    beside = Reader(worker, _request(3, 5, 290))
    reader = Reader(worker, _request(2, 5, 290), on_token=lambda r: len(r.events) == 3 and worker.cancel(r.ticket))
    assert reader.end == Finished("cancelled", 5, 0, 3)  # no token after that
    worker.cancel(beside.ticket)
    assert beside.end.reason == "cancelled"


def _cancel_while_finishing(worker: Worker) -> None:
    reader = Reader(worker, _request(2, 5, 3), on_token=lambda r: len(r.events) == 3 and worker.cancel(r.ticket))
    assert reader.end == Finished("length", 5, 0, 3)


def _cancel_after_the_end(worker: Worker) -> None:
    reader = Reader(worker, _request(2, 5, 1))
    reader.wait()
    worker.cancel(reader.ticket)
    worker.cancel(reader.ticket)
    worker.cancel(Ticket(10**9))  # there is none
    assert reader.end == Finished("length", 5, 0, 1)


@pytest.mark.parametrize("phase", CANCELLED)
def test_cancellation_frees_the_slot_in_every_phase(worker, alone, phase):
    for _ in range(TIMES):
        CANCELLED[phase](worker)
        _until(lambda: worker.state.busy == worker.state.queued == 0)
        _until(lambda: not worker._open)
    # All slots work as before.
    readers = [Reader(worker, REQUESTS[0]) for _ in range(SLOTS)]
    assert all(reader.wait() and reader.tokens == alone[0] for reader in readers)


def test_cancelling_twice_ends_once(worker):
    reader = Reader(worker, _request(2, 5, 290))
    assert reader.begun.wait(PATIENCE)
    for _ in range(3):
        worker.cancel(reader.ticket)
    assert reader.end.reason == "cancelled"
    _until(lambda: worker.state.busy == 0)
    assert [type(event) for event in reader.events].count(Finished) == 1


def test_a_reader_that_raises_is_cancelled_and_hurts_nobody(worker, alone):
    def raises(_):
        raise RuntimeError("the event loop is closed")

    readers = [Reader(worker, REQUESTS[0]), Reader(worker, _request(2, 5, 290), on_token=raises)]
    assert readers[0].end.reason == "length"
    assert readers[0].tokens == alone[0]
    assert readers[1].end.reason == "cancelled"


def test_many_threads_at_once(worker, alone):
    """Requests and cancellations from all sides; each has one end, and those left alone have their bits."""
    results = []

    def client(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(4):
            number = int(rng.integers(len(REQUESTS)))
            reader = _submit(worker, REQUESTS[number])
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
        assert reader.tokens == alone[number][: len(reader.tokens)]
        assert end.reason == "cancelled" or len(reader.tokens) == len(alone[number])
        assert sum(not isinstance(event, Token) for event in reader.events) == 1


def test_a_full_queue_says_when_to_come_again(worker):
    readers = [Reader(worker, _request(n, 5, 290)) for n in range(SLOTS)]
    _until(lambda: worker.state.busy == SLOTS)
    readers += [Reader(worker, _request(n, 5, 290)) for n in range(3)]
    before = worker.state
    assert before.queued == 3
    with pytest.raises(QueueFull, match=r"3 requests are waiting already; try again in \d+ s") as raised:
        Reader(worker, _request(9, 5))
    assert 1 <= raised.value.retry_after <= 60
    assert worker.state.requests == before.requests  # it was not taken
    worker.cancel(readers[-1].ticket)
    readers.append(Reader(worker, _request(9, 5, 290)))  # there is room at once
    for reader in readers:
        worker.cancel(reader.ticket)
        assert reader.end.reason == "cancelled"


def test_what_cannot_run_is_refused(worker):
    before = worker.state.requests
    with pytest.raises(CapacityError, match="the prompt has 301 tokens"):
        Reader(worker, _request(1, 301))
    with pytest.raises(RequestError, match="the prompt is empty"):
        Reader(worker, _request(1, 0))
    with pytest.raises(RequestError, match="temperature"):
        Reader(worker, _request(1, 5, temperature=-1.0))
    with pytest.raises(RequestError, match="max_tokens"):
        Reader(worker, _request(1, 5, 0))
    assert worker.state.requests == before


def test_the_state_tells_what_goes_on(worker):
    before = worker.state
    assert (before.slots, before.busy, before.cache_used, before.error) == (SLOTS, 0, 0.0, None)
    reader = Reader(worker, _request(1, 105, 150))
    assert reader.begun.wait(PATIENCE)
    state = worker.state
    assert state.busy == 1
    assert 105 / (SLOTS * MAX_LENGTH) < state.cache_used <= 255 / (SLOTS * MAX_LENGTH)
    assert reader.end.completion_tokens == 150
    after = worker.state
    assert after.requests - before.requests == 1
    assert after.tokens_total - before.tokens_total == 150


def test_an_idle_worker_lives_without_working(worker):
    time.sleep(0.1)
    before = time.thread_time(), time.process_time()
    ages = []
    for _ in range(30):
        time.sleep(0.1)
        ages.append(worker.state.heartbeat_age)
    mine, all_threads = time.thread_time() - before[0], time.process_time() - before[1]
    assert max(ages) < 2
    assert max(ages) > 0.5  # it sleeps for a second at a time
    assert all_threads - mine < 0.15  # of three seconds


def _shared(seed: int, *lengths: int) -> list[tuple[int, ...]]:
    """Prompts of growing length, each the beginning of the next."""
    ids = _ids(seed, max(lengths))
    return [ids[:length] for length in lengths]


def test_the_next_turn_goes_on_where_the_prompt_was_read_to(worker, model):
    """Bits as alone, though the sliding layers' rings have gone on meanwhile."""
    first, second, third = _shared(41, 140, 230, 280)
    for prompt, cached in ((first, 0), (second, 128), (third, 192)):
        request = Request(prompt, 20, SamplingParams(seed=3, temperature=1.0))
        reader = Reader(worker, request)
        assert reader.end == Finished("length", len(prompt), cached, 20)
        assert reader.tokens == _alone(model, request)


def test_a_prompt_is_shared_with_slots_that_are_busy_and_beside_each_other(worker, model):
    long = Reader(worker, Request(_ids(51, 140), 150, SamplingParams(seed=1, temperature=1.0)))
    assert long.begun.wait(PATIENCE)
    others = [Request(_ids(51, 128) + _ids(n, 20), 20, SamplingParams(seed=n, temperature=1.0)) for n in (1, 2, 3)]
    readers = [Reader(worker, request) for request in others]
    for reader, request in zip(readers, others, strict=True):
        assert reader.end == Finished("length", 148, 128, 20)
        assert reader.tokens == _alone(model, request)
    long.wait()
    assert long.tokens == _alone(model, Request(_ids(51, 140), 150, SamplingParams(seed=1, temperature=1.0)))


def test_a_prefix_is_reused_in_whole_chunks_and_never_for_all_of_a_prompt(worker, model):
    for prompt, cached in (
        (_ids(61, 63), 0),  # less than a chunk
        (_ids(61, 100), 0),
        (_ids(61, 64), 0),  # held, but its last chunk must give logits
        (_ids(61, 65), 64),
        ((*_ids(61, 63), 1, 2, 3), 0),  # another token in the chunk
    ):
        request = Request(prompt, 5, SamplingParams(seed=1))
        reader = Reader(worker, request)
        assert reader.end.cached_tokens == cached
        assert reader.tokens == _alone(model, request)


def test_a_conversation_outlives_as_many_others_as_there_are_free_slots(worker, model):
    first, second = _shared(71, 70, 140)
    Reader(worker, Request(first, 3, SamplingParams(seed=1))).wait()
    for n in range(SLOTS - 1):
        Reader(worker, _request(710 + n, 70, 3)).wait()
    assert Reader(worker, Request(second, 3, SamplingParams(seed=1))).end.cached_tokens == 64
    for n in range(SLOTS):
        Reader(worker, _request(720 + n, 70, 3)).wait()
    assert Reader(worker, Request(second, 3, SamplingParams(seed=1))).end.cached_tokens == 0


def test_nothing_is_compiled_after_warm_up(model):
    # Another number of slots and another length, so that nothing is there from before.
    small = gptjax.LanguageModel(
        model.model, model.params, tokenizer=model.tokenizer, defaults=model.defaults, max_length=280, max_batch=3
    )
    worker = Worker(small, chunk=CHUNK)
    worker.start()
    worker.wait_until_ready()
    compiled = []
    listener = lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        readers = [Reader(worker, request) for request in REQUESTS if len(request.prompt_ids) <= 280]
        readers += [Reader(worker, _request(2, 270, 3))]
        worker.cancel(readers[3].ticket)
        assert all(isinstance(reader.end, Finished) for reader in readers)
        cached = [Reader(worker, Request(_ids(1, n), 3, SamplingParams())).end.cached_tokens for n in (70, 200)]
        assert cached == [0, 64]
        assert compiled == []
        jax.jit(lambda x: x * 3.5)(np.ones(3))  # the listener does hear a compilation
        assert compiled != []
    finally:
        jax.monitoring.clear_event_listeners()
        worker.stop()


def test_several_steps_a_dispatch_give_the_same_bits(model, alone):
    """As on a GPU, where the device is asked for eight steps at a time, and works ahead of what was cancelled."""
    worker = Worker(model, chunk=CHUNK, steps_per_dispatch=8)
    worker.start()
    left = Reader(worker, _request(2, 5, 290), on_token=lambda r: len(r.events) == 5 and worker.cancel(r.ticket))
    readers = [_submit(worker, request) for request in REQUESTS]
    for number, reader in enumerate(readers):
        assert reader.end.reason == "length"
        assert reader.tokens == alone[number], number
    assert left.end.completion_tokens == 5
    worker.stop()


def test_draining_waits_for_open_requests(fresh):
    worker = fresh()
    readers = [Reader(worker, _request(n, 40, 20)) for n in range(5)]  # two slots: three of them wait
    worker.drain(PATIENCE)
    assert all(reader.ended.is_set() for reader in readers)
    assert all(reader.end == Finished("length", 40, 0, 20) for reader in readers)
    with pytest.raises(Unavailable, match="shutting down"):
        Reader(worker, _request(1, 5))
    state = worker.state
    assert state.alive
    assert not state.ready
    assert (state.busy, state.queued) == (0, 0)


def test_what_is_open_when_the_time_is_over_fails(fresh):
    worker = fresh()
    worker.wait_until_ready()
    hold = threading.Event()
    running = Reader(worker, _request(1, 40, 50), on_token=lambda _: hold.wait(0.1))
    others = [Reader(worker, _request(n, 40, 50)) for n in range(4)]
    assert running.begun.wait(PATIENCE)
    worker.drain(0.2)
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
    readers = [Reader(worker, _request(n, 40, 50), on_token=lambda _: time.sleep(0.02)) for n in range(5)]
    assert readers[0].begun.wait(PATIENCE)
    worker.stop()
    assert all(reader.end == Failed("the server was stopped", "stopped") for reader in readers)
    state = worker.state
    assert (state.alive, state.ready, state.error, state.busy, state.queued) == (False, False, None, 0, 0)
    with pytest.raises(Unavailable, match="stopped"):
        Reader(worker, _request(1, 5))
    worker.cancel(readers[0].ticket)
    worker.stop()
    worker.drain(1)


def test_a_worker_that_dies_fails_all_and_shows_it(fresh, monkeypatch):
    worker = fresh()
    worker.wait_until_ready()
    running = [Reader(worker, _request(n, 5, 80), on_token=lambda _: time.sleep(0.01)) for n in range(2)]
    assert all(reader.begun.wait(PATIENCE) for reader in running)
    waiting = [Reader(worker, _request(n, 5, 50)) for n in range(3)]

    def broken(*_):
        raise FloatingPointError("a planted fault")

    monkeypatch.setattr(steps, "sample", broken)
    for reader in (*running, *waiting):
        assert reader.end.kind == "died"
        assert "FloatingPointError: a planted fault" in reader.end.message
    worker._thread.join(PATIENCE)
    state = worker.state
    assert (state.alive, state.ready, state.busy, state.queued) == (False, False, 0, 0)
    assert state.error == "FloatingPointError: a planted fault"
    with pytest.raises(Unavailable, match="died: FloatingPointError: a planted fault"):
        Reader(worker, _request(1, 5))
    for call in (worker.stop, lambda: worker.drain(1), lambda: worker.cancel(running[0].ticket)):
        call()  # nothing hangs


def test_a_worker_that_dies_while_it_compiles_says_so(fresh, monkeypatch):
    def broken(*_):
        raise MemoryError("planted")

    monkeypatch.setattr(steps, "prefill_chunk", broken)
    worker = fresh()
    with pytest.raises(Unavailable, match=r"CapacityError: .*memory"):
        worker.wait_until_ready()
    assert not worker.state.alive


def test_requests_may_come_before_all_is_compiled(fresh):
    worker = fresh()
    reader = Reader(worker, _request(1, 5, 3))
    assert reader.end == Finished("length", 5, 0, 3)
    assert worker.state.ready


def test_a_worker_that_was_not_started_takes_nothing(lm):
    small = gptjax.LanguageModel(
        lm.model, lm.params, tokenizer=lm.tokenizer, defaults=lm.defaults, max_length=96, max_batch=2
    )
    worker = Worker(small)
    with pytest.raises(Unavailable, match="not started"):
        Reader(worker, _request(1, 5))
    assert not worker.state.alive
    worker.stop()


def test_logits_that_are_not_finite_end_their_request_only(lm):
    poisoned = {**lm.params}
    poisoned["position_embedding"] = poisoned["position_embedding"].at[45].set(np.nan)
    broken = gptjax.LanguageModel(
        lm.model, poisoned, tokenizer=lm.tokenizer, defaults=lm.defaults, max_length=96, max_batch=2
    )
    worker = Worker(broken, chunk=32)
    worker.start()
    bad, good = Reader(worker, _request(1, 40, 20)), Reader(worker, _request(2, 5, 30))
    assert bad.end.kind == "not_finite"
    assert "not finite" in bad.end.message
    assert len(bad.tokens) == 6  # of positions 40 to 45
    assert good.end == Finished("length", 5, 0, 30)
    again = Reader(worker, _request(2, 5, 30))
    assert again.end == good.end
    assert again.tokens == good.tokens
    worker.stop()
