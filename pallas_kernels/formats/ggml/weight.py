"""Matrices in ggml's packed types, as arrays of JAX."""

import dataclasses
import math
from typing import Any, Generic, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.formats import PackedWeight
from pallas_kernels.formats.ggml import PACKED
from pallas_kernels.formats.ggml.packed import HALVES

_SCALE = 2.0**-10  # gives random codes about the size of a model's weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized(PackedWeight):
    """A matrix in one packed type, with blocks along the last axis, as GGUF files have it.

    A pytree, whose field may be an array or what JAX puts in its place (a tracer, a shape). Shapes and sizes are those
    of the numbers.
    """

    blocks: jax.Array  # uint8 [..., n / values of a block, bytes of a block]
    type: str = dataclasses.field(metadata={"static": True})  # a key of PACKED

    @classmethod
    def abstract(cls, shape: tuple[int, ...], type_name: str) -> "Quantized":
        """The shapes of a matrix, as `jax.ShapeDtypeStruct`. The last axis must hold whole blocks."""
        packed = PACKED[type_name]
        blocks = (*shape[:-1], shape[-1] // packed.size, packed.nbytes)
        return cls(cast(jax.Array, jax.ShapeDtypeStruct(blocks, jnp.uint8)), type_name)

    @classmethod
    def random(cls, key: jax.Array, shape: tuple[int, ...], type_name: str) -> "Quantized":
        """Random codes, all with the same scale."""
        blocks = cls.abstract(shape, type_name).blocks.shape
        data, start = jax.random.bits(key, blocks, jnp.uint8), 0
        for name, width in PACKED[type_name].fields.items():
            if name in HALVES:
                data = data.at[..., start : start + width].set(np.array([_SCALE], np.float16).view(np.uint8))
            start += width
        return cls(data, type_name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        *lead, count, _ = self.blocks.shape
        return (*lead, count * PACKED[self.type].size)

    @property
    def nbytes(self) -> int:
        """The memory that the blocks take."""
        return math.prod(self.blocks.shape)

    def __getitem__(self, index: Any) -> "Quantized":
        """Some of the rows; the last axis must stay whole."""
        return Quantized(self.blocks[index], self.type)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """The numbers, rounded once, to `dtype`."""
        numbers: jax.Array = PACKED[self.type].dequantize(self.blocks)
        return numbers.astype(dtype)


Part = TypeVar("Part", bound=PackedWeight)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rows(PackedWeight, Generic[Part]):
    """A matrix whose rows are those of several packed ones, in order: queries, keys and values may differ in type."""

    parts: tuple[Part, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def nbytes(self) -> int:
        """The memory that the blocks take."""
        return sum(part.nbytes for part in self.parts)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """The numbers, rounded once, to `dtype`."""
        return jnp.concatenate([part.dequantize(dtype) for part in self.parts])
