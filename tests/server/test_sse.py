"""Events, as clients read them, and the end of a stream whose client is in trouble."""

import asyncio
import json

import httpx2
import pytest

from gptjax.engine.request import Request, SamplingParams
from gptjax.server.errors import ApiError
from gptjax.server.generation import generation
from gptjax.server.http.sse import EventStream, encode
from tests.server.server_material import make, until


@pytest.mark.parametrize("end", ["\n", "\r", "\x85", "\u2028", "\u2029", "\x1c"])
def test_no_character_ends_an_event_for_a_client_that_reads_lines(end):
    data = encode({"text": f"a{end}b"})
    assert list(httpx2.Response(200, content=data).iter_lines()) == [data.decode()]
    assert json.loads(data) == {"text": f"a{end}b"}


@pytest.mark.parametrize("leaves", [False, True])
def test_a_stream_is_closed_though_a_client_takes_no_ping(leaves):
    """The next object is being waited for when the stream comes to its end."""
    happened, gone = [], asyncio.Event()

    class Answer:
        async def stream(self):
            try:
                yield {}
                await asyncio.sleep(60)
            finally:
                happened.append("objects are closed")

        def close(self):
            happened.append("requests are cancelled")

    async def send(message):
        if message.get("body", b"").startswith(b": ping"):
            if leaves:
                gone.set()
            await asyncio.sleep(60)

    async def receive():
        await gone.wait()
        return {"type": "http.disconnect"}

    service = make(send_seconds=0.3, ping_seconds=0.05)
    stream = EventStream(Answer(), service.limits, service.metrics)
    asyncio.run(asyncio.wait_for(stream({}, receive, send), 60))
    assert sorted(happened) == ["objects are closed", "requests are cancelled"]


def _stream(answer):
    service = make()
    return EventStream(answer, service.limits, service.metrics)


async def _never():
    await asyncio.Event().wait()


def test_events_that_come_together_are_sent_together():
    sent = []

    class Answer:
        async def stream(self):
            for number in range(5):
                yield {"n": number}
            await asyncio.sleep(0.05)
            yield {"n": 5}

        def close(self):
            pass

    async def send(message):
        sent.append(message.get("body"))

    asyncio.run(asyncio.wait_for(_stream(Answer())({}, _never, send), 60))
    together = b"".join(b'data: {"n":%d}\n\n' % number for number in range(5))
    assert sent == [None, together, b'data: {"n":5}\n\n', b"data: [DONE]\n\n"]


def test_a_client_that_takes_nothing_has_little_made_for_it():
    """No more than 64 KiB of events, whatever there is to send; and all of it once the client takes some."""
    made, sent, takes = [], [], asyncio.Event()

    class Answer:
        async def stream(self):
            for number in range(100):
                made.append(number)
                yield {"text": "x" * 10_000, "n": number}

        def close(self):
            pass

    async def send(message):
        if message.get("body"):
            await takes.wait()
        sent.append(message.get("body") or b"")

    async def run():
        streaming = asyncio.ensure_future(_stream(Answer())({}, _never, send))
        for _ in range(200):
            await asyncio.sleep(0)
        assert 0 < len(made) < 20
        takes.set()
        await streaming

    asyncio.run(asyncio.wait_for(run(), 60))
    assert [line for line in b"".join(sent).splitlines() if line] == [
        *(encode({"text": "x" * 10_000, "n": number}).join([b"data: ", b""]) for number in range(100)),
        b"data: [DONE]",
    ]


def test_a_client_that_stays_behind_is_given_up(monkeypatch):
    """Tokens that nobody takes would fill the memory: a client may take just enough not to be cut."""
    monkeypatch.setattr(generation, "_MOST_BEHIND", 10)
    service = make(lambda request: [5, 0.1, *[6] * 300])
    found = []

    async def run():
        request = Request((5,), 390, SamplingParams())
        rows = generation.Generation(service, [generation.Row(request, None, lambda chunk: chunk.token_id)])
        rows.start()
        async for _, tokens in rows.results():
            found.extend(tokens)
            await until(lambda: not service.worker.open)

    with pytest.raises(ApiError, match="behind") as error:
        asyncio.run(run())
    assert error.value.code == "too_slow"
    assert found == [5, *[6] * (len(found) - 1)]
    assert 10 <= len(found) < 300
