"""One streamed completion over HTTP, with the time at which each of its events arrived.

A load generator must not be what is slow. So this reads its own sockets, and leaves the JSON of an event alone unless
the event has the usage or an error: a general client, which parses each event, takes several times as long.
"""

import asyncio
import dataclasses
import json
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import SplitResult

_LONGEST_MESSAGE = 200  # characters of a server's error that are kept


@dataclasses.dataclass
class Record:
    """What became of a request. Times are those of `time.monotonic`, in seconds."""

    began: float
    events: list[float] = dataclasses.field(default_factory=list)  # when each with text arrived
    ended: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt
    output_tokens: int = 0
    error: str | None = None


class Endpoint:
    """A server's address, and what every request to it needs."""

    def __init__(self, url: SplitResult, api_key: str | None):
        """An endpoint below `url`, such as http://localhost:8000/v1."""
        assert url.hostname is not None
        self.host, self.secure = url.hostname, url.scheme == "https"
        self.port = url.port or (443 if self.secure else 80)
        self._path = url.path.rstrip("/")
        self._headers = f"Host: {url.netloc.rpartition('@')[2]}\r\nConnection: close\r\n"
        if api_key:
            self._headers += f"Authorization: Bearer {api_key}\r\n"

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        """The bytes of a request; its connection is closed after the answer."""
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(content)}\r\n"
        return (head + ("Content-Type: application/json\r\n" if content else "") + "\r\n").encode() + content

    def completion(self, body: dict[str, Any]) -> bytes:
        """The bytes of a request for a completion."""
        return self.request("POST", "/completions", body)


async def completion(endpoint: Endpoint, request: bytes, *, timeout: float) -> Record:
    """Sends `Endpoint.completion`'s request and reads the stream to its end. Errors are part of the record."""
    record = Record(time.monotonic())
    try:
        async with asyncio.timeout(timeout):
            await _read(endpoint, request, record)
    except TimeoutError:
        record.error = f"no end after {timeout:.0f} s"
    except (OSError, ValueError) as error:
        record.error = f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE]
    record.ended = time.monotonic()
    if record.error is None and not record.output_tokens:
        record.error = "the stream ended without a usage"
    return record


async def answer(endpoint: Endpoint, method: str, path: str) -> bytes:
    """The body of a short answer. Raises `OSError` or `ValueError` if there is none."""
    response = await _exchanged(endpoint, Response(lambda part, now: None), lambda: endpoint.request(method, path))
    if response.status != 200:
        raise ValueError(f"HTTP {response.status}")
    return bytes(response.kept)


async def _read(endpoint: Endpoint, request: bytes, record: Record) -> None:
    def begun() -> bytes:
        record.began = time.monotonic()  # a connection's time is not the server's
        return request

    response = await _exchanged(endpoint, Response(Events(record).take), begun)
    if response.status != 200:
        record.error = f"HTTP {response.status}: {_message(bytes(response.kept))}"


async def _exchanged(endpoint: Endpoint, response: "Response", request: Callable[[], bytes]) -> "Response":
    """The response to a request, when it has arrived and its connection is closed."""
    context = ssl.create_default_context() if endpoint.secure else None
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(lambda: response, endpoint.host, endpoint.port, ssl=context)
    try:
        transport.write(request())
        await response.finished
    finally:
        transport.close()
        await response.closed
    return response


def _message(body: bytes) -> str:
    """What an error's body says."""
    text = body.decode(errors="replace")
    try:
        said = json.loads(text)["error"]
        text = said["message"] if isinstance(said, dict) else str(said)
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:_LONGEST_MESSAGE]


class Events:
    """Server-sent events, cut out of a body that arrives in parts."""

    def __init__(self, record: Record):
        """Events that are added to a record."""
        self._record = record
        self._rest = b""

    def take(self, part: bytes, now: float) -> None:
        """Takes the next bytes of the body, which arrived at `now`."""
        *events, self._rest = (self._rest + part).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data:").strip()
            if event.startswith(b"data:") and data != b"[DONE]":
                self._event(data, now)

    def _event(self, data: bytes, now: float) -> None:
        if b'"usage":{' in data or b'"usage": {' in data or b'"error"' in data:
            self._special(data)
        if b'"choices":[]' not in data and b'"choices": []' not in data:
            self._record.events.append(now)

    def _special(self, data: bytes) -> None:
        record, event = self._record, json.loads(data)
        if event.get("error"):
            record.error = _message(data)
        if usage := event.get("usage"):
            record.prompt_tokens, record.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


class Response(asyncio.Protocol):
    """An HTTP/1.1 answer on a connection of its own. Its body goes to `take`, or is kept if the status is an error."""

    def __init__(self, take: Callable[[bytes, float], None]):
        """An answer that is still to come."""
        loop = asyncio.get_running_loop()
        self.finished: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.status = 0
        self.kept = bytearray()  # an answer that is not a stream of events
        self._take = take
        self._head: bytearray | None = bytearray()
        self._body: _Chunked | _Plain
        self._streams = False

    def data_received(self, data: bytes) -> None:
        """asyncio's call."""
        now = time.monotonic()
        if self.finished.done():
            return
        try:
            if self._head is not None:
                self._head += data
                head, found, data = bytes(self._head).partition(b"\r\n\r\n")
                if not found:
                    return
                self._begin(head)
            for part in self._body.parts(data):
                if self._streams:
                    self._take(part, now)
                else:
                    self.kept += part
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            self._fail(ValueError(f"an answer that is not HTTP or not OpenAI's: {error!r}"))
            return
        if self._body.ended and not self.finished.done():
            self.finished.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's call."""
        self.closed.set_result(None)
        if self.finished.done():
            return
        if exc is None and self._head is None and isinstance(self._body, _Plain) and self._body.left is None:
            self.finished.set_result(None)  # an answer without a length ends with its connection
        else:
            self._fail(ConnectionError("the connection was lost before the answer's end"))

    def _begin(self, head: bytes) -> None:
        self._head = None
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split()[1])
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._streams = self.status == 200 and headers.get("content-type", "").startswith("text/event-stream")
        if headers.get("transfer-encoding", "").lower() == "chunked":
            self._body = _Chunked()
        else:
            self._body = _Plain(int(headers["content-length"]) if "content-length" in headers else None)

    def _fail(self, error: Exception) -> None:
        if not self.finished.done():
            self.finished.set_exception(error)


class _Plain:
    """A body of a known length, or one that lasts as long as its connection."""

    def __init__(self, length: int | None):
        self.left = length

    @property
    def ended(self) -> bool:
        return self.left == 0

    def parts(self, data: bytes) -> Sequence[bytes]:
        if self.left is not None:
            data = data[: self.left]
            self.left -= len(data)
        return [data] if data else []


class _Chunked:
    """A body in chunks, each after a line with its length."""

    def __init__(self) -> None:
        self.ended = False
        self._rest = b""

    def parts(self, data: bytes) -> Sequence[bytes]:
        """The whole chunks that have arrived."""
        data, found = self._rest + data, []
        while not self.ended:
            line, complete, after = data.partition(b"\r\n")
            if not complete:
                break
            size = int(line.split(b";")[0], 16)
            if len(after) < size + 2:
                break
            found.append(after[:size])
            data, self.ended = after[size + 2 :], size == 0
        self._rest = data
        return found
