"""A worker that is in another process: the front's end of it."""

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Final

from gptjax.engine.request import Request, Token, check_prompt
from gptjax.server.errors import unavailable
from gptjax.server.ipc.channel import Channel
from gptjax.server.ipc.events import (
    Deliver,
    Event,
    Failed,
    Finished,
    PromptScores,
    QueueFull,
    State,
    Ticket,
    Tokens,
    Unavailable,
    deliver,
)
from gptjax.server.ipc.messages import Cancel, Compiled, Drain, Progress, Score, Scored, Setup, Signal, Stop, Submit

_PATIENCE: Final = 12.0  # seconds for the other process to end requests: longer than its worker's own patience
_LOST: Final = "the engine's process has ended"
_HANGS: Final = "its device hangs"
_token = partial(tuple.__new__, Token)  # `Token._make` takes three times as long


@dataclasses.dataclass(eq=False)
class _Open:
    """A request that has not ended."""

    ticket: Ticket
    deliver: Deliver
    count: int = 0  # tokens that came
    cancelled: bool = False
    is_cut: bool = False  # tokens came that are not delivered, as it was cancelled
    is_over: bool = False  # its last event is on its way


class RemoteWorker:
    """Hands requests to the `WorkerHost` at the other end of a channel, and delivers their events. See `Worker`.

    All requests come through here. So it knows which of them to refuse, and nothing waits for the other process.
    """

    def __init__(self, channel: Channel, setup: Setup, *, on_signal: Callable[[int], None] = lambda number: None):
        """A worker described by `setup`.

        Args:
          on_signal: called with each signal that the other process got.
        """
        self._channel = channel
        self._facts = setup.facts
        self._max_queue = setup.max_queue
        self._on_signal = on_signal
        self._thread = threading.Thread(target=self._run, name="gptjax-remote-worker", daemon=True)
        self._changed = threading.Condition()  # guards all that follows
        self._open: dict[int, _Open] = {}
        self._wanted = 0  # of these, those that were not cancelled
        self._state, self._came = setup.state, time.monotonic()
        self._memory_in_use = setup.memory_in_use
        self._accepted = self._tokens_total = 0
        self._numbers = itertools.count(1)
        self._scores: dict[int, Future[PromptScores]] = {}
        self._compiled: bool | None = None
        self._was_ready = False
        self._draining = self._stopping = False
        self._most_silence = setup.limits.heartbeat_seconds
        self._lost: str | None = None  # why nothing more is expected of the other process

    def start(self) -> None:
        """Begins to read what the other process sends."""
        self._thread.start()

    def wait_until_ready(self) -> None:
        """Returns once requests run. Raises `Unavailable` if the worker ends before that."""
        with self._changed:
            self._changed.wait_for(lambda: self._state.ready or self._refusal())
            if refusal := self._refusal():
                raise Unavailable(refusal)

    def wait_until_compiled(self) -> bool:
        """Waits until all programs of a worker that is ready are compiled. Returns whether they are."""
        with self._changed:
            self._changed.wait_for(lambda: self._compiled is not None or self._lost or self._stopping)
            return bool(self._compiled)

    def submit(self, request: Request, deliver: Deliver) -> Ticket:
        """Hands a request to the worker; returns at once. Raises what `Worker.submit` does."""
        limits = {"vocab_size": self._facts.vocab_size, "max_length": self._facts.max_length}
        request.check(**limits)
        # Such ids take less time to send, and none to check again.
        request = dataclasses.replace(request, prompt_ids=check_prompt(request.prompt_ids, **limits))
        with self._changed:
            self._check_room()
            self._accepted += 1
            self._wanted += 1
            number = next(self._numbers)
            self._open[number] = _Open(Ticket(number), deliver)
            self._channel.send(Submit(number, request))
        return Ticket(number)

    def check_room(self, ahead: int) -> None:
        """Raises `QueueFull` or `Unavailable` if a request would be refused after `ahead` others."""
        with self._changed:
            self._check_room(ahead)

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request soon, as `Finished` with the reason "cancelled"; does nothing if it has ended."""
        with self._changed:
            job = self._open.get(ticket.number)
            if job is None or job.cancelled:
                return
            job.cancelled = True
            self._wanted -= 1
            self._channel.send(Cancel(ticket.number))

    def drain(self, seconds: float) -> None:
        """Refuses new requests and waits up to `seconds` for the open ones; those left then fail.

        It does not wait for a worker that hangs.
        """
        if self._was_ready and self.state.heartbeat_age > self._most_silence:
            self._lose(_HANGS)
            return
        with self._changed:
            self._draining = True
            if self._changed.wait_for(lambda: not self._open, seconds):
                return
            self._channel.send(Drain())
            self._changed.wait_for(lambda: not self._open, _PATIENCE)

    def stop(self) -> None:
        """Ends the worker; open requests fail. Waits for it, unless it hangs or compiles, which cannot be stopped."""
        with self._changed:
            self._stopping = True
            waits = self._was_ready
            self._changed.notify_all()
            self._channel.send(Stop())
            self._changed.wait_for(
                lambda: self._lost or not (self._open or (waits and self._state.alive)), _PATIENCE if waits else 1.0
            )

    def score(self, prompt_ids: Sequence[int], num_top: int) -> PromptScores:
        """Has a checked prompt scored; waits for the result. Raises what `gptjax.server.worker.scoring.score` does."""
        with self._changed:
            if self._lost:
                raise unavailable(f"the worker died: {self._lost}", "died")
            number = next(self._numbers)
            found = self._scores[number] = Future()
            self._channel.send(Score(number, prompt_ids, num_top))
        return found.result()

    def memory_in_use(self) -> int:
        """Bytes on the device, a moment ago."""
        return self._memory_in_use

    @property
    def state(self) -> State:
        """The worker's state as last heard; what is counted here is exact."""
        with self._changed:
            state, error = self._state, self._error
            return dataclasses.replace(
                state,
                ready=state.ready and self._refusal() is None,
                alive=state.alive and error is None,
                heartbeat_age=state.heartbeat_age + time.monotonic() - self._came,
                queued=max(0, self._wanted - state.busy),
                requests=self._accepted,
                tokens_total=self._tokens_total,
                error=error,
            )

    @property
    def _error(self) -> str | None:
        return self._state.error or (None if self._stopping else self._lost)

    def _check_room(self, ahead: int = 0) -> None:
        if refusal := self._refusal():
            raise Unavailable(refusal)
        # Not the slots that are busy: how many are is heard late.
        if self._wanted + ahead >= self._max_queue + self._state.slots:
            waiting = self._wanted + ahead - (self._state.slots if self._state.ready else 0)
            raise QueueFull(waiting, self._state.retry_after(waiting))

    def _refusal(self) -> str | None:
        """Why requests are refused; None if they are not."""
        if self._error is not None:
            return f"the worker died: {self._error}"
        if self._stopping:
            return "the server was stopped"
        return "the server is shutting down" if self._draining else None

    # The rest runs in the thread.

    def _run(self) -> None:
        try:
            for message in self._channel.messages():
                if self._lost is None or isinstance(message, Signal):
                    self._take(message)
        finally:
            self._lose(_LOST)

    def _take(self, message: object) -> None:
        match message:
            case Progress():
                self._deliver(self._read(message))
            case Scored():
                self._scored(message)
            case Signal():
                self._on_signal(message.number)
            case Compiled():
                with self._changed:
                    self._compiled = message.all
                    self._changed.notify_all()

    def _read(self, message: Progress) -> list[tuple[_Open, Event]]:
        """Takes a message's state. Returns its events."""
        tokens = tuple(
            map(
                _token,
                zip(
                    itertools.repeat(0),
                    message.token_ids,
                    message.logprobs,
                    itertools.repeat(()) if message.tops is None else message.tops,
                ),
            )
        )
        found: list[tuple[_Open, Event]] = []
        begin = 0
        with self._changed:
            if self._lost:
                return []
            self._state, self._came = message.state, time.monotonic()
            self._was_ready |= self._state.ready
            self._memory_in_use = message.memory_in_use
            for number, count in zip(message.numbers, message.counts, strict=True):
                job = self._open[number]
                if job.cancelled:
                    job.is_cut = True
                else:
                    job.count += count
                    self._tokens_total += count
                    found.append((job, Tokens(tokens[begin : begin + count])))
                begin += count
            for number, end in message.ends:
                job = self._open[number]
                job.is_over = True
                if isinstance(end, Finished) and job.is_cut:  # however it ended afterwards
                    end = dataclasses.replace(end, reason="cancelled", completion_tokens=job.count)
                found.append((job, end))
            self._changed.notify_all()
        return found

    def _deliver(self, events: Sequence[tuple[_Open, Event]]) -> None:
        """Delivers events, and closes the requests whose last they are."""
        for job in deliver(events):  # for example, the reader's loop was closed: there is nobody to inform
            self.cancel(job.ticket)
        with self._changed:
            for job, event in events:
                if not isinstance(event, Tokens):
                    del self._open[job.ticket.number]
                    self._wanted -= not job.cancelled
                    self._changed.notify_all()

    def _scored(self, message: Scored) -> None:
        with self._changed:
            found = self._scores.pop(message.number)
        if message.error is None:
            found.set_result(message.scores)
        else:
            found.set_exception(message.error)

    def _lose(self, why: str) -> None:
        """Ends all requests, as nothing more will come from the other process."""
        with self._changed:
            if self._lost:
                return
            self._lost = why
            jobs = [job for job in self._open.values() if not job.is_over]
            scores = list(self._scores.values())
            self._scores.clear()
            self._changed.notify_all()
            message = f"the worker died: {self._error or self._lost}"
        self._deliver([(job, Failed(message, "died")) for job in jobs])
        for found in scores:
            found.set_exception(unavailable(message, "died"))
