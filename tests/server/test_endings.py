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
import pytest

from tests.fuzz import rounds
from tests.server.load_material import request
from tests.server.server_material import GPT2, wait_for
from tests.thinned import thinned, thorough

# The command with a worker that says " a" for ever to every request, as fast as it can.
FAKE = """
import itertools, sys
from tests.server.server_material import fail_all, ids, make
from gptjax.cli import main
from gptjax.server import serving

service = make(lambda request: itertools.cycle([ids(" a")[0], 0.0001]), send_seconds=600)
service.worker.max_length = 1 << 30
object.__setattr__(service.served, "max_length", 1 << 30)
service.worker.stop = lambda: fail_all(service.worker)
serving.make_service = lambda *_, **__: service
serving._TO_END_STREAMS = 1.0
sys.exit(main())
"""
REAL = "import sys; from gptjax.cli import main; sys.exit(main())"


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

    def end(self, *signals):
        """Sends signals, and checks how it ends."""
        for number in signals:
            self.process.send_signal(number)
            time.sleep(0.2)
        assert self.process.wait(60) == 0, self.log
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
            with log.open("w") as file:
                process = subprocess.Popen([sys.executable, "-c", code, *argv], stderr=file, env=variables)
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
    server = start(FAKE, "--drain", "0" if signals[0] == signal.SIGTERM else "600")
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


def test_a_stream_that_is_read_ends_in_order(start):
    server = start(FAKE, "--drain", "0.3")
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
    server.end(chance.choice([signal.SIGTERM, signal.SIGINT]))
