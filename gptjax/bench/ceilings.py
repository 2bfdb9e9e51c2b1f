"""What the device itself reaches, measured in the run that is compared with it."""

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
    """Bytes a second between the default device and its memory, each the best of several measurements."""

    copy: float  # read and written
    read: float  # read alone

    @property
    def bytes_per_second(self) -> float:
        """The ceiling: the faster of the two."""
        return max(self.copy, self.read)

    def to_json(self) -> dict[str, float]:
        """In SI units."""
        return {
            "ceiling_bytes_per_second": self.bytes_per_second,
            "copy_bytes_per_second": self.copy,
            "read_bytes_per_second": self.read,
        }


def measure_memory(repeats: int = 7) -> MemorySpeed:
    """Copies and reads a large array.

    A CPU copies with NumPy, a thread a core: XLA's copies there wait for fresh memory more than for the copying. What
    is read is a bfloat16 matrix, summed along its rows and multiplied with a vector, as the weights of a decode step
    are; on one GPU the one is faster, on another the other.
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
    """Operations a second of a large product in `dtype`."""
    size = 1 << 10 if jax.default_backend() == "cpu" else 1 << 13
    a = jnp.ones((size, size), dtype)
    return 2 * size**3 / best(partial(jax.jit(jnp.matmul), a, a))


def best(work: Callable[[], jax.Array], repeats: int = 7, together: int = 10) -> float:
    """Seconds of one of several calls that are queued together: the best of several measurements."""
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
