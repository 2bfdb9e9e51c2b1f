"""Repeated measurements, and the clock they are taken with."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import jax

NOISE: Final = 0.1  # a spread above this share of the median is called noise


@dataclasses.dataclass(frozen=True)
class Figure:
    """Repeated measurements of one thing, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure to quote."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The difference between the slowest and the fastest."""
        return max(self.seconds) - min(self.seconds)

    @property
    def noisy(self) -> bool:
        """Whether the spread is too wide for small differences to mean anything."""
        return self.spread > NOISE * self.median


def timed(work: Callable[[], Any]) -> float:
    """Seconds until the device has finished what `work` returns."""
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start
