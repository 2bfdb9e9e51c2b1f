"""How the warps of a block, and the blocks of a cluster, merge their parts of a softmax. For Hopper, in PTX."""

import dataclasses
import math

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.attention.decode.split import FLOOR, LOG2_E
from pallas_kernels.ptx import Condition, Value

EIGHT = 8  # queries in half an instruction
QUERIES = 2 * EIGHT  # per block, at most

_LOAD = "ld.global.nc.b32 $0, [$1];"
_FROM_SHARED = "ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4+{}];"
_PAIR_FROM_SHARED = "ld.shared.v2.f32 {{$0, $1}}, [$2+{}];"
_TO_SHARED = "st.shared.v4.f32 [$0+{}], {{$1, $2, $3, $4}};"
_PAIR_TO_SHARED = "st.shared.v2.f32 [$0+{}], {{$1, $2}};"
_PREPARE = """{{ .reg .pred p; setp.eq.s32 p, $1, 0; @p mbarrier.init.shared::cta.b64 [$0], 1;
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
class SoftmaxPlan:
    """What is known about the kernel's result when it is built."""

    keys: int  # K
    group: int  # G
    width: int  # H
    splits: int  # J: clusters that share a row's places
    blocks: int  # per cluster, a power of two
    warps: int  # per block, a multiple of 4
    sinks: str | None  # their dtype, bfloat16 or float32

    @property
    def threads(self) -> int:
        """Per block."""
        return 32 * self.warps

    @property
    def eights(self) -> int:
        """Groups of eight queries that a block has room for."""
        return 1 if self.group <= EIGHT else 2

    @property
    def float4s(self) -> int:
        """Float4s in a block's result."""
        return min(self.group, QUERIES) * self.width // 4

    @property
    def sums_row(self) -> int:
        """Bytes of a query's sums in shared memory: 16 columns per thread, each with a gap against bank conflicts."""
        return 5 * self.width

    @property
    def warp_bytes(self) -> int:
        """Bytes of shared memory per warp: a row of sums per query, then each query's maximum and sum of weights."""
        return self.eights * EIGHT * (self.sums_row + 8)


@dataclasses.dataclass(frozen=True)
class Block:
    """The block that a thread belongs to."""

    row: Value
    head: Value  # of keys and values
    first: Value  # its first query in the group
    part: Value  # which split
    rank: Value  # in its cluster

    def pair(self, plan: SoftmaxPlan) -> Value:
        """The number of the pair (row, head)."""
        return ptx.add(ptx.mul(self.row, plan.keys), self.head)


def prepare(plan: SoftmaxPlan, mbarrier: Value) -> None:
    """Prepares to receive from the cluster's blocks, and waits until all of them are ready too."""
    if plan.blocks > 1:
        bytes_to_come = 24 * plan.float4s  # from all blocks, for this block's share of the result
        ptx.asm(_PREPARE.format(bytes_to_come), [], [mbarrier, utils.thread_idx()])


@dataclasses.dataclass(frozen=True)
class Float4:
    """Four adjacent numbers of the result, which a thread writes."""

    inside: Value  # its number among the block's
    query: Value  # in the group
    column: Value  # divided by 4
    exists: Condition
    sink: Value | None  # the query's, as a logarithm to base 2, if the block writes the whole result


def float4s(plan: SoftmaxPlan, sinks: Value, block: Block) -> list[Float4]:
    """The float4s that the thread writes, of the block's or of the block's share of its cluster's."""
    per = plan.float4s // plan.blocks
    found = []
    for number in _numbers(plan, per):
        inside = arith.minsi(number, ptx.const(per - 1))
        query, column = _column(plan, ptx.add(ptx.mul(block.rank, per), inside))
        query = ptx.add(block.first, query)
        exists = ptx.both(ptx.less(number, per), ptx.less(query, plan.group))
        sink = None
        if plan.splits == 1 and plan.sinks is not None:
            query = arith.minsi(query, ptx.const(plan.group - 1))
            head = ptx.add(ptx.mul(block.head, plan.group), query)
            sink = load_sink(sinks, plan.sinks, head)
        found.append(Float4(inside, query, column, exists, sink))
    return found


def keep(
    plan: SoftmaxPlan, own: Value, lane: Value, maxima: list[Value], totals: list[Value], sums: list[Value]
) -> None:
    """Writes to the warp's shared memory: a row of sums of values per query, then the maxima and sums of weights."""
    g, q = arith.shrui(lane, ptx.const(2)), arith.andi(lane, ptx.const(3))
    for half in range(plan.eights):
        query = ptx.add(g, EIGHT * half)
        row = ptx.add(ptx.shared_offset(own, query, plan.sums_row), ptx.mul(q, 80))
        for j in range(plan.width // 64):
            for column in (0, 1):
                mine = [sums[4 * (8 * j + i) + 2 * half + column] for i in range(8)]
                for i in (0, 4):
                    place = 4 * 80 * j + 32 * column + 4 * i
                    ptx.asm(_TO_SHARED.format(place), [], [row, *mine[i : i + 4]])
        place = plan.eights * EIGHT * plan.sums_row
        total = ptx.quad_reduce(arith.addf, totals[half])
        ptx.asm(_PAIR_TO_SHARED.format(place), [], [ptx.shared_offset(own, query, 8), maxima[half], total])


def gather(
    plan: SoftmaxPlan, memory: Value, mailbox: Value, mbarrier: Value, block: Block, mine: list[Float4]
) -> list[list[Value]]:
    """For each float4, the maximum, the sum of weights and the sums of values over all places of the cluster.

    Args:
      memory: what the block's warps wrote with `keep`.
      mailbox: shared memory to receive from the cluster's blocks, 24 bytes per float4.
      mbarrier: see `prepare`.
    """
    numbers = _numbers(plan, plan.float4s)
    ptx.sync_block()
    sums = [_of_warps(plan, memory, number) for number in numbers]
    if plan.blocks == 1:
        return sums
    for number, values in zip(numbers, sums, strict=True):
        _send(plan, mailbox, mbarrier, block.rank, number, *values)
    ptx.asm(_RECEIVE, [], [mbarrier])
    return [_of_blocks(plan, mailbox, four.inside) for four in mine]


def _numbers(plan: SoftmaxPlan, count: int) -> list[Value]:
    """The thread's share of the numbers below a count; the last may lie beyond it."""
    return [ptx.add(utils.thread_idx(), begin) for begin in range(0, count, plan.threads)]


def _column(plan: SoftmaxPlan, number: Value) -> tuple[Value, Value]:
    """The query of one of the block's float4s, and its column divided by 4."""
    return ptx.divided(number, plan.width // 4)


def _of_warps(plan: SoftmaxPlan, memory: Value, number: Value) -> list[Value]:
    """A float4 of the block, over its warps: the maximum, the sum of weights, and the four sums of values."""
    query, four = _column(plan, arith.minsi(number, ptx.const(plan.float4s - 1)))
    inside = ptx.add(ptx.mul(arith.shrui(four, ptx.const(2)), 80), ptx.mul(arith.andi(four, ptx.const(3)), 16))
    row = ptx.add(ptx.shared_offset(memory, query, plan.sums_row), inside)
    pair = ptx.shared_offset(memory, query, 8)
    parts = []
    for warp in range(plan.warps):
        place = plan.warp_bytes * warp + plan.eights * EIGHT * plan.sums_row
        pair_of_warp = ptx.asm(_PAIR_FROM_SHARED.format(place), [ptx.f32()] * 2, [pair], volatile=True)
        text = _FROM_SHARED.format(plan.warp_bytes * warp)
        parts.append([*pair_of_warp, *ptx.asm(text, [ptx.f32()] * 4, [row], volatile=True)])
    return _together(parts)


def _of_blocks(plan: SoftmaxPlan, mailbox: Value, number: Value) -> list[Value]:
    """Like `_of_warps`, over the cluster's blocks, from what they sent here."""
    per = plan.float4s // plan.blocks
    here, pair = ptx.shared_offset(mailbox, number, 16), ptx.shared_offset(mailbox, number, 8)
    parts = []
    for block in range(plan.blocks):
        text = _PAIR_FROM_SHARED.format(16 * plan.float4s + 8 * per * block)
        pair_of_block = ptx.asm(text, [ptx.f32()] * 2, [pair], volatile=True)
        text = _FROM_SHARED.format(16 * per * block)
        parts.append([*pair_of_block, *ptx.asm(text, [ptx.f32()] * 4, [here], volatile=True)])
    return _together(parts)


def _together(parts: list[list[Value]]) -> list[Value]:
    """Merges several results: maximum, sum of weights, and sums of values."""
    maximum = ptx.float32(FLOOR)
    for part in parts:
        maximum = arith.maximumf(maximum, part[0])
    shares = [ptx.exp2(arith.subf(part[0], maximum)) for part in parts]
    sums = [
        ptx.tree_sum([arith.mulf(share, part[i]) for share, part in zip(shares, parts, strict=True)])
        for i in range(1, 6)
    ]
    return [maximum, *sums]


def _send(
    plan: SoftmaxPlan,
    mailbox: Value,
    mbarrier: Value,
    block: Value,
    number: Value,
    maximum: Value,
    total: Value,
    *sums: Value,
) -> None:
    """Sends a float4's result to the block of the cluster that merges it."""
    per = plan.float4s // plan.blocks
    inside = arith.minsi(number, ptx.const(plan.float4s - 1))
    to, there = ptx.divided(inside, per)
    place = ptx.add(ptx.mul(block, per), there)
    four_at = ptx.shared_offset(mailbox, place, 16)
    pair_at = ptx.add(ptx.shared_offset(mailbox, place, 8), 16 * plan.float4s)
    exists = ptx.less(number, plan.float4s)
    ptx.asm(_SEND, [], [to, four_at, pair_at, mbarrier, exists, *sums, maximum, total])


def write(
    plan: SoftmaxPlan, out: Value, lse: Value, block: Block, four: Float4, maximum: Value, total: Value, *sums: Value
) -> None:
    """Writes a float4 of the result, or of the split's result."""
    if four.sink is not None:
        new = arith.maximumf(maximum, four.sink)
        rescale = ptx.exp2(arith.subf(maximum, new))
        total = arith.addf(arith.mulf(total, rescale), ptx.exp2(arith.subf(four.sink, new)))
        sums = tuple(arith.mulf(value, rescale) for value in sums)
    # Without places and sinks the sum is 0, and so is the result.
    total = arith.maximumf(total, ptx.float32(math.ldexp(1.0, -126)))
    results = [ptx.divide(value, total) for value in sums]
    place = ptx.add(ptx.mul(ptx.add(ptx.mul(block.pair(plan), plan.splits), block.part), plan.group), four.query)
    if plan.splits == 1:
        here = ptx.offset(ptx.offset(out, place, 2 * plan.width), four.column, 8)
        ptx.asm(_STORE_FOUR, [], [here, *results, four.exists])
        return
    here = ptx.offset(ptx.offset(out, place, 4 * plan.width), four.column, 16)
    ptx.asm(_STORE_PART, [], [here, *results, four.exists])
    (log,) = ptx.asm("lg2.approx.f32 $0, $1;", [ptx.f32()], [total])
    first = ptx.both(four.exists, ptx.less(four.column, 1))
    ptx.asm(_STORE_LOG, [], [ptx.offset(lse, place, 4), arith.addf(maximum, log), first])


def load_sink(sinks: Value, dtype: str, query: Value) -> Value:
    """A query's sink, of bfloat16 or float32, as a logarithm to base 2."""
    text, size = ("ld.global.nc.u16 $0, [$1];", 2) if dtype == "bfloat16" else (_LOAD, 4)
    (bits,) = ptx.asm(text, [ptx.i32()], [ptx.offset(sinks, query, size)], volatile=True)
    sink = arith.bitcast(ptx.f32(), arith.shli(bits, ptx.const(16)) if size == 2 else bits)
    return arith.maximumf(arith.mulf(sink, ptx.float32(LOG2_E)), ptx.float32(FLOOR))
