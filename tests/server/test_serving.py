"""The server on a socket, with uvicorn: signals, clients that do not read, a worker that dies."""

import contextlib
import dataclasses
import gc
import itertools
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx2
import pytest

from gptjax.cli import main, serve
from gptjax.engine import steps
from gptjax.server import logs
from gptjax.server.front import serving
from gptjax.server.worker import hosting
from tests.server.load_material import request
from tests.server.server_material import GPT2, endless, fail_all, ids, make, running, wait_for
from tests.shallow import shallow_directory


def streamed(address, **fields):
    body = {"prompt": "a", "stream": True, "max_tokens": 390} | fields
    return httpx2.stream("POST", f"{address}/v1/completions", json=body, timeout=60)


def test_streams_end_in_order_when_the_server_is_told_to_end():
    def script(request):
        while request.max_tokens == 390 or service.worker.refusal is None:
            yield from [*ids(" a"), 0.01]
        yield from ids(" b<|endoftext|>")

    service = make(script)
    with running(service, drain_seconds=2) as (server, address):
        with streamed(address, max_tokens=100) as short, streamed(address) as long:
            wait_for(lambda: len(service.worker.open) == 2)
            service.worker.stop = lambda: fail_all(service.worker)
            server.handle_exit(signal.SIGTERM, None)
            lines = [list(filter(None, response.iter_lines())) for response in (short, long)]
        assert [each[-1] for each in lines] == ["data: [DONE]"] * 2
        assert json.loads(lines[0][-2][6:])["choices"][0]["finish_reason"] == "stop"
        assert json.loads(lines[1][-2][6:])["error"]["code"] == "drained"
    assert server.status == 0


@pytest.mark.parametrize("at", ["the start", "mid-stream"])
def test_a_client_that_hangs_up_frees_its_slot(at):
    service = make(endless)
    with running(service) as (_, address):
        with streamed(address) as response:
            if at == "mid-stream":
                next(response.iter_lines())
        wait_for(lambda: not service.worker.open)
        with contextlib.ExitStack() as stack:
            connected(stack, address).sendall(request(1, {"prompt": "a", "max_tokens": 390}))
            wait_for(lambda: service.worker.open)
        wait_for(lambda: not service.worker.open)
    assert len(service.worker.cancelled) == 2


def test_a_client_that_never_reads_is_cut():
    service = make(lambda request: itertools.cycle([ids(" a")[0], 0.0002]), send_seconds=0.3)
    service.worker.max_length = 1 << 30
    service = dataclasses.replace(service, served=dataclasses.replace(service.served, max_length=1 << 30))
    with running(service) as (_, address), contextlib.ExitStack() as stack:
        client = connected(stack, address)
        client.sendall(request(1, {"prompt": "a", "stream": True, "max_tokens": 1 << 30, "logprobs": 20}, last=False))
        wait_for(lambda: len(service.worker.requests) == 1)
        wait_for(lambda: not service.worker.open)
        with pytest.raises(ConnectionError):
            while client.recv(1 << 20):
                pass


@pytest.mark.parametrize("has_process", [False, True])
def test_what_compiling_leaves_is_kept_from_the_garbage_collector_once_there_is_no_more_of_it(monkeypatch, has_process):
    """A collection of everything would take a second, in the middle of streams."""
    called = []
    monkeypatch.setattr(gc, "collect", lambda: called.append("collect"))
    monkeypatch.setattr(gc, "freeze", lambda: called.append("freeze"))
    service = make(endless)
    service.worker.ready = False
    monkeypatch.setattr(service.worker, "wait_until_compiled", lambda: called.append("compiled"))
    with running(service) as (server, _):
        server.has_process = has_process
        time.sleep(0.3)
        assert called == []
        service.worker.ready = True
        wait_for(lambda: server._announced)
        # Again once the programs are there that compile while requests run.
        expected = ["collect", "freeze", "compiled", "freeze"] if has_process else []
        wait_for(lambda: len(called) >= len(expected))
    assert called == expected


def test_a_command_has_the_process_for_itself(monkeypatch):
    switches = []
    monkeypatch.setattr(sys, "setswitchinterval", switches.append)
    server = serving.make_server(make(), host="127.0.0.1", port=0, drain_seconds=1)
    monkeypatch.setattr(server, "run", lambda: None)
    assert not server.has_process
    assert serving.run(server) == 0
    assert server.has_process and switches == [0.0005]


def connected(stack, address):
    client = stack.enter_context(socket.socket())
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", int(address.rsplit(":", 1)[1])))
    return client


def test_a_client_that_does_not_take_its_answer_is_cut():
    """An answer in one piece is written at once: the server waits for the client elsewhere than in a stream."""
    service = make(send_seconds=0.5)
    service = dataclasses.replace(service, served=dataclasses.replace(service.served, max_length=1 << 30))
    with running(service) as (server, address), contextlib.ExitStack() as stack:
        client = connected(stack, address)
        wait_for(lambda: server.server_state.connections)
        client.sendall(request(1, {"prompt": " the" * 40_000, "echo": True, "max_tokens": 0, "n": 128}))
        wait_for(lambda: not server.server_state.connections)
        with pytest.raises(ConnectionError):
            while client.recv(1 << 20):
                pass


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: a\r\n"])
def test_a_client_that_asks_for_nothing_is_cut(sent):
    service = make(lambda request: [1.5, *ids(" a<|endoftext|>")], send_seconds=0.5)
    with running(service) as (server, address), contextlib.ExitStack() as stack:
        idle, waiting = (connected(stack, address) for _ in range(2))
        idle.sendall(sent)
        waiting.sendall(request(1, {"prompt": "a"}, last=False))  # its answer takes longer than that
        wait_for(lambda: len(server.server_state.connections) == 1)
        with pytest.raises(ConnectionError):
            idle.recv(1)
        assert waiting.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_a_connection_that_is_used_is_not_cut():
    with running(make(send_seconds=0.5)) as (server, address), httpx2.Client(base_url=address) as client:
        assert client.get("/health").status_code == 200
        (connection,) = server.server_state.connections
        used = began = time.monotonic()
        while used < began + 1:
            time.sleep(0.05)
            assert client.get("/health").status_code == 200
            if time.monotonic() > used + 0.25:  # a busy machine paused: it may have been cut, and others count
                began, (connection,) = time.monotonic(), server.server_state.connections
            used = time.monotonic()
        assert server.server_state.connections == {connection}


def test_a_worker_that_dies_takes_the_server_with_it(monkeypatch):
    monkeypatch.setattr(serving, "_LAST_WORDS", 1.0)
    service = make(endless)
    with running(service) as (server, address):
        assert httpx2.get(f"{address}/health").status_code == 200
        service.worker.error = "RuntimeError: gone"
        response = httpx2.get(f"{address}/health")
        assert (response.status_code, response.json()["status"]) == (503, "dead")
        wait_for(lambda: server.should_exit or not server.servers[0].is_serving())
    assert server.status == 1


def test_the_log_tells_once_that_the_server_is_ready(caplog):
    caplog.set_level(logging.INFO, "gptjax")
    service = make()
    service.worker.ready = False
    with running(service):
        time.sleep(0.3)
        assert not caplog.records
        service.worker.ready = True
        wait_for(lambda: caplog.records)
        time.sleep(0.3)
    (record,) = caplog.records
    assert re.fullmatch(r"gpt2-tales is ready after \d+ s: 4 slots of 400 tokens", record.getMessage())


def test_logs_as_json():
    record = logging.LogRecord("gptjax", logging.WARNING, __file__, 1, "cut %s", ("it",), None)
    line = json.loads(logs.JsonFormatter().format(record))
    assert (line["level"], line["logger"], line["message"]) == ("warning", "gptjax", "cut it")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PORT", "seven"),
        ("MAX_QUEUE", "0"),
        ("SEND_TIMEOUT", "-1"),
        ("PORT", "65536"),
        ("PREFILL_CHUNK", "1000"),
        ("DRAIN", "soon"),
        ("ALIAS", "gpt-*-mini"),
    ],
)
def test_a_bad_environment_variable_is_wrong_usage(monkeypatch, capsys, variable, value):
    monkeypatch.setenv(f"GPTJAX_SERVE_{variable}", value)
    with pytest.raises(SystemExit) as status:
        main(["serve"])
    assert status.value.code == 2
    said = capsys.readouterr().err
    assert f"--{variable.lower().replace('_', '-')}" in said
    assert f"{value} is not " in said or f"'{value}' is no" in said


def test_the_command_knows_the_chunks_of_prompts():
    assert serve._CHUNK == steps.CHUNK
    assert {32, steps.LARGEST_CHUNK} <= set(serve._CHUNKS)
    assert max(serve._CHUNKS) == steps.LARGEST_CHUNK


def test_the_commands_chunk_is_the_workers(monkeypatch):
    class Stop(Exception):
        pass

    def worker(*_, chunk, **__):
        raise Stop(chunk)

    monkeypatch.setattr(hosting, "Worker", worker)
    with pytest.raises(Stop, match=r"^64$"):
        main(["serve", "-m", GPT2, "--max-length", "64", "--max-batch", "1", "--prefill-chunk", "64"])


def test_the_command_serves_and_ends(demo, tmp_path):
    checkpoint = str(shallow_directory(demo, tmp_path / "model"))
    argv = [sys.executable, "-m", "gptjax", "serve", "-m", checkpoint, "--max-length", "128", "--prefill-chunk", "64"]
    argv += ["--port", "0", "--log-format", "json", "--max-batch", "2"]
    # With programs from before, it would be ready at once.
    variables = os.environ | {"GPTJAX_CACHE_DIR": str(tmp_path / "programs")}
    with (
        open(tmp_path / "log", "w+") as log,
        subprocess.Popen(argv, stderr=log, env=variables) as process,
    ):
        try:
            wait_for(lambda: "running on" in (tmp_path / "log").read_text())
            lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
            address = lines[-1]["message"].split()[3]
            response = httpx2.get(f"{address}/health", timeout=60)
            assert (response.status_code, response.json()["status"]) == (503, "starting")
            body = {"prompt": "The king", "max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 1}
            answer = httpx2.post(f"{address}/v1/completions", json=body, timeout=120).json()
            assert len(answer["choices"][0]["logprobs"]["tokens"]) == 5
            assert httpx2.get(f"{address}/health").status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
