"""Answers as JSON, and as server-sent events, for clients that may leave or stop reading."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Coroutine, Iterable
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from gptjax.server.errors import ApiError, internal
from gptjax.server.http.metrics import Metrics
from gptjax.server.ipc.settings import Limits

ABORT = "gptjax.abort"  # in a scope's extensions: cuts the connection without waiting for the client
_MOST_PENDING = 1 << 16  # bytes that wait for a client to take them
_HEADERS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
# Many clients, httpx's `iter_lines` among them, end a line here, and so an event's data.
_LINE_ENDS = {end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
_encoder = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":"))
_log = logging.getLogger(__name__)
T = TypeVar("T")


class ClientGone(Exception):  # noqa: N818 (a state, not a fault)
    """The client closed its connection before the answer was ready."""


def encode(value: object) -> bytes:
    """JSON as bytes; never NaN, and lone surrogates (which an error may quote) as question marks."""
    text = _encoder.encode(value)
    if not text.isascii():
        for end, escaped in _LINE_ENDS.items():
            text = text.replace(end, escaped)  # `str.translate` takes ten times as long
    return text.encode(errors="replace")


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer in one piece."""
    return Response(encode(value), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """An error as an answer."""
    return json_response(error.body(), error.status, error.headers)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Returns what `work` returns, or raises `ClientGone` if the client leaves first. The body must have been read."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        await _end(working, watching)


class Streamed(Protocol):
    """An answer sent as events."""

    def stream(self) -> AsyncGenerator[object, None]:
        """Yields its objects. Raises `ApiError`."""

    def failure(self, error: ApiError) -> Iterable[object]:
        """The objects that report an error to clients within the stream."""

    def close(self) -> None:
        """Cancels whatever is still running."""


class EventStream(Response):
    """The JSON objects of an answer as events, then `[DONE]`; an error is reported before that.

    The answer is closed at the end, whether it was sent, the client left, or the client was cut because it did not read
    for `send_seconds`.

    Attributes:
      ping: what is sent when there is nothing else, so that the connection stays open.
      end: what is sent at the end.
    """

    ping = b": ping\n\n"
    end = b"data: [DONE]\n\n"

    def __init__(self, answer: Streamed, limits: Limits, metrics: Metrics) -> None:
        super().__init__()
        self.raw_headers = list(_HEADERS)
        self._answer = answer
        self._objects = answer.stream()
        self._limits = limits
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        sending = asyncio.ensure_future(self._send_all(send))
        watching = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except TimeoutError:
            _log.warning("cut a client that did not read for %g seconds", self._limits.send_seconds)
            if (abort := scope.get("extensions", {}).get(ABORT)) is not None:
                abort()
        finally:
            self._answer.close()
            await _end(sending, watching)
            await self._objects.aclose()

    async def _send_all(self, send: Send) -> None:
        async def write(message: Message) -> None:
            async with asyncio.timeout(self._limits.send_seconds):
                await send(message)

        await write({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        pending = _Pending()
        filling = asyncio.ensure_future(self._fill(pending))
        try:
            while (data := await pending.take(self._limits.ping_seconds)) is not None:
                await write({"type": "http.response.body", "body": data or self.ping, "more_body": True})
            await filling  # raises what is no event
        finally:  # at once if a write fails, though the next object is being waited for
            await _end(filling)
        await write({"type": "http.response.body", "body": self.end, "more_body": False})

    async def _fill(self, pending: "_Pending") -> None:
        try:
            async for value in self._objects:
                await pending.put(_event(value))
        except ApiError as error:
            await pending.put(self._failure(error))
        except Exception:
            _log.exception("a stream failed")
            await pending.put(self._failure(internal()))
        finally:
            pending.end()

    def _failure(self, error: ApiError) -> bytes:
        self._metrics.failed(error)
        return b"".join(map(_event, self._answer.failure(error)))


def _event(value: object) -> bytes:
    """An object as an event, named by its type if it has one, as those of `/v1/responses` do."""
    kind = value.get("type") if isinstance(value, dict) else None
    name = b"" if kind is None else b"event: " + kind.encode() + b"\n"
    return name + b"data: " + encode(value) + b"\n\n"


class _Pending:
    """Events that were not sent yet. Those that come together are sent together, as each write costs a system call."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._ended = False
        self._filled, self._taken = asyncio.Event(), asyncio.Event()

    async def put(self, data: bytes) -> None:
        """Adds events, and waits if the client is far behind."""
        self._parts.append(data)
        self._size += len(data)
        self._filled.set()
        while self._size > _MOST_PENDING:
            self._taken.clear()
            await self._taken.wait()

    def end(self) -> None:
        """Notes that no more will come."""
        self._ended = True
        self._filled.set()

    async def take(self, seconds: float) -> bytes | None:
        """All that is pending, once there is anything; b"" if nothing came for so long; None at the end."""
        if not self._filled.is_set():
            try:
                async with asyncio.timeout(seconds):
                    await self._filled.wait()
            except TimeoutError:
                return b""
        data = b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        self._taken.set()
        if not self._ended:
            self._filled.clear()
        return data or None


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancels tasks and waits for them to end, whatever they raise."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
