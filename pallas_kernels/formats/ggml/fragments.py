"""ggml's packed types in the order in which a GPU's tensor cores take them. Weights are repacked to it once.

As in `pallas_kernels.formats.fragments`, a tile is 64 rows and 64 columns for the 128 threads of a warpgroup, and
thread 32·w + 4·g + q (lane 4·g + q of warp w) holds rows 16·w + 2·g + r (r is 0 or 1) of it. Unlike MXFP4's powers of
two, the types' scales cannot go into bfloat16 operands, so a product must sum each run of values with one scale by
itself: the 16 columns of an `mma.m16n8k16` lie in one run. With bits j, m, u and h, a thread has the columns

    32·j + 8·q + 4·m + 2·u + h     in types with a scale for 32 values
    32·j + 16·m + 4·q + 2·u + h    in Q6_K, with a scale for 16

where (j, m) says which of a tile's four instructions they belong to, u which register of operand A, and h which half of
it. A code's bits are in

    words, 4 bits   word 2·j + r, at bit 8·m + 4·u + 16·h
    words, 8 bits   word 2·m + r of the j-th four, at bit 8·u + 16·h
    high, 1 bit     one word, at bit 8·r + 4·j + 2·m + u + 16·h
    high, 2 bits    word j, at bit 8·r + 4·m + 2·u + 16·h

and two numbers of 16 bits, of rows r = 0 and 1, share each word of `scales` and `blocks`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.formats import PackedWeight
from pallas_kernels.formats.fragments import TILE
from pallas_kernels.formats.ggml import PACKED
from pallas_kernels.formats.ggml.blocks_of_32 import five_bits
from pallas_kernels.formats.ggml.k_quants import q5_k_codes, q6_k_codes, scales_and_offsets
from pallas_kernels.formats.ggml.packed import floats, planes
from pallas_kernels.formats.ggml.weight import Quantized

_BITS: Final = np.arange(2, dtype=np.uint32)
_R, _J, _M, _U, _H = (_BITS.reshape(-1, *[1] * after) for after in (4, 3, 2, 1, 0))  # axes of [..., r, j, m, u, h]


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a type's numbers are made of: codes, and what is shared by 32 or 256 of them."""

    bits: int  # of a code: 4, 5, 6 or 8
    zero: int  # the code of the number 0, if there are no offsets
    codes: Callable[..., Any]  # of a block's fields by name: uint8 [..., values of a block]
    scales: Callable[..., Any]  # of the same: uint16 [..., blocks of 32, s], what 32 codes share
    run: int = 32  # codes with one scale
    shared: tuple[str, ...] = ()  # fields with a half-precision number each that 256 codes share


def _pairs(data: Any) -> Any:
    """Bytes [..., 2 n] to uint16 [..., n, 1]."""
    return jax.lax.bitcast_convert_type(data.reshape(*data.shape[:-1], -1, 2), jnp.uint16)[..., None]


def _d(d: Any, **_: Any) -> Any:
    return _pairs(d)


def _d_and_m(d: Any, m: Any, **_: Any) -> Any:
    return jnp.concatenate([_pairs(d), _pairs(m)], axis=-1)


def _integers(scales: Any, **_: Any) -> Any:
    factors_and_offsets = jnp.stack(scales_and_offsets(scales), axis=-1)
    return jax.lax.bitcast_convert_type(factors_and_offsets, jnp.uint16)[..., None]


PARTS: Final[Mapping[str, Parts]] = {
    "Q4_0": Parts(4, 8, lambda qs, **_: planes(qs, 4, 16), _d),
    "Q4_1": Parts(4, 0, lambda qs, **_: planes(qs, 4, 16), _d_and_m),
    "Q5_0": Parts(5, 16, lambda qh, qs, **_: five_bits(qh, qs), _d),
    "Q8_0": Parts(8, 0, lambda qs, **_: qs, _d),
    "Q4_K": Parts(4, 0, lambda qs, **_: planes(qs, 4, 32), _integers, shared=("d", "dmin")),
    "Q5_K": Parts(5, 0, lambda qh, qs, **_: q5_k_codes(qh, qs), _integers, shared=("d", "dmin")),
    "Q6_K": Parts(
        6, 32, lambda ql, qh, **_: q6_k_codes(ql, qh), lambda scales, **_: _pairs(scales), run=16, shared=("d",)
    ),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedFragments(PackedWeight):
    """A `Quantized` matrix [O, I] repacked for tensor cores. See the module."""

    words: jax.Array  # uint32 [O / 64, I / 64, 1, 128, 4]; of 8 bits [O / 64, I / 64, 2, 128, 4]
    high: jax.Array | None  # uint32 [O / 64, I / 64, 128, 1 or 2]: the fifth bit, or the fifth and sixth
    scales: jax.Array  # uint32 [O / 64, I / 64, 32, 2 or 4]: for j = 0 and 1 what 32 codes share
    blocks: jax.Array | None  # uint32 [O / 64, I / 256, 32, 1 or 2]: what 256 codes share
    type: str = dataclasses.field(metadata={"static": True})  # a key of PARTS

    @classmethod
    def of(cls, weight: Quantized) -> "QuantizedFragments":
        """The same numbers, repacked.

        Raises:
          ValueError: the type or the shape does not fit.
        """
        if not fits(weight):
            raise ValueError(
                f"{weight.type} of shape {weight.shape} cannot be repacked: types {', '.join(PARTS)} can, of two axes "
                "that are multiples of 64"
            )
        return _repack(weight)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the numbers: [O, I]."""
        return self.words.shape[0] * TILE, self.words.shape[1] * TILE

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: as many as the blocks have, but an eighth of a bit more a number in Q4_K and Q5_K."""
        return 4 * sum(math.prod(array.shape) for array in jax.tree.leaves(self))

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """The numbers [O, I]: the same as `Quantized.dequantize` gives."""
        m, k, runs, _, _ = self.words.shape
        # [m, k, L, w·g, q, word pair, r] -> [m, w·g, r, k, L, q, word pair], and so on
        words = self.words.reshape(m, k, runs, 32, 4, 2, 2).transpose(0, 3, 6, 1, 2, 4, 5)
        high = None if self.high is None else self.high.reshape(m, k, 32, 4, -1).transpose(0, 2, 1, 3, 4)[:, :, None]
        scales = self.scales.transpose(0, 2, 1, 3)[:, :, None]
        blocks = None if self.blocks is None else self.blocks.transpose(0, 2, 1, 3)[:, :, None]
        row = jnp.arange(2, dtype=jnp.uint32)[None, None]
        return _numbers(self.type, words, high, scales, blocks, row).reshape(self.shape).astype(dtype)

    def rows(self, indices: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Some rows of the numbers, [...] -> [..., I]. Indices that do not exist are clamped to the matrix."""
        indices = jnp.clip(indices, 0, self.shape[0] - 1)
        tile, place, row = indices // TILE, indices % TILE // 2, (indices % 2).astype(jnp.uint32)
        m, k, runs, _, _ = self.words.shape
        words = self.words.reshape(m, k, runs, 32, 4, 2, 2)[tile, :, :, place, :, :, row]
        high = None if self.high is None else self.high.reshape(m, k, 32, 4, -1)[tile, :, place]
        blocks = None if self.blocks is None else self.blocks[tile, :, place]
        return _numbers(self.type, words, high, self.scales[tile, :, place], blocks, row).astype(dtype)


def fits(weight: Quantized) -> bool:
    """Whether there is a layout of fragments for a weight's type and shape."""
    return weight.type in PARTS and weight.ndim == 2 and not any(size % TILE for size in weight.shape)


@jax.jit
def _repack(weight: Quantized) -> QuantizedFragments:
    parts, fields = PARTS[weight.type], PACKED[weight.type].split(weight.blocks)
    outputs, inputs = weight.shape
    m, k = outputs // TILE, inputs // TILE
    # [m, w, g, r, k, columns] -> [m, k, w, g, q, r, j, m, u, h]
    columns, order = ((2, 4, 2, 2, 2), (6, 3, 5, 7)) if parts.run == 32 else ((2, 2, 4, 2, 2), (7, 3, 5, 6))
    codes = parts.codes(**fields).reshape(m, 4, 8, 2, k, *columns).transpose(0, 4, 1, 2, *order, 8, 9)
    words, high = _words(parts.bits, codes.reshape(m, k, 128, 2, 2, 2, 2, 2).astype(jnp.uint32))
    scales = parts.scales(**fields)
    scales = _of_both_rows(scales.reshape(m, 32, 2, k, 2, scales.shape[-1])).reshape(m, k, 32, -1)
    halves = [_pairs(fields[name]) for name in parts.shared]
    blocks = None
    if halves:
        blocks = _of_both_rows(jnp.concatenate(halves, axis=-1).reshape(m, 32, 2, -1, len(halves)))
    return QuantizedFragments(words, high, scales, blocks, weight.type)


def _words(bits: int, codes: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """`words` and `high` of codes [m, k, thread, r, j, m, u, h]."""
    m, k = codes.shape[:2]

    def packed(numbers: jax.Array, shifts: Any, axes: int) -> jax.Array:
        return jnp.sum(numbers << shifts, axis=tuple(range(-axes, 0)), dtype=jnp.uint32)

    if bits == 8:
        words = packed(codes, 8 * _U + 16 * _H, 2).transpose(0, 1, 4, 2, 5, 3)  # [m, k, j, thread, m, r]
        return words.reshape(m, k, 2, 128, 4), None
    words = packed(codes & 15, 8 * _M + 4 * _U + 16 * _H, 3).swapaxes(-1, -2).reshape(m, k, 1, 128, 4)
    if bits == 4:
        return words, None
    if bits == 5:
        return words, packed(codes >> 4, 8 * _R + 4 * _J + 2 * _M + _U + 16 * _H, 5)[..., None]
    by_j = (codes >> 4).swapaxes(3, 4)  # [m, k, thread, j, r, m, u, h]
    return words, packed(by_j, 8 * _J + 4 * _M + 2 * _U + 16 * _H, 4)


def _of_both_rows(halves: jax.Array) -> jax.Array:
    """uint16 [m, 32, 2, n, ...] to words [m, n, 32, ...] that hold both of a thread's rows."""
    wide = halves.astype(jnp.uint32)
    return jnp.moveaxis(wide[:, :, 0] | wide[:, :, 1] << 16, 1, 2)


def _of_row(words: jax.Array, row: jax.Array) -> jax.Array:
    """A row's half of words [..., n, s], as uint16."""
    return (words >> 16 * row[..., None, None]).astype(jnp.uint16)


def _half(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def _numbers(
    name: str, words: jax.Array, high: jax.Array | None, scales: jax.Array, blocks: jax.Array | None, row: jax.Array
) -> jax.Array:
    """float32 [..., I] of words [..., k, L, q, word pair], high [..., k, q, word], scales and blocks [..., k, word].

    Args:
      row: r of each row, [...].
    """
    parts = PARTS[name]
    codes = _codes(parts, words, high, row)
    scales = _of_row(scales, row)
    scales = scales.reshape(*scales.shape[:-2], codes.shape[-1] // 32, -1)
    factors, offsets = _factors(parts, scales, None if blocks is None else _of_row(blocks, row))
    values = factors[..., None] * (codes.reshape(*factors.shape, parts.run) - parts.zero)
    return (values if offsets is None else values + offsets[..., None]).reshape(codes.shape)


def _codes(parts: Parts, words: jax.Array, high: jax.Array | None, row: jax.Array) -> jax.Array:
    """Codes in the order of columns, float32 [..., I]."""
    if parts.bits == 8:  # [..., k, q, j, m, u, h]
        codes = words.swapaxes(-3, -2)[..., None, None] >> (8 * _U + 16 * _H) & 255
        codes = codes.astype(jnp.uint8).view(jnp.int8)
    else:
        codes = words[..., 0, :, :, None, None, None] >> (8 * _M + 4 * _U + 16 * _H) & 15
    if high is not None:
        first = 8 * row[(..., *[None] * 6)]
        if parts.bits == 5:
            codes |= (high[(..., 0, *[None] * 4)] >> (first + 4 * _J + 2 * _M + _U + 16 * _H) & 1) << 4
        else:
            codes |= (high[..., None, None, None] >> (first + 4 * _M + 2 * _U + 16 * _H) & 3) << 4
    # [..., k, j, q, m, u, h] or [..., k, j, m, q, u, h]
    ordered = jnp.moveaxis(codes, -5, -4 if parts.run == 32 else -3)
    return jnp.asarray(floats(ordered)).reshape(*ordered.shape[:-6], -1)


def _factors(parts: Parts, scales: jax.Array, blocks: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """What a run's codes are multiplied by, and what is then added: float32 [..., I / run]."""
    if blocks is None:
        return _half(scales[..., 0]), _half(scales[..., 1]) if scales.shape[-1] == 2 else None
    pairs = jax.lax.bitcast_convert_type(scales[..., 0], jnp.uint8)  # [..., runs of 32, 2]
    *lead, runs, _ = pairs.shape
    numbers = [_half(blocks[..., place])[..., None] for place in range(len(parts.shared))]  # [..., I / 256, 1]

    def times(number: jax.Array, integers: jax.Array) -> jax.Array:
        return (number * floats(integers).reshape(*lead, runs // 8, -1)).reshape(*lead, -1)

    if parts.run == 16:
        return times(numbers[0], pairs.view(jnp.int8)), None
    return times(numbers[0], pairs[..., 0]), -times(numbers[1], pairs[..., 1])
