"""The operations of `pallas_kernels` alone: their time, what part of the memory's speed that is, and their error."""

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

_APART: Final = 256_000_000  # bytes between two uses of a weight, several times any GPU's cache
_MOST_CALLS: Final = 64  # of a chain: each is compiled
_CHAIN_SECONDS: Final = 4e-3  # by the time of a lone call, most of which is the host's
_RUN_SECONDS: Final = 20e-3  # of a measurement, against which starting and waiting are nothing


@dataclasses.dataclass(frozen=True)
class KernelResult:
    """One operation at one shape by one implementation."""

    case: Case
    models: tuple[str, ...]
    implementation: str
    call: Figure  # seconds of one call in a chain, with what makes its input of the last one's result
    error: float  # ‖result − expected‖ / ‖expected‖, against float64
    apart: int  # bytes that are read between two uses of a weight: little of it may be read from a cache

    @property
    def bytes_per_second(self) -> float:
        """Of what must be read."""
        return self.case.bytes / self.call.median

    @property
    def flops_per_second(self) -> float:
        """Achieved."""
        return self.case.flops / self.call.median

    @property
    def intensity(self) -> float:
        """Operations for each byte that must be read."""
        return self.case.flops / self.case.bytes

    @property
    def cached(self) -> bool:
        """Whether so little is read that it may come from the device's cache."""
        return self.apart < _APART // 4

    def to_json(self, ceiling: float) -> dict[str, Any]:
        """All of it, in SI units."""
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
    """What the device reaches, measured."""

    flops: float  # a second, of a large product
    link: float  # seconds of what makes a call's input of the last one's result, alone

    def to_json(self) -> dict[str, float]:
        """All of it, in SI units."""
        return super().to_json() | {"flops_per_second": self.flops, "link_seconds": self.link}


def implementations() -> tuple[str, ...]:
    """The names to measure on the default device. On a CPU, Pallas kernels are only interpreted."""
    return ("xla",) if jax.default_backend() == "cpu" else dispatch.IMPLEMENTATIONS[1:]


def measure_ceilings(dtype: str) -> Ceilings:
    """Measures them on the default device, products in `dtype`."""
    memory = measure_memory()
    links = _chain(lambda x, _: x, link, jnp.ones((1, 2880), dtype), [()] * 512, repeats=5)
    return Ceilings(memory.copy, memory.read, measure_flops(dtype), links.median)


@dataclasses.dataclass(frozen=True)
class NotRun:
    """What could not be measured."""

    case: Case
    implementation: str
    reason: str

    @classmethod
    def of(cls, case: Case, implementation: str, error: Exception) -> "NotRun":
        """The error's first line says why."""
        return cls(case, implementation, (str(error).strip() or type(error).__name__).splitlines()[0])

    def to_json(self) -> dict[str, Any]:
        """What, and why not."""
        facts = {"operation": self.case.operation, "shape": self.case.shape, "rows": self.case.rows}
        return {**facts, "implementation": self.implementation, "reason": self.reason}


def run(cases: Mapping[Case, Sequence[str]], names: Sequence[str], *, repeats: int) -> Iterator[KernelResult | NotRun]:
    """Measures each case, which comes with its models' names, by each of the named implementations."""
    for case, models in cases.items():
        expected = None
        for name in names:
            try:
                if expected is None:
                    expected = expected_result(case)
                call, difference, apart = measure(case, name, expected, repeats=repeats)
                yield KernelResult(case, tuple(models), name, call, difference, apart)
            except Exception as error:  # of a kernel that is tried out: the others go on
                yield NotRun.of(case, name, error)


def expected_result(case: Case) -> np.ndarray:
    """The result in float64, of which `error` is measured."""
    (operands,) = case.copies(1, "xla")
    return case.expected(case.x(1), operands)


def measure(case: Case, implementation: str, expected: np.ndarray, *, repeats: int) -> tuple[Figure, float, int]:
    """Times of a call in a chain, its relative error, and the bytes read between two uses of a weight."""
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
    """Calls with these operands, one after the other. Each operand is an argument of its own, also where two are the
    same array: what could be computed from it alone, such as a weight transposed, is not shared between calls.
    """

    # The donated buffer keeps the addresses of each run the same, as recorded launches (CUDA graphs) like them.
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
    """Seconds of a call, in a chain with these operands that is run several times without waiting between."""
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
