"""Measures the operations of `pallas_kernels` alone: their time, their share of the memory's speed, and their error."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.bench.cases import Case, link
from gptjax.bench.ceilings import MemorySpeed, measure_flops, measure_memory
from gptjax.bench.figure import Figure, timed
from pallas_kernels import dispatch

_APART: Final = 256_000_000  # bytes read between two uses of a weight, several times any GPU's cache
_MOST_CALLS: Final = 64  # in a chain, since each is compiled
_CHAIN_SECONDS: Final = 4e-3  # a chain's length, estimated from a single call, whose time is mostly the host's
_RUN_SECONDS: Final = 20e-3  # per measurement, so that starting and waiting are negligible


@dataclasses.dataclass(frozen=True)
class KernelResult:
    """One operation at one shape with one implementation."""

    case: Case
    models: tuple[str, ...]
    implementation: str
    call: Figure  # seconds per call in a chain, including making its input from the previous result
    error: float  # ‖result − expected‖ / ‖expected‖, against float64
    apart: int  # bytes read between two uses of a weight; if few, it may be read from a cache

    @property
    def bytes_per_second(self) -> float:
        """The speed of reading what must be read."""
        return self.case.bytes / self.call.median

    @property
    def flops_per_second(self) -> float:
        """The speed of arithmetic."""
        return self.case.flops / self.call.median

    @property
    def intensity(self) -> float:
        """Operations per byte that must be read."""
        return self.case.flops / self.case.bytes

    @property
    def cached(self) -> bool:
        """Whether so little is read that it may come from the device's cache."""
        return self.apart < _APART // 4

    def to_json(self, ceiling: float) -> dict[str, Any]:
        """Everything for JSON, in SI units."""
        return {
            "operation": self.case.operation,
            "shape": self.case.shape,
            **dataclasses.asdict(self.case),
            "models": self.models,
            "implementation": self.implementation,
            "seconds": self.call.median,
            "spread_seconds": self.call.spread,
            "runs": self.call.seconds,
            "noisy": self.call.noisy,
            "bytes": self.case.bytes,
            "flops": self.case.flops,
            "bytes_per_second": self.bytes_per_second,
            "flops_per_second": self.flops_per_second,
            "share_of_ceiling": self.bytes_per_second / ceiling,
            "cached": self.cached,
            "relative_error": self.error,
        }


@dataclasses.dataclass(frozen=True)
class Ceilings(MemorySpeed):
    """The device's measured limits."""

    flops: float  # a second, of a large matrix product
    link: float  # seconds to make a call's input from the previous result, alone

    def to_json(self) -> dict[str, float]:
        """Everything for JSON, in SI units."""
        return super().to_json() | {"flops_per_second": self.flops, "link_seconds": self.link}


def implementations() -> tuple[str, ...]:
    """The implementations to measure on the default device. On a CPU, Pallas kernels are only interpreted."""
    return ("xla",) if jax.default_backend() == "cpu" else dispatch.IMPLEMENTATIONS[1:]


def measure_ceilings(dtype: str) -> Ceilings:
    """Measures the default device's limits, with matrix products in `dtype`."""
    memory = measure_memory()
    links = _chain(lambda x, _: x, link, jnp.ones((1, 2880), dtype), [()] * 512, repeats=5)
    return Ceilings(memory.copy, memory.read, measure_flops(dtype), links.median)


@dataclasses.dataclass(frozen=True)
class NotRun:
    """A measurement that failed."""

    case: Case
    implementation: str
    reason: str

    @classmethod
    def of(cls, case: Case, implementation: str, error: Exception) -> "NotRun":
        """From an error, whose first line is the reason."""
        return cls(case, implementation, (str(error).strip() or type(error).__name__).splitlines()[0])

    def to_json(self) -> dict[str, Any]:
        """What failed and why, for JSON."""
        facts = {"operation": self.case.operation, "shape": self.case.shape, "rows": self.case.rows}
        return {**facts, "implementation": self.implementation, "reason": self.reason}


def run(cases: Mapping[Case, Sequence[str]], names: Sequence[str], *, repeats: int) -> Iterator[KernelResult | NotRun]:
    """Measures each case (with the names of its models) with each of the named implementations."""
    for case, models in cases.items():
        expected = None
        for name in names:
            try:
                if expected is None:
                    expected = expected_result(case)
                call, difference, apart = measure(case, name, expected, repeats=repeats)
                yield KernelResult(case, tuple(models), name, call, difference, apart)
            except Exception as error:  # whatever a kernel under trial raises: the others go on
                yield NotRun.of(case, name, error)


def expected_result(case: Case) -> np.ndarray:
    """The result in float64, which errors are measured against."""
    (operands,) = case.copies(1, "xla")
    return case.expected(case.x(1), operands)


def measure(case: Case, implementation: str, expected: np.ndarray, *, repeats: int) -> tuple[Figure, float, int]:
    """Seconds per call in a chain, the relative error, and the bytes read between two uses of a weight."""
    count = min(_MOST_CALLS, -(-_APART // case.bytes))
    x, copies = case.x(count), case.copies(count, implementation)

    def call(x: Any, operands: Any) -> Any:
        return case.call(x, operands, implementation)

    alone = jax.jit(call)
    found = np.asarray(case.sample(alone(x, copies[0]))).astype(np.float64)
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    lone = min(timed(lambda: alone(x, copies[0])) for _ in range(3))
    calls = min(_MOST_CALLS, math.ceil(_CHAIN_SECONDS / lone))
    chain = [copies[index % len(copies)] for index in range(calls)]
    return _chain(call, case.following, x, chain, repeats=repeats), error, min(calls, len(copies)) * case.bytes


def _program(
    call: Callable[[Any, Any], Any], following: Callable[[Any, Any], Any]
) -> Callable[[Any, Sequence[Any]], Any]:
    """A program that makes a chain of calls, one after the other.

    Each call's operands are separate arguments, even if two are the same array, so that nothing computed from them
    alone, such as a transposed weight, is shared between calls.
    """

    # Donating the buffer keeps its address the same in all runs, so that recorded launches (CUDA graphs) can be reused.
    @partial(jax.jit, donate_argnums=0)
    def program(x: Any, chain: Sequence[Any]) -> Any:
        for operands in chain:
            x = following(x, call(x, operands))
        return x

    return program


def _chain(
    call: Callable[[Any, Any], Any],
    following: Callable[[Any, Any], Any],
    x: Any,
    chain: Sequence[Any],
    *,
    repeats: int,
) -> Figure:
    """Seconds per call, in a chain with these operands that is run several times without waiting in between."""
    program = _program(call, following)
    held = jax.tree.map(jnp.copy, x)

    def turn(times: int) -> Any:
        nonlocal held
        for _ in range(times):
            held = program(held, chain)
        return held

    timed(lambda: turn(1))  # compiles
    times = max(1, math.ceil(_RUN_SECONDS / timed(lambda: turn(1))))
    timed(lambda: turn(times))
    return Figure(tuple(timed(lambda: turn(times)) / (times * len(chain)) for _ in range(repeats)))
