"""Clients that leave in each phase of a request, and a worker's thread that is killed, with a model and on a socket."""

import ctypes
import socket
import time

import httpx2
import pytest

from gptjax.server.front.remote_worker import RemoteWorker
from gptjax.server.ipc.events import AnyWorker
from gptjax.server.worker import own_engine
from gptjax.server.worker import worker as worker_module
from tests.server.load_material import request
from tests.server.server_material import GPT2, served, wait_for
from tests.shallow import shallow

TIMES = 100
SLOTS, CHUNK = 2, 32


@pytest.fixture(scope="module")
def model():
    return shallow(GPT2, max_length=512, max_batch=SLOTS)


@pytest.fixture(scope="module", params=[False, True], ids=["in this process", "in another"])
def warm(request, model):
    """A server that reads prompts in many parts, and what is asked of it."""
    with served(model, GPT2, chunk=CHUNK, far=request.param) as (server, address):
        yield server, address


def leave(address: str, holds, *, prompt, stream: bool, max_tokens: int) -> None:
    """Asks, waits until `holds()`, and hangs up."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "stream": stream, "ignore_eos": True, "temperature": 0}
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(request(int(port), body))
        deadline = time.monotonic() + 120
        while not holds():
            assert time.monotonic() < deadline, "it did not come"


def free(server, worker: AnyWorker) -> None:
    """All slots are free, and nothing is left of any request."""
    wait_for(lambda: worker.state.busy == worker.state.queued == 0)
    wait_for(lambda: not worker._open)
    wait_for(lambda: not server.server_state.connections and not server.server_state.tasks)


def in_the_queue(worker: AnyWorker, address: str, ask) -> bool:
    body = {"prompt": [[5]] * SLOTS, "max_tokens": 500, "ignore_eos": True, "stream": True}
    with httpx2.stream("POST", f"{address}/v1/completions", json=body):
        wait_for(lambda: worker.state.busy == SLOTS)
        ask(lambda: worker.state.queued == 1, length=3, max_tokens=1)
        wait_for(lambda: worker.state.queued == 0)
        return worker.state.busy == SLOTS


def in_prefill(worker: AnyWorker, address: str, ask) -> bool:
    before, requests = worker.state.tokens_total, worker.state.requests
    # From another process one may hear of a slot only when it is free again; there, the request may not have begun.
    is_far = isinstance(worker, RemoteWorker)
    ask(lambda: worker.state.busy == 1 or (is_far and worker.state.requests > requests), length=480, max_tokens=1)
    wait_for(lambda: worker.state.busy == 0)
    return worker.state.tokens_total == before


def in_decode(worker: AnyWorker, address: str, ask) -> bool:
    before = worker.state.tokens_total
    ask(lambda: worker.state.tokens_total > before, length=3, max_tokens=500)
    wait_for(lambda: worker.state.busy == 0)
    return worker.state.tokens_total < before + 500


def while_finishing(worker: AnyWorker, address: str, ask) -> bool:
    """With the last token, or what follows it, on its way."""
    before = worker.state.tokens_total
    ask(lambda: worker.state.tokens_total >= before + 2, length=3, max_tokens=3)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("phase", [in_the_queue, in_prefill, in_decode, while_finishing])
def test_a_client_that_leaves_frees_its_slot(warm, model, phase):
    server, address = warm
    worker = server.config.app.state.service.worker
    for number in range(TIMES):

        def ask(holds, *, length, max_tokens, number=number):
            # Other tokens each time, so that no prompt is found in a slot.
            leave(address, holds, prompt=[number + 1] * length, stream=number % 2 == 0, max_tokens=max_tokens)

        assert phase(worker, address, ask), f"client {number} left too late"
        free(server, worker)
    answer = httpx2.post(f"{address}/v1/completions", json={"prompt": "The king", "max_tokens": 9, "temperature": 0})
    assert answer.json()["choices"][0]["text"] == model.generate("The king", max_tokens=9, temperature=0).text


def test_a_killed_worker_thread_is_seen_at_once(monkeypatch):
    """It dies when it wakes, as it does every second; the first who asks for /health after that is told."""
    assert worker_module._BEAT <= 1
    monkeypatch.setattr(own_engine, "_LEVELS", own_engine._LEVELS[-1:])  # one program for all kinds of sampling
    small = shallow(GPT2, max_length=96, max_batch=1)
    with served(small, GPT2, chunk=CHUNK) as (server, address):
        thread = server.config.app.state.service.worker._thread
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        wait_for(lambda: not thread.is_alive())
        response = httpx2.get(f"{address}/health")
        assert (response.status_code, response.json()["status"]) == (503, "dead")
        assert httpx2.post(f"{address}/v1/completions", json={"prompt": "A"}).status_code == 503
        wait_for(lambda: server.should_exit or not server.servers[0].is_serving())
    assert server.status == 1
