"""Products of a few rows with a matrix [I, O], for Ampere and Ada: Pallas Triton. See RECORD.md.

A program takes a strip of columns and a run of rows, a tile at a time, on the tensor cores.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.partial_sum import PartialSum

ROWS = 16  # the fewest rows that a product takes
STRIP = 64  # columns per program
_TILE_BYTES = 128  # of a column, multiplied at a time
WARPS = 4
STAGES = 5  # of Triton's software pipeline: tiles in flight
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_PROGRAMS = 320  # to aim for at least: about a hundred multiprocessors hold two or three each


def product(
    x_TI: jax.Array,
    kernel_IO: jax.Array,
    bias_O: jax.Array | None = None,
    *,
    splits: int | None = None,
    strip: int = STRIP,
    tile: int | None = None,
    warps: int = WARPS,
    stages: int = STAGES,
    interpret: bool = False,
) -> PartialSum:
    """See `api.matvec`.

    Args:
      x_TI, kernel_IO: of one of DTYPES; products of float32 are not rounded.
      splits: programs that share I, at most; by default from I and O.
      strip, tile: columns per program and rows that it multiplies at a time, powers of two, at least 16; by default 64
        columns, and 64 rows of 16-bit or 32 of 32-bit numbers.
      warps, stages: per program.
      interpret: run on a CPU.
    """
    inputs, outputs = kernel_IO.shape
    tile = _TILE_BYTES // kernel_IO.dtype.itemsize if tile is None else tile
    tiles = pl.cdiv(inputs, tile)
    wanted = pl.cdiv(_PROGRAMS, pl.cdiv(outputs, strip)) if splits is None else splits
    run = pl.cdiv(tiles, min(wanted, tiles))  # tiles per program
    parts_JTO = _parts(
        x_TI, kernel_IO, run=run, strip=strip, tile=tile, warps=warps, stages=stages, interpret=interpret
    )
    return PartialSum(parts_JTO, bias_EO=None if bias_O is None else bias_O[None])


@partial(jax.jit, static_argnames=("run", "strip", "tile", "warps", "stages", "interpret"))
def _parts(
    x_TI: jax.Array,
    kernel_IO: jax.Array,
    *,
    run: int,
    strip: int,
    tile: int,
    warps: int,
    stages: int,
    interpret: bool,
) -> jax.Array:
    (T, inputs), outputs = x_TI.shape, kernel_IO.shape[1]
    tiles, rows = pl.cdiv(inputs, tile), max(ROWS, pl.next_power_of_2(T))
    # By default float32 operands would be rounded to TensorFloat-32.
    multiply = partial(pltriton.dot, precision=jax.lax.Precision.HIGHEST if x_TI.dtype == jnp.float32 else None)

    def body(x_ref: Any, kernel_ref: Any, out_ref: Any) -> None:
        row_M1 = jnp.arange(rows)[:, None]
        column_1o = pl.program_id(0) * strip + jnp.arange(strip)[None]
        split = pl.program_id(1)

        def step(index: jax.Array, acc_Mo: jax.Array) -> jax.Array:
            inner_i = index * tile + jnp.arange(tile)
            x_Mi = pltriton.load(x_ref.at[row_M1, inner_i[None]], mask=(row_M1 < T) & (inner_i[None] < inputs), other=0)
            inside_io = (inner_i[:, None] < inputs) & (column_1o < outputs)
            kernel_io = pltriton.load(kernel_ref.at[inner_i[:, None], column_1o], mask=inside_io, other=0)
            return acc_Mo + multiply(x_Mi, kernel_io)

        zeros_Mo = jnp.zeros((rows, strip), jnp.float32)
        acc_Mo = jax.lax.fori_loop(split * run, jnp.minimum((split + 1) * run, tiles), step, zeros_Mo)
        pltriton.store(out_ref.at[split, row_M1, column_1o], acc_Mo, mask=(row_M1 < T) & (column_1o < outputs))

    splits = pl.cdiv(tiles, run)
    result: jax.Array = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((splits, T, outputs), jnp.float32),
        grid=(pl.cdiv(outputs, strip), splits),
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=stages),
        name="matvec",
        interpret=interpret,
    )(x_TI, kernel_IO)
    return result
