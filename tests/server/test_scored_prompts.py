"""`/v1/completions` with log-probabilities, and prompts that are echoed and scored."""

import asyncio
import dataclasses
import threading

import httpx2
import pytest

from gptjax.server.front import app
from tests.server.fake_worker import score
from tests.server.server_material import (
    GPT_OSS,
    RAW,
    choice,
    complete,
    endless,
    fault,
    ids,
    make,
    saying,
    tokenizer,
    until,
)


def test_legacy_logprobs():
    found = choice(complete(make(saying(" there was é<|endoftext|>")), logprobs=2))["logprobs"]
    tokens = ids(" there was é<|endoftext|>")
    assert len(found["tokens"]) == len(tokens)
    assert found["tokens"][:2] == [" there", " was"]
    assert found["token_logprobs"] == [-0.5] * len(tokens)
    assert [list(top.values()) for top in found["top_logprobs"]] == [[-0.5, -1.5]] * len(tokens)
    assert found["text_offset"][:3] == [0, 6, 10]
    assert choice(complete(make(), logprobs=0))["logprobs"]["top_logprobs"] is None


def test_echo_with_logprobs_as_the_evaluation_harness_asks_for_it():
    tokens = ids("The old king went")
    response = complete(make(endless), prompt=[tokens, tokens[:2]], echo=True, max_tokens=1, logprobs=1, seed=1234)
    first, second = response.json()["choices"]
    assert first["text"] == "The old king went a"
    assert first["logprobs"]["token_logprobs"] == [None] + [-0.5] * len(tokens)
    assert first["logprobs"]["top_logprobs"][0] is None
    assert all(max(top.values()) == -0.5 for top in first["logprobs"]["top_logprobs"][1:])
    text = "".join(first["logprobs"]["tokens"])
    assert text == first["text"]
    offsets = first["logprobs"]["text_offset"]
    assert [text[at:] for at in offsets][-1] == " a"
    assert second["text"] == "The old a"


def test_one_prompt_is_scored_at_a_time_though_clients_leave():
    at_once, most, go_on = 0, 0, threading.Event()

    def slow(token_ids, num_top):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        go_on.wait(10)
        at_once -= 1
        return score(token_ids, num_top)

    service = make()
    service = dataclasses.replace(service, served=dataclasses.replace(service.served, score=slow))
    body = {"prompt": "a b", "echo": True, "logprobs": 1, "max_tokens": 0}

    async def run():
        transport = httpx2.ASGITransport(app.build(service))
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            for _ in range(3):
                leaving = asyncio.ensure_future(client.post("/v1/completions", json=body))
                await until(lambda: service._scoring)
                await asyncio.sleep(0.05)
                leaving.cancel()
                await until(lambda: not service._scoring)
            staying = asyncio.ensure_future(client.post("/v1/completions", json=body))
            await asyncio.sleep(0.05)
            go_on.set()
            return await staying

    assert asyncio.run(run()).status_code == 200
    assert most == 1


def test_no_more_prompts_wait_to_be_scored_than_may():
    service = make(scoring=0)
    response = complete(service, echo=True, logprobs=1, stream=True)
    assert fault(response, 429)["code"] == "queue_full"
    assert complete(service, echo=True).status_code == 200


def test_echo_alone_generates_nothing():
    service = make()
    response = complete(service, echo=True, max_tokens=0, logprobs=0)
    assert choice(response)["text"] == "Once upon a time"
    assert choice(response)["finish_reason"] == "length"
    assert response.json()["usage"]["completion_tokens"] == 0
    assert service.worker.requests == []


@pytest.mark.parametrize("special", [True, False])
def test_a_text_is_echoed_and_scored_as_its_tokens_are(special):
    service = make(name=GPT_OSS)
    token_ids = tokenizer(GPT_OSS).encode(RAW, special=special)
    fields = {"echo": True, "max_tokens": 0, "logprobs": 1}
    by_text = complete(service, prompt=RAW, parse_special=special, **fields).json()
    by_ids = complete(service, prompt=token_ids, **fields).json()
    assert by_text["choices"] == by_ids["choices"]
    assert by_text["usage"] == by_ids["usage"]
    (echoed,) = by_text["choices"]
    assert echoed["text"] == RAW == "".join(echoed["logprobs"]["tokens"])
