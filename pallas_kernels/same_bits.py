"""Products, sums and roundings by XLA that give a row the same bits among any number of rows.

On a CPU, XLA computes an output of a float32 product as a chain of fused multiply-adds in ascending order of what it
sums over. Some things depend on the number of rows, and are avoided here (seen with JAX 0.10.2, 0.11.2 and 0.12 on
AVX2 and AVX-512; `tests/pallas_kernels/test_same_bits.py` compares with such chains):

- Chains are cut: at 1024, with AVX-512 at 512. So what is summed is divided into runs of at most `RUN`, and the runs
  are added in order. A kernel [in, out] is also cut, at shorter lengths, if there are 2 to 60 rows. So up to `FEW` rows
  are multiplied one at a time, which takes XLA no longer than all of them together. More rows are padded to `MANY`.
- One row times a matrix [out, in] has eight chains or sixteen, where more rows have one. So one row is padded to two;
  except for the head, whose matrix is so large that this would double a token's time: there, all rows are computed one
  by one. With AVX-512, a loop over rows has sixteen chains where code outside of loops has eight, unless the program is
  compiled with `COMPILER`.
- A product whose outputs are not a multiple of `LANES` may have two or four chains, at least for the last outputs. So
  outputs are padded; and of a head's large matrix, the last `LANES` outputs are a product of their own.
- With AVX-512, 1 / sqrt(x) is approximated where 16 numbers are computed together. So `rsqrt` divides.
- With JAX 0.10.2, some logarithms among 3, 5, 6, 7 or 15 are rounded otherwise than alone. So `log` computes one at
  a time.
- A product to which something is added may be rounded first or not, depending on what XLA fuses, and that on the number
  of rows. So `moe.reference` stores a token's weighted experts before it adds them.

XLA sums a row's numbers in another order if there are fewer than `SUMMED` numbers in all. In attention, the shapes of
products must not depend on the number of rows or tokens: see `attention.paged` and `attention.decode.lanes`.

Only float32 products are computed this way.
"""

import re
from collections.abc import Callable
from functools import cache, reduce
from operator import add
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

RUN = 512  # numbers of a chain, at most
FEW = 8  # rows that are products of their own
MANY = 64  # rows of other products, at least
LANES = 64  # outputs are a multiple of this
SUMMED = 4096  # numbers from which on XLA sums them in one way
COMPILER = {"xla_cpu_prefer_vector_width": 512}  # for `jax.jit` of whole programs
PIECE = 256  # rows of a softmax: how XLA approximates an exponential depends on how many there are
SMALL = 1 << 17  # numbers of a head's matrix, up to which it is padded
# Numbers of a head's matrix that all rows are multiplied by before the next are read: 32 KB, as much as a first cache
# holds. With 512 KB, 32 rows of gpt2-tales took 2.4 times as long.
IN_CACHE = 1 << 13
GROUP = 8  # outputs of a head that XLA computes together


@cache
def holds() -> bool:
    """Whether all this was seen to work on CPUs like this machine's: x86-64 with AVX2 and FMA, with or without AVX-512.

    Read from Linux's /proc/cpuinfo, so false on other systems.
    """
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return False
    return flags is not None and {"avx2", "fma"} <= set(flags[1].split())


def product(x_TI: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """x · kernel, [T, O] float32, on any device."""
    return _anywhere(product_on_cpu, _times, x_TI, kernel_IO)


def head(x_TI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    """x · kernelᵀ, [T, O] float32, of a large matrix and usually few rows, on any device."""
    return _anywhere(head_on_cpu, _times_rows, x_TI, kernel_OI)


def mean(x: jax.Array) -> jax.Array:
    """The mean of the last axis, [..., 1], on any device."""
    if x.size >= SUMMED:
        return _mean(x)
    y: jax.Array = jax.lax.platform_dependent(x, cpu=_mean_of_few, default=_mean)
    return y


def rsqrt(x: jax.Array) -> jax.Array:
    """1 / sqrt(x), on any device."""

    def divided(x: jax.Array) -> jax.Array:
        root: jax.Array = jax.lax.optimization_barrier(jnp.sqrt(x))  # without it, XLA rewrites 1 / sqrt
        return 1 / root

    y: jax.Array = jax.lax.platform_dependent(x, cpu=divided, default=jax.lax.rsqrt)
    return y


def softmax(x_TX: jax.Array) -> jax.Array:
    """The softmax over a few choices of each row, on any device."""

    def in_pieces(x_TX: jax.Array) -> jax.Array:
        pieces = jnp.split(_padded(x_TX, 0, PIECE), list(range(PIECE, x_TX.shape[0], PIECE)))
        return jnp.concatenate([jax.nn.softmax(piece, axis=-1) for piece in pieces])[: x_TX.shape[0]]

    y: jax.Array = jax.lax.platform_dependent(x_TX, cpu=in_pieces, default=lambda x_TX: jax.nn.softmax(x_TX, axis=-1))
    return y


def log(x_T: jax.Array) -> jax.Array:
    """The logarithms of a number each row, on any device."""
    y: jax.Array = jax.lax.platform_dependent(x_T, cpu=lambda x_T: jax.lax.map(jnp.log, x_T), default=jnp.log)
    return y


def rounded(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x as another dtype, rounded even if a wider one is asked for right after.

    Where XLA sees both conversions, it may leave them out. On a GPU it does for one token's gate and up, not for
    several's. Only bfloat16 is safe from that: `reduce_precision` has no subnormal numbers, of which float16 has many.
    """
    if jnp.dtype(dtype) == jnp.bfloat16:
        x = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def product_on_cpu(x_TI: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """x · kernel, [T, O] float32."""
    if not takes(x_TI, kernel_IO):
        return _times(x_TI, kernel_IO)
    T, outputs = x_TI.shape[0], kernel_IO.shape[1]
    x_JTR = _in_runs(x_TI)
    kernel_IO = _at_least(_padded(kernel_IO, 1, LANES), 0, x_JTR.shape[0] * x_JTR.shape[2])
    kernel_JRO = kernel_IO.reshape(x_JTR.shape[0], x_JTR.shape[2], -1)
    if T <= FEW:
        y_JTO = jnp.concatenate([_batched(x_JTR[:, t : t + 1], kernel_JRO, 1) for t in range(T)], axis=1)
    else:
        y_JTO = _batched(_at_least(x_JTR, 1, MANY), kernel_JRO, 1)
    return total_on_cpu(y_JTO, 0)[:T, :outputs]


def product_of_rows_on_cpu(x_TI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    """x · kernelᵀ, [T, O] float32, of a matrix that need not be read from memory."""
    if not takes(x_TI, kernel_OI):
        return _times_rows(x_TI, kernel_OI)
    T, outputs = x_TI.shape[0], kernel_OI.shape[0]
    x_JTR, kernel_JOR = _in_runs(_at_least(x_TI, 0, 2)), _in_runs(_padded(kernel_OI, 0, LANES))
    return total_on_cpu(_batched(x_JTR, kernel_JOR, 2), 0)[:T, :outputs]


def head_on_cpu(x_TI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    """`head`.

    Beyond 128 rows, which no decode step has, it is a usual product, with other bits.
    """
    T, (outputs, inputs) = x_TI.shape[0], kernel_OI.shape
    if not takes(x_TI, kernel_OI) or T > 2 * MANY:
        return _times_rows(x_TI, kernel_OI)
    if outputs * inputs <= SMALL:
        kernel_OI = _padded(kernel_OI, 0, LANES)
    y_TO = _head_of_one(x_TI, kernel_OI) if T == 1 else _head_in_parts(x_TI, kernel_OI)
    return y_TO[:, :outputs]


def _head_of_one(x_1I: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    y_1O = _times_rows(x_1I, kernel_OI)
    if kernel_OI.shape[0] % LANES == 0:
        return y_1O
    return y_1O.at[:, -LANES:].set(_times_rows(x_1I, kernel_OI[-LANES:]))


def _head_in_parts(x_TI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    """Part by part of the matrix, each times one row after the other."""
    T, (outputs, inputs) = x_TI.shape[0], kernel_OI.shape
    step = min(outputs, max(1, IN_CACHE // inputs // GROUP) * GROUP)

    def multiply(index: jax.Array, y_TO: jax.Array) -> jax.Array:
        start = jnp.minimum(index * step, outputs - step)  # the last outputs may be computed twice
        part_OI = jax.lax.dynamic_slice_in_dim(kernel_OI, start, step)
        part_TO = jax.lax.map(lambda x_I: _times_rows(x_I[None], part_OI)[0], x_TI)
        return jax.lax.dynamic_update_slice_in_dim(y_TO, part_TO, start, axis=1)

    return jax.lax.fori_loop(0, -(-outputs // step), multiply, jnp.zeros((T, outputs), jnp.float32))


def runs(inputs: int) -> int:
    """How many runs of one length this many numbers, or these and zeros after them, are divided into."""
    least = -(-inputs // RUN)
    return next((J for J in range(least, 4 * least) if inputs % J == 0), least)


def takes(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether there is more than the usual product for these operands."""
    return x.dtype == jnp.float32 and kernel.dtype == jnp.float32


def total_on_cpu(terms: jax.Array, axis: int) -> jax.Array:
    """The sum over an axis, in ascending order."""
    return reduce(add, [jax.lax.index_in_dim(terms, each, axis, keepdims=False) for each in range(terms.shape[axis])])


def _anywhere(
    on_cpu: Callable[[jax.Array, jax.Array], jax.Array],
    usual: Callable[[jax.Array, jax.Array], jax.Array],
    x_TI: jax.Array,
    kernel: jax.Array,
) -> jax.Array:
    if not takes(x_TI, kernel):
        return usual(x_TI, kernel)
    y: jax.Array = jax.lax.platform_dependent(x_TI, kernel, cpu=on_cpu, default=usual)
    return y


def _mean(x: jax.Array) -> jax.Array:
    return x.mean(axis=-1, keepdims=True)


def _mean_of_few(x: jax.Array) -> jax.Array:
    D = x.shape[-1]
    x_TD = x.reshape(-1, D)
    mean_T1 = _mean(_at_least(x_TD, 0, -(-SUMMED // D)))[: len(x_TD)]
    return mean_T1.reshape(*x.shape[:-1], 1)


def _in_runs(x_TI: jax.Array) -> jax.Array:
    """[J, T, R] of a matrix whose last axis is summed over."""
    J = runs(x_TI.shape[1])
    x_TI = _padded(x_TI, 1, J if x_TI.shape[1] % J == 0 else RUN)  # zeros add nothing
    return x_TI.reshape(x_TI.shape[0], J, -1).swapaxes(0, 1)


def _batched(x_JTR: jax.Array, kernel: jax.Array, summed: int) -> jax.Array:
    """The products of J pairs of matrices, [J, T, O]."""
    return jax.lax.dot_general(x_JTR, kernel, (((2,), (summed,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _times(x_TI: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x_TI, kernel_IO, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _times_rows(x_TI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x_TI, kernel_OI, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _padded(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    return _at_least(x, axis, -(-x.shape[axis] // multiple) * multiple)


def _at_least(x: jax.Array, axis: int, size: int) -> jax.Array:
    """The array with zeros after it, if it is smaller."""
    missing = max(0, size - x.shape[axis])
    return jnp.pad(x, [(0, missing if each == axis else 0) for each in range(x.ndim)]) if missing else x
