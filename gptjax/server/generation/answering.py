"""From a request to its answer, whole or as events: shared by the routes that run the model."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from gptjax.server.generation.service import Service
from gptjax.server.http.body import parse_body, read_body
from gptjax.server.http.sse import EventStream, Streamed, json_response, unless_gone

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


@contextlib.asynccontextmanager
async def reading(request: Request, service: Service) -> AsyncIterator[dict[str, Any]]:
    """The object in a request's body; holds a place in the queue until the request is submitted or refused.

    Raises:
      ApiError: the body is too large (413, or 429 together with others), too slow (408), or not a JSON object (400).
      ClientGone: the client left.
      QueueFull, Unavailable: no place is free; the body is not parsed, so refusing is cheap.
    """
    with service.body() as grow:
        data = await read_body(request, service.limits, grow)
        with service.place():
            yield await parse_body(data, service.parser)


async def answered(
    request: Request,
    read: Callable[[dict[str, Any], Service], Asked],
    make: Callable[[Service, Asked], Answer],
    *,
    is_quick: Callable[[dict[str, Any]], bool] = lambda values: False,
    stream: type[EventStream] = EventStream,
) -> Response:
    """Answers a request with `make(service, read(values, service))`; `values` is its parsed body.

    A body that `is_quick` is read at once: a thread would take as long, and make others wait as well. Otherwise others
    go on meanwhile, as encoding a long text takes time.
    """
    service: Service = request.app.state.service
    async with reading(request, service) as values:
        asked = read(values, service) if is_quick(values) else await asyncio.to_thread(read, values, service)
        answer = make(service, asked)
        answer.start()
    if answer.streams:
        return stream(answer, service.limits, service.metrics)
    try:
        return json_response(await unless_gone(request, answer.whole()))
    finally:
        answer.close()
