"""A worker seen from another process: what is sent, what is lost, and what comes back. (All else: test_worker.py.)"""

import contextlib
import dataclasses
import pickle
import socket
import threading
import time

import pytest

from gptjax.checkpoints.checkpoint import open_checkpoint
from gptjax.engine.request import CheckedIds, Request, SamplingParams, check_prompt
from gptjax.errors import RequestError
from gptjax.server.errors import ApiError, bad_request
from gptjax.server.front.remote_worker import RemoteWorker
from gptjax.server.ipc.channel import Channel
from gptjax.server.ipc.events import Failed, Finished, QueueFull, Tokens, Unavailable
from gptjax.server.ipc.messages import Setup, Signal
from gptjax.server.ipc.settings import Limits
from gptjax.server.worker import worker_host
from tests.gguf import made as made_gguf
from tests.oracles import gguf_from_hf, llama_random
from tests.server.fake_worker import FakeWorker, score
from tests.server.server_material import GPT2, GPT_OSS
from tests.server.worker_material import FACTS, PATIENCE, Reader, remote, request_of, until


@pytest.fixture
def channels():
    ends = [Channel(end) for end in socket.socketpair()]
    yield ends
    for each in ends:
        each.close()


@contextlib.contextmanager
def seen(worker, **options):
    with remote(worker, FACTS, **{"max_queue": 8, "score": score} | options) as found:
        found.start()
        yield found


def script(_):
    return [5, 6, [7, 8], *[9] * 500]


def test_messages_come_whole_and_in_order_and_nobody_waits_to_send_them(channels):
    near, far = channels
    sent = [bytes(number % 7) + b"x" * (number * 10_007 % 900_000) for number in range(60)]
    for message in sent:  # 26 MB, which nobody reads yet
        near.send(message)
    for message in sent:
        assert far.receive() == message
    far.send("back")
    assert near.receive() == "back"
    near.send("on")  # the thread that sent the rest has ended, or ends
    assert far.receive() == "on"


def test_many_threads_may_send(channels):
    near, far = channels

    def send(number):
        for count in range(200):
            near.send((number, count, "x" * 5000))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    found = [far.receive()[:2] for _ in range(800)]
    for thread in threads:
        thread.join()
    assert all([i for n, i in found if n == of] == list(range(200)) for of in range(4))


@pytest.mark.parametrize("waiting", [0, 20])
def test_a_process_that_has_gone_sends_nothing_and_takes_everything(channels, waiting):
    near, far = channels
    for _ in range(waiting):
        near.send("x" * 500_000)
    far.close()
    for _ in range(3):
        near.send("x" * 500_000)
    assert near.receive() is None
    assert list(near.messages()) == []


def test_half_a_message_is_none():
    ours, theirs = socket.socketpair()
    near = Channel(theirs)
    ours.sendall((100).to_bytes(8, "little") + b"half")
    ours.close()
    assert near.receive() is None
    near.close()


def test_what_is_sent_is_what_comes():
    error = ApiError(503, "no room", kind="server_error", param="n", code="no_memory", headers={"a": "b"})
    again = pickle.loads(pickle.dumps(error))
    assert (again.status, again.body(), again.headers) == (error.status, error.body(), error.headers)
    ids = check_prompt([5, 6, 7], vocab_size=10, max_length=4)
    request = Request(ids, 3, SamplingParams(seed=1, logit_bias={3: 1.0}))
    found = pickle.loads(pickle.dumps(request))
    assert found == request and isinstance(found.prompt_ids, CheckedIds)
    assert check_prompt(found.prompt_ids, vocab_size=10, max_length=4) is found.prompt_ids
    assert found.prompt_ids.array_T.tolist() == [5, 6, 7]
    with pytest.raises(ValueError, match="read-only"):
        found.prompt_ids.array_T[0] = 1


@pytest.mark.parametrize("name", [GPT2, GPT_OSS, "model.gguf"])
def test_a_checkpoints_text_can_be_sent(tmp_path, name):
    if name == "model.gguf":
        name = gguf_from_hf.write(tmp_path / name, *llama_random.checkpoint(3), metadata=made_gguf.tokenizer())
    checkpoint = open_checkpoint(name, generation_config={"temperature": 0.5})
    found = pickle.loads(pickle.dumps(dataclasses.replace(checkpoint, gguf=None)))
    expected = checkpoint.tokenizer().encode("abba")
    assert expected and found.tokenizer().encode("abba") == expected


def test_requests_that_the_engine_has_not_seen_count(monkeypatch):
    worker = FakeWorker(script, max_length=400)
    entered, go_on = threading.Event(), threading.Event()
    original = worker.submit

    def held(*arguments):
        entered.set()
        assert go_on.wait(PATIENCE)
        return original(*arguments)

    worker.submit = held
    with seen(worker, max_queue=3) as near:
        slots = near.state.slots
        readers = [Reader(near, request_of(1, 5, 4)) for _ in range(slots + 3)]
        assert entered.wait(PATIENCE)
        assert (near.state.queued, near.state.requests) == (slots + 3, slots + 3)
        near.check_room(-1)
        with pytest.raises(QueueFull, match=r"^3 requests are already waiting"):
            Reader(near, request_of(1, 5, 4))
        near.cancel(readers[-1].ticket)
        readers.append(Reader(near, request_of(1, 5, 4)))  # there is room at once
        go_on.set()
        assert all(isinstance(reader.end, Finished) for reader in readers)


def test_tokens_after_a_cancellation_are_not_delivered():
    worker = FakeWorker(lambda _: [5, *[0.01, 6] * 300], max_length=400)
    worker.cancel = lambda ticket: None  # it takes its time
    with seen(worker) as near:
        reader = Reader(near, request_of(1, 5, 9), on_token=lambda r: len(r.events) == 2 and near.cancel(r.ticket))
        assert reader.end == Finished("cancelled", 5, 2, 2)
        assert len(reader.tokens) == 2


def test_tokens_that_come_together_stay_together_and_wake_their_reader_once():
    woken, events = [], []
    with seen(FakeWorker(lambda request: [[5, 6, 7], 8], max_length=400)) as near:

        def deliver(event):
            events.append(event)
            return lambda: woken.append(len(events))

        near.submit(request_of(1, 5, 4, top_logprobs=2), deliver)
        until(lambda: len(events) == 3)
        assert [len(event.tokens) for event in events[:2]] == [3, 1]
        assert [token.token_id for event in events[:2] for token in event.tokens] == [5, 6, 7, 8]
        assert events[0].tokens[0].top == ((5, -0.5), (6, -1.5))
        assert isinstance(events[0], Tokens) and events[2] == Finished("length", 5, 2, 4)
        until(lambda: len(woken) == len(set(woken)) and woken[-1:] == [3])


def test_prompts_are_scored_by_the_engines_process(caplog):
    def scoring(ids, num_top):
        if num_top == 3:
            raise RequestError("not finite")
        if num_top == 4:
            raise bad_request("no", "echo")
        if num_top == 5:
            raise ZeroDivisionError
        return score(ids, num_top)

    with seen(FakeWorker(script, max_length=400), score=scoring) as near:
        assert near.score([5, 6, 7], 2) == score([5, 6, 7], 2)
        with pytest.raises(RequestError, match="not finite"):
            near.score([5], 3)
        with pytest.raises(ApiError, match="no") as raised:
            near.score([5], 4)
        assert raised.value.param == "echo"
        with pytest.raises(ApiError, match="internal server error") as raised:
            near.score([5], 5)
        assert raised.value.status == 500
        assert near.memory_in_use() == 7
    assert "ZeroDivisionError" in caplog.text


def test_the_engines_process_tells_of_its_signals_and_of_what_is_compiled():
    near, far = map(Channel, socket.socketpair())
    worker = FakeWorker(script, max_length=400)
    numbers = []
    with contextlib.closing(near), contextlib.closing(far):
        found = RemoteWorker(near, Setup(FACTS, 8, worker.state, 7, Limits(), {}), on_signal=numbers.append)
        found.start()
        far.send(Signal(15))
        until(lambda: numbers == [15])
        called = []
        host = worker_host.WorkerHost(
            worker,
            far,
            score=score,
            memory_in_use=lambda: 9,
            on_ready=lambda: called.append("ready"),
            on_compiled=lambda: called.append("compiled"),
        )
        host.start()
        assert found.wait_until_compiled()
        assert called == ["ready", "compiled"]
        until(lambda: found.memory_in_use() == 9)


def test_a_request_that_the_worker_fails_to_take_ends(caplog):
    worker = FakeWorker(script, max_length=400)
    worker.refusal = "the worker died: planted"
    with seen(worker) as near:
        assert Reader(near, request_of(1, 5)).end == Failed("the worker died: planted", "died")
        worker.refusal = None
        worker.script = lambda _: 1 / 0
        assert Reader(near, request_of(1, 5)).end.kind == "internal"
        worker.script = script
        assert Reader(near, request_of(1, 5, 3)).end.reason == "length"  # nothing else has changed
    assert "ZeroDivisionError" in caplog.text


def test_streams_go_on_while_a_grammar_compiles_and_end_with_what_is_wrong_with_it():
    compiles = threading.Event()

    def prepare(request):
        if len(request.prompt_ids) == 3:
            assert compiles.wait(PATIENCE)
            raise RequestError("planted")

    with seen(FakeWorker(script, max_length=400), prepare=prepare) as near:
        streaming = Reader(near, request_of(1, 5, 200))
        assert streaming.begun.wait(PATIENCE)
        refused = Reader(near, request_of(2, 3))
        assert streaming.end.reason == "length" and not refused.ended.is_set()
        compiles.set()
        assert refused.end == Failed("planted", "grammar")


def test_when_the_engines_process_is_lost_everything_ends():
    scoring = threading.Event()

    def slow(*_):
        scoring.set()
        time.sleep(0.5)
        return []

    worker = FakeWorker(lambda _: [0.05, 5] * 400, max_length=400)
    failed = []

    def ask():
        with pytest.raises(ApiError) as raised:
            near.score([5, 6], 1)
        failed.append(raised.value)

    with seen(worker, score=slow) as near:
        reader = Reader(near, request_of(1, 5, 300))
        asking = threading.Thread(target=ask)
        asking.start()
        assert reader.begun.wait(PATIENCE) and scoring.wait(PATIENCE)
        near._channel.close()
        assert reader.end == Failed("the worker died: the engine's process has ended", "died")
        asking.join(PATIENCE)
        assert (failed[0].status, failed[0].code) == (503, "died")
        state = near.state
        assert (state.alive, state.ready, state.error) == (False, False, "the engine's process has ended")
        with pytest.raises(Unavailable, match="died: the engine's process has ended"):
            Reader(near, request_of(1, 5))
        with pytest.raises(ApiError):
            near.score([5], 1)
        with pytest.raises(Unavailable):
            near.wait_until_ready()
        assert near.wait_until_compiled() in (True, False)
        began = time.monotonic()
        near.cancel(reader.ticket)
        near.drain(60)
        near.stop()
        assert time.monotonic() - began < 5
    until(lambda: not worker.open)  # there is nobody to read it


@pytest.mark.parametrize(("age", "seconds", "hangs"), [(59.0, 0.5, False), (61.0, 60, True)])
def test_a_drain_does_not_wait_for_a_worker_that_hangs(age, seconds, hangs):
    worker = FakeWorker(lambda _: [0.05, 5] * 400, max_length=400)
    worker.heartbeat_age = age
    with seen(worker) as near:
        reader = Reader(near, request_of(1, 5, 300))
        assert reader.begun.wait(PATIENCE)
        began = time.monotonic()
        near.drain(seconds)
        near.stop()
        assert (time.monotonic() - began < seconds) == hangs
        assert (reader.end == Failed("the worker died: its device hangs", "died")) == hangs
    until(lambda: not worker.open)


def test_a_process_that_is_silent_has_no_new_heartbeat(monkeypatch):
    monkeypatch.setattr(worker_host, "_BEAT", 3600)
    with seen(FakeWorker(script, max_length=400)) as near:
        time.sleep(0.3)  # what is sent once it is ready
        before = near.state.heartbeat_age
        time.sleep(0.3)
        assert near.state.heartbeat_age >= before + 0.3


def test_what_comes_together_with_the_setup_is_taken():
    near, far = map(Channel, socket.socketpair())
    worker = FakeWorker(script, max_length=400)
    numbers = []
    far.send(Setup(FACTS, 8, worker.state, 7, Limits(), {}))
    far.send(Signal(15))
    time.sleep(0.1)
    with contextlib.closing(near):
        found = RemoteWorker(near, near.receive(), on_signal=numbers.append)
        found.start()
        until(lambda: numbers == [15])
        far.close()
        until(lambda: found.state.error == "the engine's process has ended")
