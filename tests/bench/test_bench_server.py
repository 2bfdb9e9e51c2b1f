"""`gptjax bench-server` against servers whose speed and faults are known."""

import asyncio
import json
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pytest

from gptjax.bench.serving.clients import Measured, run
from gptjax.bench.serving.load import Load
from gptjax.bench.serving.result import Result, percentile
from gptjax.bench.serving.stream import Endpoint, Events, Record, Response, completion
from gptjax.cli import main

FIRST, GAP = 0.15, 0.02  # seconds


class Server:
    """A server that answers every request after FIRST seconds with a token each GAP seconds, or as `answer` says."""

    def __init__(self, answer=None):
        self.bodies, self.headers = [], []
        self._answer = answer or self._tokens
        self._listening = threading.Event()
        self._writers = []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self):
        self._thread.start()
        self._listening.wait()
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _run(self):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=256)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        self._listening.set()
        await self._stop.wait()
        server.close()
        for writer in self._writers:  # some are still answered
            writer.transport.abort()
        await asyncio.sleep(0.01)  # transports close in the loop's next turn

    async def _serve(self, reader, writer):
        self._writers.append(writer)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, _ = head.split("\r\n")[0].split()
        fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        body = await reader.readexactly(int(fields.get("content-length", 0)))
        if (method, path) == ("GET", "/v1/models"):
            content = json.dumps({"object": "list", "data": [{"id": "fake"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content))
        else:
            assert (method, path) == ("POST", "/v1/completions")
            self.bodies.append(json.loads(body))
            self.headers.append(fields)
            await self._answer(writer, self.bodies[-1])
        writer.close()

    async def _tokens(self, writer, body):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        await asyncio.sleep(FIRST)
        for number in range(body["max_tokens"]):
            if number:
                await asyncio.sleep(GAP)
            writer.write(chunk(event({"choices": [{"text": "a"}], "usage": None})))
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        usage["prompt_tokens_details"] = {"cached_tokens": 3}
        writer.write(chunk(event({"choices": [], "usage": usage})) + chunk(b"data: [DONE]\n\n") + chunk(b""))


def event(value):
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunk(content):
    return b"%x\r\n%b\r\n" % (len(content), content)


USAGE = event({"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 2}})
TOKENS = event({"choices": [{"text": "a"}]}) * 2
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def ask(server, **options):
    endpoint = Endpoint(urlsplit(server.url), None)
    request = endpoint.completion({"prompt": [1, 2], "max_tokens": 2})
    return asyncio.run(completion(endpoint, request, **{"timeout": 5.0} | options))


def answers(*parts, pause=0.0):
    async def answer(writer, body):
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)

    return answer


def test_latencies_and_throughput_are_those_of_the_server(capsys):
    with Server() as server:
        argv = ["bench-server", server.url, "--clients", "1", "6", "--requests", "6", "--output-length", "11"]
        assert main([*argv, "--prompt-length", "20", "--shared-prefix", "5", "--processes", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == "fake"
    expected = FIRST + 10 * GAP
    for clients, result in zip((1, 6), report["results"], strict=True):
        assert (result["clients"], result["requests"], result["errors"]) == (clients, 6, {})
        assert (result["prompt_tokens"], result["cached_tokens"], result["output_tokens"]) == (120, 18, 66)
        assert FIRST <= result["first_token_seconds"]["p50"] < 5 * FIRST  # the machine may have other things to do
        assert GAP / 2 <= result["gap_seconds"]["p50"] < 5 * GAP
        assert expected <= result["whole_seconds"]["p50"] < 5 * expected
        assert result["seconds"] >= expected * 6 / clients
        assert result["output_tokens_per_second"] == pytest.approx(66 / result["seconds"], rel=1e-3)
        assert result["total_tokens_per_second"] == pytest.approx(186 / result["seconds"], rel=1e-3)
    prompts = [body["prompt"] for body in server.bodies]
    assert len(set(map(tuple, prompts))) == len(prompts) == 14  # no two are the same, and two were not counted
    for first in (1, 8):
        assert len({tuple(prompt[:5]) for prompt in prompts[first : first + 6]}) == 1
        assert len({prompt[5] for prompt in prompts[first : first + 6]}) > 1
    assert all(body["ignore_eos"] and body["stream_options"] == {"include_usage": True} for body in server.bodies)


def test_requests_at_a_rate_do_not_wait_for_each_other():
    with Server() as server:
        load = Load("fake", requests=20, clients=None, rate=10.0, prompt_length=4, output_length=26, seed=1)
        result = Result(load, run(server.url, None, load, 2))
    assert not result.errors
    began = sorted(record.began for record in result.measured.records)
    wanted = [after for after, _ in load.queues()]
    for at, arrival in zip(began, wanted, strict=True):
        assert at - began[0] == pytest.approx(arrival, abs=0.5)
    assert wanted[-1] > 1
    assert result.seconds < 10 * (FIRST + 25 * GAP)  # in turns they would take twice as long


def test_requests_come_at_random_times():
    """The gaps of a Poisson process are as wide as they are long on average, unlike even ones."""
    times = [after for after, _ in Load("fake", requests=4000, clients=None, rate=5.0).queues()]
    gaps = np.diff(times)
    assert times[0] == 0
    assert gaps.mean() == pytest.approx(0.2, rel=0.1)
    assert gaps.std() == pytest.approx(0.2, rel=0.1)


def test_each_load_has_prompts_of_its_own():
    one, other = (Load("fake", 4, 1, None, prompt_length=30, seed=seed) for seed in (0, 1))
    assert len({tuple(load.body(number)["prompt"]) for load in (one, other) for number in range(4)}) == 8
    assert one.body(2) == one.body(2)


def test_figures_of_known_records():
    records = (
        Record(began=10.0, events=[10.5, 10.75, 11.5], ended=12.0, prompt_tokens=6, output_tokens=4),
        Record(began=10.25, events=[12.25], ended=14.0, prompt_tokens=2, output_tokens=1),
        Record(began=9.0, events=[9.5], ended=11.0, error="lost"),
    )
    result = Result(Load("fake", 3, 2, None), Measured(records, 0.1))
    assert (result.first, result.gaps, result.whole) == ([0.5, 2.0], [0.25, 0.75], [2.0, 3.75])
    assert (result.seconds, result.output_rate, result.total_rate) == (5.0, 1.0, 2.6)
    assert result.errors == {"lost": 1}


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk(TOKENS + USAGE) + chunk(b"")], id="at once"),
        pytest.param(
            [HEAD + b"Transfer-Encoding: chunked\r\n\r\n"]
            + [chunk((TOKENS + USAGE)[at : at + 7]) for at in range(0, len(TOKENS + USAGE), 7)]
            + [chunk(b"")],
            id="events across chunks",
        ),
        pytest.param([HEAD + b"\r\n", TOKENS.replace(b"\n\n", b"\r\n\r\n"), USAGE], id="no length, other line ends"),
        pytest.param([HEAD + b"Content-Length: %d\r\n\r\n" % len(TOKENS + USAGE), TOKENS, USAGE], id="a length"),
        pytest.param([HEAD + b"\r\n", b": ping\n\n", b"event: x\n\n", TOKENS, USAGE], id="comments and other events"),
    ],
)
def test_every_form_of_a_stream_is_read(parts):
    with Server(answers(*parts)) as server:
        record = ask(server)
    assert record.error is None
    assert (len(record.events), record.prompt_tokens, record.output_tokens) == (2, 2, 2)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_stream_may_be_cut_anywhere(size):
    stream = (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(TOKENS + USAGE) + chunk(b"data: [DONE]\n\n") + chunk(b"")
    )

    async def read():
        record = Record(0.0)
        response = Response(Events(record).take)
        for at in range(0, len(stream), size):
            assert not response.finished.done()
            response.data_received(stream[at : at + size])
        await response.finished
        return record

    record = asyncio.run(read())
    assert (len(record.events), record.prompt_tokens, record.output_tokens) == (2, 2, 2)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (
            [b"HTTP/1.1 429 Too Many\r\nContent-Length: 41\r\n\r\n", b'{"error": {"message": "the queue is\\n full"}}'],
            "429",
        ),
        ([b"HTTP/1.1 500 Oops\r\n\r\n", b"<html>no</html>"], "HTTP 500: <html>no</html>"),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk(TOKENS)], "lost before the answer's end"),
        ([HEAD + b"Content-Length: 900\r\n\r\n", TOKENS], "lost before the answer's end"),
        ([HEAD + b"\r\n", TOKENS], "ended without a usage"),
        ([HEAD + b"\r\n", TOKENS, event({"error": {"message": "the model's logits"}})], "the model's logits"),
        ([b"SSH-2.0-OpenSSH\r\n\r\n"], "not HTTP"),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"zz\r\nabc"], "not HTTP"),
        ([HEAD + b"\r\n", b'data: {"usage":{"prompt_tokens"\n\n'], "not HTTP"),
        ([HEAD + b"\r\n", event({"usage": {"prompt_tokens": 2}, "choices": []}).replace(b": {", b":{")], "not HTTP"),
        ([b""], "lost"),
    ],
)
def test_what_goes_wrong_is_in_the_record(parts, says):
    with Server(answers(*parts)) as server:
        assert says in ask(server).error


def test_an_answer_that_does_not_end_is_given_up():
    with Server(answers(HEAD + b"\r\n", TOKENS, pause=3.0)) as server:
        began = time.monotonic()
        assert "no end after" in ask(server, timeout=0.3).error
        assert time.monotonic() - began < 2


def test_a_server_that_is_not_there(capsys):
    with Server() as server:
        pass
    assert main(["bench-server", server.url]) == 1
    assert "is a server running there?" in capsys.readouterr().err
    assert main(["bench-server", server.url, "--model", "fake"]) == 1
    assert "completions fails" in capsys.readouterr().err


def test_errors_are_counted_and_end_with_1(capsys):
    async def answer(writer, body):
        if len(server.bodies) % 3 == 0:
            writer.write(b'HTTP/1.1 429 Too Many\r\nContent-Length: 36\r\n\r\n{"error": {"message": "queue full"}} ')
        else:
            await server._tokens(writer, body)

    with Server(answer) as server:
        argv = ["bench-server", server.url, "--clients", "2", "--output-length", "2", "--prompt-length", "3"]
        assert main([*argv, "--requests", "8", "--processes", "1"]) == 1
    out = capsys.readouterr().out
    assert "3 failed: HTTP 429: queue full" in out
    assert f"{2:>9} {5:8} " in out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["localhost:8000"], "is not the URL of an API"),
        (["http://localhost:99999/v1"], "is not a URL"),
        (["--clients", "0"], "--clients must be at least 1, found 0"),
        (["--rate", "0"], "--rate must be a number above 0, found 0"),
        (["--rate", "inf"], "--rate must be a number above 0, found inf"),
        (["--clients", "1", "--rate", "2"], "leave one of them out"),
        (["--prompt-length", "8", "--shared-prefix", "8"], "less than --prompt-length (8), found 8"),
        (["--prompts", "no-such-file", "--model", "fake"], "no-such-file cannot be read"),
        (["--plot", "speed.txt"], "end it in .png"),
    ],
)
def test_arguments_that_make_no_sense(capsys, argv, says):
    assert main(["bench-server", *argv]) == 1
    assert says in capsys.readouterr().err


def test_percentiles_are_values_that_were_seen():
    values = [float(value) for value in range(200, 0, -1)]
    assert [percentile(values, share) for share in (50, 90, 99)] == [100.0, 180.0, 198.0]
    assert percentile([7.0], 99) == 7.0
    assert percentile([], 50) != percentile([], 50)  # NaN


def test_clients_that_are_too_slow_are_said_to_be():
    records = (Record(0.0, [1.0, 2.0], 2.0, 3, 0, 2),)
    assert Result(Load("fake", 1, 1, None), Measured(records, 0.95)).clients_are_slow
    assert not Result(Load("fake", 1, 1, None), Measured(records, 0.5)).clients_are_slow


def test_a_plot_and_prompts_from_a_file(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    prompts, picture = tmp_path / "prompts.txt", tmp_path / "plot.svg"
    prompts.write_text("One\n\nTwo, three\n")
    with Server() as server:
        argv = ["bench-server", server.url, "--clients", "1", "2", "--requests", "2", "--output-length", "2"]
        assert main([*argv, "--prompts", str(prompts), "--plot", str(picture), "--api-key", "secret"]) == 0
    assert {body["prompt"] for body in server.bodies} == {"One", "Two, three"}
    assert {fields["authorization"] for fields in server.headers} == {"bearer secret"}
    assert "2 clients" in picture.read_text() or picture.stat().st_size > 10_000
