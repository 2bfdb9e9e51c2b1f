"""Many clients at once, with a model: what the server holds, and how it ends. Figures are printed."""

import asyncio
import json
import re
import signal
import time

import pytest

from gptjax.cli import main
from tests.server.load_material import ask, ask_all, body, serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    options = ["--max-batch", "8", "--max-queue", "64", "--max-length", "128"]
    with serving(tmp_path_factory.mktemp("server"), *options) as server:
        yield server


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
