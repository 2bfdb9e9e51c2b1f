"""The messages between the worker and those who give it requests."""

import dataclasses

from gptjax.errors import GptjaxError


class QueueFull(GptjaxError):  # noqa: N818 (a state, not a fault)
    """The queue is full. There may be room after `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} requests are already waiting; try again in {retry_after} s")
        self.retry_after = retry_after


class Unavailable(GptjaxError):  # noqa: N818
    """The worker takes no requests: it is not started, is draining, was stopped, or died."""


@dataclasses.dataclass(frozen=True)
class Token:
    """A token that was drawn, even if it is one of the request's stop ids."""

    token_id: int
    logprob: float  # the model's own
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), most likely first; as many as asked for


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


Event = Token | Finished | Failed


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
