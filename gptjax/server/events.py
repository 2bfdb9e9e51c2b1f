"""What the worker and those who give it requests tell each other."""

import dataclasses

from gptjax.errors import GptjaxError


class QueueFull(GptjaxError):  # noqa: N818 (what it says is a state, not a fault)
    """As many requests wait as may. `retry_after` is the seconds after which there may be room."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after} s")
        self.retry_after = retry_after


class Unavailable(GptjaxError):  # noqa: N818
    """The worker takes no requests: it was not started, it is draining, it was stopped, or it died."""


@dataclasses.dataclass(frozen=True)
class Token:
    """A token that was drawn; one of the request's stop ids as well."""

    token_id: int
    logprob: float  # the model's own
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), most likely first; as many as asked for


@dataclasses.dataclass(frozen=True)
class Finished:
    """The request has ended as it should, and its slot is free."""

    reason: str  # "stop" (one of its stop ids), "length", or "cancelled"
    prompt_tokens: int
    cached_tokens: int  # of the prompt, those that were not read again
    completion_tokens: int


@dataclasses.dataclass(frozen=True)
class Failed:
    """The request could not be brought to its end."""

    message: str
    kind: str  # "not_finite" (the model's logits), "drained", "stopped", or "died" (the worker)


Event = Token | Finished | Failed


@dataclasses.dataclass(frozen=True)
class Ticket:
    """What `cancel` needs to know."""

    number: int


@dataclasses.dataclass(frozen=True)
class State:
    """What a worker is doing, for health checks and metrics."""

    ready: bool  # all is compiled, and requests are taken
    alive: bool  # the thread runs
    heartbeat_age: float  # seconds since the thread's last turn; compiling, until it is ready, is one turn
    slots: int
    busy: int  # slots with a request, one whose prompt is being read included
    queued: int
    cache_used: float  # positions in use, as a share of all slots'
    requests: int  # that were accepted
    tokens_total: int  # that were delivered
    error: str | None  # what the worker died of
