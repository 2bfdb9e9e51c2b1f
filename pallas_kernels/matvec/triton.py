"""Products of a few rows with a matrix [K, N]: Pallas Triton, for Ampere and Ada. RECORD.md beside tells how.

A program takes a strip of columns and a run of K, a tile at a time, on the tensor cores.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.partial_sum import PartialSum

ROWS = 16  # the fewest rows of a product
STRIP = 64  # columns of a program
_TILE_BYTES = 128  # of a column, that are multiplied at a time
WARPS = 4
STAGES = 5  # of Triton's software pipeline: tiles in flight
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_PROGRAMS = 320  # that are wanted at least: some hundred multiprocessors hold two or three each


def product(
    x_TK: jax.Array,
    kernel_KN: jax.Array,
    bias_N: jax.Array | None = None,
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
      x_TK, kernel_KN: of one of DTYPES; products of float32 are not rounded.
      splits: programs that share K, at most; by default from K and N.
      strip, tile: columns of a program and rows that it multiplies at a time, powers of two from 16; by default 64,
        and 64 rows of 16 bits or 32 of 32.
      warps, stages: of a program.
      interpret: run on a CPU.
    """
    K, N = kernel_KN.shape
    tile = _TILE_BYTES // kernel_KN.dtype.itemsize if tile is None else tile
    tiles = pl.cdiv(K, tile)
    wanted = pl.cdiv(_PROGRAMS, pl.cdiv(N, strip)) if splits is None else splits
    run = pl.cdiv(tiles, min(wanted, tiles))  # tiles of a program
    parts_STN = _parts(
        x_TK, kernel_KN, run=run, strip=strip, tile=tile, warps=warps, stages=stages, interpret=interpret
    )
    return PartialSum(parts_STN, bias_EN=None if bias_N is None else bias_N[None])


@partial(jax.jit, static_argnames=("run", "strip", "tile", "warps", "stages", "interpret"))
def _parts(
    x_TK: jax.Array,
    kernel_KN: jax.Array,
    *,
    run: int,
    strip: int,
    tile: int,
    warps: int,
    stages: int,
    interpret: bool,
) -> jax.Array:
    (T, K), N = x_TK.shape, kernel_KN.shape[1]
    tiles, rows = pl.cdiv(K, tile), max(ROWS, pl.next_power_of_2(T))
    # By default float32 operands would be rounded to TensorFloat-32.
    multiply = partial(pltriton.dot, precision=jax.lax.Precision.HIGHEST if x_TK.dtype == jnp.float32 else None)

    def body(x_ref: Any, kernel_ref: Any, out_ref: Any) -> None:
        row_M1 = jnp.arange(rows)[:, None]
        column_1N = pl.program_id(0) * strip + jnp.arange(strip)[None]
        split = pl.program_id(1)

        def step(index: jax.Array, acc_MN: jax.Array) -> jax.Array:
            inner_t = index * tile + jnp.arange(tile)
            x_Mt = pltriton.load(x_ref.at[row_M1, inner_t[None]], mask=(row_M1 < T) & (inner_t[None] < K), other=0)
            inside_tN = (inner_t[:, None] < K) & (column_1N < N)
            kernel_tN = pltriton.load(kernel_ref.at[inner_t[:, None], column_1N], mask=inside_tN, other=0)
            return acc_MN + multiply(x_Mt, kernel_tN)

        zeros_MN = jnp.zeros((rows, strip), jnp.float32)
        acc_MN = jax.lax.fori_loop(split * run, jnp.minimum((split + 1) * run, tiles), step, zeros_MN)
        pltriton.store(out_ref.at[split, row_M1, column_1N], acc_MN, mask=(row_M1 < T) & (column_1N < N))

    splits = pl.cdiv(tiles, run)
    result: jax.Array = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((splits, T, N), jnp.float32),
        grid=(pl.cdiv(N, strip), splits),
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=stages),
        name="matvec",
        interpret=interpret,
    )(x_TK, kernel_KN)
    return result
