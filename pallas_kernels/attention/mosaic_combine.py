"""`split.combine` as one small kernel, of which XLA makes three: Pallas Mosaic GPU, for Hopper."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.attention.split import FLOOR, LOG2_E
from pallas_kernels.ptx import Value

THREADS = 128

# Of a split without work nothing is read: its logarithm is -infinity and its output 0.
_LOAD_LSE = "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0xFF800000; @p ld.global.nc.f32 $0, [$1]; }"
_LOAD_OUT = """{ .reg .pred p; setp.ne.s32 p, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0;
@p ld.global.nc.v2.f32 {$0, $1}, [$2]; }"""
_LOAD = "ld.global.nc.b32 $0, [$1];"
_STORE = "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $2, $1; st.global.b32 [$0], t; }"


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All that is known when a kernel is built."""

    keys: int  # K
    splits: int  # J
    group: int  # G
    columns: int  # of lse, at least G
    width: int  # H
    tile: int
    has_sinks: bool

    @property
    def pairs(self) -> int:
        """Of numbers of a row."""
        return self.keys * self.group * self.width // 2


def combine(
    out_BKJGH: jax.Array, lse_BKJM: jax.Array, counts_B: jax.Array, sinks_N: jax.Array | None, *, tile: int
) -> jax.Array:
    """See `split.combine`. H is even, and the result is bfloat16."""
    B, K, J, G, H = out_BKJGH.shape
    plan = _Plan(K, J, G, lse_BKJM.shape[-1], H, tile, has_sinks=sinks_N is not None)
    # Where there are none, they are not read, but something must stand for them.
    sinks = counts_B if sinks_N is None else sinks_N.astype(jnp.float32)

    result: jax.Array = ptx.kernel(
        partial(combine_splits, plan),
        (out_BKJGH, lse_BKJM, counts_B, sinks),
        jax.ShapeDtypeStruct((B, K * G, H), jnp.bfloat16),
        {"row": B, "part": -(-plan.pairs // THREADS)},
    )
    return result


def combine_splits(
    plan: _Plan, out: Value, lse: Value, counts: Value, sinks: Value, result: Value, row: Value, part: Value
) -> None:
    """One thread of a block: two numbers of one query's result."""
    number = ptx.add(ptx.mul(part, THREADS), ptx.thread())

    def pair() -> None:
        query, column = (op(number, ptx.const(plan.width // 2)) for op in (arith.divui, arith.remui))
        key, place = (op(query, ptx.const(plan.group)) for op in (arith.divui, arith.remui))
        first = ptx.mul(ptx.add(ptx.mul(row, plan.keys), key), plan.splits)  # split of this row and head
        (count,) = ptx.asm(_LOAD, [ptx.i32()], [ptx.offset(counts, row, 4)])
        tiles = arith.divui(ptx.add(count, plan.tile - 1), ptx.const(plan.tile))
        length = arith.divui(ptx.add(tiles, plan.splits - 1), ptx.const(plan.splits))
        used = [ptx.less(ptx.mul(length, j), tiles) for j in range(plan.splits)]
        lse_at = ptx.offset(lse, ptx.add(ptx.mul(first, plan.columns), place), 4)
        logs = [
            ptx.asm(_LOAD_LSE, [ptx.f32()], [_after(lse_at, 4 * plan.columns * j), is_used])[0]
            for j, is_used in enumerate(used)
        ]
        at = ptx.offset(out, ptx.add(ptx.mul(first, plan.group), place), 4 * plan.width)
        at = ptx.offset(at, column, 8)
        stride = 4 * plan.group * plan.width
        outs = [
            ptx.asm(_LOAD_OUT, [ptx.f32()] * 2, [_after(at, stride * j), is_used]) for j, is_used in enumerate(used)
        ]
        values = _mean(plan, logs, outs, _start(plan, sinks, query))
        place = ptx.add(ptx.mul(row, plan.pairs), number)
        ptx.asm(_STORE, [], [ptx.offset(result, place, 4), *values])

    ptx.when(arith.cmpi(arith.CmpIPredicate.slt, number, ptx.const(plan.pairs)), pair)


def _after(at: Value, size: int) -> Value:
    return arith.addi(at, ptx.const(size, ptx.i64()))


def _start(plan: _Plan, sinks: Value, query: Value) -> Value:
    floor = ptx.const(FLOOR, ptx.f32())
    if not plan.has_sinks:
        return floor
    (sink,) = ptx.asm("ld.global.nc.f32 $0, [$1];", [ptx.f32()], [ptx.offset(sinks, query, 4)])
    return arith.maximumf(arith.mulf(sink, ptx.const(LOG2_E, ptx.f32())), floor)


def _mean(plan: _Plan, logs: list[Value], outs: list[list[Value]], start: Value) -> list[Value]:
    """The splits' outputs, each weighed by its share of the softmax."""
    maximum = start
    for log in logs:
        maximum = arith.maximumf(maximum, log)

    def power(log: Value) -> Value:
        return ptx.asm("ex2.approx.f32 $0, $1;", [ptx.f32()], [arith.subf(log, maximum)])[0]

    zero = ptx.const(0.0, ptx.f32())
    total = power(start) if plan.has_sinks else zero
    sums = [zero, zero]
    for log, pair in zip(logs, outs, strict=True):
        weight = power(log)
        total = arith.addf(total, weight)
        sums = [arith.addf(old, arith.mulf(weight, value)) for old, value in zip(sums, pair, strict=True)]
    # Without keys and sinks the sum is 0, and so is the result.
    total = arith.maximumf(total, ptx.const(math.ldexp(1.0, -126), ptx.f32()))
    return [ptx.asm("div.full.f32 $0, $1, $2;", [ptx.f32()], [value, total])[0] for value in sums]
