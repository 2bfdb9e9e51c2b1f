"""A connection that is cut if its client keeps it without using it."""

import asyncio
import functools
import socket
import struct
from collections.abc import Callable
from typing import Any, Final

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptjax.server.http.sse import ABORT

_LOOKS: Final = 10  # at an idle connection before it is cut


class Connection(H11Protocol):
    """uvicorn's, with a limit where that waits forever: for a request's head, and for a client to read an answer.

    The application can cut the connection too.
    """

    def __init__(self, *arguments: Any, seconds: float, **named: Any) -> None:
        """`seconds`: how long a client may neither send a request nor read any of an answer."""
        super().__init__(*arguments, **named)
        self._between = seconds / _LOOKS
        self._idle = 0  # looks in a row at which nothing had changed
        self._before: tuple[object, int] = None, 0
        self._next: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Starts watching."""
        super().connection_made(transport)
        self.app = _with_abort(self.app, functools.partial(_abort, transport))
        self._next = self.loop.call_later(self._between, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops watching."""
        if self._next is not None:
            self._next.cancel()
        super().connection_lost(exc)

    def cut(self) -> None:
        """Closes the connection now."""
        _abort(self.transport)

    def _look(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        answering = self.cycle is not None and not self.cycle.response_complete
        now = self.cycle, unsent
        self._idle = self._idle + 1 if now == self._before and (unsent or not answering) else 0
        self._before = now
        if self._idle < _LOOKS:
            self._next = self.loop.call_later(self._between, self._look)
        else:
            self.cut()


def _abort(transport: Any) -> None:
    """Ends a connection now; closing it would wait until the client has read everything written to it."""
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _with_abort(application: Any, abort: Callable[[], None]) -> ASGIApp:
    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("extensions", {})[ABORT] = abort
        await application(scope, receive, send)

    return wrapped
