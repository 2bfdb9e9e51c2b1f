"""What the kernel's phases have in common: products of rows with matrices, and what blocks tell each other.

A row's D numbers are N strips of 64, and a cluster of C blocks has a strip of each result. Of a product's inner axis
each block of a cluster has an equal share, so that its sums are part of 64 columns, which the blocks send each other.
All the boxes of weights that a block needs, of all products, are one stream through a ring of shared memory: it runs on
while the blocks wait for each other.

Clusters tell each other through global memory, the relay. They write to where all bits are set, and who needs it reads
until it finds something else: numbers that are computed never have all bits set. The next kernel sets them again.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx, rows
from pallas_kernels.block.memory_sm90 import await_all, keep, load_pair, store
from pallas_kernels.block.plan_sm90 import BOX, BOX_BYTES, SLOTS, SUMS_BYTES, THREADS, TOGETHER, WARPS, Plan
from pallas_kernels.block.stream import STRIP
from pallas_kernels.ptx import Value


@dataclasses.dataclass(frozen=True)
class Here:
    """Where a thread is, and what its block shares."""

    plan: Plan
    place: rows.Place
    strip: Value  # of the cluster
    shared: dict[str, Value]  # addresses in shared memory by name

    @classmethod
    def of(cls, plan: Plan, strip: Value, memory: dict[str, Value]) -> "Here":
        """This thread's. `memory`: shared memory by the names of `Plan.scratch`."""
        shared = {name: ptx.shared_address(each) for name, each in memory.items()}
        place = rows.Place.here(rows.Spread(plan.width, plan.blocks, THREADS), memory["meetings"])
        return cls(plan, place, strip, shared)

    def prepare(self, counts: Sequence[int]) -> None:
        """Prepares what blocks send each other: so many numbers to a block in each exchange. All threads meet."""
        ptx.Meetings(self.shared["filled"], self.plan.stages, WARPS).prepare()
        self.place.prepare(counts)
        ptx.asm("bar.sync 0;", [], [])

    @property
    def rank(self) -> Value:
        """The block's number in its cluster."""
        return self.place.block

    def box_rows(self, share: int) -> list[Value]:
        """The first row of a matrix in each of the block's boxes of a strip."""
        first = ptx.mul(self.rank, share * BOX)
        return [ptx.add(first, box * BOX) for box in range(share)]

    def own_row(self) -> tuple[Value, Value]:
        """The row that the thread's warp has, and 1 where there is such a row, else 0."""
        return arith.minsi(self.place.warp, ptx.const(self.plan.rows - 1)), ptx.less(self.place.warp, self.plan.rows)


class Ring:
    """The boxes of weights of a block, in the order in which it takes them."""

    def __init__(self, here: Here, context: Any, memory: dict[str, Value], jobs: Sequence[tuple[Value, Value, Value]]):
        """`jobs`: of each box the matrix, and the first row and column."""
        self._plan, self._context, self._boxes, self._jobs = here.plan, context, memory["boxes"], jobs
        self._slots, self._half = here.shared["boxes"], arith.shrui(here.place.warp, ptx.const(2))
        self._filled = ptx.Meetings(here.shared["filled"], here.plan.stages, WARPS)
        phases: Any = None  # which we count ourselves
        filled = utils.memref_ptr(memory["filled"])
        self._barriers = utils.BarrierRef(filled, ptx.const(0), phases, here.plan.stages)
        self._warp, self._begun = here.place.warp, 0

    def begin(self, end: int) -> None:
        """Begins to bring the boxes up to `end`, as far as there are slots that nobody reads."""
        for box in range(self._begun, min(end, self._plan.boxes)):
            self._copy(box)
        self._begun = max(self._begun, min(end, self._plan.boxes))

    def _copy(self, box: int) -> None:
        """Begins to bring a box; a row's 16-byte pieces are exchanged by the row's number modulo 8.

        The warps take turns, for it takes a thread a while.
        """
        matrix, *corner = self._jobs[box]
        is_turn = arith.cmpi(arith.CmpIPredicate.eq, self._warp, ptx.const(box % WARPS))
        slot = box % self._plan.stages
        self._context.async_copy(
            src_ref=matrix,
            dst_ref=utils.memref_slice(self._boxes, slot),
            gmem_slice=tuple(utils.ds(arith.index_cast(ir.IndexType.get(), each), BOX) for each in corner),
            barrier=self._barriers[slot],
            swizzle=2 * STRIP,
            predicate=arith.andi(is_turn, utils.single_thread_predicate(scope=utils.ThreadSubset.WARP)),
        )

    def multiply(self, first: int, count: int, wide: int, factor: Value) -> list[list[Value]]:
        """The warp's sums of `wide` strips: for each 16 of its 32 columns four, in the order of `ptx.mma`.

        Args:
          first, count: boxes, of which those of the strips take turns.
          factor: rows in shared memory, of as many numbers as `count // wide` boxes have rows.
        """
        plan = self._plan
        group, g, q = ptx.lane()
        lane = arith.andi(ptx.thread(), ptx.const(31))
        # A lane says where a row of 8 numbers of a matrix begins: of matrix m row r.
        r, m = arith.andi(lane, ptx.const(7)), arith.shrui(lane, ptx.const(3))
        row = ptx.add(ptx.mul(group, 16), ptx.mul(arith.shrui(m, ptx.const(1)), 8), r)
        row_at = ptx.offset32(self._slots, row, 2 * STRIP)
        piece = ptx.add(arith.andi(m, ptx.const(1)), ptx.mul(self._half, 4))
        pairs = [ptx.add(row_at, ptx.mul(arith.xori(ptx.add(piece, 2 * pair), r), 16)) for pair in range(2)]
        # What comes of rows that there are not is not used, so these may be any row.
        x_row = ptx.offset32(factor, arith.minsi(g, ptx.const(plan.rows - 1)), plan.row_bytes(count // wide))
        x_at = ptx.add(x_row, ptx.mul(group, 32), ptx.mul(q, 4))
        sums = [[ptx.const(0.0, ptx.f32())] * 8 for _ in range(wide)]
        for i in range(count):
            box, strip = first + i, i % wide
            slot = box % plan.stages
            self._filled.wait(slot, box // plan.stages % 2)
            if strip == 0:
                texts = [f"ld.shared.b32 $0, [$1+{2 * BOX * (i // wide) + half}];" for half in (0, 16)]
                x = [ptx.asm(text, [ptx.i32()], [x_at], volatile=True)[0] for text in texts]
            text = f"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{$0, $1, $2, $3}}, [$4+{BOX_BYTES * slot}];"
            for pair in range(2):
                a = ptx.asm(text, [ptx.i32()] * 4, [pairs[pair]], volatile=True)
                four = slice(4 * pair, 4 * pair + 4)
                sums[strip][four] = ptx.mma(sums[strip][four], a, x)
            is_last = i % TOGETHER == TOGETHER - 1 or i == count - 1
            if is_last and self._begun < min(box + 1 + plan.stages, plan.boxes):
                ptx.asm("bar.sync 0;", [], [])
                self.begin(box + 1 + plan.stages)
        return sums


def block_sums(here: Here, sums: Sequence[Sequence[Value]]) -> list[list[Value]]:
    """Adds up what the warps have of each strip: of columns 8·w + g, of warp w, those of rows 2·q and 2·q + 1."""
    warp = here.place.warp
    mine = ptx.offset32(ptx.offset32(here.shared["sums"], warp, 4 * 32 * 8), here.place.lane, 4)
    for strip, values in enumerate(sums):
        for i, value in enumerate(values):
            ptx.asm(f"st.shared.f32 [$0+{strip * SUMS_BYTES + 4 * 32 * i}], $1;", [], [mine, value])
    ptx.asm("bar.sync 0;", [], [])
    first = ptx.add(ptx.mul(arith.shrui(warp, ptx.const(2)), 4 * 8), ptx.mul(arith.andi(warp, ptx.const(3)), 2))
    theirs = ptx.offset32(ptx.offset32(here.shared["sums"], first, 4 * 32), here.place.lane, 4)

    def total(strip: int, i: int) -> Value:
        shifts = [strip * SUMS_BYTES + 4 * 32 * (8 * group + i) for group in range(4)]
        texts = [f"ld.shared.f32 $0, [$1+{shift}];" for shift in shifts]
        return ptx.total([ptx.asm(text, [ptx.f32()], [theirs], volatile=True)[0] for text in texts])

    return [[total(strip, i) for i in range(2)] for strip in range(len(sums))]


def send_sums(here: Here, exchange: int, sums: Sequence[Value], slot: int, to: Any) -> None:
    """Sends `block_sums` of a strip to a slot of the inboxes [C, SLOTS, T, 64] of the cluster's blocks `to`."""
    plan = here.plan
    _, g, q = ptx.lane()
    source = ptx.add(ptx.mul(here.rank, SLOTS), slot)
    column = ptx.add(ptx.mul(here.place.warp, 8), g)
    for i, value in enumerate(sums[: plan.rows]):
        row = ptx.add(ptx.mul(q, 2), i)
        at = ptx.offset32(
            ptx.offset32(ptx.offset32(here.shared["inbox"], source, 4 * STRIP * plan.rows), row, 4 * STRIP), column, 4
        )
        for block in to:
            here.place.send(exchange, ptx.const(block), at, value, ptx.less(row, plan.rows))


def inbox_pair(here: Here, slot: Value | int, row: Value, pair: Value) -> list[Value]:
    """The sums of two columns of a slot of the inbox, over the cluster's blocks."""
    plan = here.plan
    row_at = ptx.add(ptx.mul(slot, plan.rows), row)
    at = ptx.add(ptx.offset32(here.shared["inbox"], row_at, 4 * STRIP), ptx.mul(pair, 8))
    parts = [load_pair(ptx.add(at, 4 * STRIP * plan.rows * SLOTS * source)) for source in range(plan.blocks)]
    return [ptx.total([part[i] for part in parts]) for i in range(2)]


def clear(here: Here, relay: Value, words: int) -> None:
    """Sets all bits of a relay, which the next kernel uses."""
    own = ptx.add(ptx.mul(here.strip, here.plan.blocks), here.rank)
    first = ptx.add(ptx.mul(own, THREADS), here.place.thread)
    for start in range(0, words, here.plan.strips * here.plan.blocks * THREADS):
        word = ptx.add(first, start)
        store(ptx.offset(relay, word, 4), ptx.const(-1), ptx.less(word, words))


def block_does(here: Here, most: int, body: Callable[[], None]) -> None:
    """Lets the first so many blocks of the cluster do something."""
    ptx.when(arith.cmpi(arith.CmpIPredicate.slt, here.rank, ptx.const(most)), body)


def gather(here: Here, relay: Value, width: int, share: int) -> None:
    """Brings the block's share of rows [T, width], bfloat16, to `second` as soon as it is there. All threads meet."""
    plan = here.plan
    count = 2 * BOX * share // 16
    pieces, targets = [], []
    for start in range(0, plan.rows * count, THREADS):
        each = ptx.add(here.place.thread, start)
        row, piece = (op(each, ptx.const(count)) for op in (arith.divui, arith.remui))
        is_piece = ptx.less(each, plan.rows * count)
        from_piece = ptx.add(ptx.mul(here.rank, count), piece)
        is_there = arith.andi(is_piece, ptx.less(from_piece, width // 8))  # what is beyond counts as 0
        pieces.append((ptx.offset(ptx.offset(relay, row, 2 * width), from_piece, 16), is_there, 4))
        to = ptx.add(ptx.offset32(here.shared["second"], row, plan.row_bytes(share)), ptx.mul(piece, 16))
        targets.append((to, is_piece))
    for (to, is_piece), words in zip(targets, await_all(pieces), strict=True):
        keep(to, words, is_piece)
    ptx.asm("bar.sync 0;", [], [])
