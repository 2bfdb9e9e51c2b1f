"""Speeds of a server under load, compared with one another or with limits: `make quiet`. Figures are printed."""

import asyncio
import errno
import json
import socket
import statistics
import subprocess
import sys
import time

import pytest

from tests.server.load_material import ask_all, body, request, serving, wait

pytestmark = pytest.mark.quiet


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
            # A fifth of them for one slot, so that neither is measured for much longer than the other.
            best[0] = max(best[0], tokens_a_second(one, bodies[:12], 12))
            best[1] = max(best[1], tokens_a_second(many, bodies, 64))
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
