"""`gptjax serve` ends on a signal at any moment: soon, with exit status 0, and every client gets an answer."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.fuzz import rounds
from tests.server.load_material import request
from tests.server.server_material import GPT2, wait_for
from tests.thinned import thinned, thorough

# The command with a worker that says " a" for ever to every request, as fast as it can.
FAKE = """
import dataclasses, itertools, sys
from tests.server.fake_worker import FakeWorker
from tests.server.server_material import fail_all, ids
from gptjax.cli import main
from gptjax.server.worker import front_process
from gptjax.server.worker import hosting

class Worker(FakeWorker):
    def drain(self, seconds):
        fail_all(self)

    def stop(self):
        fail_all(self)
        self.alive = False

worker = Worker(lambda _: itertools.cycle([ids(" a")[0], 0.0001]), max_length=1 << 30, room=1 << 60)
hosting.Worker = lambda *_, **__: worker
facts_of = hosting.facts_of
hosting.facts_of = lambda *_, **__: dataclasses.replace(facts_of(*_, **__), max_length=1 << 30)
front = "import sys; from gptjax.server.front import __main__ as front, serving; serving._TO_END_STREAMS = 1.0; "
front_process.COMMAND = (sys.executable, "-c", front + "front.leave(front.main(int(sys.argv[1])))")
"""
RUN = "sys.exit(main())"
REAL = "import sys; from gptjax.cli import main; "
OPTIONS = ("--send-timeout", "600", "--drain")


class Served:
    """A server in a process of its own."""

    def __init__(self, process, log):
        self.process = process
        self._log = log

    @property
    def log(self):
        return self._log.read_text()

    def catches_signals(self):
        """Whether SIGTERM has its handler."""
        caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{self.process.pid}/status").read_text(), re.MULTILINE)
        return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)

    def listening(self):
        """Its address, as soon as it listens."""
        wait_for(lambda: "running on" in self.log)
        return re.search(r"running on (http://\S+)", self.log)[1]

    @property
    def front(self):
        """The process that speaks HTTP, once it is there."""
        wait_for(lambda: psutil.Process(self.process.pid).children())
        (found,) = psutil.Process(self.process.pid).children()
        return found

    def end(self, *signals, status=0, group=False):
        """Sends signals, to both processes as a terminal does or to the one that was started; checks how they end."""
        fronts = psutil.Process(self.process.pid).children() if self.process.poll() is None else []
        for number in signals:
            os.killpg(self.process.pid, number) if group else self.process.send_signal(number)
            time.sleep(0.2)
        assert self.process.wait(60) == status, self.log
        assert psutil.wait_procs(fronts, 10)[1] == []
        assert "Traceback" not in self.log
        assert "FATAL" not in self.log
        assert "Exception" not in self.log


@pytest.fixture
def start(tmp_path):
    """Starts a server."""
    with contextlib.ExitStack() as stack:

        def begin(code=REAL, *options):
            argv = ["serve", "-m", GPT2, "--max-length", "128", "--max-batch", "2", "--port", "0", *options]
            path = os.pathsep.join(map(str, sys.path))
            # Nothing is compiled from before.
            variables = os.environ | {"PYTHONPATH": path, "GPTJAX_CACHE_DIR": str(tmp_path / "programs")}
            log = tmp_path / "log"
            argv = [sys.executable, "-c", code + RUN, *argv]
            with log.open("w") as file:
                process = subprocess.Popen(argv, stderr=file, env=variables, start_new_session=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return Served(process, log)

        yield begin


@pytest.mark.parametrize("number", thinned([signal.SIGTERM, signal.SIGINT], signal.SIGTERM))
def test_a_server_that_compiles_ends_at_once(start, number):
    began = time.monotonic()
    server = start()
    server.listening()
    starting = time.monotonic() - began
    time.sleep(0.5)
    began = time.monotonic()
    server.end(number)
    # To start takes a fraction of what compiling takes, on a slow machine as on a fast one.
    assert time.monotonic() - began < max(3, starting)


def test_a_request_that_waits_for_the_compiler_is_answered(start):
    server = start(REAL, "--drain", "0.3")
    address = server.listening()
    answers = []
    body = {"prompt": "a", "max_tokens": 3}
    ask = threading.Thread(target=lambda: answers.append(httpx2.post(f"{address}/v1/completions", json=body)))
    ask.start()
    wait_for(lambda: httpx2.get(f"{address}/health").json()["queued"])
    server.end(signal.SIGTERM)
    ask.join()
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["code"] == "drained"


@pytest.mark.parametrize("signals", [thorough([signal.SIGTERM] * 2), [signal.SIGINT] * 2])
def test_streams_that_nobody_reads_are_cut(start, signals):
    # A second Ctrl-C does not wait for --drain.
    server = start(FAKE, *OPTIONS, "0" if signals[0] == signal.SIGTERM else "600")
    address = server.listening()
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(socket.socket())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(address.rsplit(":", 1)[1])))
        fields = {"prompt": "a", "stream": True, "max_tokens": 1 << 30, "logprobs": 20}
        client.sendall(request(1, fields, last=False))
        wait_for(lambda: stands_still(address))
        server.end(*signals)


def stands_still(address):
    """Whether all buffers are full, so that no more tokens are taken."""
    counts = []
    for _ in range(4):  # a busy machine may pause for longer than it takes to look twice
        metrics = httpx2.get(f"{address}/metrics").text
        counts.append(float(re.search(r"^worker_tokens_generated_total (.*)", metrics, re.MULTILINE)[1]))
        time.sleep(0.2)
    return counts[0] == counts[-1] > 0


@pytest.mark.thorough
def test_a_stream_that_is_read_ends_in_order(start):
    server = start(FAKE, *OPTIONS, "0.3")
    body = {"prompt": "a", "stream": True, "max_tokens": 1 << 30}
    with httpx2.stream("POST", f"{server.listening()}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        *_, error, done = filter(None, lines)
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "drained"
    assert done == "data: [DONE]"
    server.end()


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(rounds(1)))
def test_any_moment_is_a_good_one(start, seed):
    """Once the handlers are there, which Python's own start and `gptjax.cli` come before."""
    chance = random.Random(seed)
    server = start()
    wait_for(server.catches_signals)
    time.sleep(chance.uniform(0.0, 4.0))
    server.end(chance.choice([signal.SIGTERM, signal.SIGINT]), group=chance.random() < 0.5)


def reading(lines):
    """What is left of a stream."""
    return [json.loads(line[6:]) if line != "data: [DONE]" else None for line in filter(None, lines)]


@pytest.mark.thorough
def test_ctrl_c_which_both_processes_get_counts_once(start):
    server = start(FAKE, *OPTIONS, "0.3")
    body = {"prompt": "a", "stream": True, "max_tokens": 1 << 30}
    with httpx2.stream("POST", f"{server.listening()}/v1/completions", json=body, timeout=60) as response:
        next(lines := response.iter_lines())
        os.killpg(server.process.pid, signal.SIGINT)
        *_, error, done = reading(lines)
    assert (error["error"]["code"], done) == ("drained", None)
    server.end()


@pytest.mark.thorough
def test_a_signal_to_the_process_that_speaks_http_ends_both(start):
    server = start(FAKE, *OPTIONS, "0.3")
    server.listening()
    front = server.front
    front.send_signal(signal.SIGTERM)
    server.end()
    assert not front.is_running()


def test_if_the_engines_process_dies_the_other_says_so_and_ends(start):
    server = start(FAKE, *OPTIONS, "600")
    address, front = server.listening(), server.front
    body = {"prompt": "a", "stream": True, "max_tokens": 1 << 30}
    with httpx2.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
        next(lines := response.iter_lines())
        server.process.kill()
        *_, error, done = reading(lines)
    assert (error["error"]["code"], done) == ("died", None)
    answer = httpx2.get(f"{address}/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "dead")
    assert httpx2.post(f"{address}/v1/completions", json=body).json()["error"]["code"] == "unavailable"
    assert psutil.wait_procs([front], 20)[1] == []
    assert "the worker died: the engine's process has ended" in server.log
    server.end(status=-signal.SIGKILL)


def test_if_the_process_that_speaks_http_dies_the_other_says_so_and_ends(start):
    server = start(FAKE)
    server.listening()
    server.front.kill()
    server.end(status=1)
    assert "the process that speaks HTTP was ended by SIGKILL" in server.log


def test_a_worker_that_dies_ends_both(start):
    server = start(FAKE + "worker.script = lambda _: setattr(worker, 'error', 'planted') or []; ")
    address = server.listening()
    httpx2.post(f"{address}/v1/completions", json={"prompt": "a"}, timeout=60)
    wait_for(lambda: httpx2.get(f"{address}/health").json()["status"] == "dead")
    server.end(status=1)
    assert "the worker died: planted" in server.log


@pytest.mark.thorough
def test_a_process_that_hangs_sends_no_heartbeat(start):
    server = start(FAKE)
    address = server.listening()
    server.process.send_signal(signal.SIGSTOP)
    try:
        wait_for(lambda: age(address) > 1.0)
        assert httpx2.post(f"{address}/v1/completions", json={"prompt": "a", "max_tokens": 0}).status_code == 400
    finally:
        server.process.send_signal(signal.SIGCONT)
    wait_for(lambda: age(address) < 1.0)
    server.end(signal.SIGTERM)


def age(address):
    """Seconds since the last heartbeat."""
    metrics = httpx2.get(f"{address}/metrics").text
    return float(re.search(r"^gptjax_heartbeat_age_seconds (.*)", metrics, re.MULTILINE)[1])


@pytest.mark.parametrize("number", thinned([signal.SIGTERM, signal.SIGKILL], signal.SIGKILL))
def test_a_process_that_ends_while_it_loads_leaves_none(start, number):
    server = start(
        "import time; from gptjax import api; api.load_checkpoint = lambda *_, **__: time.sleep(60); " + REAL
    )
    wait_for(server.catches_signals)
    assert server.front.is_running()
    server.end(number, status=0 if number == signal.SIGTERM else -number)


@pytest.mark.thorough
def test_a_port_that_is_taken_ends_both(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = start(FAKE, "--port", str(port))
        server.end(status=1)
    assert f"error while attempting to bind on address ('127.0.0.1', {port})" in server.log
    assert server.log.count("ERROR") == 1  # it is said once


def test_a_checkpoint_that_cannot_be_loaded_leaves_none(start, tmp_path):
    server = start(REAL, "--tokenizer", str(tmp_path / "none"))
    server.end(status=1)
    assert server.log.count("does not exist; name the directory of a tokenizer") == 1
