"""The worker's engine: how it is made, and how it goes on after the device ran out of memory."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Final

from jax.errors import JaxRuntimeError

from gptjax.engine.engine import Engine, free_locals
from gptjax.engine.settings import Features
from gptjax.errors import CapacityError
from gptjax.language_model import LanguageModel
from gptjax.scheduling.policy import Policy
from gptjax.server.ipc.events import Failed

# The compiled forms of sampling; a chat at temperature 1 needs the first, and with a grammar the third.
_LEVELS: Final = (
    Features(draws=True),
    Features(draws=True, truncates=True),
    Features(draws=True, constrains=True),
    Features(draws=True, truncates=True, constrains=True),
    Features.everything(),
)


def make(lm: LanguageModel, *, slots: int, policy: Policy, pages: Sequence[int]) -> Engine:
    """An engine for any request, with nothing compiled yet."""
    return Engine(
        lm.model,
        lm.params,
        batch=slots,
        max_length=lm.max_length,
        levels=_LEVELS,
        policy=policy,
        pages=pages,
        compiler=lm.compiler,
    )


def out_of_memory(engine: Engine, error: JaxRuntimeError, explained: AbstractContextManager[None]) -> Failed | None:
    """What becomes of requests if a step failed for want of memory; None if something else is wrong.

    What the failed call was given is freed once nobody handles the error any more.

    Args:
      explained: says what such an error means, and what to try: see `engine.memory`.
    """
    if not _is_for_want_of_memory(engine, error):
        return None
    message = ""
    try:
        with explained:
            raise error
    except CapacityError as found:
        message = str(found)
    free_locals(error)
    return Failed(message, "out_of_memory")


def _is_for_want_of_memory(engine: Engine, error: JaxRuntimeError) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) and engine.can_restart


def restarted(engine: Engine, end_requests: Callable[[], bool]) -> bool:
    """Gives an engine new pools, as soon as there is memory for them.

    Args:
      end_requests: ends all that are open, and waits a while; called before each attempt. Returns whether to make it.

    Returns:
      Whether the engine goes on.
    """
    while end_requests():
        try:
            engine.restart()
        except JaxRuntimeError as error:
            if not _is_for_want_of_memory(engine, error):
                raise
            free_locals(error)
        else:
            return True
    return False
