"""Many clients at once, clients that leave, and clients that do not read, with a model. Figures are printed."""

import asyncio
import errno
import json
import re
import signal
import socket
import statistics
import subprocess
import sys
import time

import pytest

from gptjax.cli import main
from tests.server.load_material import ask, ask_all, request, serving, wait

pytestmark = pytest.mark.slow


def body(number: int, **fields):
    prompt = "The old king went down to the sea. " * (number % 4) + f"And {number}"
    return {"prompt": prompt, "temperature": (number % 3) / 2, "seed": number, "ignore_eos": True} | fields


def tokens_a_second(server, bodies, at_once):
    began = time.monotonic()
    answers = asyncio.run(ask_all(server.port, bodies, at_once=at_once))
    assert {status for status, _ in answers} == {200}
    seconds = time.monotonic() - began
    return sum(json.loads(answer)["usage"]["completion_tokens"] for _, answer in answers) / seconds


def engine_gain():
    """How many times as many tokens a second the engine decodes with 32 rows as with one, without a server."""
    argv = [sys.executable, "-m", "gptjax", "bench", "gpt2-tales", "--dtype", "float32", "--batch", "1", "32"]
    argv += ["--prompt-length", "16", "--repeats", "5", "--json"]
    report = json.loads(subprocess.run(argv, capture_output=True, check=True, timeout=300).stdout)
    one, many = (result["decode_tokens_per_second"] for result in report["results"])
    return many / one


def test_32_slots_gain_at_least_half_of_what_the_engine_gains(tmp_path):
    """At least twice the tokens of one slot, and four times is enough: the engine alone gains 4.6 times on some CPUs.

    That clients at once get what each gets alone is shown in test_with_model.py.
    """
    wanted = min(4.0, max(2.0, engine_gain() / 2))
    bodies = [body(number, max_tokens=64) for number in range(64)]
    options = ["--max-length", "128", "--max-batch"]
    best = [0.0, 0.0]
    with serving(tmp_path, *options, "1") as one, serving(tmp_path, *options, "32") as many:
        for server in (one, many):
            tokens_a_second(server, bodies[:4], 4)
        # In turns, and the best of three of each: the machine may have other things to do.
        for _ in range(3):
            best = [
                max(rate, tokens_a_second(server, bodies, 64)) for rate, server in zip(best, (one, many), strict=True)
            ]
    gain = best[1] / best[0]
    print(f"1 slot: {best[0]:.0f} tokens/s, 32 slots: {best[1]:.0f}, {gain:.1f} times as many; {wanted:.1f} wanted")
    assert gain >= wanted


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    options = ["--max-batch", "8", "--max-queue", "64", "--max-length", "128", "--send-timeout", "2"]
    with serving(tmp_path_factory.mktemp("server"), *options) as server:
        yield server


def test_a_thousand_at_once_against_a_queue_of_64(server):
    bodies = [body(number, max_tokens=8) for number in range(1000)]
    began = time.monotonic()
    statuses = [status for status, _ in asyncio.run(ask_all(server.port, bodies, at_once=1000))]
    seconds = time.monotonic() - began
    served, refused = statuses.count(200), statuses.count(429)
    metrics = server.metrics()
    times = {
        limit: metrics["gptjax_http_answer_seconds_bucket", limit, "/v1/completions", "429"]
        for limit in ("0.01", "0.1")
    }
    print(f"{served} served, {refused} refused, in {seconds:.1f} s; 429s within so many seconds: {times}")
    assert served + refused == 1000
    assert served >= 72 and refused > 0
    assert times["0.1"] >= 0.99 * refused
    assert server.health()["queued"] == 0


def test_memory_stays_flat_over_two_thousand_requests(server):
    bodies = [body(number, max_tokens=1 + number % 4, stream=number % 2 == 0) for number in range(2000)]
    sizes = []
    for part in (bodies[:400], bodies):
        answers = asyncio.run(ask_all(server.port, part, at_once=32))
        assert {status for status, _ in answers} == {200}
        sizes.append(server.memory())
    print("resident after 400 and 2400 requests:", *(f"{size / 1e6:.1f} MB" for size in sizes))
    assert sizes[1] <= 1.02 * sizes[0]


def test_bench_server_counts_what_the_server_counts(server, capsys):
    tokens = server.metrics()["worker_tokens_generated_total",]
    argv = ["bench-server", f"http://127.0.0.1:{server.port}/v1", "--clients", "4", "--requests", "12", "--json"]
    assert main([*argv, "--prompt-length", "24", "--output-length", "20"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert (result["errors"], result["prompt_tokens"], result["output_tokens"]) == ({}, 12 * 24, 12 * 20)
    assert server.metrics()["worker_tokens_generated_total",] - tokens == 13 * 20  # one request was not counted
    assert 0 < result["first_token_seconds"]["p50"] < result["whole_seconds"]["p50"] < result["seconds"]


def silent_client(server, **fields):
    """A client that asks for more than both ends' buffers can hold, and reads nothing."""
    asked = {"prompt": "A", "stream": True, "max_tokens": 120, "ignore_eos": True, "temperature": 0} | fields
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", server.port))
    client.sendall(request(server.port, asked, last=False) * 200)  # they are answered in turn
    wait(lambda: server.health()["busy"] > 0, 60)
    return client


def test_a_client_that_never_reads_neither_slows_others_nor_stays(server):
    bodies = [body(number, max_tokens=100) for number in range(28)]
    tokens_a_second(server, bodies, 7)
    for _ in range(3):  # the machine may have other things to do: one of three is to be undisturbed
        alone, beside = [], []
        for _ in range(3):
            alone.append(round(tokens_a_second(server, bodies, 7)))
            with silent_client(server):
                beside.append(round(tokens_a_second(server, bodies, 7)))
            wait(lambda: server.health()["busy"] == 0, 60)
        print(f"{alone} tokens/s, beside a client that does not read {beside}")
        if statistics.median(beside) >= 0.9 * statistics.median(alone):
            break
    with silent_client(server, logprobs=20, n=8) as client:
        began = time.monotonic()
        wait(lambda: cut(client), 120)
        print(f"cut after {time.monotonic() - began:.1f} s")
        wait(lambda: server.health()["busy"] == 0, 60)
    assert statistics.median(beside) >= 0.9 * statistics.median(alone)


def cut(client):
    """Whether the server has reset the connection; reads nothing of it."""
    return client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET


def test_on_sigterm_every_stream_ends_in_order_within_the_limit(tmp_path):
    drain = 1.0

    async def streams(server):
        coming = [
            asyncio.ensure_future(ask(server.port, body(number, max_tokens=480, stream=True))) for number in range(8)
        ]
        while server.health()["busy"] < 8:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        return await asyncio.gather(*coming), time.monotonic() - began

    with serving(tmp_path, "--max-batch", "8", "--drain", str(drain)) as server:
        answers, seconds = asyncio.run(streams(server))
        assert server.process.wait(10) == 0
    print(f"all streams had ended {seconds:.2f} s after the signal, with {drain} s to drain")
    assert seconds < drain + 2
    for status, answer in answers:
        *_, before, end = re.findall(rb"data: (.*)", answer)
        assert (status, end) == (200, b"[DONE]")
        assert json.loads(before)["error"]["code"] == "drained"
