"""What is measured of an operation, and what cases are made with."""

import abc
import dataclasses
from functools import partial
from typing import Any, ClassVar, Final

import jax
import jax.numpy as jnp
import numpy as np

_SMALL: Final = 2.0**-30  # so little that what it is added to stays what it was, which the compiler does not know


@dataclasses.dataclass(frozen=True)
class Case(abc.ABC):
    """An operation at a shape. Everything random in it is the same each time."""

    operation: ClassVar[str]
    rows: int
    dtype: str

    @property
    @abc.abstractmethod
    def shape(self) -> str:
        """For people."""

    @property
    @abc.abstractmethod
    def bytes(self) -> int:
        """That must be read: weights, or keys and values. What goes in and out besides is left out."""

    @property
    @abc.abstractmethod
    def flops(self) -> int:
        """Two for each product of two numbers."""

    @abc.abstractmethod
    def x(self, count: int) -> Any:
        """The input of the first of calls whose operands are so many copies: what is given from call to call."""

    @abc.abstractmethod
    def copies(self, count: int, implementation: str) -> list[Any]:
        """Operands for so many calls, of which none reads what the one before did, where there is so much to read."""

    @abc.abstractmethod
    def call(self, x: Any, operands: Any, implementation: str) -> Any:
        """The operation."""

    @abc.abstractmethod
    def sample(self, out: Any) -> jax.Array:
        """The part of a result that is compared."""

    @abc.abstractmethod
    def expected(self, x: Any, operands: Any) -> np.ndarray:
        """That part in float64, by NumPy; the operands are those of "xla"."""

    def following(self, x: Any, out: Any) -> Any:
        """The next call's input, which cannot be known before this call has ended; as good as x."""
        return link(x, out)


def link(x: jax.Array, out: jax.Array) -> jax.Array:
    """x [rows, ...] again, not to be known before the result [rows, ...] is."""
    # Without the barrier, of the result only what is used here would be computed.
    x, out = jax.lax.optimization_barrier((x, out))
    return x + (out[:, :1] * _SMALL).astype(x.dtype)


@partial(jax.jit, static_argnums=(1, 2))
def normal(seed: int, shape: tuple[int, ...], dtype: str, deviation: float = 1.0) -> jax.Array:
    """Random numbers, the same for the same seed."""
    return jax.random.normal(jax.random.key(seed), shape, dtype) * jnp.asarray(deviation, dtype)


def float64(x: Any) -> np.ndarray:
    """What an array of the device holds, for NumPy."""
    return np.asarray(x).astype(np.float64)
