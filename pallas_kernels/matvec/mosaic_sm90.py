"""Products of a few rows with a bfloat16 matrix [K, N]: Pallas Mosaic GPU, for Hopper. RECORD.md beside tells how.

A block streams its share of a strip of 64 columns through shared memory, in boxes of 64 rows. Each warp transposes 16
rows of a box as it loads them, and multiplies them with eight rows of x at a time on the tensor cores. The warps' sums
meet in the block, and those of the `splits` blocks that share a strip where they are read.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import dispatch, ptx, tiles
from pallas_kernels.parts import Parts
from pallas_kernels.ptx import Value

EIGHT = 8  # rows of x of an instruction
WARPS = 4
STRIP = 64  # columns of a block
BOX = 64  # rows of the matrix that are copied together, 16 for each warp
_BOX_BYTES = 2 * BOX * STRIP
_BLOCKS = 320  # that are wanted: 132 multiprocessors hold up to four each
_MOST_X = 2**17  # bytes of x in shared memory
_STAGES = 6  # boxes of a block in flight, at most
_ROOM = 56 * 1024 - 2048  # bytes of shared memory of a block, of which four fit on a multiprocessor

_STORE = "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p st.global.f32 [$0], $1; }"


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All that is known when a kernel is built."""

    rows: int  # T, of x
    inner: int  # K
    columns: int  # N
    splits: int  # blocks that share K

    @property
    def boxes(self) -> int:
        """Of a block."""
        return self.inner // (BOX * self.splits)

    @property
    def stages(self) -> int:
        """Slots of shared memory: fewer, if x takes the room."""
        return min(self.boxes, _STAGES, max(2, (_ROOM - self.rows * self.x_row) // _BOX_BYTES))

    @property
    def eights(self) -> int:
        return -(-self.rows // EIGHT)

    @property
    def x_copied(self) -> int:
        """Bytes of a row of x that a block needs."""
        return 2 * BOX * self.boxes

    @property
    def x_row(self) -> int:
        """Bytes from row to row of x in shared memory, so that eight rows lie in different banks."""
        return self.x_copied + 16


def product(x_TK: jax.Array, kernel_KN: jax.Array, bias_N: jax.Array | None = None) -> Parts:
    """See `api.matvec`."""
    shape = {tiles.ROWS: x_TK.shape[0], "in": kernel_KN.shape[0], "out": kernel_KN.shape[1]}
    settings: Any = tiles.lookup(dispatch.device_kind(), "matvec/mosaic", shape)
    if settings is None or settings["splits"] not in _splits(shape):  # as of fewer rows, whose x takes less room
        settings = heuristic(shape)
    parts_STN = _parts(x_TK, kernel_KN, **settings)
    return Parts(parts_STN, bias_EN=None if bias_N is None else bias_N[None])


def heuristic(shape: tiles.Shape) -> tiles.Settings:
    """The settings of a shape that no table has."""
    wanted = _BLOCKS * STRIP / int(shape["out"])
    return {"splits": min(_splits(shape), key=lambda each: abs(math.log(each / wanted)))}


def tunable(shape: tiles.Shape) -> list[tiles.Settings]:
    """See `tiles`: around the heuristic's number of blocks."""
    strips, usual = int(shape["out"]) // STRIP, heuristic(shape)
    near = [each for each in _splits(shape) if _BLOCKS / 3 <= each * strips <= 3 * _BLOCKS]
    others: list[tiles.Settings] = [{"splits": splits} for splits in near]
    return [usual, *(each for each in others if each != usual)]


def _splits(shape: tiles.Shape) -> list[int]:
    """Numbers of blocks that may share a strip."""
    boxes, rows = int(shape["in"]) // BOX, int(shape[tiles.ROWS])
    return [each for each in range(1, boxes + 1) if boxes % each == 0 and rows * 2 * BOX * boxes // each <= _MOST_X]


@partial(jax.jit, static_argnames=("splits",))
def _parts(x_TK: jax.Array, kernel_KN: jax.Array, *, splits: int) -> jax.Array:
    T, K = x_TK.shape
    N = kernel_KN.shape[1]
    plan = _Plan(rows=T, inner=K, columns=N, splits=splits)
    ring = max(plan.stages * BOX * STRIP, 2 * WARPS * 16 * plan.eights * 32)  # where in the end the warps' sums are
    result: jax.Array = ptx.kernel(
        partial(matvec, plan),
        (x_TK, kernel_KN),
        jax.ShapeDtypeStruct((splits, T, N), jnp.float32),
        {"strip": N // STRIP, "split": splits},
        shared=[
            plgpu.SMEM((-(-ring // (BOX * STRIP)), BOX, STRIP), jnp.bfloat16),
            plgpu.SMEM((T * plan.x_row // 2,), jnp.bfloat16),
            plgpu.SMEM((2 * (plan.stages + 1),), jnp.uint32),
        ],
        raw=True,
    )
    return result


def matvec(
    plan: _Plan,
    context: Any,
    x: Value,
    kernel: Value,
    out: Value,
    boxes: Value,
    x_part: Value,
    meetings: Value,
    strip: Value,
    split: Value,
) -> None:
    """One thread of a block."""
    slots, x_shared = ptx.shared_address(boxes), ptx.shared_address(x_part)
    arrived = ptx.Meetings(ptx.shared_address(meetings), plan.stages + 1)  # one for each slot, and one for x
    arrived.prepare()
    ptx.asm("bar.sync 0;", [], [])
    begin = ptx.mul(split, plan.boxes * BOX)
    phases: Any = None  # which we count ourselves
    barriers = utils.BarrierRef(utils.memref_ptr(meetings), ptx.const(0), phases, plan.stages)

    def copy(box: int) -> None:
        """Begins to bring a box of the matrix; a row's 16-byte pieces are exchanged by the row's number modulo 8."""
        corner = ptx.add(begin, BOX * box), ptx.mul(strip, STRIP)
        context.async_copy(
            src_ref=kernel,
            dst_ref=utils.memref_slice(boxes, box % plan.stages),
            gmem_slice=tuple(utils.ds(arith.index_cast(ir.IndexType.get(), each), BOX) for each in corner),
            barrier=barriers[box % plan.stages],
            swizzle=2 * STRIP,
        )

    for box in range(plan.stages):
        copy(box)
    _copy_x(plan, ptx.address(x), x_shared, arrived.at(plan.stages), begin)
    arrived.wait(plan.stages, 0)
    acc = _multiply(plan, arrived, slots, x_shared, copy)
    ptx.asm("bar.sync 0;", [], [])  # the slots are used for something else now
    _write(plan, acc, ptx.address(out), slots, strip, split)


def _copy_x(plan: _Plan, x: Value, x_shared: Value, meeting: Value, begin: Value) -> None:
    """Begins to bring the block's share of all rows of x."""

    def copy() -> None:
        ptx.expect(meeting, plan.rows * plan.x_copied, ptx.less(ptx.thread(), 1))
        for first in range(0, plan.rows, 32):
            row = ptx.add(ptx.thread(), first)
            source = ptx.offset(ptx.offset(x, row, 2 * plan.inner), begin, 2)
            to = ptx.offset32(x_shared, row, plan.x_row)
            ptx.bulk_copy(to, source, plan.x_copied, meeting, ptx.less(row, plan.rows))

    ptx.when(arith.cmpi(arith.CmpIPredicate.slt, ptx.thread(), ptx.const(32)), copy)


def _multiply(
    plan: _Plan, arrived: ptx.Meetings, slots: Value, x_shared: Value, copy: Callable[[int], None]
) -> list[Value]:
    """The warp's sums: for each eight rows of x and each 16 columns four, in the order of `ptx.mma`."""
    lane = arith.andi(ptx.thread(), ptx.const(31))
    warp = arith.shrui(ptx.thread(), ptx.const(5))
    g, q = arith.shrui(lane, ptx.const(2)), arith.andi(lane, ptx.const(3))
    # A lane says where a row of 8 numbers of a matrix begins: of matrix m row r, with m and r from the lane's bits.
    r, m = arith.andi(lane, ptx.const(7)), arith.shrui(lane, ptx.const(3))
    row = ptx.add(ptx.mul(warp, 16), ptx.mul(arith.shrui(m, ptx.const(1)), 8), r)
    row_at = ptx.offset32(slots, row, 2 * STRIP)
    swizzled = [
        ptx.add(row_at, ptx.mul(arith.xori(ptx.add(arith.andi(m, ptx.const(1)), 2 * pair), r), 16)) for pair in range(4)
    ]
    # What the product has at the columns of rows that there are not is not used, so these may be any row.
    x_at = [
        ptx.add(
            ptx.offset32(x_shared, arith.minsi(ptx.add(g, EIGHT * eight), ptx.const(plan.rows - 1)), plan.x_row),
            ptx.mul(warp, 32),
            ptx.mul(q, 4),
        )
        for eight in range(plan.eights)
    ]
    sums = [ptx.const(0.0, ptx.f32())] * (16 * plan.eights)
    for box in range(plan.boxes):
        slot = box % plan.stages
        arrived.wait(slot, box // plan.stages % 2)
        xs = [
            [
                ptx.asm(f"ld.shared.b32 $0, [$1+{2 * BOX * box + half}];", [ptx.i32()], [at], volatile=True)[0]
                for half in (0, 16)
            ]
            for at in x_at
        ]
        text = f"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{$0, $1, $2, $3}}, [$4+{_BOX_BYTES * slot}];"
        for pair in range(4):
            a = ptx.asm(text, [ptx.i32()] * 4, [swizzled[pair]], volatile=True)
            for eight, x in enumerate(xs):
                place = 16 * eight + 4 * pair
                sums[place : place + 4] = ptx.mma(sums[place : place + 4], a, x)
        if box + plan.stages < plan.boxes:
            ptx.asm("bar.sync 0;", [], [])
            copy(box + plan.stages)
    return sums


def _write(plan: _Plan, acc: list[Value], out: Value, sums: Value, strip: Value, split: Value) -> None:
    """Adds up what the warps have: warp w that of the w-th 16 columns."""
    lane = arith.andi(ptx.thread(), ptx.const(31))
    warp = arith.shrui(ptx.thread(), ptx.const(5))
    mine = ptx.offset32(ptx.offset32(sums, warp, 4 * 32 * len(acc)), lane, 4)
    for i, value in enumerate(acc):
        ptx.asm(f"st.shared.f32 [$0+{4 * 32 * i}], $1;", [], [mine, value])
    ptx.asm("bar.sync 0;", [], [])
    theirs = ptx.offset32(ptx.offset32(sums, warp, 4 * 32 * 4), lane, 4)
    column = ptx.add(ptx.mul(strip, STRIP), ptx.mul(warp, 16), arith.shrui(lane, ptx.const(2)))
    twice_q = ptx.mul(arith.andi(lane, ptx.const(3)), 2)
    for eight in range(plan.eights):
        for i in range(4):
            places = [4 * 32 * (len(acc) * other + 16 * eight + i) for other in range(WARPS)]
            loads = [f"ld.shared.f32 $0, [$1+{place}];" for place in places]
            parts = [ptx.asm(text, [ptx.f32()], [theirs], volatile=True)[0] for text in loads]
            row = ptx.add(twice_q, EIGHT * eight + i % 2)
            place = ptx.add(ptx.mul(split, plan.rows), row)
            at = ptx.offset(ptx.offset(out, place, 4 * plan.columns), ptx.add(column, 8 * (i // 2)), 4)
            ptx.asm(_STORE, [], [at, ptx.total(parts), ptx.less(row, plan.rows)])
