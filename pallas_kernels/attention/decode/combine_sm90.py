"""How decode attention puts together what it has of a softmax: warps, blocks, and splits. For Hopper, in PTX.

`gather` does it inside a kernel, for the warps of a block and the blocks of a cluster. `combine` is `split.combine` as
one small kernel, of which XLA makes three.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.attention.decode.split import FLOOR, LOG2_E
from pallas_kernels.ptx import Value

THREADS = 128  # of a block
EIGHT = 8  # queries of half an instruction
QUERIES = 2 * EIGHT  # of a block at most

_LOAD_LSE = "ld.global.nc.f32 $0, [$1];"
_LOAD_OUT = "ld.global.nc.v2.f32 {$0, $1}, [$2];"
_LOAD = "ld.global.nc.b32 $0, [$1];"
_STORE = "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $2, $1; st.global.b32 [$0], t; }"
_FROM_SHARED = "ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4+{}];"
_PAIR_FROM_SHARED = "ld.shared.v2.f32 {{$0, $1}}, [$2+{}];"
_TO_SHARED = "st.shared.v4.f32 [$0+{}], {{$1, $2, $3, $4}};"
_PAIR_TO_SHARED = "st.shared.v2.f32 [$0+{}], {{$1, $2}};"
_MEET = """{{ .reg .pred p; setp.eq.s32 p, $1, 0; @p mbarrier.init.shared::cta.b64 [$0], 1;
@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {}; fence.mbarrier_init.release.cluster;
barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned; }}"""
_SEND = """{ .reg .pred p; .reg .b32 a, b, c; setp.ne.s32 p, $4, 0; mapa.shared::cluster.u32 a, $1, $0;
mapa.shared::cluster.u32 b, $2, $0; mapa.shared::cluster.u32 c, $3, $0;
@p st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [a], {$5, $6, $7, $8}, [c];
@p st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [b], {$9, $10}, [c]; }"""
_RECEIVE = "{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], 0; @!p bra again; }"
_STORE_FOUR = """{ .reg .pred p; .reg .b32 a, b; setp.ne.s32 p, $5, 0; cvt.rn.bf16x2.f32 a, $2, $1;
cvt.rn.bf16x2.f32 b, $4, $3; @p st.global.v2.b32 [$0], {a, b}; }"""
_STORE_PART = "{ .reg .pred p; setp.ne.s32 p, $5, 0; @p st.global.v4.f32 [$0], {$1, $2, $3, $4}; }"
_STORE_LOG = "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p st.global.f32 [$0], $1; }"


@dataclasses.dataclass(frozen=True)
class Result:
    """What is known of a kernel's result when it is built."""

    keys: int  # K
    group: int  # G
    width: int  # H
    splits: int  # J: clusters that share a row's places
    blocks: int  # of a cluster, a power of two
    sinks: str | None  # their dtype, bfloat16 or float32

    @property
    def eights(self) -> int:
        """Of queries, that a block has room for."""
        return 1 if self.group <= EIGHT else 2

    @property
    def fours(self) -> int:
        """Of a block's result: numbers next to each other."""
        return min(self.group, QUERIES) * self.width // 4

    @property
    def sums_row(self) -> int:
        """Bytes of a query's sums in shared memory: 16 columns of each thread, then a gap against bank conflicts."""
        return 5 * self.width

    @property
    def warp_bytes(self) -> int:
        """Of shared memory for what a warp has: a row of sums a query, then pairs of maximum and sum of weights."""
        return self.eights * EIGHT * (self.sums_row + 8)


@dataclasses.dataclass(frozen=True)
class Block:
    """Which block a thread is of."""

    row: Value
    head: Value  # of keys and values
    first: Value  # of its queries, in the group
    part: Value  # which split
    number: Value  # in its cluster

    def pair(self, plan: Result) -> Value:
        """The number of the row and head."""
        return ptx.add(ptx.mul(self.row, plan.keys), self.head)


def number(plan: Result) -> Value:
    """Which of its cluster's blocks the thread's is."""
    return ptx.const(0) if plan.blocks == 1 else ptx.asm("mov.u32 $0, %cluster_ctarank;", [ptx.i32()], [])[0]


def meet(plan: Result, meeting: Value) -> None:
    """Prepares to receive from the cluster's blocks, and waits until all of them have.

    Args:
      meeting: an mbarrier.
    """
    if plan.blocks > 1:
        bytes_to_come = 24 * plan.fours  # from all blocks, for this block's share of the result
        ptx.asm(_MEET.format(bytes_to_come), [], [meeting, ptx.thread()])


@dataclasses.dataclass(frozen=True)
class Four:
    """Four numbers next to each other of the result, which a thread writes."""

    inside: Value  # which of the block's
    query: Value  # of the group
    column: Value  # / 4
    exists: Value
    sink: Value | None  # the query's, as a logarithm to base 2, where the block writes the whole result


def fours(plan: Result, sinks: Value, block: Block) -> list[Four]:
    """What the thread writes: of the block's fours, or of the block's share of its cluster's."""
    per = plan.fours // plan.blocks
    fours = []
    for number in _numbers(per):
        inside = arith.minsi(number, ptx.const(per - 1))
        query, column = _column(plan, ptx.add(ptx.mul(block.number, per), inside))
        query = ptx.add(block.first, query)
        exists = arith.andi(ptx.less(number, per), ptx.less(query, plan.group))
        sink = None
        if plan.splits == 1 and plan.sinks is not None:
            query = arith.minsi(query, ptx.const(plan.group - 1))
            head = ptx.add(ptx.mul(block.head, plan.group), query)
            sink = _load_sink(sinks, plan.sinks, head)
        fours.append(Four(inside, query, column, exists, sink))
    return fours


def keep(plan: Result, own: Value, lane: Value, maxima: list[Value], totals: list[Value], sums: list[Value]) -> None:
    """Writes to the warp's shared memory, a row a query, its sums of values; then maxima and sums of weights."""
    g, q = arith.shrui(lane, ptx.const(2)), arith.andi(lane, ptx.const(3))
    for half in range(plan.eights):
        query = ptx.add(g, EIGHT * half)
        row = ptx.add(ptx.offset32(own, query, plan.sums_row), ptx.mul(q, 80))
        for j in range(plan.width // 64):
            for column in (0, 1):
                mine = [sums[4 * (8 * j + i) + 2 * half + column] for i in range(8)]
                for i in (0, 4):
                    place = 4 * 80 * j + 32 * column + 4 * i
                    ptx.asm(_TO_SHARED.format(place), [], [row, *mine[i : i + 4]])
        place = plan.eights * EIGHT * plan.sums_row
        total = over_quad(arith.addf, totals[half])
        ptx.asm(_PAIR_TO_SHARED.format(place), [], [ptx.offset32(own, query, 8), maxima[half], total])


def gather(
    plan: Result, memory: Value, received: Value, meeting: Value, block: Block, mine: list[Four]
) -> list[list[Value]]:
    """Of each four the maximum, the sum of weights and the sums of values over all places of the cluster.

    Args:
      memory: what the block's warps have written with `keep`.
      received: shared memory for what comes from the cluster's blocks, 24 bytes a four.
      meeting: see `meet`.
    """
    numbers = _numbers(plan.fours)
    ptx.asm("bar.sync 0;", [], [])
    sums = [_of_warps(plan, memory, number) for number in numbers]
    if plan.blocks == 1:
        return sums
    for number, values in zip(numbers, sums, strict=True):
        _send(plan, received, meeting, block.number, number, *values)
    ptx.asm(_RECEIVE, [], [meeting])
    return [_of_blocks(plan, received, four.inside) for four in mine]


def _numbers(count: int) -> list[Value]:
    """The thread's of so many numbers, and perhaps one beyond."""
    return [ptx.add(ptx.thread(), begin) for begin in range(0, count, THREADS)]


def _column(plan: Result, number: Value) -> tuple[Value, Value]:
    """The query and the column / 4 of four of the block's numbers."""
    across = ptx.const(plan.width // 4)
    return arith.divui(number, across), arith.remui(number, across)


def _of_warps(plan: Result, memory: Value, number: Value) -> list[Value]:
    """Of four numbers of the block: the maximum, the sum of weights, and the four sums of values."""
    query, four = _column(plan, number)
    inside = ptx.add(ptx.mul(arith.shrui(four, ptx.const(2)), 80), ptx.mul(arith.andi(four, ptx.const(3)), 16))
    row = ptx.add(ptx.offset32(memory, query, plan.sums_row), inside)
    pair = ptx.offset32(memory, query, 8)
    parts = []
    for warp in range(THREADS // 32):
        place = plan.warp_bytes * warp + plan.eights * EIGHT * plan.sums_row
        pair_of_warp = ptx.asm(_PAIR_FROM_SHARED.format(place), [ptx.f32()] * 2, [pair], volatile=True)
        text = _FROM_SHARED.format(plan.warp_bytes * warp)
        parts.append([*pair_of_warp, *ptx.asm(text, [ptx.f32()] * 4, [row], volatile=True)])
    return _together(parts)


def _of_blocks(plan: Result, received: Value, number: Value) -> list[Value]:
    """As `_of_warps`, of the cluster, from what has been sent here."""
    per = plan.fours // plan.blocks
    here, pair = ptx.offset32(received, number, 16), ptx.offset32(received, number, 8)
    parts = []
    for block in range(plan.blocks):
        text = _PAIR_FROM_SHARED.format(16 * plan.fours + 8 * per * block)
        pair_of_block = ptx.asm(text, [ptx.f32()] * 2, [pair], volatile=True)
        text = _FROM_SHARED.format(16 * per * block)
        parts.append([*pair_of_block, *ptx.asm(text, [ptx.f32()] * 4, [here], volatile=True)])
    return _together(parts)


def _together(parts: list[list[Value]]) -> list[Value]:
    """Maximum, sum of weights and sums of values, of several such."""
    maximum = ptx.const(FLOOR, ptx.f32())
    for part in parts:
        maximum = arith.maximumf(maximum, part[0])
    shares = [power(arith.subf(part[0], maximum)) for part in parts]
    sums = [
        ptx.total([arith.mulf(share, part[i]) for share, part in zip(shares, parts, strict=True)]) for i in range(1, 6)
    ]
    return [maximum, *sums]


def _send(
    plan: Result,
    received: Value,
    meeting: Value,
    block: Value,
    number: Value,
    maximum: Value,
    total: Value,
    *sums: Value,
) -> None:
    """Sends four numbers to the block of the cluster that puts them together."""
    per = plan.fours // plan.blocks
    inside = arith.minsi(number, ptx.const(plan.fours - 1))
    to, there = arith.divui(inside, ptx.const(per)), arith.remui(inside, ptx.const(per))
    place = ptx.add(ptx.mul(block, per), there)
    four_at = ptx.offset32(received, place, 16)
    pair_at = ptx.add(ptx.offset32(received, place, 8), 16 * plan.fours)
    exists = ptx.less(number, plan.fours)
    ptx.asm(_SEND, [], [to, four_at, pair_at, meeting, exists, *sums, maximum, total])


def write(
    plan: Result, out: Value, lse: Value, block: Block, four: Four, maximum: Value, total: Value, *sums: Value
) -> None:
    """Writes four numbers of the result, or of the split's."""
    if four.sink is not None:
        new = arith.maximumf(maximum, four.sink)
        rescale = power(arith.subf(maximum, new))
        total = arith.addf(arith.mulf(total, rescale), power(arith.subf(four.sink, new)))
        sums = tuple(arith.mulf(value, rescale) for value in sums)
    # Without places and sinks the sum is 0, and so is the result.
    total = arith.maximumf(total, ptx.const(math.ldexp(1.0, -126), ptx.f32()))
    results = [ptx.asm("div.full.f32 $0, $1, $2;", [ptx.f32()], [value, total])[0] for value in sums]
    place = ptx.add(ptx.mul(ptx.add(ptx.mul(block.pair(plan), plan.splits), block.part), plan.group), four.query)
    if plan.splits == 1:
        here = ptx.offset(ptx.offset(out, place, 2 * plan.width), four.column, 8)
        ptx.asm(_STORE_FOUR, [], [here, *results, four.exists])
        return
    here = ptx.offset(ptx.offset(out, place, 4 * plan.width), four.column, 16)
    ptx.asm(_STORE_PART, [], [here, *results, four.exists])
    (log,) = ptx.asm("lg2.approx.f32 $0, $1;", [ptx.f32()], [total])
    first = arith.andi(four.exists, ptx.less(four.column, 1))
    ptx.asm(_STORE_LOG, [], [ptx.offset(lse, place, 4), arith.addf(maximum, log), first])


def over_quad(combine: Callable[[Value, Value], Value], value: Value) -> Value:
    """What `combine` makes of the values of lanes 4·g … 4·g + 3."""
    for distance in (1, 2):
        text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;"
        (other,) = ptx.asm(text, [ptx.f32()], [value], volatile=True)
        value = combine(value, other)
    return value


def power(value: Value) -> Value:
    """2 to the power of a float32 number."""
    return ptx.asm("ex2.approx.ftz.f32 $0, $1;", [ptx.f32()], [value])[0]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All that is known when a kernel is built."""

    keys: int  # K
    splits: int  # J
    group: int  # G
    columns: int  # of lse, at least G
    width: int  # H
    tile: int
    sinks: str | None  # their dtype, bfloat16 or float32

    @property
    def pairs(self) -> int:
        """Of numbers of a row."""
        return self.keys * self.group * self.width // 2


def combine(
    out_BKJGH: jax.Array, lse_BKJM: jax.Array, counts_B: jax.Array, sinks_N: jax.Array | None, *, tile: int
) -> jax.Array:
    """See `split.combine`. H is even, and the result is bfloat16."""
    B, K, J, G, H = out_BKJGH.shape
    plan = _Plan(K, J, G, lse_BKJM.shape[-1], H, tile, sinks=None if sinks_N is None else sinks_N.dtype.name)
    # Where there are none, they are not read, but something must stand for them.
    sinks = counts_B if sinks_N is None else sinks_N

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
    """One thread of a block: two numbers of one query's result. Threads beyond the last do what the last one does."""
    number = arith.minsi(ptx.add(ptx.mul(part, THREADS), ptx.thread()), ptx.const(plan.pairs - 1))
    query, column = (op(number, ptx.const(plan.width // 2)) for op in (arith.divui, arith.remui))
    key, place = (op(query, ptx.const(plan.group)) for op in (arith.divui, arith.remui))
    first = ptx.mul(ptx.add(ptx.mul(row, plan.keys), key), plan.splits)  # split of this row and head
    (count,) = ptx.asm(_LOAD, [ptx.i32()], [ptx.offset(counts, row, 4)], volatile=True)
    sink = ptx.const(FLOOR, ptx.f32()) if plan.sinks is None else _load_sink(sinks, plan.sinks, query)
    lse_at = ptx.offset(lse, ptx.add(ptx.mul(first, plan.columns), place), 4)
    logs = [
        ptx.asm(_LOAD_LSE, [ptx.f32()], [_after(lse_at, 4 * plan.columns * j)], volatile=True)[0]
        for j in range(plan.splits)
    ]
    at = ptx.offset(out, ptx.add(ptx.mul(first, plan.group), place), 4 * plan.width)
    at, stride = ptx.offset(at, column, 8), 4 * plan.group * plan.width
    outs = [ptx.asm(_LOAD_OUT, [ptx.f32()] * 2, [_after(at, stride * j)], volatile=True) for j in range(plan.splits)]

    # What a split without work left there does not matter.
    tiles = arith.divui(ptx.add(count, plan.tile - 1), ptx.const(plan.tile))
    length = arith.divui(ptx.add(tiles, plan.splits - 1), ptx.const(plan.splits))
    used = [arith.cmpi(arith.CmpIPredicate.slt, ptx.mul(length, j), tiles) for j in range(plan.splits)]
    least, zero = ptx.const(-math.inf, ptx.f32()), ptx.const(0.0, ptx.f32())
    logs = [arith.select(yes, log, least) for yes, log in zip(used, logs, strict=True)]
    outs = [[arith.select(yes, value, zero) for value in pair] for yes, pair in zip(used, outs, strict=True)]
    values = _mean(plan, logs, outs, sink)
    ptx.asm(_STORE, [], [ptx.offset(result, ptx.add(ptx.mul(row, plan.pairs), number), 4), *values])


def _after(at: Value, size: int) -> Value:
    return arith.addi(at, ptx.const(size, ptx.i64()))


def _load_sink(sinks: Value, dtype: str, query: Value) -> Value:
    """A query's sink, of bfloat16 or float32, as a logarithm to base 2."""
    text, size = ("ld.global.nc.u16 $0, [$1];", 2) if dtype == "bfloat16" else (_LOAD, 4)
    (bits,) = ptx.asm(text, [ptx.i32()], [ptx.offset(sinks, query, size)], volatile=True)
    sink = arith.bitcast(ptx.f32(), arith.shli(bits, ptx.const(16)) if size == 2 else bits)
    return arith.maximumf(arith.mulf(sink, ptx.const(LOG2_E, ptx.f32())), ptx.const(FLOOR, ptx.f32()))


def _mean(plan: _Plan, logs: list[Value], outs: list[list[Value]], sink: Value) -> list[Value]:
    """The splits' outputs, each weighed by its share of the softmax."""
    maximum = sink
    for log in logs:
        maximum = arith.maximumf(maximum, log)

    zero = ptx.const(0.0, ptx.f32())
    total = zero if plan.sinks is None else power(arith.subf(sink, maximum))
    sums = [zero, zero]
    for log, pair in zip(logs, outs, strict=True):
        weight = power(arith.subf(log, maximum))
        total = arith.addf(total, weight)
        sums = [arith.addf(old, arith.mulf(weight, value)) for old, value in zip(sums, pair, strict=True)]
    # Without keys and sinks the sum is 0, and so is the result.
    total = arith.maximumf(total, ptx.const(math.ldexp(1.0, -126), ptx.f32()))
    return [ptx.asm("div.full.f32 $0, $1, $2;", [ptx.f32()], [value, total])[0] for value in sums]
