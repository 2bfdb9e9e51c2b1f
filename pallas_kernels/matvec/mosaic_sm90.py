"""Products of a few rows with a bfloat16 matrix [I, O], for Hopper: Pallas Mosaic GPU. See RECORD.md.

A block streams its share of a panel of 64 columns through shared memory, in tiles of 64 rows. Each warp transposes 16
rows of a tile as it loads them, and multiplies them by eight rows of x at a time on the tensor cores. The block adds up
its warps' sums; those of the `splits` blocks that share a panel are added up by whoever reads the result.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import dispatch, ptx, tiles
from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.ptx import Value

EIGHT = 8  # rows of x per instruction
WARPS = 4
TILE = 64  # rows and columns of the matrix per copy, 16 rows for each warp
_TILE_BYTES = 2 * TILE**2
_BLOCKS = 320  # to aim for: 132 multiprocessors hold up to four each
_MOST_X = 2**17  # bytes of x in shared memory
_STAGES = 6  # tiles in flight per block, at most
_ROOM = 56 * 1024 - 2048  # bytes of shared memory per block, of which four fit on a multiprocessor

_STORE = "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p st.global.f32 [$0], $1; }"


@dataclasses.dataclass(frozen=True)
class _MatvecPlan:
    """Everything that is known when the kernel is built."""

    rows: int  # T, of x
    inner: int  # I
    columns: int  # O
    splits: int  # blocks that share I

    @property
    def tiles(self) -> int:
        """Tiles per block."""
        return self.inner // (TILE * self.splits)

    @property
    def stages(self) -> int:
        """Tiles in shared memory: fewer if x takes up the room."""
        return min(self.tiles, _STAGES, max(2, (_ROOM - self.rows * self.x_row) // _TILE_BYTES))

    @property
    def eights(self) -> int:
        return -(-self.rows // EIGHT)

    @property
    def x_copied(self) -> int:
        """Bytes of each row of x that a block needs."""
        return 2 * TILE * self.tiles

    @property
    def x_row(self) -> int:
        """Bytes between rows of x in shared memory, such that eight rows lie in different banks."""
        return self.x_copied + 16


def product(x_TI: jax.Array, kernel_IO: jax.Array, bias_O: jax.Array | None = None) -> PartialSum:
    """See `api.matvec`."""
    shape = {tiles.ROWS: x_TI.shape[0], "in": kernel_IO.shape[0], "out": kernel_IO.shape[1]}
    settings: Any = tiles.lookup(dispatch.device_kind(), "matvec/mosaic", shape)
    if settings is None or settings["splits"] not in _splits(shape):  # if x takes too much room
        settings = heuristic(shape)
    parts_JTO = _parts(x_TI, kernel_IO, **settings)
    return PartialSum(parts_JTO, bias_EO=None if bias_O is None else bias_O[None])


def heuristic(shape: tiles.Shape) -> tiles.Settings:
    """The settings for a shape that is not in the table."""
    wanted = _BLOCKS * TILE / int(shape["out"])
    return {"splits": min(_splits(shape), key=lambda each: abs(math.log(each / wanted)))}


def tunable(shape: tiles.Shape) -> list[tiles.Settings]:
    """See `tiles`: around the heuristic's number of blocks."""
    panels, usual = int(shape["out"]) // TILE, heuristic(shape)
    near = [each for each in _splits(shape) if _BLOCKS / 3 <= each * panels <= 3 * _BLOCKS]
    others: list[tiles.Settings] = [{"splits": splits} for splits in near]
    return [usual, *(each for each in others if each != usual)]


def _splits(shape: tiles.Shape) -> list[int]:
    """Numbers of blocks that may share a panel."""
    count, rows = int(shape["in"]) // TILE, int(shape[tiles.ROWS])
    return [each for each in range(1, count + 1) if count % each == 0 and rows * 2 * TILE * count // each <= _MOST_X]


@partial(jax.jit, static_argnames=("splits",))
def _parts(x_TI: jax.Array, kernel_IO: jax.Array, *, splits: int) -> jax.Array:
    T, inputs = x_TI.shape
    outputs = kernel_IO.shape[1]
    plan = _MatvecPlan(rows=T, inner=inputs, columns=outputs, splits=splits)
    ring = max(plan.stages * TILE**2, 2 * WARPS * 16 * plan.eights * 32)  # at the end it holds the warps' sums
    results = ptx.launch(
        partial(matvec, plan),
        {"x": x_TI, "kernel": kernel_IO},
        {"out": jax.ShapeDtypeStruct((splits, T, outputs), jnp.float32)},
        {"panel": outputs // TILE, "split": splits},
        {
            "ring": plgpu.SMEM((-(-ring // TILE**2), TILE, TILE), jnp.bfloat16),
            "x_shared": plgpu.SMEM((T * plan.x_row // 2,), jnp.bfloat16),
            "mbarriers": plgpu.SMEM((2 * (plan.stages + 1),), jnp.uint32),
        },
        needs_refs=True,
    )
    return results["out"]


def matvec(
    plan: _MatvecPlan,
    *,
    x: Value,
    kernel: Value,
    out: Value,
    ring: Value,
    x_shared: Value,
    mbarriers: Value,
    panel: Value,
    split: Value,
    context: Any,
    refs: Mapping[str, Value],
) -> None:
    """One thread of a block."""
    del kernel  # `copies` takes the array instead of its address
    arrived = ptx.MBarriers(mbarriers, plan.stages + 1)  # one for each stage, and one for x
    arrived.init()
    ptx.sync_block()
    begin = ptx.mul(split, plan.tiles * TILE)
    copies = ptx.TileCopies(context, refs["ring"], refs["mbarriers"], plan.stages, TILE)

    def copy(tile: int) -> None:
        copies.begin(refs["kernel"], ptx.add(begin, TILE * tile), ptx.mul(panel, TILE), tile % plan.stages)

    for tile in range(plan.stages):
        copy(tile)
    _copy_x(plan, x, x_shared, arrived.at(plan.stages), begin)
    arrived.wait(plan.stages, 0)
    acc = _multiply(plan, arrived, ring, x_shared, copy)
    ptx.sync_block()  # from here on, the ring has another use
    _write(plan, acc, out, ring, panel, split)


def _copy_x(plan: _MatvecPlan, x: Value, x_shared: Value, mbarrier: Value, begin: Value) -> None:
    """Begins to copy the block's share of all rows of x."""

    def copy() -> None:
        ptx.expect_bytes(mbarrier, plan.rows * plan.x_copied, ptx.less(ptx.thread(), 1))
        for first in range(0, plan.rows, 32):
            row = ptx.add(ptx.thread(), first)
            source = ptx.offset(ptx.offset(x, row, 2 * plan.inner), begin, 2)
            to = ptx.shared_offset(x_shared, row, plan.x_row)
            ptx.bulk_copy(to, source, plan.x_copied, mbarrier, ptx.less(row, plan.rows))

    ptx.when(ptx.less(ptx.thread(), 32), copy)


def _multiply(
    plan: _MatvecPlan, arrived: ptx.MBarriers, ring: Value, x_shared: Value, copy: Callable[[int], None]
) -> list[Value]:
    """The warp's sums: four for every eight rows of x and 16 columns, in the order of `ptx.mma`."""
    lane = arith.andi(ptx.thread(), ptx.const(31))
    warp = arith.shrui(ptx.thread(), ptx.const(5))
    g, q = arith.shrui(lane, ptx.const(2)), arith.andi(lane, ptx.const(3))
    # For ldmatrix, each lane names the address of one row of 8 numbers: row r of matrix m, both from the lane's bits.
    r, m = arith.andi(lane, ptx.const(7)), arith.shrui(lane, ptx.const(3))
    row = ptx.add(ptx.mul(warp, 16), ptx.mul(arith.shrui(m, ptx.const(1)), 8), r)
    row_at = ptx.shared_offset(ring, row, 2 * TILE)
    swizzled = [
        ptx.add(row_at, ptx.mul(arith.xori(ptx.add(arith.andi(m, ptx.const(1)), 2 * pair), r), 16)) for pair in range(4)
    ]
    # The sums of rows beyond the last are not used, so any row will do for them.
    x_at = [
        ptx.add(
            ptx.shared_offset(x_shared, arith.minsi(ptx.add(g, EIGHT * eight), ptx.const(plan.rows - 1)), plan.x_row),
            ptx.mul(warp, 32),
            ptx.mul(q, 4),
        )
        for eight in range(plan.eights)
    ]
    sums = [ptx.float32(0.0)] * (16 * plan.eights)
    for tile in range(plan.tiles):
        stage = tile % plan.stages
        arrived.wait(stage, tile // plan.stages % 2)
        xs = [
            [
                ptx.asm(f"ld.shared.b32 $0, [$1+{2 * TILE * tile + half}];", [ptx.i32()], [at], volatile=True)[0]
                for half in (0, 16)
            ]
            for at in x_at
        ]
        text = f"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{$0, $1, $2, $3}}, [$4+{_TILE_BYTES * stage}];"
        for pair in range(4):
            a = ptx.asm(text, [ptx.i32()] * 4, [swizzled[pair]], volatile=True)
            for eight, x in enumerate(xs):
                place = 16 * eight + 4 * pair
                sums[place : place + 4] = ptx.mma(sums[place : place + 4], a, x)
        if tile + plan.stages < plan.tiles:
            ptx.sync_block()
            copy(tile + plan.stages)
    return sums


def _write(plan: _MatvecPlan, acc: list[Value], out: Value, sums: Value, panel: Value, split: Value) -> None:
    """Adds up the warps' sums: warp w adds those of the w-th 16 columns."""
    lane = arith.andi(ptx.thread(), ptx.const(31))
    warp = arith.shrui(ptx.thread(), ptx.const(5))
    mine = ptx.shared_offset(ptx.shared_offset(sums, warp, 4 * 32 * len(acc)), lane, 4)
    for i, value in enumerate(acc):
        ptx.asm(f"st.shared.f32 [$0+{4 * 32 * i}], $1;", [], [mine, value])
    ptx.sync_block()
    theirs = ptx.shared_offset(ptx.shared_offset(sums, warp, 4 * 32 * 4), lane, 4)
    column = ptx.add(ptx.mul(panel, TILE), ptx.mul(warp, 16), arith.shrui(lane, ptx.const(2)))
    twice_q = ptx.mul(arith.andi(lane, ptx.const(3)), 2)
    for eight in range(plan.eights):
        for i in range(4):
            places = [4 * 32 * (len(acc) * other + 16 * eight + i) for other in range(WARPS)]
            loads = [f"ld.shared.f32 $0, [$1+{place}];" for place in places]
            parts = [ptx.asm(text, [ptx.f32()], [theirs], volatile=True)[0] for text in loads]
            row = ptx.add(twice_q, EIGHT * eight + i % 2)
            place = ptx.add(ptx.mul(split, plan.rows), row)
            at = ptx.offset(ptx.offset(out, place, 4 * plan.columns), ptx.add(column, 8 * (i // 2)), 4)
            ptx.asm(_STORE, [], [at, ptx.tree_sum(parts), ptx.less(row, plan.rows)])
