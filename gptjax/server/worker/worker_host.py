"""A worker whose requests come from another process: the engine's end of it."""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from gptjax.engine.request import Request, Token
from gptjax.errors import GptjaxError, RequestError
from gptjax.server.errors import ApiError, internal
from gptjax.server.ipc.channel import Channel
from gptjax.server.ipc.events import (
    AnyWorker,
    Deliver,
    Event,
    Failed,
    Finished,
    PromptScores,
    Ticket,
    Tokens,
    Unavailable,
)
from gptjax.server.ipc.messages import Cancel, Compiled, Drain, Progress, Score, Scored, Stop, Submit

_BEAT: Final = 0.2  # seconds between states, if there are no events to send them with
_log = logging.getLogger(__name__)


class WorkerHost:
    """Does what a `RemoteWorker` at the other end of a channel asks for, with a worker of this process."""

    def __init__(
        self,
        worker: AnyWorker,
        channel: Channel,
        *,
        score: Callable[[Sequence[int], int], PromptScores],
        memory_in_use: Callable[[], int],
        prepare: Callable[[Request], object] = lambda request: None,
        on_ready: Callable[[], object] = lambda: None,
        on_compiled: Callable[[], object] = lambda: None,
    ) -> None:
        """For a worker that was started, and refuses no request because of its queue.

        Args:
          prepare: called with each request before it is submitted; may take long, and raise `RequestError`.
          on_ready: called once the worker is ready.
          on_compiled: called once it compiles nothing more.
        """
        self._worker = worker
        self._channel = channel
        self._score = score
        self._memory_in_use = memory_in_use
        self._prepare = prepare
        self._on_ready = on_ready
        self._on_compiled = on_compiled
        self._scorer = ThreadPoolExecutor(1, "gptjax-scorer")
        self._gone = threading.Event()  # the other process is
        # Held while events are sent, too, so that those of a request keep their order.
        self._lock = threading.Lock()
        self._tickets: dict[int, Ticket] = {}
        self._bytes = memory_in_use()
        self._clear()

    def start(self) -> None:
        """Starts threads that read requests and send states."""
        for target in (self._read, self._beat, self._settle):
            threading.Thread(target=target, name="gptjax-host", daemon=True).start()

    def _clear(self) -> None:
        self._numbers: list[int] = []
        self._counts: list[int] = []
        self._tokens: list[Token] = []
        self._ends: list[tuple[int, Finished | Failed]] = []

    def _read(self) -> None:
        for message in self._channel.messages():
            match message:
                case Submit():
                    self._submit(message.number, message.request)
                case Cancel():
                    if (ticket := self._tickets.get(message.number)) is not None:
                        self._worker.cancel(ticket)
                case Score():
                    self._scorer.submit(self._answer, message)
                case Drain():
                    threading.Thread(target=self._worker.drain, args=(0,), daemon=True).start()
                case Stop():
                    threading.Thread(target=self._stop, daemon=True).start()
        self._gone.set()
        for ticket in list(self._tickets.values()):  # there is nobody to read them
            self._worker.cancel(ticket)

    def _stop(self) -> None:
        self._worker.stop()
        self._send()

    def _submit(self, number: int, request: Request) -> None:
        try:
            self._prepare(request)
            with self._lock:
                self._tickets[number] = self._worker.submit(request, self._deliver(number))
        except RequestError as error:  # all else was checked, but what a grammar is with the whole vocabulary
            self._refuse(number, Failed(str(error), "grammar"))
        except GptjaxError as error:  # it has just died, and the other process does not know it yet
            self._refuse(number, Failed(str(error), "died"))
        except Exception:
            _log.exception("a request could not be submitted")
            self._refuse(number, Failed(str(internal()), "internal"))

    def _refuse(self, number: int, failed: Failed) -> None:
        with self._lock:
            self._ends.append((number, failed))
        self._send()

    def _deliver(self, number: int) -> Deliver:
        def deliver(event: Event) -> Callable[[], None]:
            with self._lock:
                if isinstance(event, Tokens):
                    self._numbers.append(number)
                    self._counts.append(len(event.tokens))
                    self._tokens += event.tokens
                else:
                    self._tickets.pop(number, None)
                    self._ends.append((number, event))
            return self._send

        return deliver

    def _send(self) -> None:
        """Sends the events that were collected, and the state."""
        with self._lock:
            _, ids, logprobs, tops = zip(*self._tokens, strict=True) if self._tokens else ((), (), (), ())
            message = Progress(
                self._worker.state,
                self._bytes,
                self._numbers,
                self._counts,
                ids,
                logprobs,
                tops if any(tops) else None,
                self._ends,
            )
            self._clear()
            self._channel.send(message)

    def _beat(self) -> None:
        while not self._gone.wait(_BEAT):
            self._bytes = self._memory_in_use()
            self._send()

    def _settle(self) -> None:
        try:
            self._worker.wait_until_ready()
        except Unavailable:
            return  # the state says why
        self._send()
        self._on_ready()
        compiled = self._worker.wait_until_compiled()
        self._on_compiled()
        self._channel.send(Compiled(compiled))

    def _answer(self, asked: Score) -> None:
        scores: PromptScores = ()
        error: Exception | None = None
        try:
            scores = self._score(asked.prompt_ids, asked.num_top)
        except (ApiError, GptjaxError) as raised:
            error = raised
        except Exception:
            _log.exception("scoring a prompt failed")
            error = internal()
        self._channel.send(Scored(asked.number, scores, error))
