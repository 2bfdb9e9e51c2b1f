"""Limits on what a caller may ask for: positions in a sequence, rows in a step."""

import numbers
import os

from gptjax.config import ModelConfig
from gptjax.errors import CapacityError, RequestError
from gptjax.support.quoting import quoted


def positions(config: ModelConfig, max_length: int | None, *, default: int | None = None) -> int:
    """The positions to allow in a sequence: as given, else $GPTJAX_MAX_LENGTH, else all that the model has.

    Args:
      default: the most to take of the model's positions if nothing else is given.

    Raises:
      CapacityError: more than the model has.
      RequestError: not a whole number of at least 1.
    """
    source: str = "max_length"
    given: object = max_length
    if given is None and (text := os.environ.get("GPTJAX_MAX_LENGTH")):
        source, given = "GPTJAX_MAX_LENGTH", int(text) if text.isascii() and text.isdecimal() else text
    if given is None:
        return min(config.context_length, default or config.context_length)
    length = at_least_one(source, given)
    if length > config.context_length:
        raise CapacityError(
            f"{source} is {quoted(length)}, but the model has only {config.context_length} positions; "
            "choose at most that"
        )
    return length


def at_least_one(name: str, given: object) -> int:
    """The given number, checked to be whole and at least 1. Raises `RequestError`, naming the option."""
    if isinstance(given, bool) or not isinstance(given, numbers.Integral) or given < 1:
        raise RequestError(f"{name} must be a whole number of at least 1, found {quoted(given)}")
    return int(given)
