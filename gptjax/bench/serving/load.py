"""What clients send: their number or rate, their prompts, and how much they ask for."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

_FIRST_ID, _IDS = 10, 990  # ids that every vocabulary has, without the special tokens at its beginning


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests of one kind, from clients that each wait for an answer, or at a rate."""

    model: str
    requests: int
    clients: int | None  # each sends its next request when it has the answer; None: requests come at `rate`
    rate: float | None  # requests per second, at random times (a Poisson process)
    prompt_length: int = 512  # tokens; with `texts` it is unused
    shared_prefix: int = 0  # of these, the first are the same in all prompts
    output_length: int = 128  # tokens
    texts: Sequence[str] = ()  # prompts to take turns with, instead of random token ids
    temperature: float = 0.0
    seed: int = 0
    timeout: float = 600.0  # seconds for an answer

    def body(self, number: int) -> dict[str, Any]:
        """The JSON of a request. Prompts of different numbers and seeds differ."""
        return {
            "model": self.model,
            "prompt": self.texts[number % len(self.texts)] if self.texts else self._ids(number),
            "max_tokens": self.output_length,
            "temperature": self.temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def _ids(self, number: int) -> list[int]:
        shared = random.Random(f"{self.seed} shared")
        own = random.Random(f"{self.seed} {number}")
        ids = [_FIRST_ID + shared.randrange(_IDS) for _ in range(self.shared_prefix)]
        return ids + [_FIRST_ID + own.randrange(_IDS) for _ in range(self.prompt_length - self.shared_prefix)]

    def arrivals(self) -> list[float]:
        """When each request begins, in seconds from the start, at `rate`."""
        assert self.rate is not None
        rng, now, times = random.Random(f"{self.seed} arrivals"), 0.0, []
        for _ in range(self.requests):
            times.append(now)
            now += rng.expovariate(self.rate)
        return times
