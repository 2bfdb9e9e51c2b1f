"""What every packed type is made of: named fields of a block's bytes, and a function from these to numbers."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:  # a reader of files needs no JAX
    import jax

Array: TypeAlias = "np.ndarray | jax.Array"


HALVES = ("d", "dmin", "m")  # the fields that are half-precision numbers, in every type


@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed type."""

    size: int  # values in a block
    fields: Mapping[str, int]  # the bytes of a block, in order: each field's name in ggml, and its bytes
    decode: Callable[..., Any]  # takes the fields by name, uint8 [..., bytes]; returns float32 [..., size]

    @property
    def nbytes(self) -> int:
        """The bytes of a block."""
        return sum(self.fields.values())

    def is_finite(self, blocks: np.ndarray) -> bool:
        """Whether all half-precision fields of blocks are finite, so that all numbers are."""
        halves = [np.ascontiguousarray(field) for name, field in self.split(blocks).items() if name in HALVES]
        return all(np.isfinite(field.view(np.float16)).all() for field in halves)

    def dequantize(self, blocks: Any) -> Any:
        """The numbers in packed blocks, as llama.cpp rounds them: in float32.

        Args:
          blocks: uint8 [..., blocks, nbytes], NumPy's or JAX's. NumPy's last axis must be contiguous.

        Returns:
          float32 [..., blocks * size], of the same library.
        """
        return self.decode(**self.split(blocks)).reshape(*blocks.shape[:-2], blocks.shape[-2] * self.size)

    def split(self, blocks: Any) -> dict[str, Any]:
        """The fields of blocks by name, uint8 [..., nbytes] to uint8 [..., bytes of the field]."""
        parts, start = {}, 0
        for name, width in self.fields.items():
            parts[name] = blocks[..., start : start + width]
            start += width
        return parts


def half(field: Array) -> Array:
    """Half-precision numbers, uint8 [..., 2 n] to float32 [..., n]."""
    return field.view(np.float16).astype(np.float32)


def planes(field: Array, bits: int, width: int) -> Array:
    """Small integers that are spread over bytes.

    Each group of `width` bytes holds `width * 8 / bits` integers: the lowest bits of its bytes are the first `width` of
    them, the next bits the next, and so on.

    Args:
      field: uint8 [..., n], n a multiple of width.
      bits: of an integer: 1, 2 or 4.
      width: bytes of a group.

    Returns:
      uint8 [..., n * 8 / bits].
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    count = field.shape[-1]
    groups = field.reshape(*field.shape[:-1], count // width, 1, width)
    return ((groups >> shifts) & (2**bits - 1)).reshape(*field.shape[:-1], count * 8 // bits)


def floats(integers: Array) -> Array:
    """Integers as float32, which holds them exactly."""
    return integers.astype(np.float32)


def scaled(scales: Array, values: Array) -> Array:
    """Multiplies each run of values with its scale: [..., runs] and [..., runs * n] to [..., runs, n]."""
    runs = scales.shape[-1]
    return scales[..., None] * values.reshape(*values.shape[:-1], runs, values.shape[-1] // runs)
