"""Runs the server, until it is asked to end or its worker dies. It does not matter where the worker is."""

import asyncio
import contextlib
import functools
import gc
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Final, cast

import uvicorn

from gptjax.errors import GptjaxError
from gptjax.server.front import app
from gptjax.server.generation.served import Served
from gptjax.server.generation.service import Service
from gptjax.server.http.connection import Connection
from gptjax.server.http.metrics import Metrics
from gptjax.server.http.origins import is_address
from gptjax.server.ipc.events import AnyWorker, PromptScores
from gptjax.server.ipc.settings import Facts, Limits
from gptjax.support.processes import share_lock
from gptjax.text import Tokenizer
from gptjax.text.chat_formats import ChatFormat, choose_format

_LAST_WORDS: Final = 3.0  # seconds to keep answering after the worker died, so that /health can report it
_TO_END_STREAMS: Final = 5.0  # seconds to send the rest of them, after the worker has drained
_TICK: Final = 0.1  # seconds
_log = logging.getLogger(__name__)


def make_service(
    worker: AnyWorker,
    facts: Facts,
    tokenizer: Tokenizer | GptjaxError,
    chat_format: str | None = None,
    *,
    score: Callable[[Sequence[int], int], PromptScores],
    memory_in_use: Callable[[], int],
    limits: Limits,
) -> Service:
    """The service of a model, its worker not yet started.

    Args:
      tokenizer: or why there is none.
      chat_format: the name of the format of conversations; None recognises it by the tokenizer.
    """
    format_ = tokenizer if isinstance(tokenizer, GptjaxError) else _chat_format(tokenizer, chat_format)
    if isinstance(tokenizer, GptjaxError):
        _log.warning("only token ids can be sent: %s", tokenizer)
    served = Served(
        **vars(facts),
        tokenizer=None if isinstance(tokenizer, GptjaxError) else tokenizer,
        chat_format=format_,
        score=score,
        memory_in_use=memory_in_use,
    )
    return Service(worker, served, limits, Metrics(lambda: worker.state, memory_in_use))


def _chat_format(tokenizer: Tokenizer, name: str | None) -> ChatFormat | GptjaxError:
    try:
        return choose_format(tokenizer, name)
    except GptjaxError as error:
        return error


def run(server: "Server") -> int:
    """Serves until `handle_exit` is called. Returns the exit status: 0, or 1 if the worker died or the port is taken.

    The process must have nothing else to do.
    """
    share_lock()
    server.has_process = True
    try:
        server.run()
    except SystemExit as error:  # it could not start; the log says why
        return 1 if error.code else 0
    return server.status


def make_server(
    service: Service,
    *,
    host: str,
    port: int,
    drain_seconds: float,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
    log_config: dict[str, Any] | None = None,
) -> "Server":
    """A server that is not running yet."""
    local = host == "localhost" or is_address(host, local=True)
    if not local and api_key is None:
        _log.warning("anyone who can reach %s can use this server: it has no API key", host)
    config = uvicorn.Config(
        app.build(service, api_key=api_key, cors_origins=cors_origins, local=local),
        host=host,
        port=port,
        http=functools.partial(Connection, seconds=service.limits.send_seconds),  # type: ignore[arg-type]
        ws="none",
        log_config=log_config,
        server_header=False,
        proxy_headers=False,  # keeps addresses that clients made up out of the log
        # A last resort: `Server` cuts all connections before that.
        timeout_graceful_shutdown=int(drain_seconds + 2 * _TO_END_STREAMS),
    )
    return Server(config, service, drain_seconds)


class Server(uvicorn.Server):
    """uvicorn's; it also drains the worker before it ends, and ends when the worker dies.

    Attributes:
      status: the exit status.
      has_process: whether nothing else is done in this process, so that its settings can be the server's.
    """

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self.status = 0
        self.has_process = False
        self._service = service
        self._drain_seconds = drain_seconds
        self._died: float | None = None
        self._announced = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins the shutdown: streams continue a while, then end with an error. A second SIGINT ends them at once."""
        if not self._service.draining.is_set():
            self._service.draining.set()
            threading.Thread(target=self._service.drain, args=(self._drain_seconds,), daemon=True).start()
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Does nothing: signals come to the engine's process, which calls `handle_exit` from there."""
        yield

    def _when_compiled(self) -> None:
        """Says so, and freezes what compiling left since the server was ready."""
        if self._service.worker.wait_until_compiled():
            _log.info("all programs are compiled after %.0f s", time.monotonic() - self._service.began)
        gc.freeze()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for open connections, and cuts those whose clients do not read."""
        cutting = asyncio.ensure_future(self._cut())
        try:
            await super().shutdown(sockets)
            if self.force_exit:  # uvicorn then skips this, and logs each request and this as cancelled
                self._cut_all()
                if self.server_state.tasks:
                    await asyncio.wait(self.server_state.tasks, timeout=_TO_END_STREAMS)
                await self.lifespan.shutdown()
        finally:
            cutting.cancel()

    async def _cut(self) -> None:
        until = time.monotonic() + self._drain_seconds + _TO_END_STREAMS
        while not self.force_exit and time.monotonic() < until:
            await asyncio.sleep(_TICK)
        self._cut_all()

    def _cut_all(self) -> None:
        for connection in list(self.server_state.connections):
            cast(Connection, connection).cut()

    async def on_tick(self, counter: int) -> bool:
        """Whether to end; called ten times a second."""
        state, served = self._service.worker.state, self._service.served
        if state.ready and not self._announced:
            self._announced = True
            if self.has_process:
                # Or the garbage collector would go through what compiling left, with all streams waiting for a second.
                gc.collect()
                gc.freeze()
                threading.Thread(target=self._when_compiled, daemon=True).start()
            seconds = time.monotonic() - self._service.began
            _log.info(
                "%s is ready after %.0f s: %d slots of %d tokens", served.name, seconds, state.slots, served.max_length
            )
        if state.error is not None and self._died is None:
            _log.error("the worker died: %s", state.error)
            self._died, self.status = time.monotonic(), 1
        if self._died is not None and time.monotonic() - self._died > _LAST_WORDS:
            return True
        return await super().on_tick(counter)
