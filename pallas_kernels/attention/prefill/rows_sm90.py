"""Rows of attention's result that are written or zeroed by threads: TMA copies only whole tiles."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.attention.prefill.core_sm90 import MATRIX

plgpu: Any = mosaic_gpu  # JAX 0.10 has another interface: there, this module can only be imported


def write(tile_tH: jax.Array, out_ref: Any, start: jax.Array, head: jax.Array, count: jax.Array) -> None:
    """Writes the first `count` rows of a warpgroup's tile to a head of `out_ref` [T, N, H], from row `start` on."""
    scalars = [plgpu.Layout.WG_SPLAT(())] * 3

    @plgpu.inline_mgpu(arg_types=(MATRIX, plgpu.RefType(), *scalars))
    def run(_: Any, tile: Any, array: Any, *numbers: Any) -> None:
        first, of_head, rows = (each.registers.item() for each in numbers)
        _write_rows(tile, ptx.global_address(array), out_ref.shape, first, of_head, rows)

    run(tile_tH, out_ref, start, head, count)


def _write_rows(
    tile: Any, address: ptx.Value, shape: tuple[int, ...], first: ptx.Value, head: ptx.Value, count: ptx.Value
) -> None:
    """Writes the first `count` rows of a tile [QUERIES, H] to a head of an array [T, N, H], from row `first` on."""
    _, N, H = shape
    for (row, column), words in zip(tile.layout.thread_idxs(tile.shape), tile.registers.flat, strict=True):
        row, column = (arith.index_cast(ptx.i32(), each) for each in (row, column))
        at = ptx.add(ptx.mul(ptx.add(ptx.mul(ptx.add(first, row), N), head), H), column)
        word = utils.bitcast(words, ptx.i32())
        ptx.store(ptx.offset(address, at, 2), [word], ptx.less(row, count))


def zero(out_ref: Any, first: jax.Array, head: jax.Array, count: jax.Array, *, interpret: bool) -> None:
    """Zeroes `count` rows of a head, from `first` on and, after the last, from 0 on."""
    T, N, H = out_ref.shape
    if interpret:

        def row(i: jax.Array, _: None) -> None:
            out_ref[lax.rem(first + i, jnp.int32(T)), head] = jnp.zeros((H,), out_ref.dtype)

        lax.fori_loop(0, count, row, None)
        return

    @pl.when(count > 0)
    def _() -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[plgpu.Layout.WG_SPLAT(())] * 3))
        def write(_: Any, array: Any, *numbers: Any) -> None:
            address = ptx.global_address(array)
            first, head, count = (each.registers.item() for each in numbers)
            pieces, at_once = H // 8, 128  # of 16 bytes: per row, and per turn
            turns = arith.divui(ptx.add(ptx.mul(count, pieces), at_once - 1), ptx.const(at_once))

            def turn(i: ptx.Value, carry: list[ptx.Value]) -> list[ptx.Value]:
                row, piece = ptx.divided(ptx.add(ptx.mul(i, at_once), ptx.thread()), pieces)
                place = ptx.add(first, row)
                place = arith.select(ptx.less(place, T), place, ptx.add(place, -T))
                at = ptx.offset(address, ptx.add(ptx.mul(ptx.add(ptx.mul(place, N), head), pieces), piece), 16)
                ptx.store(at, [ptx.const(0)] * 4, ptx.less(row, count))
                return carry

            ptx.loop(turns, [], turn)

        write(out_ref, first, head, count)
