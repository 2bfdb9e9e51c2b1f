"""MXFP4, the format of GPT-OSS's experts: 4-bit floats in blocks of 32 that share a power of two.

Source: Open Compute Project, "Microscaling Formats (MX) Specification", version 1.0: elements are E2M1, scales E8M0.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import bitcast_convert_type as bitcast

from pallas_kernels.formats import PackedWeight

BLOCK = 32  # values that share a scale
MIN_SCALE = 2  # from here to 252 every value times its power of two is a normal, finite float32
NAN_SCALE = 255
_BIAS = 127  # of E8M0, and of float32's exponents
_MANTISSA = 23  # bits of float32 below the exponent
_TWICE_THE_VALUES = 0xC8643210  # nibble i is 2 · (0, .5, 1, 1.5, 2, 3, 4, 6)[i]
# Halfway between two magnitudes. A tie goes to the even code: here down, and in the second row up.
_TIES_DOWN = (0.25, 1.25, 2.5, 5.0)
_TIES_UP = (0.75, 1.75, 3.5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MXFP4(PackedWeight):
    """A tensor in OCP MXFP4, with blocks of 32 values along the last axis, in the layout of checkpoints.

    Value i of a block is `(0, .5, 1, 1.5, 2, 3, 4, 6, -0, -.5, -1, -1.5, -2, -3, -4, -6)[code i] · 2^(scale − 127)`.

    A pytree, whose fields may be arrays or what JAX and Flax put in their place (tracers, shapes, boxes). So nothing is
    checked here: `MXFP4.of` does that. Shapes and sizes are those of the numbers, and work for shapes too.
    """

    blocks: jax.Array  # uint8 [..., n/32, 16], two codes per byte; the low nibble is the even element
    scales: jax.Array  # uint8 [..., n/32]; 255 makes its block NaN

    @classmethod
    def of(cls, blocks: Any, scales: Any) -> "MXFP4":
        """The tensor of a checkpoint's blocks and scales, arrays or `jax.ShapeDtypeStruct`s.

        Raises:
          ValueError: they are not uint8, their shapes do not fit, or a scale is NaN. Only NumPy arrays are searched for
            NaN: an array on a device would have to be waited for.
        """
        for name, array in (("blocks", blocks), ("scales", scales)):
            if array.dtype != np.uint8:
                raise ValueError(
                    f"MXFP4 {name} must be uint8, found {array.dtype}: pass the checkpoint's bytes as stored"
                )
        if not scales.shape or tuple(blocks.shape) != (*scales.shape, BLOCK // 2):
            raise ValueError(
                f"MXFP4 blocks must be [..., n/{BLOCK}, {BLOCK // 2}] and scales [..., n/{BLOCK}], "
                f"found {tuple(blocks.shape)} and {tuple(scales.shape)}"
            )
        if isinstance(scales, np.ndarray) and (nan := scales == NAN_SCALE).any():
            first = tuple(map(int, np.argwhere(nan)[0]))
            raise ValueError(
                f"{nan.sum()} of {nan.size} MXFP4 scales are {NAN_SCALE}, which is NaN, the first at {first}: "
                "no sound checkpoint has one, so fetch it again"
            )
        return cls(blocks, scales)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers: [..., n]."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * BLOCK)

    @property
    def nbytes(self) -> int:
        """Bytes of blocks and scales: 4.25 bits per number."""
        return math.prod(self.blocks.shape) + math.prod(self.scales.shape)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The numbers [..., n], exact in float32 on every device for scales of 2 to 252, then rounded once to `dtype`.

        Outside, 255 gives NaN; 0 gives zeros; 1 may give 0 for ±0.5, subnormal in float32 and flushed by a CPU; 253
        (±4, ±6) and 254 (those, ±2 and ±3) overflow to infinity.
        """
        return _dequantize(self.blocks, self.scales, jnp.dtype(dtype))

    def __getitem__(self, index: Any) -> "MXFP4":
        """Indexes leading axes, as arrays are indexed: rows of an embedding, experts of `[E, F, D]`.

        Raises:
          IndexError: it reaches the last axis, whose blocks stay whole, or holds an Ellipsis.
        """
        indices = index if isinstance(index, tuple) else (index,)
        taken = sum(_axes_taken(i) for i in indices)
        if taken >= self.ndim or any(i is Ellipsis for i in indices):
            raise IndexError(
                f"MXFP4 of shape {self.shape} can be indexed in its first {self.ndim - 1} axes, without '...': "
                "dequantize() before you take single values"
            )
        return MXFP4(self.blocks[index], self.scales[index])

    # Otherwise Python would iterate by indexing until an IndexError, which JAX does not raise.
    __iter__ = None


def _axes_taken(index: Any) -> int:
    if index is None:
        return 0
    return index.ndim if getattr(index, "dtype", None) == np.bool_ else 1


@partial(jax.jit, static_argnames="dtype")
def _dequantize(blocks: jax.Array, scales: jax.Array, dtype: Any) -> jax.Array:
    """Arithmetic on stacked pairs of nibbles, the fastest of the variants tried.

    [4, 5760, 2880] to float32 / bfloat16, ms on 2 CPU cores (JAX 0.10.2), most of it for writing 265 MB:

        stack, integers (this)  76 / 47       byte >> [0, 4], integers  82 / 57
        stack, table of 16      81 / 57       byte >> [0, 4], table     95 / 59
        stack, float16 bits     94 / 55       table of 256 pairs       116 / 74

    and [384, 2880], which stays in the cache: 0.33 / 0.38 against 0.45 / 0.54 for stack and a table of 16.
    """
    codes = jnp.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, BLOCK).astype(jnp.uint32)
    # A shift of 2|v| and not of float32's bits, where ±0.5 would be subnormal; the sign as a bit, for −0.
    twice = (jnp.uint32(_TWICE_THE_VALUES) >> ((codes & 7) * 4)) & 15
    magnitudes = twice.astype(jnp.int32).astype(jnp.float32) * 0.5
    values = bitcast(bitcast(magnitudes, jnp.uint32) | (codes & 8) << 28, jnp.float32)
    # exp2 is not exact on a CPU. The bits of 255 alone would be infinity and not NaN.
    powers = jnp.where(scales == NAN_SCALE, jnp.nan, _power_of_two(scales))
    return (values * powers[..., None]).reshape(MXFP4(blocks, scales).shape).astype(dtype)


def _power_of_two(biased: jax.Array) -> jax.Array:
    """2^(biased − 127) for 1 to 254, and 0 for 0."""
    return bitcast(biased.astype(jnp.uint32) << _MANTISSA, jnp.float32)


def quantize(x: jax.typing.ArrayLike) -> MXFP4:
    """Rounds to MXFP4, by the rules of OCP MX 1.0, from float32.

    A block's shared exponent is floor(log2(max |x|)) − 2 and its scale that plus 127, but at least 2 (also for a block
    of zeros) so that `dequantize` is exact everywhere; float32 needs none above 252. Elements are rounded to the
    nearest, ties to the even code, and saturate at ±6. Subnormals of float32 count as 0. Signs are kept, of zeros too.

    Args:
      x: [..., n], floating point, n a multiple of 32. Rounded to float32 first if it has more bits.

    Returns:
      The same bits on every device, inside `jax.jit` and outside. Inside a transformation, which cannot check values, a
      block with a NaN or an infinity gets the scale 255, so all of it dequantizes to NaN.

    Raises:
      ValueError: x is not floating point, n is not a multiple of 32, or x holds NaN or infinity.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"quantize takes floating-point numbers, found {x.dtype}: convert them first")
    if not x.shape or x.shape[-1] % BLOCK:
        raise ValueError(
            f"MXFP4 needs a last axis that is a multiple of {BLOCK}, found shape {x.shape}: pad it with zeros"
        )
    packed = _quantize(x)
    if not isinstance(packed.scales, jax.core.Tracer) and (packed.scales == NAN_SCALE).any():
        raise ValueError("MXFP4 has no NaN and no infinity, and x holds one: look for what made it, or clip x")
    return packed


@jax.jit
def _quantize(x: jax.Array) -> MXFP4:
    bits = bitcast(x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK), jnp.uint32)
    sign, magnitude = bits >> 31, bits & 0x7FFFFFFF
    # The bits of nonnegative floats are in the order of the numbers; log2 would not be exact.
    exponent = magnitude.max(axis=-1, keepdims=True) >> _MANTISSA
    scale = jnp.maximum(exponent, MIN_SCALE + 2) - 2  # in this order: unsigned
    normal = jnp.where(magnitude >> _MANTISSA == 0, 0, magnitude)
    scaled = bitcast(normal, jnp.float32) * _power_of_two(2 * _BIAS - scale)
    passed = [scaled > tie for tie in _TIES_DOWN] + [scaled >= tie for tie in _TIES_UP]
    code = sum(above.astype(jnp.uint8) for above in passed) | (sign << 3).astype(jnp.uint8)
    scales = jnp.where(exponent == 255, NAN_SCALE, scale).astype(jnp.uint8)
    return MXFP4(code[..., 0::2] | code[..., 1::2] << 4, scales[..., 0])
