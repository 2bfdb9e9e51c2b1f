"""Throughput and latencies of a load."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from gptjax.bench.serving.clients import Measured
from gptjax.bench.serving.load import Load
from gptjax.bench.serving.stream import Record

PERCENTILES: Final = (50, 90, 99)
BUSY: Final = 0.8  # a share of the time from which the clients themselves are what is slow


@dataclasses.dataclass(frozen=True)
class Result:
    """One load's figures. Latencies, in seconds, are of requests that ended without an error."""

    load: Load
    measured: Measured

    @property
    def served(self) -> list[Record]:
        """The requests that ended without an error."""
        return [record for record in self.measured.records if record.error is None]

    @property
    def errors(self) -> dict[str, int]:
        """How often each error came, the most frequent first."""
        return dict(collections.Counter(record.error for record in self.measured.records if record.error).most_common())

    @property
    def seconds(self) -> float:
        """From the first request to the last answer."""
        records = self.measured.records
        return max(record.ended for record in records) - min(record.began for record in records)

    @property
    def output_rate(self) -> float:
        """Tokens generated per second, of all requests together."""
        return sum(record.output_tokens for record in self.served) / self.seconds

    @property
    def total_rate(self) -> float:
        """Tokens read and generated per second."""
        return self.output_rate + sum(record.prompt_tokens for record in self.served) / self.seconds

    @property
    def first(self) -> list[float]:
        """From each request to its first token."""
        return [record.events[0] - record.began for record in self.served if record.events]

    @property
    def gaps(self) -> list[float]:
        """Between two events of a request, each with one or more tokens."""
        return [
            later - earlier
            for record in self.served
            for earlier, later in zip(record.events, record.events[1:], strict=False)
        ]

    @property
    def whole(self) -> list[float]:
        """From each request to the end of its answer."""
        return [record.ended - record.began for record in self.served]

    @property
    def clients_are_slow(self) -> bool:
        """Whether the figures may be those of the clients."""
        return self.measured.busy > BUSY

    def to_json(self) -> dict[str, Any]:
        """All figures; seconds are rounded to 0.01 ms."""
        return {
            "clients": self.load.clients,
            "rate": self.load.rate,
            "requests": len(self.measured.records),
            "errors": self.errors,
            "prompt_tokens": sum(record.prompt_tokens for record in self.served),
            "cached_tokens": sum(record.cached_tokens for record in self.served),
            "output_tokens": sum(record.output_tokens for record in self.served),
            "seconds": round(self.seconds, 5),
            "requests_per_second": round(len(self.served) / self.seconds, 3),
            "output_tokens_per_second": round(self.output_rate, 2),
            "total_tokens_per_second": round(self.total_rate, 2),
            "first_token_seconds": _percentiles(self.first),
            "gap_seconds": _percentiles(self.gaps),
            "whole_seconds": _percentiles(self.whole),
            "clients_busy": round(self.measured.busy, 3),
        }


def percentile(values: Sequence[float], share: int) -> float:
    """One of the values: the p90 of ten is the ninth smallest. NaN if there are none."""
    return float(np.percentile(values, share, method="inverted_cdf")) if values else math.nan


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    return {f"p{share}": round(percentile(values, share), 5) if values else None for share in PERCENTILES}
