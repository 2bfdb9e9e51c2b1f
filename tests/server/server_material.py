"""A server around a fake worker, and ways to ask it."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from gptjax.config import GenerationDefaults
from gptjax.engine import steps
from gptjax.engine.request import Request
from gptjax.errors import GptjaxError
from gptjax.server.front import app, serving
from gptjax.server.generation.served import Served
from gptjax.server.generation.service import Service
from gptjax.server.http.metrics import Metrics
from gptjax.server.ipc.events import Failed
from gptjax.server.ipc.settings import Limits
from gptjax.server.worker import hosting, scoring
from gptjax.server.worker.worker import Worker
from gptjax.text import Tokenizer, load_tokenizer
from gptjax.text.chat_formats import ChatFormat, choose_format
from tests.server.fake_worker import FakeWorker, score
from tests.server.worker_material import remote

DEMO = Path(__file__).resolve().parents[2] / "gptjax" / "demo"
GPT2, GPT_OSS = "gpt2-tales", "gpt-oss-tales"
MAX_LENGTH = 400


@cache
def tokenizer(name: str = GPT2) -> Tokenizer:
    return load_tokenizer(DEMO / name)


def chat_format(text: Tokenizer) -> ChatFormat | GptjaxError:
    try:
        return choose_format(text)
    except GptjaxError as error:
        return error


def ids(text: str, name: str = GPT2) -> list[int]:
    return tokenizer(name).encode(text, special=True)


def saying(*texts: str, name: str = GPT2) -> Callable[[Request], list[int]]:
    """A script: each request gets the tokens of the next text, the last one again and again."""
    left = list(texts)

    def script(_: Request) -> list[int]:
        return ids(left.pop(0) if len(left) > 1 else left[0], name)

    return script


def endless(_: Request):
    """Takes seconds to fill a row, so that a busy machine cancels it before."""
    while True:
        yield ids(" a")[0]
        yield 0.05


def make(
    script: Any = None,
    *,
    name: str = GPT2,
    text: Tokenizer | None = None,
    aliases: Sequence[str] = (),
    max_length: int = MAX_LENGTH,
    **limits: float,
) -> Service:
    """A server of a demo, or of a model with the tokenizer `text`."""
    text = text or tokenizer(name)
    worker = FakeWorker(script or saying(" there was<|endoftext|>", name=name), max_length=max_length)
    served = Served(
        name=name,
        aliases=tuple(aliases),
        tokenizer=text,
        chat_format=chat_format(text),
        defaults=GenerationDefaults(),
        eos_ids=text.eos_ids,
        vocab_size=text.vocab_size,
        max_length=max_length,
        quant_kind="F32",
        tokenizer_kind="hf-json",
        score=score,
        memory_in_use=lambda: 1234,
        created=1700000000,
    )
    return Service(worker, served, Limits(**limits), Metrics(lambda: worker.state, served.memory_in_use))


async def answer(
    service: Service, method: str, path: str, *, options: dict[str, Any] | None = None, **more: Any
) -> httpx2.Response:
    """One request to a server of its own; an exception there is the 500 that clients see."""
    transport = httpx2.ASGITransport(app.build(service, **(options or {})), raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
        return await asyncio.wait_for(client.request(method, path, **more), 60)


def ask(service: Service, method: str, path: str, **more: Any) -> httpx2.Response:
    """`answer` in an event loop of its own, where most of the time goes into that and its threads."""
    return asyncio.run(answer(service, method, path, **more))


def complete(service: Service, **fields: Any) -> httpx2.Response:
    return post(service, "/v1/completions", {"prompt": "Once upon a time"} | fields)


def chat(service: Service, **fields: Any) -> httpx2.Response:
    return post(service, "/v1/chat/completions", {"messages": [USER]} | fields)


def post(service: Service, path: str, body: Any) -> httpx2.Response:
    return ask(service, "POST", path, content=json.dumps(body))


USER = {"role": "user", "content": "Hello"}


def events(response: httpx2.Response) -> list[dict[str, Any]]:
    """The objects of a stream, whose form is checked."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream"
    *lines, end, nothing = response.text.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def fault(response: httpx2.Response, status: int = 400) -> dict[str, Any]:
    """The error object of an answer, whose form is checked."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    return body["error"]


def samples(service: Service) -> dict[tuple[str, ...], float]:
    """What `/metrics` says, by names and label values."""
    response = ask(service, "GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            found[sample.name, *sorted(sample.labels.values())] = sample.value
    return found


def until(holds: Callable[[], bool], seconds: float = 60) -> Any:
    """Waits, in a coroutine, for what another thread does."""

    async def wait() -> None:
        for _ in range(int(seconds * 100)):
            if holds():
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it did not come")

    return wait()


def all_of(choices: Sequence[dict[str, Any]], field: str, index: int = 0) -> list[Any]:
    return [choice[field] for choice in choices if choice["index"] == index]


@contextlib.contextmanager
def running(service, drain_seconds=5.0):
    """The server in a thread; its address."""
    server = serving.make_server(service, host="127.0.0.1", port=0, drain_seconds=drain_seconds)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield server, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def fail_all(worker):
    """What the real worker does at the end of `drain`."""
    for ticket in list(worker.open):
        worker.fail(ticket, Failed("the server is shutting down", "drained"))


def wait_for(holds, seconds=120):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.01)


@contextlib.contextmanager
def served(lm, name, *, max_queue=64, chunk=steps.CHUNK, far=False):
    """A server of a model that is warm, in this process, and its address. `far`: with the worker behind a channel."""
    worker = Worker(lm, max_queue=1 << 60 if far else max_queue, chunk=chunk)
    facts, score = hosting.facts_of(lm, name), partial(scoring.score, lm)
    in_use = hosting.memory_in_use(lm)
    with contextlib.ExitStack() as stack:
        if far:
            worker.start()
            stack.callback(worker.stop)
            worker = stack.enter_context(remote(worker, facts, max_queue=max_queue, score=score))
            score = worker.score
        service = serving.make_service(worker, facts, lm.tokenizer, score=score, memory_in_use=in_use, limits=Limits())
        server, address = stack.enter_context(running(service))
        service.worker.wait_until_ready()
        yield server, address


def choice(response, index=0):
    assert response.status_code == 200, response.text
    return response.json()["choices"][index]


RAW = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
