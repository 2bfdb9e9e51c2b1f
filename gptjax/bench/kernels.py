"""The operations of `pallas_kernels` alone: their time, what part of the memory's speed that is, and their error."""

import dataclasses
import datetime
import importlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.bench.cases import Case, link
from gptjax.bench.models import Figure, measure_ceiling
from gptjax.diagnostics.mxfp4_accuracy import check_plot
from gptjax.errors import RequestError
from gptjax.support.units import readable
from pallas_kernels import dispatch, tiles

_APART: Final = 256_000_000  # bytes between two uses of a weight, several times any GPU's cache
_MOST_CALLS: Final = 64  # of a chain: each is compiled
_CHAIN_SECONDS: Final = 4e-3  # by the time of a lone call, most of which is the host's
_RUN_SECONDS: Final = 20e-3  # of a measurement, against which starting and waiting are nothing
_WRONG: Final = 4  # settings whose error is so many times another's compute something else


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
class Ceilings:
    """What the device reaches, measured."""

    copy: float  # bytes a second, read and written
    read: float  # bytes a second, summed up
    flops: float  # a second, of a large product
    link: float  # seconds of what makes a call's input of the last one's result, alone

    @property
    def bytes_per_second(self) -> float:
        """The memory's speed: the better of two."""
        return max(self.copy, self.read)

    def to_json(self) -> dict[str, float]:
        """All of it, in SI units."""
        return {
            "ceiling_bytes_per_second": self.bytes_per_second,
            "copy_bytes_per_second": self.copy,
            "read_bytes_per_second": self.read,
            "flops_per_second": self.flops,
            "link_seconds": self.link,
        }


def implementations() -> tuple[str, ...]:
    """The names to measure on the default device. On a CPU, Pallas kernels are only interpreted."""
    return ("xla",) if jax.default_backend() == "cpu" else dispatch.IMPLEMENTATIONS[1:]


def measure_ceilings(dtype: str) -> Ceilings:
    """Measures them on the default device, products in `dtype`."""
    is_cpu = jax.default_backend() == "cpu"
    x = jnp.ones(((1 << 28 if is_cpu else 1 << 31) >> 14, 1 << 12), jnp.float32)
    read = x.nbytes / _best(partial(jax.jit(lambda x: x.sum(axis=1)), x))
    size = 1 << 10 if is_cpu else 1 << 13
    a = jnp.ones((size, size), dtype)
    flops = 2 * size**3 / _best(partial(jax.jit(jnp.matmul), a, a))
    links = _chain(lambda x, _: x, link, jnp.ones((1, 2880), dtype), [()] * 512, repeats=5)
    return Ceilings(copy=measure_ceiling(), read=read, flops=flops, link=links.median)


def _best(work: Callable[[], jax.Array], repeats: int = 7, together: int = 10) -> float:
    """Seconds of one of several that are queued together: the best of several times."""
    jax.block_until_ready(work())
    return min(_timed(lambda: [work() for _ in range(together)]) for _ in range(repeats)) / together


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
                    expected = _expected(case)
                call, difference, apart = _measure(case, name, expected, repeats=repeats)
                yield KernelResult(case, tuple(models), name, call, difference, apart)
            except Exception as error:  # of a kernel that is tried out: the others go on
                yield NotRun.of(case, name, error)


def _expected(case: Case) -> np.ndarray:
    (operands,) = case.copies(1, "xla")
    return case.expected(case.x(1), operands)


def _measure(case: Case, implementation: str, expected: np.ndarray, *, repeats: int) -> tuple[Figure, float, int]:
    """Times of a call in a chain, its relative error, and the bytes read between two uses of a weight."""
    count = min(_MOST_CALLS, -(-_APART // case.bytes))
    x, copies = case.x(count), case.copies(count, implementation)

    def call(x: Any, operands: Any) -> Any:
        return case.call(x, operands, implementation)

    alone = jax.jit(call)
    found = np.asarray(case.sample(alone(x, copies[0]))).astype(np.float64)
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    lone = min(_timed(lambda: alone(x, copies[0])) for _ in range(3))
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

    _timed(lambda: turn(1))  # compiles
    times = max(1, math.ceil(_RUN_SECONDS / _timed(lambda: turn(1))))
    _timed(lambda: turn(times))
    return Figure(tuple(_timed(lambda: turn(times)) / (times * len(chain)) for _ in range(repeats)))


def _timed(work: Callable[[], Any]) -> float:
    """Seconds until the device is done."""
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


# Tuning


@dataclasses.dataclass(frozen=True)
class Attempt:
    """Settings that were tried. The protocol of what can be tuned is that of `pallas_kernels.tiles`."""

    key: tiles.Key
    settings: tiles.Settings
    call: Figure
    error: float


def tune(case: Case, implementation: str, *, repeats: int) -> Iterator[Attempt | NotRun]:
    """Tries the settings of every key that the implementation asks `tiles.lookup` about, one key after the other."""
    taken: dict[tiles.Key, tiles.Settings] = {}
    try:
        x, (operands,) = jax.eval_shape(lambda: (case.x(1), case.copies(1, implementation)))
        with tiles.trial({}) as asked:
            jax.eval_shape(lambda x, operands: case.call(x, operands, implementation), x, operands)
    except Exception as error:  # of a kernel that is tried out: the others go on
        yield NotRun.of(case, implementation, error)
        return
    candidates = {key: _tunable(key) for key in asked}
    expected = _expected(case) if any(candidates.values()) else np.empty(0)
    for key, tried in candidates.items():
        attempts = []
        for settings in tried:
            try:
                with tiles.trial({**taken, key: settings}):
                    call, difference, _ = _measure(case, implementation, expected, repeats=repeats)
            except Exception as error:  # such as too little shared memory
                unfit = NotRun.of(case, implementation, error)
                yield dataclasses.replace(unfit, reason=f"{settings}: {unfit.reason}")
            else:
                attempts.append(Attempt(key, settings, call, difference))
                yield attempts[-1]
        taken |= {entry.key: entry.settings for entry in fastest(attempts)}


def _tunable(key: tiles.Key) -> list[tiles.Settings]:
    operation, shape = key
    module = importlib.import_module(dispatch.module(operation))
    return module.tunable(dict(shape)) if hasattr(module, "tunable") else []


def fastest(attempts: Iterable[Attempt]) -> list[tiles.Entry]:
    """The best settings for each key. Whose error is many times that of others are not taken, however fast."""
    by_key: dict[tiles.Key, list[Attempt]] = {}
    for attempt in attempts:
        if math.isfinite(attempt.error):
            by_key.setdefault(attempt.key, []).append(attempt)
    entries = []
    for (operation, shape), tried in by_key.items():
        least = min(attempt.error for attempt in tried)
        best = min((each for each in tried if each.error <= _WRONG * least), key=lambda each: each.call.median)
        measured = round(1e6 * best.call.median, 2), datetime.date.today().isoformat(), jax.__version__
        entries.append(tiles.Entry(operation, dict(shape), best.settings, *measured))
    return entries


def plot(results: Sequence[KernelResult], ceilings: Ceilings, path: str | Path, *, title: str) -> None:
    """Draws the roofline: operations a second against operations a byte, below what the device reaches.

    Raises:
      RequestError: matplotlib is not installed, or the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure as Picture  # without pyplot: no window, no state

    picture = Picture(figsize=(9, 6), layout="constrained")
    axes = picture.add_subplot(xscale="log", yscale="log")
    ridge = ceilings.flops / ceilings.bytes_per_second
    left = min([ridge, *(result.intensity for result in results)]) / 2
    right = max([ridge, *(result.intensity for result in results)]) * 4
    roof = [ceilings.bytes_per_second * left, ceilings.flops, ceilings.flops]
    said = f"{readable(int(ceilings.bytes_per_second))}/s, {ceilings.flops / 1e12:.3g} TFLOP/s, measured"
    axes.plot([left, ridge, right], roof, color="black", label=said)
    operations, names = (
        sorted(set(each)) for each in zip(*((r.case.operation, r.implementation) for r in results), strict=True)
    )
    for (row, operation), (column, name) in itertools.product(enumerate(operations), enumerate(names)):
        points = [
            (result.intensity, result.flops_per_second)
            for result in results
            if (result.case.operation, result.implementation) == (operation, name)
        ]
        if points:
            marker, color = "os^D"[row % 4], f"C{column}"
            axes.scatter(
                *zip(*points, strict=True), marker=marker, color=color, alpha=0.7, label=f"{operation}, {name}"
            )
    axes.set(xlabel="FLOPs a byte that must be read", ylabel="FLOP/s", title=title)
    axes.grid(which="major", alpha=0.3)
    axes.legend()
    try:
        picture.savefig(path)
    except OSError as error:
        raise RequestError(f"{path} cannot be written ({error.strerror}); name another file") from None
