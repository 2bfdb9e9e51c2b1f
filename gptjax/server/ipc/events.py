"""The messages between the worker and those who give it requests."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from gptjax.engine.request import Request, Token
from gptjax.errors import GptjaxError

_SHORTEST_RETRY, _LONGEST_RETRY = 1, 60  # seconds
PromptScores = Sequence[tuple[float, tuple[tuple[int, float], ...]]]
"""For each token after the first: its log-probability, and the most likely (token id, log-probability) instead."""


class QueueFull(GptjaxError):  # noqa: N818 (a state, not a fault)
    """The queue is full. There may be room after `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} requests are already waiting; try again in {retry_after} s")
        self.retry_after = retry_after


class Unavailable(GptjaxError):  # noqa: N818
    """The worker takes no requests: it is not started, is draining, was stopped, or died."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Consecutive tokens of a request that were drawn together; the last may be one of its stop ids."""

    tokens: tuple[Token, ...]  # at least one; the alternatives are as many as asked for


@dataclasses.dataclass(frozen=True)
class Finished:
    """The request has ended normally, and its slot is free."""

    reason: str  # "stop" (one of its stop ids), "length", or "cancelled"
    prompt_tokens: int
    cached_tokens: int  # prompt tokens that were not read again
    completion_tokens: int


@dataclasses.dataclass(frozen=True)
class Failed:
    """The request could not be completed."""

    message: str
    # "grammar", "not_finite" (the model's logits), "out_of_memory", "drained", "stopped", or "died" (the worker).
    kind: str


Event = Tokens | Finished | Failed
Deliver = Callable[[Event], Callable[[], None] | None]
"""Takes an event; called in the worker's thread, so it must not block. May return what wakes the reader of the event:
the worker calls it once for all events that it delivers together."""


class Delivers(Protocol):
    """What either process keeps of an open request."""

    @property
    def deliver(self) -> Deliver:
        """What takes the request's events."""


Taker = TypeVar("Taker", bound=Delivers)


def deliver(events: Iterable[tuple[Taker, Event]]) -> list[Taker]:
    """Delivers events, then wakes each of their readers once. Returns the jobs for which either failed."""
    readers: dict[Callable[[], None], list[Taker]] = {}
    failed = []
    for job, event in events:
        try:
            wake = job.deliver(event)
        except Exception:
            failed.append(job)
        else:
            if wake is not None:
                readers.setdefault(wake, []).append(job)
    for wake, jobs in readers.items():
        try:
            wake()
        except Exception:
            failed += jobs
    return failed


@dataclasses.dataclass(frozen=True)
class Ticket:
    """Identifies a request to `cancel`."""

    number: int


@dataclasses.dataclass(frozen=True)
class State:
    """The state of a worker, for health checks and metrics."""

    ready: bool  # everything is compiled, and requests are taken
    alive: bool  # the thread runs
    heartbeat_age: float  # seconds since the thread's last turn; all compiling before `ready` is one turn
    slots: int
    busy: int  # slots with a request, including one whose prompt is being read
    queued: int
    cache_used: float  # share of the cache's positions in use
    requests: int  # accepted
    tokens_total: int  # delivered
    error: str | None  # what the worker died of
    losses: int = 0  # how often the device failed, and all open requests were computed again
    slot_seconds: float = 1.0  # that a request keeps its slot, on average

    def retry_after(self, waiting: int) -> int:
        """Seconds until `waiting` requests have had their turn."""
        seconds = math.ceil(waiting / self.slots * self.slot_seconds)
        return max(_SHORTEST_RETRY, min(seconds, _LONGEST_RETRY))


class AnyWorker(Protocol):
    """A worker, in this process or in another. See `Worker` for what its methods do."""

    @property
    def state(self) -> State:
        """Its current state."""

    def start(self) -> None:
        """Has it begin."""

    def wait_until_ready(self) -> None:
        """Returns once requests run."""

    def wait_until_compiled(self) -> bool:
        """Waits until all programs are compiled. Returns whether they are."""

    def submit(self, request: Request, deliver: Deliver) -> Ticket:
        """Hands a request to it."""

    def check_room(self, ahead: int) -> None:
        """Raises `QueueFull` or `Unavailable` if a request would be refused after `ahead` others."""

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request."""

    def drain(self, seconds: float) -> None:
        """Refuses new requests and waits for the open ones."""

    def stop(self) -> None:
        """Ends it."""
