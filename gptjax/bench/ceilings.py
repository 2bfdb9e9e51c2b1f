"""The device's own limits, measured in the same run as what is compared with them."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.bench.figure import timed


@dataclasses.dataclass(frozen=True)
class MemorySpeed:
    """Bytes a second between the default device and its memory; each is the best of several measurements."""

    copy: float  # reads plus writes
    read: float  # reads alone

    @property
    def bytes_per_second(self) -> float:
        """The ceiling: the faster of the two."""
        return max(self.copy, self.read)

    def to_json(self) -> dict[str, float]:
        """The speeds for JSON, in SI units."""
        return {
            "ceiling_bytes_per_second": self.bytes_per_second,
            "copy_bytes_per_second": self.copy,
            "read_bytes_per_second": self.read,
        }


def measure_memory(repeats: int = 7) -> MemorySpeed:
    """Copies and reads a large array.

    A CPU copies with NumPy, one thread per core, because XLA's copies there mostly wait for fresh memory. A
    matrix is read in two ways, summing its rows and multiplying it by a vector, as a decode step does with its weights;
    which is faster depends on the GPU.
    """
    is_cpu = jax.default_backend() == "cpu"
    copy = _cpu_copy(1 << 28) if is_cpu else _device_copy(1 << 31)
    copied = copy()
    dtype = jnp.float32 if is_cpu else jnp.bfloat16
    matrix = jnp.ones(((1 << 28 if is_cpu else 1 << 31) // (4096 * jnp.dtype(dtype).itemsize), 4096), dtype)
    vector = jnp.ones((4096,), dtype)
    reads: list[Callable[[], jax.Array]] = [
        partial(jax.jit(lambda x: x.sum(axis=1, dtype=jnp.float32)), matrix),
        partial(jax.jit(jnp.matmul), matrix, vector),
    ]
    return MemorySpeed(
        copy=max(copied / timed(copy) for _ in range(repeats)),
        read=max(matrix.nbytes / best(read, repeats) for read in reads),
    )


def measure_flops(dtype: str) -> float:
    """Floating-point operations a second of a large matrix product in `dtype`."""
    size = 1 << 10 if jax.default_backend() == "cpu" else 1 << 13
    a = jnp.ones((size, size), dtype)
    return 2 * size**3 / best(partial(jax.jit(jnp.matmul), a, a))


def best(work: Callable[[], jax.Array], repeats: int = 7) -> float:
    """Seconds per call: the best of several measurements. A GPU gets ten calls at once, to hide what a launch takes."""
    together = 1 if jax.default_backend() == "cpu" else 10
    jax.block_until_ready(work())
    return min(timed(lambda: [work() for _ in range(together)]) for _ in range(repeats)) / together


def _cpu_copy(size: int) -> Callable[[], int]:
    parts = os.cpu_count() or 1
    pairs = [(np.ones(size // parts, np.uint8), np.zeros(size // parts, np.uint8)) for _ in range(parts)]
    pool = concurrent.futures.ThreadPoolExecutor(parts)

    def copy() -> int:
        list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs))
        return 2 * size

    return copy


def _device_copy(size: int) -> Callable[[], int]:
    negate = jax.jit(lambda x: -x, donate_argnums=0)  # a plain copy would be optimised away
    held = [jnp.zeros((size // 4,), jnp.float32)]

    def copy() -> int:
        held[0] = jax.block_until_ready(negate(held[0]))
        return 2 * size

    return copy
