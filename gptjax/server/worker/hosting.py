"""Serves a model from the process that has its engine, by way of another that speaks HTTP."""

import functools
import gc
import signal
from collections.abc import Callable, Sequence
from typing import Any

from gptjax.checkpoints.checkpoint import Checkpoint
from gptjax.errors import GptjaxError
from gptjax.language_model import LanguageModel
from gptjax.server.ipc.messages import Setup, Signal
from gptjax.server.ipc.settings import Facts, Limits
from gptjax.server.worker.facts import quant_kind, tokenizer_kind
from gptjax.server.worker.front_process import FrontProcess
from gptjax.server.worker.scoring import score
from gptjax.server.worker.worker import DEFAULT_SLOTS, Worker
from gptjax.server.worker.worker_host import WorkerHost
from gptjax.structured.matching import prepare
from gptjax.support.processes import share_lock
from gptjax.support.runtime import device_memory

_NO_LIMIT = 1 << 60  # of the queue: the front refuses what is too much


def serve(
    lm: LanguageModel,
    facts: Facts,
    front: FrontProcess,
    *,
    max_queue: int,
    prefill_chunk: int,
    limits: Limits,
    options: dict[str, Any],
) -> int:
    """Serves until SIGINT or SIGTERM. Returns the exit status: 0, or 1 if the worker or the front died.

    The process must have nothing else to do, and `front` have been started for this model.

    Args:
      options: of `make_server`.

    Raises:
      CapacityError: the cache does not fit the remaining memory.
    """
    worker = Worker(lm, max_queue=_NO_LIMIT, chunk=prefill_chunk)
    in_use = memory_in_use(lm)
    worker.start()
    share_lock()
    front.channel.send(Setup(facts, max_queue, worker.state, in_use(), limits, options))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: front.channel.send(Signal(number)))
    host = WorkerHost(
        worker,
        front.channel,
        score=functools.partial(score, lm),
        memory_in_use=in_use,
        prepare=lambda request: prepare(lm.compiler, request.grammar),
        on_ready=_freeze,
        on_compiled=gc.freeze,
    )
    host.start()
    return front.wait()


def _freeze() -> None:
    """Or the garbage collector would go through what compiling left, with all streams waiting for a second."""
    gc.collect()
    gc.freeze()


def facts_of(
    lm: LanguageModel,
    name: str,
    *,
    aliases: Sequence[str] = (),
    checkpoint: Checkpoint | None = None,
    tokenizer_from: str | None = None,
) -> Facts:
    """What is known of a model.

    Args:
      aliases: other names that clients may use; a * at the end stands for anything.
      checkpoint: what it was loaded from, for `/health`.
      tokenizer_from: where its tokenizer was read from, if not from there.
    """
    return Facts(
        name=name,
        aliases=tuple(aliases),
        defaults=lm.defaults,
        eos_ids=lm.eos_ids,
        vocab_size=lm.config.vocab_size,
        max_length=lm.max_length,
        quant_kind=quant_kind(lm, checkpoint),
        tokenizer_kind=tokenizer_kind(checkpoint, tokenizer_from) if checkpoint and _has_tokenizer(lm) else None,
    )


def _has_tokenizer(lm: LanguageModel) -> bool:
    try:
        return lm.tokenizer is not None
    except GptjaxError:
        return False


def memory_in_use(lm: LanguageModel) -> Callable[[], int]:
    """Bytes in use on the device; on a CPU, which only counts all processes together, weights and cache by formula."""
    if device_memory().platform != "cpu":
        return lambda: device_memory().in_use
    needed = lm.memory(batch=lm.max_batch or DEFAULT_SLOTS)
    return lambda: needed.weights + needed.cache
