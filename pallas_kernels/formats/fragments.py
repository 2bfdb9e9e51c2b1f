"""MXFP4 in the order in which a GPU's tensor cores take it. Weights are repacked to it once, for the kernels.

The format is made for `mma.m16n8k16`: a tile is 64 rows and 64 columns in one piece of 2 KiB, and each of a
warpgroup's 128 threads reads its part of it with one 16-byte load. Let thread i = 32·w + 4·g + q be lane 4·g + q of
warp w. Its word 2·c + r (c and r are 0 or 1) holds the eight values of

    row     16·w + 2·g + r
    columns 16·q + 4·p + 2·c + h        for plane p of 0 to 3 and half h of 0 and 1

so a plane of its four words is an operand A of the instruction, with the odd rows as its rows 8 + g: a thread gets the
sums of adjacent rows, such as gate and up of one unit.

Half h of a word has 16 bits. Plane p's code (sign, two bits of exponent, one of mantissa) lies at bits

    0: 15, 8, 7, 6      1: 12, 5, 4, 3      2: 9, 2, 1, 0      3: 14, 13, 11, 10

so `word << 3·p & 0x81C081C0` is two bfloat16 numbers, 2^-126 times the values, for the first three planes. (The idea
is from `triton_kernels`, openai/triton, `hopper_value.py`.)

A thread's scales of a tile are the two bytes of halfword i // 2: the even row's and the odd row's.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.formats import PackedWeight
from pallas_kernels.formats.mxfp4 import BLOCK, MXFP4

TILE = 64  # rows and columns
LARGEST_SCALE = 192  # that the kernels take: 2^65
# Per plane: how far to shift the sign, the exponent's upper bit and the other two bits of a code 0bseem to the left.
_PLACES = ((12, 6, 6), (9, 3, 3), (6, 0, 0), (11, 11, 10))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MXFP4Fragments(PackedWeight):
    """An `MXFP4` tensor [..., O, I] repacked for tensor cores; O and I are multiples of 64. See the module."""

    words: jax.Array  # uint32 [..., O / 64, I / 64, 128, 4]
    scales: jax.Array  # uint16 [..., O / 64, I / 64, 64]

    @classmethod
    def of(cls, packed: MXFP4) -> "MXFP4Fragments":
        """The same numbers, repacked. Bits are kept: `unpacked` gives back the same tensor.

        Raises:
          ValueError: O or I is not a multiple of 64.
        """
        if any(size % TILE for size in packed.shape[-2:]):
            raise ValueError(
                f"MXFP4 of shape {packed.shape} cannot be repacked: its last two axes must be multiples of 64"
            )
        return _repack(packed)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers: [..., O, I]."""
        *lead, tiles, steps, _, _ = self.words.shape
        return (*lead, tiles * TILE, steps * TILE)

    @property
    def nbytes(self) -> int:
        """Bytes of words and scales: 4.25 bits per number."""
        return 4 * math.prod(self.words.shape) + 2 * math.prod(self.scales.shape)

    def unpacked(self) -> MXFP4:
        """The tensor in the layout of checkpoints."""
        return _unpack(self)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The numbers [..., O, I]. See `MXFP4.dequantize`."""
        return self.unpacked().dequantize(dtype)

    def __getitem__(self, index: Any) -> "MXFP4Fragments":
        """Indexes the axes before the last two, as arrays are indexed: experts of `[E, O, I]`.

        Raises:
          IndexError: it would reach the rows, whose tiles stay whole.
        """
        if isinstance(index, tuple) or self.ndim < 3:
            raise IndexError(f"repacked MXFP4 of shape {self.shape} can be indexed in its first axis only")
        return MXFP4Fragments(self.words[index], self.scales[index])

    __iter__ = None


def fits(packed: MXFP4, shape: tuple[int, ...] | None = None) -> bool:
    """Whether the kernels can take the fragments of a tensor, or of parts of it that have this shape: the last two axes
    are multiples of 64, and no scale is above `LARGEST_SCALE`, as in no working model."""
    sizes = packed.shape if shape is None else shape
    return not any(size % TILE for size in sizes[-2:]) and int(packed.scales.max()) <= LARGEST_SCALE


@jax.jit
def _repack(packed: MXFP4) -> MXFP4Fragments:
    *lead, outputs, inputs = packed.shape
    codes = jnp.stack([packed.blocks & 15, packed.blocks >> 4], axis=-1).reshape(*lead, outputs, inputs)
    m, k = outputs // TILE, inputs // TILE
    # [m, w, g, r, k, q, p, c, h] -> [m, k, w, g, q, c, r, p, h]
    codes = codes.reshape(*lead, m, 4, 8, 2, k, 4, 4, 2, 2).transpose(_axes(lead, 0, 4, 1, 2, 5, 7, 3, 6, 8))
    words = jnp.zeros(codes.shape[:-2], jnp.uint32)
    for plane, (sign, high, low) in enumerate(_PLACES):
        for half in range(2):
            code = codes[..., plane, half].astype(jnp.uint32)
            bits = (code & 8) << sign | (code & 4) << high | (code & 3) << low
            words = words | bits << 16 * half
    # [m, w, g, r, k, q // 2] -> [m, k, w, g, q // 2, r]
    pairs = packed.scales.reshape(*lead, m, 4, 8, 2, k, 2).transpose(_axes(lead, 0, 4, 1, 2, 5, 3)).astype(jnp.uint16)
    return MXFP4Fragments(
        words=words.reshape(*lead, m, k, 128, 4),
        scales=(pairs[..., 0] | pairs[..., 1] << 8).reshape(*lead, m, k, 64),
    )


@jax.jit
def _unpack(fragments: MXFP4Fragments) -> MXFP4:
    *lead, m, k, _, _ = fragments.words.shape
    words = fragments.words.reshape(*lead, m, k, 4, 8, 4, 2, 2)  # [m, k, w, g, q, c, r]
    planes = [
        jnp.stack(
            [(half >> sign & 8) | (half >> high & 4) | (half >> low & 3) for half in (words & 0xFFFF, words >> 16)],
            axis=-1,
        ).astype(jnp.uint8)
        for sign, high, low in _PLACES
    ]
    # [m, k, w, g, q, c, r, p, h] -> [m, w, g, r, k, q, p, c, h]
    codes = jnp.stack(planes, axis=-2).transpose(_axes(lead, 0, 2, 3, 6, 1, 4, 7, 5, 8))
    codes = codes.reshape(*lead, m * TILE, k * TILE)
    pairs = fragments.scales.reshape(*lead, m, k, 4, 8, 2)
    scales = jnp.stack([pairs & 255, pairs >> 8], axis=-1).astype(jnp.uint8).transpose(_axes(lead, 0, 2, 3, 5, 1, 4))
    scales = scales.reshape(*lead, m * TILE, 2 * k)
    return MXFP4((codes[..., 0::2] | codes[..., 1::2] << 4).reshape(*scales.shape, BLOCK // 2), scales)


def _axes(lead: list[int], *rest: int) -> tuple[int, ...]:
    """A transposition of the axes after the leading ones."""
    return (*range(len(lead)), *(len(lead) + axis for axis in rest))
