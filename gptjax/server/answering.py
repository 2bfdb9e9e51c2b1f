"""From a request to its answer, whole or as events: shared by the routes that run the model."""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from gptjax.server.body import reading
from gptjax.server.service import Service
from gptjax.server.sse import EventStream, Streamed, json_response, unless_gone

Asked = TypeVar("Asked")


class Answer(Streamed, Protocol):
    """The answer to a request."""

    @property
    def streams(self) -> bool:
        """Whether the client asked for a stream of events."""

    def start(self) -> None:
        """Submits the prompts. Raises `ApiError`."""

    async def whole(self) -> dict[str, Any]:
        """Returns it in one piece."""


async def answered(
    request: Request,
    read: Callable[[dict[str, Any], Service], Asked],
    make: Callable[[Service, Asked], Answer],
) -> Response:
    """Answers a request with `make(service, read(values, service))`; `values` is its parsed body."""
    service: Service = request.app.state.service
    async with reading(request, service) as values:
        # Encoding a long text takes time, and others are waiting.
        answer = make(service, await asyncio.to_thread(read, values, service))
        answer.start()
    if answer.streams:
        return EventStream(answer, service)
    try:
        return json_response(await unless_gone(request, answer.whole()))
    finally:
        answer.close()
