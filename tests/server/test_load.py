"""Many clients at once, clients that leave, and clients that do not read, with a model. Figures are printed."""

import asyncio
import json
import time

import pytest
from load_material import ask_all, serving

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


def test_sixteen_slots_do_four_times_as_much_a_second_as_one(tmp_path):
    """That 64 clients at once get what each gets alone is shown in test_with_model.py."""
    bodies = [body(number, max_tokens=128) for number in range(64)]
    rates = []
    for slots in ("1", "16"):
        with serving(tmp_path, "--max-batch", slots, "--max-queue", "64") as server:
            tokens_a_second(server, bodies[:4], 4)
            rates.append(tokens_a_second(server, bodies, 64))
    print(f"1 slot: {rates[0]:.0f} tokens/s, 16 slots: {rates[1]:.0f} tokens/s, {rates[1] / rates[0]:.1f} times")
    assert rates[1] >= 4 * rates[0]


def test_a_thousand_at_once_against_a_queue_of_64(tmp_path):
    bodies = [body(number, max_tokens=8) for number in range(1000)]
    with serving(tmp_path, "--max-batch", "8", "--max-queue", "64") as server:
        began = time.monotonic()
        statuses = [status for status, _ in asyncio.run(ask_all(server.port, bodies, at_once=1000))]
        seconds = time.monotonic() - began
        served, refused = statuses.count(200), statuses.count(429)
        times = {
            limit: server.metrics()["gptjax_http_answer_seconds_bucket", limit, "429"] for limit in ("0.01", "0.1")
        }
        print(f"{served} served, {refused} refused, in {seconds:.1f} s; 429s within so many seconds: {times}")
        assert served + refused == 1000
        assert served >= 72 and refused > 0
        assert times["0.1"] >= 0.99 * refused
        assert server.health()["queued"] == 0
