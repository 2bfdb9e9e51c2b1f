"""How the partial results in a block's slots, and those of a cluster's blocks, become one. For Hopper, in PTX."""

import dataclasses
from functools import partial

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.attention.decode import merge_sm90
from pallas_kernels.attention.decode.merge_sm90 import Partial
from pallas_kernels.attention.decode.plan_sm90 import DecodePlan
from pallas_kernels.attention.decode.slots_sm90 import Slots
from pallas_kernels.ptx import Condition, Value

_FROM_SHARED = "ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4+{}];"
_PAIR_FROM_SHARED = "ld.shared.v2.f32 {{$0, $1}}, [$2+{}];"
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


@dataclasses.dataclass(frozen=True)
class Block:
    """The block that a thread belongs to."""

    row: Value
    head: Value  # of keys and values
    first: Value  # its first query in the group
    split: Value
    rank: Value  # in its cluster

    def pair(self, plan: DecodePlan) -> Value:
        """The number of the pair (row, head)."""
        return ptx.add(ptx.mul(self.row, plan.keys), self.head)


def prepare(plan: DecodePlan, mbarrier: Value) -> None:
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


def float4s(plan: DecodePlan, sinks: Value, block: Block) -> list[Float4]:
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
            sink = merge_sm90.load_sink(sinks, plan.sinks, head)
        found.append(Float4(inside, query, column, exists, sink))
    return found


def gather(
    plan: DecodePlan, slots: Slots, shift: Value, mailbox: Value, mbarrier: Value, block: Block, mine: list[Float4]
) -> list[Partial]:
    """For each of the thread's float4s, the partial result over all places of the cluster.

    Args:
      slots: what the block's warps wrote.
      shift: base-2 logarithm of the number of clusters that share the range.
      mailbox: shared memory to receive from the cluster's blocks, 24 bytes per float4.
      mbarrier: see `prepare`.
    """
    numbers = _numbers(plan, plan.float4s)
    ptx.sync_block()
    partials = [_of_block(plan, slots, shift, number) for number in numbers]
    if plan.blocks == 1:
        return partials
    for number, each in zip(numbers, partials, strict=True):
        _send(plan, mailbox, mbarrier, block.rank, number, each)
    ptx.asm(_RECEIVE, [], [mbarrier])
    return [merge_sm90.tree(partial(_sent, plan, mailbox, four.inside), plan.blocks) for four in mine]


def _numbers(plan: DecodePlan, count: int) -> list[Value]:
    """The thread's share of the numbers below a count; the last may lie beyond it."""
    return [ptx.add(utils.thread_idx(), begin) for begin in range(0, count, plan.threads)]


def _column(plan: DecodePlan, number: Value) -> tuple[Value, Value]:
    """The query of one of the block's float4s, and its column divided by 4."""
    return ptx.divided(number, plan.width // 4)


def _of_block(plan: DecodePlan, slots: Slots, shift: Value, number: Value) -> Partial:
    """A float4, over the block's slots."""
    query, column = _column(plan, arith.minsi(number, ptx.const(plan.float4s - 1)))

    def slot(index: int) -> Partial:
        return slots.float4(index, query, column)

    def strand(index: int) -> Partial:
        return merge_sm90.chain([slot(plan.kept * index + i) for i in range(plan.chain)])

    def merged(is_apart: bool) -> list[Value]:
        strands = [plan.slots(each) for each in plan.shifts if plan.is_apart(each) == is_apart]
        count = max(strands) // (plan.kept if is_apart else 1)  # those that this block has not are empty
        return merge_sm90.tree(strand if is_apart else slot, count).numbers()

    kinds = {plan.is_apart(each) for each in plan.shifts}
    if len(kinds) == 1:
        return Partial.of(merged(kinds.pop()))
    first_apart = min(each for each in plan.shifts if plan.is_apart(each))
    is_apart = ptx.less(first_apart - 1, shift)
    return Partial.of(ptx.choose(is_apart, [ptx.f32()] * 6, partial(merged, True), partial(merged, False)))


def _sent(plan: DecodePlan, mailbox: Value, number: Value, block: int) -> Partial:
    """What a block of the cluster has sent here."""
    per = plan.float4s // plan.blocks
    text = _PAIR_FROM_SHARED.format(16 * plan.float4s + 8 * per * block)
    pair = ptx.asm(text, [ptx.f32()] * 2, [ptx.shared_offset(mailbox, number, 8)], volatile=True)
    text = _FROM_SHARED.format(16 * per * block)
    sums = ptx.asm(text, [ptx.f32()] * 4, [ptx.shared_offset(mailbox, number, 16)], volatile=True)
    return Partial.of([*pair, *sums])


def _send(plan: DecodePlan, mailbox: Value, mbarrier: Value, rank: Value, number: Value, mine: Partial) -> None:
    """Sends a float4's result to the block of the cluster that merges it."""
    per = plan.float4s // plan.blocks
    inside = arith.minsi(number, ptx.const(plan.float4s - 1))
    to, there = ptx.divided(inside, per)
    place = ptx.add(ptx.mul(rank, per), there)
    four_at = ptx.shared_offset(mailbox, place, 16)
    pair_at = ptx.add(ptx.shared_offset(mailbox, place, 8), 16 * plan.float4s)
    exists = ptx.less(number, plan.float4s)
    ptx.asm(_SEND, [], [to, four_at, pair_at, mbarrier, exists, *mine.sums, mine.maximum, mine.total])


def write(plan: DecodePlan, out: Value, block: Block, four: Float4, partial: Partial) -> None:
    """Writes a float4 of the result."""
    results = merge_sm90.finished(partial, four.sink)
    place = ptx.add(ptx.mul(block.pair(plan), plan.group), four.query)
    here = ptx.offset(ptx.offset(out, place, 2 * plan.width), four.column, 8)
    ptx.asm(_STORE_FOUR, [], [here, *results, four.exists])


def write_entry(
    plan: DecodePlan, out: Value, totals: Value, block: Block, entry: Value, four: Float4, partial: Partial
) -> None:
    """Writes a float4 of a partial result, for `combine_sm90`."""
    entry = ptx.add(ptx.mul(block.pair(plan), plan.entries), entry)
    place = ptx.add(ptx.mul(entry, plan.group), four.query)
    ptx.store(ptx.offset(ptx.offset(out, place, 4 * plan.width), four.column, 16), partial.sums, four.exists)
    first = ptx.both(four.exists, ptx.less(four.column, 1))
    ptx.store(ptx.offset(totals, place, 8), [partial.maximum, partial.total], first)
