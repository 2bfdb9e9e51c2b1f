"""Products of a few rows with a bfloat16 matrix [K, N]: Pallas Mosaic GPU, for Hopper. RECORD.md beside tells how.

A warp streams a strip of 64 columns from memory to registers, pairs the numbers of adjacent rows there, and multiplies
them with eight rows of x at a time on the tensor cores. The warps of a block share K, and so do `splits` blocks.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.parts import Parts
from pallas_kernels.ptx import Value

EIGHT = 8  # rows of x of an instruction
WARPS = 4
STRIP = 64  # columns of a block
STEP = 16  # rows of the matrix of an instruction
_BLOCKS = 320  # that are wanted at least: 132 multiprocessors hold two or three each

_LOAD_X = """{ .reg .pred p; setp.ne.s32 p, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0;
@p ld.global.nc.v2.b32 {$0, $1}, [$2]; }"""
_STORE = "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.v2.f32 [$0], {$1, $2}; }"


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All that is known when a kernel is built."""

    rows: int  # T, of x
    inner: int  # K
    columns: int  # N
    splits: int  # blocks that share K
    steps: int  # of a warp
    unroll: int  # steps whose loads are in flight while as many are computed

    @property
    def eights(self) -> int:
        return -(-self.rows // EIGHT)


def product(
    x_TK: jax.Array,
    kernel_KN: jax.Array,
    bias_N: jax.Array | None = None,
    *,
    splits: int | None = None,
    unroll: int = 5,
) -> Parts:
    """See `api.matvec`. `splits` and `unroll` that do not divide what they cut are lowered to what does."""
    K, N = kernel_KN.shape
    warp_steps = K // (STEP * WARPS)
    wanted = -(-_BLOCKS * STRIP // N) if splits is None else splits
    splits = next(s for s in range(min(wanted, warp_steps), 0, -1) if warp_steps % s == 0)
    unroll = next(u for u in range(unroll, 0, -1) if warp_steps // splits % u == 0)
    parts_STN = _parts(x_TK, kernel_KN, splits=splits, unroll=unroll)
    return Parts(parts_STN, bias_EN=None if bias_N is None else bias_N[None])


@partial(jax.jit, static_argnames=("splits", "unroll"))
def _parts(x_TK: jax.Array, kernel_KN: jax.Array, *, splits: int, unroll: int) -> jax.Array:
    T, K = x_TK.shape
    N = kernel_KN.shape[1]
    plan = _Plan(rows=T, inner=K, columns=N, splits=splits, steps=K // (STEP * WARPS * splits), unroll=unroll)

    result: jax.Array = ptx.kernel(
        partial(matvec, plan),
        (x_TK, kernel_KN),
        jax.ShapeDtypeStruct((splits, T, N), jnp.float32),
        {"strip": N // STRIP, "split": splits},
        shared=[plgpu.SMEM((WARPS, 16 * plan.eights, 32), jnp.float32)],
    )
    return result


def matvec(plan: _Plan, x: Value, kernel: Value, out: Value, sums: Value, strip: Value, split: Value) -> None:
    """One thread of a block. Lane 4·g + q has columns 8·g to 8·g + 7 of the strip, rows 4·q to 4·q + 3 of a step."""
    lane = arith.andi(ptx.thread(), ptx.const(31))
    warp = arith.shrui(ptx.thread(), ptx.const(5))
    g, q = arith.shrui(lane, ptx.const(2)), arith.andi(lane, ptx.const(3))
    inner = ptx.add(ptx.mul(ptx.add(ptx.mul(split, WARPS), warp), plan.steps * STEP), ptx.mul(q, 4))
    column = ptx.add(ptx.mul(strip, STRIP), ptx.mul(g, 8))
    kernel_at = ptx.offset(ptx.offset(kernel, inner, 2 * plan.columns), column, 2)
    rows = [ptx.add(g, EIGHT * eight) for eight in range(plan.eights)]
    x_at = [ptx.offset(ptx.offset(x, row, 2 * plan.inner), inner, 2) for row in rows]
    exists = [ptx.less(row, plan.rows) for row in rows]

    def load(turn: Value) -> list[Value]:
        at = ptx.offset(kernel_at, ptx.mul(turn, plan.unroll), 2 * plan.columns * STEP)
        loaded: list[Value] = []
        for i in range(plan.unroll):
            for row in range(4):
                place = 2 * plan.columns * (STEP * i + row)
                four = f"ld.global.nc.L1::no_allocate.v4.b32 {{$0, $1, $2, $3}}, [$4+{place}];"
                loaded += ptx.asm(four, [ptx.i32()] * 4, [at], volatile=True)
        return loaded

    def compute(turn: Value, acc: list[Value], loaded: list[Value]) -> list[Value]:
        from_ = [ptx.offset(at, ptx.mul(turn, plan.unroll), 2 * STEP) for at in x_at]
        for i in range(plan.unroll):
            step = ptx.const(2 * STEP * i, ptx.i64())
            xs = [
                ptx.asm(_LOAD_X, [ptx.i32()] * 2, [arith.addi(at, step), there])
                for at, there in zip(from_, exists, strict=True)
            ]
            acc = _multiply(acc, loaded[16 * i : 16 * i + 16], xs)
        return acc

    acc = ptx.stream(plan.steps // plan.unroll, [ptx.const(0.0, ptx.f32())] * (16 * plan.eights), load, compute)
    _write(plan, acc, out, sums, column, split, warp, lane)


def _multiply(acc: list[Value], loaded: list[Value], xs: list[list[Value]]) -> list[Value]:
    """Adds a step's products: of four rows eight numbers each, and for each eight rows of x four numbers of one."""
    upper, lower = (
        [
            ptx.asm(f"prmt.b32 $0, $1, $2, {selector};", [ptx.i32()], [loaded[first + i], loaded[first + 4 + i]])[0]
            for i in range(4)
            for selector in ("0x5410", "0x7632")
        ]
        for first in (0, 8)
    )
    sums = list(acc)
    for eight, x in enumerate(xs):
        for pair in range(4):  # of columns: 2 · pair and the next, of the thread's eight
            a = [*upper[2 * pair : 2 * pair + 2], *lower[2 * pair : 2 * pair + 2]]
            place = 16 * eight + 4 * pair
            sums[place : place + 4] = ptx.mma(sums[place : place + 4], a, x)
    return sums


def _write(
    plan: _Plan, acc: list[Value], out: Value, sums: Value, column: Value, split: Value, warp: Value, lane: Value
) -> None:
    """Adds up what the warps have: warp w those of pair w."""
    mine = ptx.offset32(ptx.offset32(sums, warp, 4 * 32 * len(acc)), lane, 4)
    for i, value in enumerate(acc):
        ptx.asm(f"st.shared.f32 [$0+{4 * 32 * i}], $1;", [], [mine, value])
    ptx.asm("bar.sync 0;", [], [])
    theirs = ptx.offset32(ptx.offset32(sums, warp, 4 * 32 * 4), lane, 4)
    twice_q = ptx.mul(arith.andi(lane, ptx.const(3)), 2)
    for eight in range(plan.eights):
        totals = []
        for i in range(4):
            places = [4 * 32 * (len(acc) * other + 16 * eight + i) for other in range(WARPS)]
            loads = [f"ld.shared.f32 $0, [$1+{place}];" for place in places]
            a, b, c, d = (ptx.asm(text, [ptx.f32()], [theirs], volatile=True)[0] for text in loads)
            totals.append(arith.addf(arith.addf(a, b), arith.addf(c, d)))
        for i in range(2):
            row = ptx.add(twice_q, EIGHT * eight + i)
            place = ptx.add(ptx.mul(split, plan.rows), row)
            at = ptx.offset(ptx.offset(out, place, 4 * plan.columns), ptx.add(column, ptx.mul(warp, 2)), 4)
            ptx.asm(_STORE, [], [at, totals[i], totals[2 + i], ptx.less(row, plan.rows)])
