"""The server with a model: what comes back over HTTP is what the library gives."""

import concurrent.futures
import json

import httpx2
import jax
import pytest

from gptjax.engine import steps
from gptjax.server.worker import scoring
from tests.server.server_material import GPT2, served
from tests.server.worker_material import CHUNK, MAX_LENGTH, SLOTS
from tests.shallow import shallow
from tests.thinned import thorough

CLIENTS = 64


@pytest.fixture(scope="module")
def model():
    return shallow(GPT2, max_length=MAX_LENGTH, max_batch=SLOTS)


@pytest.fixture(scope="module", params=[False, True], ids=["in this process", "in another"])
def complete(request, model):
    limits = httpx2.Limits(max_connections=CLIENTS)
    with (
        served(model, GPT2, max_queue=CLIENTS, chunk=CHUNK, far=request.param) as (_, address),
        httpx2.Client(base_url=address, timeout=300, limits=limits) as client,
    ):
        yield lambda **fields: client.post("/v1/completions", json=fields)


def test_text_and_logprobs_are_those_of_the_library(model, complete):
    choice = complete(prompt="The old king", max_tokens=20, logprobs=2, temperature=0).json()["choices"][0]
    alone = model.generate("The old king", max_tokens=20, top_logprobs=2, temperature=0)
    assert choice["text"] == alone.text
    assert choice["logprobs"]["token_logprobs"] == list(alone.logprobs)
    assert choice["finish_reason"] == alone.finish_reason


def test_echoed_logprobs_are_those_of_teacher_forcing(model, complete):
    prompt = model.tokenizer.encode("Once upon a time there was a poor woodcutter, who lived by the forest.")
    answer = complete(prompt=[prompt, prompt[:2], prompt[:1]], echo=True, max_tokens=1, logprobs=1, seed=1).json()
    for choice, ids in zip(answer["choices"], (prompt, prompt[:2], prompt[:1]), strict=True):
        logprobs_TV = jax.nn.log_softmax(model.logits(ids), axis=-1)
        expected = [float(logprobs_TV[at, token]) for at, token in enumerate(ids[1:])]
        first, *found = choice["logprobs"]["token_logprobs"][: len(ids)]
        assert first is None
        assert found == pytest.approx(expected, abs=1e-5)
        best = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][1 : len(ids)]]
        assert best == pytest.approx(logprobs_TV[:-1].max(axis=-1).tolist(), abs=1e-5)


def test_scoring_holds_the_logits_of_few_tokens(model, monkeypatch):
    asked, original = [], steps.score_chunk

    def score_chunk(model, params, cache, chunk):
        asked.append(len(chunk) - 3)  # slot, start, count
        return original(model, params, cache, chunk)

    monkeypatch.setattr(steps, "score_chunk", score_chunk)
    monkeypatch.setattr(steps, "SCORED_CHUNK", 64)
    assert len(scoring.score(model, range(1, 120), 1)) == 118
    assert asked == [64, 64]


@pytest.mark.parametrize("stream", [False, True])
def test_where_there_is_no_memory_for_scoring_the_client_is_told_and_the_log(complete, monkeypatch, caplog, stream):
    def score_chunk(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 123 bytes")

    monkeypatch.setattr(steps, "score_chunk", score_chunk)
    response = complete(prompt="The old king", echo=True, max_tokens=1, logprobs=1, stream=stream)
    body = response.text.removeprefix("data: ").split("\n\n")[0]
    assert json.loads(body)["error"]["code"] == "no_memory"
    if not stream:
        assert (response.status_code, response.headers["x-should-retry"]) == (503, "false")
    assert "--max-batch" in caplog.text
    assert complete(prompt="The old king", max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    ("complete", "clients"),
    [(False, 16), (True, 16), thorough(True, CLIENTS)],
    indirect=["complete"],
    ids=["in this process-16", "in another-16", "in another-64"],
)
def test_every_client_gets_what_it_gets_alone(complete, clients):
    asked = [
        {
            "prompt": "The old king went down to the sea. " * (number % 5 + 1) + str(number),
            "max_tokens": 5 + number % 11,
            "temperature": (number % 3) / 2,
            "seed": number,
            "logprobs": number % 3,
        }
        for number in range(clients)
    ]
    alone = [complete(**fields).json()["choices"] for fields in asked]
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        together = list(pool.map(lambda fields: complete(**fields).json()["choices"], asked))
    assert together == alone
