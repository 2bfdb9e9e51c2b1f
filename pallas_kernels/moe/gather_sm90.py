"""Tokens' rows copied to the slots of their groups, in the fragments' order of columns, for Hopper: Pallas Mosaic GPU.

A warp has a slot, and its lanes the 32 words of a tile of 64 columns: both what is read and what is written at a time
is 128 bytes in one piece. Empty slots are neither read nor written.
"""

import jax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.formats.fragments import TILE
from pallas_kernels.ptx import Value

_WARPS = 4  # of a block
_FLIGHT = 24  # loads of a lane


@jax.jit
def gathered(x_TI: jax.Array, rows_UM: jax.Array) -> jax.Array:
    """The rows of x in slots [U · M, I], of which empty ones may hold anything.

    Columns 16·q + 4·p + 2·c + h of every 64 become 16·p + 8·c + 2·q + h.

    Args:
      x_TI: bfloat16; I is a multiple of 64.
      rows_UM: see `routing.Groups`.
    """
    slots, width = rows_UM.size, x_TI.shape[1]

    def moe_gather(*, block: Value, **at: Value) -> None:
        thread = utils.thread_idx()
        lane, warp = arith.andi(thread, ptx.const(31)), arith.shrui(thread, ptx.const(5))
        slot = ptx.add(ptx.mul(block, _WARPS), warp)
        inside = ptx.less(slot, slots)
        (row,) = ptx.load(ptx.offset(at["rows"], slot, 4), [ptx.i32()], inside)
        p, c, q = arith.shrui(lane, ptx.const(3)), arith.andi(lane, ptx.const(4)), arith.andi(lane, ptx.const(3))
        word = ptx.add(ptx.mul(q, 8), ptx.mul(p, 2), arith.shrui(c, ptx.const(2)))
        source = ptx.offset(ptx.offset(at["x"], row, 2 * width), word, 4)
        target = ptx.offset(ptx.offset(at["out"], slot, 2 * width), lane, 4)

        def copy() -> None:
            shifts = range(0, 2 * width, 2 * TILE)
            for start in range(0, len(shifts), _FLIGHT):
                some = shifts[start : start + _FLIGHT]
                loaded = [ptx.load(source, [ptx.i32()], ptx.always(), shift=shift) for shift in some]
                ptx.sync_warp()
                for shift, words in zip(some, loaded, strict=True):
                    ptx.store(target, words, ptx.always(), shift=shift)

        ptx.when(ptx.both(inside, ptx.less(-1, row)), copy)

    out = ptx.launch(
        moe_gather,
        {"x": x_TI, "rows": rows_UM},
        {"out": jax.ShapeDtypeStruct((slots, width), x_TI.dtype)},
        {"block": -(-slots // _WARPS)},
    )
    return out["out"]
