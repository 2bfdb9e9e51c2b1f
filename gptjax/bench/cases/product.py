"""Matrix products with few rows."""

import dataclasses
import math
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.bench.cases.case import Case, float64, normal
from pallas_kernels import matvec as products

_COLUMNS: Final = 512  # columns of a result that are compared


def matvec(x_TI: jax.Array, kernel: jax.Array, *, transposed: bool, implementation: str) -> jax.Array:
    """The product, summed: [T, O] float32."""
    return products.matvec(x_TI, kernel, transposed=transposed, implementation=implementation).total()


@dataclasses.dataclass(frozen=True)
class Product(Case):
    """`matvec`."""

    operation = "matvec"
    inputs: int  # I
    outputs: int  # O
    transposed: bool = False  # whether the weight is [O, I], as a head's is

    @property
    def shape(self) -> str:
        """Sizes of input and output."""
        return f"{self.inputs}→{self.outputs}"

    @property
    def bytes(self) -> int:
        """The weight."""
        return self.inputs * self.outputs * int(jnp.dtype(self.dtype).itemsize)

    @property
    def flops(self) -> int:
        """Two per weight and row."""
        return 2 * self.rows * self.inputs * self.outputs

    def x(self, count: int) -> jax.Array:
        """[T, I]."""
        del count
        return normal(0, (self.rows, self.inputs), self.dtype)

    def copies(self, count: int, implementation: str) -> list[Any]:
        """Weights."""
        del implementation
        deviation, shape = 1 / math.sqrt(self.inputs), (self.inputs, self.outputs)
        if self.transposed:
            shape = shape[::-1]
        return [normal(1 + copy, shape, self.dtype, deviation) for copy in range(count)]

    def call(self, x: jax.Array, operands: Any, implementation: str) -> jax.Array:
        """[T, O]."""
        return matvec(x, operands, transposed=self.transposed, implementation=implementation)

    @property
    def _columns(self) -> np.ndarray:
        return np.unique(np.linspace(0, self.outputs - 1, _COLUMNS).astype(int))

    def sample(self, out: jax.Array) -> jax.Array:
        """Some columns."""
        return out[:, self._columns]

    def expected(self, x: jax.Array, operands: Any) -> np.ndarray:
        """[T, columns]."""
        chosen = operands[self._columns].T if self.transposed else operands[:, self._columns]
        return float64(x) @ float64(chosen)
