"""`/v1/completions`."""

import asyncio
import re

import pytest

from gptjax.server.front import app
from gptjax.server.ipc.events import Failed
from gptjax.text import Tokenizer
from tests.server.server_material import (
    GPT_OSS,
    RAW,
    all_of,
    choice,
    complete,
    endless,
    events,
    fault,
    ids,
    make,
    post,
    saying,
    tokenizer,
    until,
)

PROMPT = "Once upon a time"


def test_a_text_is_continued():
    service = make()
    response = complete(service, model="gpt2-tales", max_tokens=50)
    body = response.json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [{"index": 0, "text": " there was", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == {
        "prompt_tokens": len(ids(PROMPT)),
        "completion_tokens": 3,
        "total_tokens": len(ids(PROMPT)) + 3,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert service.worker.requests[0].prompt_ids == tuple(ids(PROMPT))
    assert service.worker.open == {}


def test_settings_reach_the_worker():
    service = make()
    settings = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
    }
    complete(service, **settings, seed=-1, logit_bias={"5": -100}, stop=["x", "y"], stop_token_ids=[7], max_tokens=9)
    request = service.worker.requests[0]
    assert {name: getattr(request.params, name) for name in settings} == settings
    assert (request.params.seed, request.params.logit_bias) == ((1 << 32) - 1, {5: -100.0})
    assert (request.stop, request.stop_ids, request.max_tokens) == (("x", "y"), (7, *tokenizer().eos_ids), 9)


def test_16_tokens_unless_told_otherwise():
    service = make(endless)
    assert choice(complete(service))["finish_reason"] == "length"
    assert service.worker.requests[0].max_tokens == 16


def test_ignore_eos():
    service = make(saying(" a<|endoftext|> b"))
    assert choice(complete(service, max_tokens=3, ignore_eos=True))["text"] == " a b"


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ([1, 2, 3], 1),
        ([[1, 2], [3]], 2),
        (["a", "b", "c"], 3),
        (["a", [1, 2]], 2),
    ],
)
def test_kinds_of_prompts(prompt, texts):
    service = make()
    body = complete(service, prompt=prompt).json()
    assert [each["index"] for each in body["choices"]] == list(range(texts))
    assert len(service.worker.requests) == texts


def test_a_text_is_encoded_in_a_thread_and_ids_are_read_at_once(monkeypatch):
    """Handing a few thousand ids to a thread takes as long as checking them."""
    threads, to_thread = [], asyncio.to_thread

    async def counted(function, *arguments):
        threads.append(arguments[0]["prompt"])
        return await to_thread(function, *arguments)

    monkeypatch.setattr(asyncio, "to_thread", counted)
    prompts = ["a", [1, 2, 3], ["a", "b"], [[1], [2]], [5] * 300]
    for prompt in prompts:
        assert complete(make(), prompt=prompt).status_code == 200
    assert complete(make(), prompt=[1, 2], echo=True, max_tokens=1).status_code == 200
    assert threads == ["a", ["a", "b"], [[1], [2]], [1, 2]]


def test_choices_have_seeds_of_their_own():
    service = make(saying(" a<|endoftext|>", " b<|endoftext|>", " c<|endoftext|>", " d<|endoftext|>"))
    body = complete(service, prompt=["x", "y"], n=2, seed=41).json()
    assert [each["text"] for each in body["choices"]] == [" a", " b", " c", " d"]
    assert [request.params.seed for request in service.worker.requests] == [41, 42, 41, 42]
    assert body["usage"]["prompt_tokens"] == 2


def test_a_stop_string_ends_the_request():
    service = make(lambda request: [*ids(" one two three"), 10.0])
    found = choice(complete(service, stop="o th", max_tokens=300))
    assert (found["text"], found["finish_reason"]) == (" one tw", "stop")
    assert len(service.worker.cancelled) == 1
    assert service.worker.open == {}


@pytest.mark.parametrize("route", ["completions", "chat/completions", "responses"])
def test_megabytes_are_refused_before_they_are_encoded(monkeypatch, route):
    """A tokenizer takes most of a minute for ten of them."""
    text = "the old king " * 400_000
    message = {"role": "user", "content": [{"type": "text", "text": text}]}
    fields = {
        "completions": {"prompt": text},
        "chat/completions": {"messages": [message]},
        "responses": {"input": text},
    }
    encode = Tokenizer.encode

    def short(self, text, **options):
        assert len(text) < 10_000
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", short)
    error = fault(post(make(name=GPT_OSS), f"/v1/{route}", fields[route]))
    assert error["code"] == "context_length_exceeded"
    assert re.search(r"has 52000\d\d characters, at least \d+ tokens, but max_length is 400", error["message"])


def test_what_was_not_read_again_counts_once_a_prompt():
    usage = complete(make(), prompt=["Once upon a time", "The old king went"], n=3).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}  # the worker says 2 of each row


def test_a_stream():
    chunks = events(complete(make(), stream=True, stream_options={"include_usage": True}))
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks}) == 1
    *parts, last = chunks
    assert [part["choices"][0]["text"] for part in parts] == [" there", " was", ""]
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None, None, "stop"]
    assert all(part["usage"] is None for part in parts)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert all("usage" not in chunk for chunk in events(complete(make(), stream=True)))


def test_a_stream_is_the_answer_in_pieces():
    fields = {"prompt": ["x", "y"], "n": 2, "echo": True, "logprobs": 1, "seed": 5}

    def script(request):
        return ids(f" {request.params.seed} \u00e9\U0001f600<|endoftext|>")

    whole = complete(make(script), **fields).json()["choices"]
    pieces = [part["choices"][0] for part in events(complete(make(script), stream=True, **fields))]
    for index in range(4):
        assert "".join(all_of(pieces, "text", index)) == whole[index]["text"]
        logprobs = all_of(pieces, "logprobs", index)
        for name, values in whole[index]["logprobs"].items():
            assert [each for part in logprobs for each in part[name]] == values


def test_a_batch_larger_than_the_queue():
    service = make()
    service.worker.room = 2
    body = complete(service, prompt=["a"] * 9).json()
    assert [each["text"] for each in body["choices"]] == [" there was"] * 9


@pytest.mark.parametrize(("kind", "status"), [("not_finite", 500), ("died", 503), ("drained", 503)])
def test_a_request_that_fails(kind, status):
    service = make(lambda request: [*ids(" a"), Failed("it broke", kind)])
    error = fault(complete(service), status)
    assert (error["message"], error["code"]) == ("it broke", kind)
    *parts, last = events(complete(service, stream=True))
    assert [part["choices"][0]["text"] for part in parts] == [" a"]
    assert last["error"]["message"] == "it broke"


def test_one_failure_ends_the_others():
    def script(request):
        return [Failed("it broke", "not_finite")] if request.prompt_ids == (1,) else endless(request)

    service = make(script)
    fault(complete(service, prompt=[[2], [1], [3]], max_tokens=300), 500)
    asyncio.run(until(lambda: not service.worker.open))
    assert len(service.worker.cancelled) == 2


def test_a_long_prompt_is_refused_with_both_numbers():
    error = fault(complete(make(), prompt=[1] * 401))
    assert error["code"] == "context_length_exceeded"
    assert "401" in error["message"] and "400" in error["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_request(stream):
    service = make(endless)

    async def run():
        body = b'{"prompt": "a", "max_tokens": 390, "stream": %s}' % (b"true" if stream else b"false")
        left, sent, messages = asyncio.Event(), [], [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop(0)
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = httpx_scope("/v1/completions")
        running = asyncio.ensure_future(app.build(service)(scope, receive, send))
        await until(lambda: bool(service.worker.open))
        await asyncio.sleep(0.05)
        left.set()
        await asyncio.wait_for(running, 60)
        await until(lambda: not service.worker.open)
        assert len(service.worker.cancelled) == 1
        return sent

    sent = asyncio.run(run())
    assert b"[DONE]" not in b"".join(message.get("body", b"") for message in sent)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_client_that_does_not_read_is_cut(at_once):
    service = make(endless, send_seconds=0.05)
    cut = []

    async def run():
        messages = [{"type": "http.request", "body": b'{"prompt": "a", "max_tokens": 390, "stream": true}'}]

        async def receive():
            return messages.pop(0) if messages else await asyncio.Event().wait()

        async def send(message):
            if at_once or message.get("body"):
                await asyncio.Event().wait()

        scope = httpx_scope("/v1/completions") | {"extensions": {"gptjax.abort": lambda: cut.append(True)}}
        await asyncio.wait_for(app.build(service)(scope, receive, send), 60)
        await until(lambda: not service.worker.open)

    asyncio.run(run())
    assert cut == [True]
    assert len(service.worker.cancelled) == 1


def test_a_silent_stream_has_comments():
    service = make(lambda request: [1.0, *ids(" a<|endoftext|>")], ping_seconds=0.03)
    assert complete(service, stream=True).text.startswith(": ping\n\n")


def httpx_scope(path):
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [],
        "query_string": b"",
        "scheme": "http",
        "server": ("server", 80),
        "client": ("client", 1),
        "root_path": "",
        "http_version": "1.1",
    }


def test_special_tokens_in_a_text_are_those_tokens():
    """Raw completions are raw."""
    service = make(name=GPT_OSS)
    for prompt in (RAW, [RAW, RAW]):
        assert complete(service, prompt=prompt, model=GPT_OSS).status_code == 200
        assert list(service.worker.requests[-1].prompt_ids) == ids(RAW, GPT_OSS)
    special = set(tokenizer(GPT_OSS).special_ids.values())
    assert len([token for token in service.worker.requests[-1].prompt_ids if token in special]) == 4
    assert complete(service, prompt=RAW, parse_special=False).status_code == 200
    assert list(service.worker.requests[-1].prompt_ids) == tokenizer(GPT_OSS).encode(RAW)
    assert fault(complete(service, parse_special="no"))["param"] == "parse_special"


def test_a_stop_that_is_a_special_token_ends_the_text():
    """As text it never comes: special tokens are not part of an answer."""
    end = tokenizer(GPT_OSS).special_ids["<|end|>"]
    service = make(saying(" there was<|end|> and more<|return|>", name=GPT_OSS), name=GPT_OSS)
    for stop in ("<|end|>", ["x", "<|end|>"]):
        choice_ = choice(complete(service, prompt=RAW, stop=stop))
        assert (choice_["text"], choice_["finish_reason"]) == (" there was", "stop")
        assert end in service.worker.requests[-1].stop_ids
    complete(service, prompt=RAW, stop="<|end|>", parse_special=False)
    assert end not in service.worker.requests[-1].stop_ids
