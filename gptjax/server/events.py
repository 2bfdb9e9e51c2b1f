"""The messages between the worker and those who give it requests."""

import dataclasses
from collections.abc import Callable

from gptjax.engine.engine import Token
from gptjax.errors import GptjaxError


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
    kind: str  # "not_finite" (the model's logits), "drained", "stopped", or "died" (the worker)


Event = Tokens | Finished | Failed
Deliver = Callable[[Event], Callable[[], None] | None]
"""Takes an event; called in the worker's thread, so it must not block. May return what wakes the reader of the event:
the worker calls it once for all events that it delivers together."""


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
