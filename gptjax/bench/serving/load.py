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

    def queues(self) -> list[tuple[float, range]]:
        """When each client begins, in seconds from the start, and the numbers of its requests, sent one after another.

        At a rate, each request has a client of its own.
        """
        if self.clients is not None:
            return [(0.0, range(client, self.requests, self.clients)) for client in range(self.clients)]
        assert self.rate is not None
        rng, now, queues = random.Random(f"{self.seed} arrivals"), 0.0, []
        for number in range(self.requests):
            queues.append((now, range(number, number + 1)))
            now += rng.expovariate(self.rate)
        return queues
