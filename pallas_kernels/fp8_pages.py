"""Keys and values in half the memory of bfloat16: float8_e4m3fn, with a power of two for each head and position.

A vector's scale is the least power of two that brings all its numbers into the format's range, ±448. It depends on
that vector alone, so neither on what else is in the page nor on how a prompt was cut.

That it is a power of two costs next to nothing, as it only moves the exponents of floating-point numbers, which keep
their four significant bits. But everything after the rounding becomes exact: a number times its scale is a number of
bfloat16. So attention over these pages has the bits of attention over pages of numbers that were rounded before. And a
scale may as well multiply a key's score, or a value's weight.

Numbers are rounded to the nearest, ties to even. If one is not finite, no number of the vector is when it is read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import same_bits

FP8: Final = "fp8"  # as options name it
BIAS: Final = 127  # of float32's exponents, and so of ours
MANTISSA: Final = 23  # bits of float32's
_MORE_MANTISSA, _MORE_BIAS = MANTISSA - 3, BIAS - 7  # than float8_e4m3fn has
RANGE, LARGEST = 8, 0x600000  # exponent and mantissa, as float32 has them, of 448 = 1.75 · 2^8
LEAST: Final = BIAS - 100  # a smaller scale would make products with it subnormal, which some devices take for 0
NOT_FINITE: Final = 255  # an infinite scale, which also says so where NaN is read as a number


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Pages:
    """A pool of pages, or any other part of one. Its shape is that of its numbers.

    Both arrays have the same leading axes, so what takes, copies or writes along these does it with both: use
    `jax.tree.map`.
    """

    numbers_YKSH: jax.Array  # uint8, the bits of float8_e4m3fn: not all of XLA moves these without converting them
    exponents_YKS1: jax.Array  # uint8: the vector is numbers · 2^(exponent - 127)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        return self.numbers_YKSH.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of the numbers."""
        return jnp.dtype(jnp.float8_e4m3fn)


Pages = jax.Array | Fp8Pages  # a pool, as attention and what writes to it take it


def rounded(x: jax.Array) -> Fp8Pages:
    """Vectors [..., H] of any floating dtype, each with a scale of its own. Nothing but the rounding is inexact."""
    x = same_bits.rounded(x.astype(jnp.float32), x.dtype).astype(jnp.float32)
    # As integers, magnitudes have the order of the numbers, and NaN is the largest.
    magnitudes = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    largest = magnitudes.max(axis=-1, keepdims=True)
    is_beyond = (largest & ((1 << MANTISSA) - 1)) > LARGEST
    is_finite = largest < 0xFF << MANTISSA
    exponents = jnp.maximum((largest >> MANTISSA) - RANGE + is_beyond, LEAST)
    scaled = x * _power(2 * BIAS - exponents)
    numbers = jnp.where(is_finite, scaled, jnp.nan).astype(jnp.float8_e4m3fn)
    exponents = jnp.where(is_finite, exponents, NOT_FINITE).astype(jnp.uint8)
    return Fp8Pages(jax.lax.bitcast_convert_type(numbers, jnp.uint8), exponents)


def expanded(pages: Pages, dtype: DTypeLike) -> jax.Array:
    """The vectors as numbers of a floating dtype, exactly; those that are numbers already stay as they are."""
    if not isinstance(pages, Fp8Pages):
        return pages
    return (_floats(pages.numbers_YKSH) * _power(pages.exponents_YKS1.astype(jnp.int32))).astype(dtype)


def arrays_of(k_YKSH: Pages, v_YKSH: Pages) -> dict[str, Any]:
    """The arrays of keys and values, by the names that kernels have for them."""
    if isinstance(k_YKSH, Fp8Pages) and isinstance(v_YKSH, Fp8Pages):
        numbers = {"k": k_YKSH.numbers_YKSH, "v": v_YKSH.numbers_YKSH}
        return numbers | {"k_exponents": k_YKSH.exponents_YKS1, "v_exponents": v_YKSH.exponents_YKS1}
    return {"k": k_YKSH, "v": v_YKSH}


def pages_of(arrays: Mapping[str, jax.Array]) -> tuple[Pages, Pages]:
    """The keys and values that `arrays_of` took apart."""
    if "k_exponents" not in arrays:
        return arrays["k"], arrays["v"]
    k_YKSH, v_YKSH = (Fp8Pages(arrays[each], arrays[f"{each}_exponents"]) for each in "kv")
    return k_YKSH, v_YKSH


def as_read(x: jax.Array) -> jax.Array:
    """Vectors as they are read again after they were written."""
    return expanded(rounded(x), x.dtype)


def zeros(shape: tuple[int, ...], dtype: DTypeLike | str) -> Pages:
    """An empty pool of a dtype, or of `FP8`. (Zeros, as uninitialised memory may hold NaN.)"""
    if not is_fp8(dtype):
        return jnp.zeros(shape, dtype)
    return Fp8Pages(jnp.zeros(shape, jnp.uint8), jnp.zeros((*shape[:-1], 1), jnp.uint8))


def vector_bytes(width: int, dtype: DTypeLike | str) -> int:
    """Bytes of a vector of `width` numbers, with its scale."""
    return width + 1 if is_fp8(dtype) else width * int(jnp.dtype(dtype).itemsize)


def is_fp8(dtype: DTypeLike | str) -> bool:
    """Whether pages of this kind are `Fp8Pages`."""
    return isinstance(dtype, str) and dtype == FP8


def _floats(numbers: jax.Array) -> jax.Array:
    """The numbers without scales, float32; NaN as ±480, which its scale makes infinite.

    XLA's own conversion, of one number after the other on a CPU (JAX 0.12), made attention take four times as long.
    """
    numbers = numbers.astype(jnp.int32)
    magnitudes = numbers & 0x7F
    normal = _bits_as_float((magnitudes << _MORE_MANTISSA) + (_MORE_BIAS << MANTISSA))
    subnormal = magnitudes.astype(jnp.float32) * 2.0**-9
    found = jnp.where(magnitudes < 8, subnormal, normal)
    return jnp.where(numbers < 0x80, found, -found)


def _bits_as_float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _power(exponents: jax.Array) -> jax.Array:
    """2^(exponent - 127), exactly. 0 gives 0."""
    return _bits_as_float(exponents << MANTISSA)
