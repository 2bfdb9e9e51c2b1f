"""What the process that has the engine and the one that speaks HTTP send each other.

Their order is part of the meaning: `Text` and `Setup` come first, and a request's `Submit` before its `Cancel`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from gptjax.checkpoints.checkpoint import Checkpoint
from gptjax.engine.request import Request
from gptjax.server.ipc.events import Failed, Finished, PromptScores, State
from gptjax.server.ipc.settings import Facts, Limits


@dataclasses.dataclass(frozen=True)
class Text:
    """To the front, when it starts: what to read while the weights are being loaded."""

    checkpoint: Checkpoint
    tokenizer: str | None  # where it is read from, if not from the checkpoint
    chat_format: str | None
    log_config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setup:
    """To the front, once the weights are loaded: it is to serve."""

    facts: Facts
    max_queue: int
    state: State
    memory_in_use: int
    limits: Limits
    options: dict[str, Any]  # of `make_server`


class Submit(NamedTuple):
    """To the engine: a request that was checked."""

    number: int
    request: Request


class Cancel(NamedTuple):
    """To the engine: that request is not wanted any more."""

    number: int


class Score(NamedTuple):
    """To the engine: a prompt to score."""

    number: int
    prompt_ids: Sequence[int]
    num_top: int


class Drain(NamedTuple):
    """To the engine: time is up, so fail all open requests."""


class Stop(NamedTuple):
    """To the engine: its thread is to end."""


class Signal(NamedTuple):
    """To the front: a signal that the engine's process got, which is the one that users know."""

    number: int


class Progress(NamedTuple):
    """To the front: the events that the worker delivered together, or none, and its state after them."""

    state: State
    memory_in_use: int
    numbers: Sequence[int]  # of the requests that got tokens
    counts: Sequence[int]  # how many each of these got
    token_ids: Sequence[int]  # of all, one after another
    logprobs: Sequence[float]
    tops: Sequence[tuple[tuple[int, float], ...]] | None  # None: all are empty
    ends: Sequence[tuple[int, Finished | Failed]]  # after the tokens


class Scored(NamedTuple):
    """To the front: the scores of a prompt, or what was raised instead."""

    number: int
    scores: PromptScores
    error: Exception | None


class Compiled(NamedTuple):
    """To the front: whether all programs are compiled; after that, none will be."""

    all: bool
