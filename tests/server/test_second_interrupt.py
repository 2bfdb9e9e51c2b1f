"""A second Ctrl-C cuts all requests, and waits until they have ended: uvicorn alone would log them as crashed."""

import asyncio
import logging
import signal
import time

import httpx2
import pytest

from gptjax.server.openai import completions
from tests.server.server_material import endless, make, running, wait_for


def test_requests_that_are_cut_are_waited_for(monkeypatch, caplog):
    """Even one that takes a moment to end."""
    ended = []
    original = completions.Answer.stream

    async def stream(self):
        try:
            async for each in original(self):
                yield each
        finally:
            await asyncio.sleep(0.5)
            ended.append(self)

    monkeypatch.setattr(completions.Answer, "stream", stream)
    service = make(endless)
    body = {"prompt": "a", "stream": True, "max_tokens": 390}
    with caplog.at_level(logging.ERROR), running(service, drain_seconds=600) as (server, address):
        with httpx2.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
            next(lines := response.iter_lines())
            began = time.monotonic()
            for _ in range(2):
                server.handle_exit(signal.SIGINT, None)
            with pytest.raises(httpx2.TransportError):
                list(lines)
        wait_for(lambda: ended)
    assert time.monotonic() - began < 60  # not --drain's 600
    assert len(ended) == 1 and service.worker.cancelled
    assert not caplog.records
