"""A worker without a model: it replays scripted tokens, from a thread, as the real one does."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gptjax.engine.request import Request, Token
from gptjax.server.ipc.events import Deliver, Event, Failed, Finished, QueueFull, State, Ticket, Tokens, Unavailable


class FakeWorker:
    """Answers each request with `script(request)`'s tokens: a finite list, or endless; then it runs to max_tokens.

    An item that is a `Failed` ends the request with it, a number that is a float is slept for, and the tokens of a list
    come together.
    """

    def __init__(self, script: Callable[[Request], Any], *, max_length: int, room: int = 64):
        self.script = script
        self.max_length = max_length
        self.room = room  # requests that may be open
        self.requests: list[Request] = []
        self.cancelled: list[Ticket] = []
        self.open: dict[Ticket, threading.Event] = {}
        self.ready = self.alive = True
        self.error: str | None = None
        self.heartbeat_age = 0.0
        self.refusal: str | None = None
        self.failed: dict[Ticket, Failed] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def start(self) -> None:
        pass

    def wait_until_ready(self) -> None:
        while not self.ready:
            time.sleep(0.01)

    def wait_until_compiled(self) -> bool:
        return True

    def stop(self) -> None:
        for stopped in list(self.open.values()):
            stopped.set()

    def drain(self, seconds: float) -> None:
        self.refusal = "the server is shutting down"
        until = time.monotonic() + seconds
        while self.open and time.monotonic() < until:
            time.sleep(0.01)
        self.stop()

    def submit(self, request: Request, deliver: Deliver) -> Ticket:
        with self._lock:
            self.check_room(0)
            request = request.with_seed()
            ticket, stopped = Ticket(next(self._numbers)), threading.Event()
            self.requests.append(request)
            self.open[ticket] = stopped
            items = self.script(request)  # here, as threads might ask for theirs in another order
        threading.Thread(target=self._run, args=(ticket, stopped, request, items, deliver), daemon=True).start()
        return ticket

    def check_room(self, ahead: int) -> None:
        if self.refusal:
            raise Unavailable(self.refusal)
        if len(self.open) + ahead >= self.room:
            raise QueueFull(len(self.open), 3)

    def cancel(self, ticket: Ticket) -> None:
        if ticket in self.open:
            self.cancelled.append(ticket)
            self.open[ticket].set()

    def fail(self, ticket: Ticket, failed: Failed) -> None:
        self.failed[ticket] = failed
        self.open[ticket].set()

    @property
    def state(self) -> State:
        return State(
            self.ready,
            self.alive and self.error is None,
            self.heartbeat_age,
            4,
            len(self.open),
            0,
            0.25,
            1,
            2,
            self.error,
            3,
        )

    def _run(
        self,
        ticket: Ticket,
        stopped: threading.Event,
        request: Request,
        items: Iterable[Any],
        deliver: Deliver,
    ) -> None:
        last = self._replay(stopped, request, items, deliver)
        self.open.pop(ticket)
        with contextlib.suppress(Exception):  # as the real one: a reader that has left may have closed its loop
            _deliver(deliver, self.failed.get(ticket, last))

    def _replay(self, stopped: threading.Event, request: Request, items: Iterable[Any], deliver: Deliver) -> Event:
        count, prompt = 0, len(request.prompt_ids)
        for item in items:
            if stopped.is_set():
                break
            if isinstance(item, Failed):
                return item
            if isinstance(item, float):
                stopped.wait(item)
                continue
            tokens, end = self._cut(request, [item] if isinstance(item, int) else item, count)
            count += len(tokens)
            try:
                _deliver(deliver, Tokens(tokens))
            except Exception:
                return Finished("cancelled", prompt, 2, count)
            if end is not None:
                return Finished(end, prompt, 2, count)
        return Finished("cancelled", prompt, 2, count)

    def _cut(self, request: Request, ids: Sequence[int], count: int) -> tuple[tuple[Token, ...], str | None]:
        """Tokens up to the one that ends the request, and why it does."""
        tokens: list[Token] = []
        for token_id in ids:
            tokens.append(Token(0, token_id, *scored(token_id, request.params.top_logprobs)))
            if token_id in request.stop_ids:
                return tuple(tokens), "stop"
            if count + len(tokens) == request.room(self.max_length):
                return tuple(tokens), "length"
        return tuple(tokens), None


def _deliver(deliver: Deliver, event: Event) -> None:
    if (wake := deliver(event)) is not None:
        wake()


def scored(token_id: int, num_top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """A log-probability, and as many alternatives, the token the first of them."""
    return -0.5, tuple((token_id + place, -0.5 - place) for place in range(num_top))


def score(token_ids: Sequence[int], num_top: int) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """A scorer of prompts that finds every token the likeliest."""
    return [scored(token_id, num_top) for token_id in token_ids[1:]]
