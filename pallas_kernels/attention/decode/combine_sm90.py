"""`split.combine` as one small kernel, where XLA would make three. For Hopper, in PTX."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.attention.decode.gather_sm90 import load_sink
from pallas_kernels.attention.decode.split import FLOOR
from pallas_kernels.ptx import Value

THREADS = 128  # per block
_LOAD = "ld.global.nc.b32 $0, [$1];"
_LOAD_LSE = "ld.global.nc.f32 $0, [$1];"
_LOAD_OUT = "ld.global.nc.v2.f32 {$0, $1}, [$2];"
_STORE = "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $2, $1; st.global.b32 [$0], t; }"


@dataclasses.dataclass(frozen=True)
class _CombinePlan:
    """Everything that is known when the kernel is built."""

    keys: int  # K
    splits: int  # J
    group: int  # G
    width: int  # H
    tile: int
    sinks: str | None  # their dtype, bfloat16 or float32

    @property
    def pairs(self) -> int:
        """Pairs of numbers in a row."""
        return self.keys * self.group * self.width // 2


def combine(
    out_BKJGH: jax.Array, lse_BKJG: jax.Array, counts_B: jax.Array, sinks_N: jax.Array | None, *, tile: int
) -> jax.Array:
    """See `split.combine`. M is G, H is even, and the result is bfloat16."""
    B, K, J, G, H = out_BKJGH.shape
    plan = _CombinePlan(K, J, G, H, tile, sinks=None if sinks_N is None else sinks_N.dtype.name)
    # Missing sinks are not read, but something has to be passed for them.
    sinks = counts_B if sinks_N is None else sinks_N

    results = ptx.launch(
        partial(combine_splits, plan),
        {"out": out_BKJGH, "lse": lse_BKJG, "counts": counts_B, "sinks": sinks},
        {"result": jax.ShapeDtypeStruct((B, K * G, H), jnp.bfloat16)},
        {"row": B, "part": -(-plan.pairs // THREADS)},
    )
    return results["result"]


def combine_splits(
    plan: _CombinePlan,
    *,
    out: Value,
    lse: Value,
    counts: Value,
    sinks: Value,
    result: Value,
    row: Value,
    part: Value,
) -> None:
    """One thread of a block: two numbers of one query's result. Threads beyond the last one repeat its work."""
    number = arith.minsi(ptx.add(ptx.mul(part, THREADS), ptx.thread()), ptx.const(plan.pairs - 1))
    query, column = ptx.divided(number, plan.width // 2)
    key, place = ptx.divided(query, plan.group)
    first = ptx.mul(ptx.add(ptx.mul(row, plan.keys), key), plan.splits)  # split of this row and head
    (count,) = ptx.asm(_LOAD, [ptx.i32()], [ptx.offset(counts, row, 4)], volatile=True)
    sink = ptx.float32(FLOOR) if plan.sinks is None else load_sink(sinks, plan.sinks, query)
    lse_at = ptx.offset(lse, ptx.add(ptx.mul(first, plan.group), place), 4)
    logs = [
        ptx.asm(_LOAD_LSE, [ptx.f32()], [ptx.shifted(lse_at, 4 * plan.group * j)], volatile=True)[0]
        for j in range(plan.splits)
    ]
    at = ptx.offset(out, ptx.add(ptx.mul(first, plan.group), place), 4 * plan.width)
    at, stride = ptx.offset(at, column, 8), 4 * plan.group * plan.width
    outs = [
        ptx.asm(_LOAD_OUT, [ptx.f32()] * 2, [ptx.shifted(at, stride * j)], volatile=True) for j in range(plan.splits)
    ]

    # The output of a split without work may be anything.
    tiles = arith.divui(ptx.add(count, plan.tile - 1), ptx.const(plan.tile))
    length = arith.divui(ptx.add(tiles, plan.splits - 1), ptx.const(plan.splits))
    used = [ptx.less(ptx.mul(length, j), tiles) for j in range(plan.splits)]
    least, zero = ptx.float32(-math.inf), ptx.float32(0.0)
    logs = [arith.select(yes, log, least) for yes, log in zip(used, logs, strict=True)]
    outs = [[arith.select(yes, value, zero) for value in pair] for yes, pair in zip(used, outs, strict=True)]
    values = _mean(plan, logs, outs, sink)
    ptx.asm(_STORE, [], [ptx.offset(result, ptx.add(ptx.mul(row, plan.pairs), number), 4), *values])


def _mean(plan: _CombinePlan, logs: list[Value], outs: list[list[Value]], sink: Value) -> list[Value]:
    """The splits' outputs, each weighed by its share of the softmax."""
    maximum = sink
    for log in logs:
        maximum = arith.maximumf(maximum, log)

    zero = ptx.float32(0.0)
    total = zero if plan.sinks is None else ptx.exp2(arith.subf(sink, maximum))
    sums = [zero, zero]
    for log, pair in zip(logs, outs, strict=True):
        weight = ptx.exp2(arith.subf(log, maximum))
        total = arith.addf(total, weight)
        sums = [arith.addf(old, arith.mulf(weight, value)) for old, value in zip(sums, pair, strict=True)]
    # Without keys and sinks the sum is 0, and so is the result.
    total = arith.maximumf(total, ptx.float32(math.ldexp(1.0, -126)))
    return [ptx.divide(value, total) for value in sums]
