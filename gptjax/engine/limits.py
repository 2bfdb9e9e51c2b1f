"""Limits on what a caller may ask for: positions in a sequence, rows in a step."""

import dataclasses
import numbers
import os
import re

from gptjax.config import ModelConfig
from gptjax.errors import CapacityError, RequestError
from gptjax.support.quoting import quoted


@dataclasses.dataclass(frozen=True)
class MemoryLimit:
    """How much memory an engine may take. One of both is given."""

    share: float | None = None  # of the device's memory, above 0 and at most 1: for the weights and all else
    tokens: int | None = None  # positions of the cache

    def check(self, max_length: int, *, parts: int = 1) -> None:
        """Raises `CapacityError` if there are fewer tokens than one request may have in each part of the cache."""
        if self.tokens is not None and self.tokens < parts * max_length:
            where = f" in each of its {parts} parts (data={parts})" if parts > 1 else ""
            raise CapacityError(
                f"a cache of {self.tokens} tokens has no room for one request of max_length={max_length}{where}: give "
                f"at least that many (--memory {parts * max_length}tokens), or a smaller max_length "
                f"(--max-length {self.tokens // parts})"
            )


def memory_limit(given: object) -> MemoryLimit | None:
    """Reads a share of the device, such as 0.9 or "0.9", or a number of tokens, such as "262144tokens".

    Raises:
      RequestError: neither of these.
    """
    if given is None:
        return None
    text = str(given).strip() if isinstance(given, str | int | float) and not isinstance(given, bool) else ""
    if re.fullmatch(r"0*[1-9][0-9]{0,14} ?tokens", text):
        return MemoryLimit(tokens=int(text.removesuffix("tokens")))
    if re.fullmatch(r"[0-9]*\.?[0-9]+(e-[0-9]+)?", text) and 0 < float(text) <= 1:
        return MemoryLimit(share=float(text))
    raise RequestError(
        f"memory is a share of the device's memory, above 0 and at most 1, such as 0.9, or a number of tokens, such as "
        f"262144tokens; found {quoted(given)}"
    )


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
