"""Packed weights: each format's layout in one place, and how its bytes become numbers."""

import abc
import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # whoever only reads GGUF files does not wait for JAX
    import jax
    from jax.typing import DTypeLike


class PackedWeight(abc.ABC):
    """A weight in a packed format: one leaf of parameters, though a pytree itself.

    Its fields may be arrays or what JAX puts in their place (tracers, shapes). Shape and size are those of the numbers.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers."""

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """The memory that it takes."""

    @abc.abstractmethod
    def dequantize(self, dtype: "DTypeLike" = np.float32) -> "jax.Array":
        """The numbers, rounded once, to `dtype`."""


def is_packed(leaf: Any) -> bool:
    """Whether a leaf of parameters is a packed weight, of any format, and so a pytree itself."""
    return isinstance(leaf, PackedWeight)
