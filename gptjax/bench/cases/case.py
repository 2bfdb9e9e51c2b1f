"""The base class of cases, and helpers to make them."""

import abc
import dataclasses
from functools import partial
from typing import Any, ClassVar, Final

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.fp8_pages import Pages, expanded, rounded
from pallas_kernels.pages import PAGE

_SMALL: Final = 2.0**-30  # so small that adding it changes nothing, which the compiler does not know


@dataclasses.dataclass(frozen=True)
class Case(abc.ABC):
    """An operation at a shape. Its random numbers are the same each time."""

    operation: ClassVar[str]
    rows: int
    dtype: str

    @property
    @abc.abstractmethod
    def shape(self) -> str:
        """The shape, for people."""

    @property
    @abc.abstractmethod
    def bytes(self) -> int:
        """Bytes that must be read: weights, or keys and values. Other inputs and outputs are not counted."""

    @property
    @abc.abstractmethod
    def flops(self) -> int:
        """Floating-point operations: two for each multiplication."""

    @abc.abstractmethod
    def x(self, count: int) -> Any:
        """The first call's input, which passes from call to call. `count` is the number of copies of the operands."""

    @abc.abstractmethod
    def copies(self, count: int, implementation: str) -> list[Any]:
        """Operands for `count` calls, none of which reads what the one before it did, if there is enough to read."""

    @abc.abstractmethod
    def call(self, x: Any, operands: Any, implementation: str) -> Any:
        """Runs the operation."""

    @abc.abstractmethod
    def sample(self, out: Any) -> jax.Array:
        """The part of a result that is compared."""

    @abc.abstractmethod
    def expected(self, x: Any, operands: Any) -> np.ndarray:
        """The same part in float64, computed by NumPy; the operands are those of "xla"."""

    def following(self, x: Any, out: Any) -> Any:
        """The next call's input, which depends on this call's result; equivalent to x."""
        return link(x, out)


def link(x: jax.Array, out: jax.Array) -> jax.Array:
    """Returns x [rows, ...], made to depend on the result [rows, ...]."""
    # Without the barrier, only the part of the result used here would be computed.
    x, out = jax.lax.optimization_barrier((x, out))
    return x + (out[:, :1] * _SMALL).astype(x.dtype)


@partial(jax.jit, static_argnums=(1, 2))
def normal(seed: int, shape: tuple[int, ...], dtype: str, deviation: float = 1.0) -> jax.Array:
    """Random numbers, the same for the same seed."""
    return jax.random.normal(jax.random.key(seed), shape, dtype) * jnp.asarray(deviation, dtype)


@partial(jax.jit, static_argnums=(1, 2, 3))
def pool(seed: int, shape: tuple[int, ...], dtype: str, cache_dtype: str | None) -> Pages:
    """Random keys or values, [Y, K, S, H]."""
    numbers = jax.random.normal(jax.random.key(seed), shape, dtype)
    return numbers if cache_dtype is None else rounded(numbers)


def float64(x: Any) -> np.ndarray:
    """A device's array as a NumPy array."""
    return np.asarray(x).astype(np.float64)


def shuffled_table(rows: int, positions: int) -> jax.Array:
    """A table for rows of this many positions, which uses all pages of a pool except page 0, in random order."""
    pages = -(-positions // PAGE)
    order = 1 + np.random.default_rng(0).permutation(rows * pages)
    return jnp.asarray(order.reshape(rows, pages), jnp.int32)


def together(pool_YKSH: Pages, table_BZ: jax.Array) -> np.ndarray:
    """The keys or values of rows' pages one after the other, float64 [B, K, Z · S, H]."""
    k_BZKSH = expanded(jax.tree.map(lambda array: array[table_BZ], pool_YKSH), jnp.float32)
    k_BKZSH = float64(jnp.moveaxis(k_BZKSH, 2, 1))
    return k_BKZSH.reshape(*k_BKZSH.shape[:2], -1, pool_YKSH.shape[3])
