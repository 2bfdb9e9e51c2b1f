"""The thread that owns the engine: many clients' requests join and leave one compiled decode step.

Between two steps the worker handles cancellations and hands the oldest waiting requests to the engine, which reads at
most one chunk of their prompts a step, so that running streams never wait for more than that.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

from jax.errors import JaxRuntimeError

from gptjax.engine import memory, steps
from gptjax.engine.engine import Engine
from gptjax.engine.output import failure_of
from gptjax.engine.pool_sizes import pools
from gptjax.engine.pools import default_policy, pool_kinds, pool_tokens
from gptjax.engine.request import TOO_COMPLEX, Request, Token
from gptjax.language_model import LanguageModel
from gptjax.server.ipc.events import Deliver, Event, Failed, QueueFull, State, Ticket, Tokens, Unavailable, deliver
from gptjax.server.worker import own_engine
from gptjax.server.worker.jobs import Job
from gptjax.structured.matching import prepare

DEFAULT_SLOTS = 8  # if the model was loaded without `max_batch`
_BEAT = 1.0  # seconds between heartbeats of an idle worker
_PATIENCE = 10.0  # seconds that `drain` and `stop` wait for the thread beyond what was asked
_log = logging.getLogger(__name__)
_SMOOTHING = 0.2  # weight of the latest request in the average duration
_STOPPED = Failed("the server was stopped", "stopped")
_DRAINED = Failed("the server is shutting down and had no time left for this request", "drained")


class Worker:
    """One thread that owns the engine: continuous batching, a bounded queue, cancellation, prefix reuse.

    Every request that `submit` accepts gets its `Tokens`, those of a dispatch together, then one `Finished` or
    `Failed`, and nothing after that. All methods may be called from any thread.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_queue: int = 64,
        chunk: int = steps.CHUNK,
        steps_per_dispatch: int | None = None,
    ):
        """A worker with `model.max_batch` slots, not started yet.

        Args:
          max_queue: requests that may wait for a slot.
          chunk: the most prompt tokens read between two steps: a power of two, at most `steps.LARGEST_CHUNK`. Running
            streams wait for them.
          steps_per_dispatch: see `Engine`.
        """
        self._model = model
        self._max_queue = max_queue
        self._policy = default_policy(
            model.model,
            slots=model.max_batch or DEFAULT_SLOTS,
            steps_per_dispatch=steps_per_dispatch,
            chunk=chunk,
            reuse=True,
            exact=model.exact,
        )
        self._slots = self._policy.all_slots
        self._pages: tuple[int, ...] = ()  # of the engine's pools; known once it is started
        self._thread = threading.Thread(target=self._run, name="gptjax-worker", daemon=True)
        # Guards all that follows, and is notified of changes. Only the thread moves jobs from place to place, except
        # that `cancel` removes them from the queue.
        self._changed = threading.Condition()
        self._open: dict[Ticket, Job] = {}  # all unfinished ones
        self._queue: deque[Job] = deque()
        self._running: dict[int, Job] = {}  # those that the engine has, by its numbers
        self._cancelled: list[Job] = []  # not handled yet
        self._ready = self._started = self._draining = self._stopping = False
        self._failing: Failed | None = None  # what all open requests will end with
        self._error: str | None = None
        self._warm: Engine | None = None  # once it is ready
        self._beat = time.monotonic()
        self._seconds = 1.0  # that a request keeps its slot, on average
        self._accepted = self._tokens_total = self._losses = 0
        # The thread's own: what `_send` delivers next.
        self._given: list[Job] = []  # those with fresh tokens
        self._ended: list[tuple[Job, Failed | str]] = []

    def start(self) -> None:
        """Starts the thread, which first compiles what it needs; see `state.ready` and `wait_until_ready`.

        Requests may be submitted from now on.

        Raises:
          CapacityError: the cache does not fit the remaining memory; see `pools`.
        """
        lm = self._model
        self._pages = pools(lm.model, max_length=lm.max_length, policy=self._policy, limit=lm.memory_limit)
        with self._changed:
            self._started = True
            self._beat = time.monotonic()
            self._changed.notify_all()
        self._thread.start()

    def wait_until_ready(self) -> None:
        """Returns once requests run. Raises `Unavailable` if the worker, once started, ends before that."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or (self._started and self._refusal()))
            if refusal := self._refusal():
                raise Unavailable(refusal)

    def wait_until_compiled(self) -> bool:
        """Waits until all programs of a worker that is ready are compiled. Returns whether they are.

        Until then, requests run with larger ones.
        """
        return self._warm is not None and self._warm.wait_until_compiled()

    def submit(self, request: Request, deliver: Deliver) -> Ticket:
        """Hands a request to the worker; returns at once.

        Args:
          request: gets a seed if it has none. The caller must look for its `stop` strings.
          deliver: called with each event. If it raises, or what it returns does, the request is cancelled.

        Raises:
          RequestError, CapacityError: the request is invalid, or its grammar cannot be compiled.
          QueueFull, Unavailable: it cannot be run now.
        """
        request.check(vocab_size=self._model.config.vocab_size, max_length=self._model.max_length)
        prepare(self._model.compiler, request.grammar)
        with self._changed:
            self._check_room()
            self._accepted += 1
            job = Job(Ticket(self._accepted), request.with_seed(), deliver, request.room(self._model.max_length))
            self._open[job.ticket] = job
            self._queue.append(job)
            self._changed.notify_all()
        return job.ticket

    def check_room(self, ahead: int) -> None:
        """Raises `QueueFull` or `Unavailable` if a request would be refused after `ahead` others."""
        with self._changed:
            self._check_room(ahead)

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request within a step, as `Finished` with the reason "cancelled"; does nothing if it has ended."""
        with self._changed:
            job = self._open.get(ticket)
            if job is None or job.cancelled:
                return
            job.cancelled = True
            self._cancelled.append(job)
            if job in self._queue:
                self._queue.remove(job)  # its place is free at once
            self._changed.notify_all()

    def drain(self, seconds: float) -> None:
        """Refuses new requests and waits up to `seconds` for the open ones; those left then fail."""
        with self._changed:
            self._draining = True
            if self._changed.wait_for(lambda: not self._open, seconds):
                return
            self._failing = _DRAINED
            self._changed.notify_all()
        self._fail_waiting(_DRAINED)
        with self._changed:
            self._changed.wait_for(lambda: not self._open, _PATIENCE)

    def stop(self) -> None:
        """Ends the thread; open requests fail. Waits for it, unless it hangs or compiles, which cannot be stopped."""
        with self._changed:
            self._stopping = True
            ready = self._ready
            self._changed.notify_all()
        if not ready:
            self._fail_waiting(_STOPPED)
        elif self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_PATIENCE)

    @property
    def state(self) -> State:
        """The worker's current state."""
        with self._changed:
            alive = self._thread.is_alive() and self._error is None
            used = sum(len(job.request.prompt_ids) + job.count for job in self._running.values())
            return State(
                ready=self._ready and alive and self._refusal() is None,
                alive=alive,
                heartbeat_age=time.monotonic() - self._beat,
                slots=self._slots,
                busy=len(self._running),
                queued=len(self._queue),
                cache_used=min(1.0, used / self._tokens),
                requests=self._accepted,
                tokens_total=self._tokens_total,
                error=self._error,
                losses=self._losses,
                slot_seconds=self._seconds,
            )

    @property
    def _tokens(self) -> int:
        """The positions that the cache has room for."""
        if not self._pages:
            return self._slots * self._model.max_length
        each = pool_kinds(self._model.model, max_length=self._model.max_length, policy=self._policy)
        return self._policy.shards * pool_tokens(each, self._pages, page=self._policy.page)

    def _check_room(self, ahead: int = 0) -> None:
        if refusal := self._refusal():
            raise Unavailable(refusal)
        waiting = len(self._queue) + ahead
        if waiting >= self._max_queue + self._slots - len(self._running):  # a free slot means no wait
            raise QueueFull(waiting, self.state.retry_after(len(self._queue)))

    def _refusal(self) -> str | None:
        """Why requests are refused; None if they are not."""
        if self._error is not None:
            return f"the worker died: {self._error}"
        if self._stopping:
            return "the server was stopped"
        if self._draining:
            return "the server is shutting down"
        return None if self._started else "the worker was not started"

    def _fail_waiting(self, failed: Failed) -> None:
        """Fails the requests without a slot; does not need the thread, which may be compiling."""
        with self._changed:
            jobs = list(self._queue)
            self._queue.clear()
            for job in jobs:
                del self._open[job.ticket]
        self._deliver([(job, failed) for job in jobs])

    # The rest runs in the thread.

    def _run(self) -> None:
        try:
            with self._explained():
                engine = own_engine.make(self._model, slots=self._slots, policy=self._policy, pages=self._pages)
                engine.warm_up_largest()
                with self._changed:
                    self._warm = engine
                    self._ready = True
                    self._changed.notify_all()
                while self._turn(engine):
                    pass
        except BaseException as error:  # whatever it was: nobody else would inform those waiting
            message = "; ".join((f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())))
            with self._changed:
                self._error = message
                self._failing = Failed(f"the worker died: {message}", "died")
                self._changed.notify_all()
        finally:
            self._fail_all()
            if self._warm is not None:
                self._warm.stop_compiling()

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        return memory.explained(self._model.model, batch=self._slots, max_length=self._model.max_length)

    def _turn(self, engine: Engine) -> bool:
        """Does the work between two steps, and a step. Returns False if the worker should end."""
        with self._changed:
            while not (self._busy() or self._failing or self._stopping):
                self._beat = time.monotonic()
                self._changed.wait(_BEAT)
            self._beat = time.monotonic()
            if self._stopping:
                return False
        if self._failing is not None:
            for request in self._fail_all():
                engine.end(request)
            return True
        self._leave(engine)
        self._join(engine)
        failed = None
        try:
            self._push(engine, engine.step())
            while engine.has_tokens:
                self._push(engine, engine.step())
        except JaxRuntimeError as error:
            if (failed := own_engine.out_of_memory(engine, error, self._explained())) is None:
                raise
        if failed is not None:  # not above: an error that is handled keeps arrays
            return self._go_on(engine, failed)
        self._send()
        if engine.losses > self._losses:
            _log.warning("the device failed; open requests go on where they were")
            with self._changed:
                self._losses = engine.losses
        return True

    def _go_on(self, engine: Engine, failed: Failed) -> bool:
        """Ends all requests, also those that come until the device has memory. Returns whether the worker goes on."""
        _log.error("all requests end: %s", failed.message)

        def end_requests() -> bool:
            with self._changed:
                self._beat, self._losses, self._ready = time.monotonic(), engine.losses, False
                self._failing = self._failing or failed
            for request in self._fail_all():
                engine.end(request)
            with self._changed:
                return not self._changed.wait_for(lambda: self._stopping, _BEAT)

        self._ready = own_engine.restarted(engine, end_requests)
        return self._ready

    def _busy(self) -> bool:
        return bool(self._queue or self._running or self._cancelled)

    def _leave(self, engine: Engine) -> None:
        """Ends cancelled requests."""
        with self._changed:
            cancelled, self._cancelled = self._cancelled, []
        for job in cancelled:
            if job.ticket in self._open:  # it may have ended meanwhile
                self._end(engine, job, "cancelled")
        self._send()

    def _join(self, engine: Engine) -> None:
        """Hands the oldest waiting requests to the engine, as many as it has room for."""
        with self._changed:
            while self._queue and engine.room:
                job = self._queue.popleft()
                job.began = time.monotonic()
                job.number = engine.add(job.request)
                self._running[job.number] = job

    def _push(self, engine: Engine, drawn: Sequence[Token]) -> None:
        """Takes the tokens of a step, and ends the requests that these were the last of."""
        for token in drawn:
            job = self._running[token.request]
            if job.cancelled:
                continue  # `_leave` handles it
            if token.token_id < 0:
                kind = "grammar" if token.token_id == TOO_COMPLEX else "not_finite"
                self._end(engine, job, Failed(failure_of(token.token_id), kind))
                continue
            if not job.fresh:
                self._given.append(job)
            if (reason := job.add(token)) is not None:
                self._end(engine, job, reason)

    def _end(self, engine: Engine, job: Job, how: Failed | str) -> None:
        """Ends a job in the engine, if it is there. Its last event goes out with the next ones."""
        number = self._forget(job)
        if number is not None:
            job.cached = engine.cached_tokens(number)
            engine.end(number)
        self._ended.append((job, how))

    def _send(self) -> None:
        """Delivers what came since the last time: tokens, then ends."""
        given, self._given = self._given, []
        ended, self._ended = self._ended, []
        if not (given or ended):
            return
        with self._changed:
            events: list[tuple[Job, Event]] = [(job, job.take()) for job in given]
            self._tokens_total += sum(len(event.tokens) for _, event in events if isinstance(event, Tokens))
        self._deliver([*events, *((job, job.end(how)) for job, how in ended)])

    def _forget(self, job: Job) -> int | None:
        """Removes a job from wherever it is. Returns the number that the engine has for it."""
        with self._changed:
            number, job.number = job.number, None
            if number is not None:
                del self._running[number]
                self._seconds += _SMOOTHING * (time.monotonic() - job.began - self._seconds)
            elif job in self._queue:
                self._queue.remove(job)
        return number

    def _fail_all(self) -> list[int]:
        """Ends all open requests with `_failing`. Returns the engine's numbers of those that it has."""
        self._send()
        with self._changed:
            jobs = list(self._open.values())
            failed, self._failing = self._failing or _STOPPED, None
            self._cancelled.clear()
        numbers = [self._forget(job) for job in jobs]
        self._deliver([(job, failed) for job in jobs])
        return [number for number in numbers if number is not None]

    def _deliver(self, events: Sequence[tuple[Job, Event]]) -> None:
        """Delivers events, and closes the jobs whose last they are."""
        for job in deliver(events):  # for example, the reader's loop was closed: there is nobody to inform
            self.cancel(job.ticket)
        with self._changed:
            for job, event in events:
                if not isinstance(event, Tokens):
                    self._open.pop(job.ticket, None)
                    self._changed.notify_all()
