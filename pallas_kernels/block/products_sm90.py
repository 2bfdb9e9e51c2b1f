"""What the kernel's phases share: products of rows with matrices, and the exchange of numbers between blocks.

A row's D numbers are N panels of 64, and a cluster has one panel of each result. Each of its blocks has an equal share
of a product's inner axis, and so has partial sums of 64 columns, which the blocks send to each other's mailboxes. All
tiles of weights that a block needs, for all products, are one stream through a ring of shared memory, which keeps
running while the blocks wait for each other.

Clusters exchange numbers through the workspace, in global memory. All its bits are set beforehand, and a reader polls
until it finds something else: computed numbers never have all bits set. The next kernel sets all bits again.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.block.plan_sm90 import SLOTS, SUMS_BYTES, THREADS, TILE_BYTES, TILE_ROWS, TOGETHER, WARPS, BlockPlan
from pallas_kernels.block.stream import PANEL
from pallas_kernels.block.workspace_sm90 import await_all, store
from pallas_kernels.ptx import Value


@dataclasses.dataclass(frozen=True)
class Thread:
    """Which thread this is, and its block's shared memory."""

    plan: BlockPlan
    cluster: ptx.ClusterThread
    panel: Value  # of the cluster
    shared: dict[str, Value]  # addresses in shared memory by the names of `BlockPlan.shared`

    @classmethod
    def of(cls, plan: BlockPlan, panel: Value, shared: dict[str, Value]) -> "Thread":
        """This thread."""
        return cls(plan, ptx.ClusterThread.here(plan.blocks, shared["mbarriers"]), panel, shared)

    def prepare(self, counts: Sequence[int]) -> None:
        """Prepares exchanges, given how many numbers a block receives in each. Synchronises the block."""
        ptx.MBarriers(self.shared["filled"], self.plan.stages, WARPS).init()
        self.cluster.prepare(counts)
        ptx.sync_block()

    @property
    def rank(self) -> Value:
        """The block's number in its cluster."""
        return self.cluster.rank

    def tile_rows(self, share: int) -> list[Value]:
        """The first row of a matrix in each of the block's tiles of a panel."""
        first = ptx.mul(self.rank, share * TILE_ROWS)
        return [ptx.add(first, tile * TILE_ROWS) for tile in range(share)]

    def own_row(self) -> tuple[Value, Value]:
        """The row of the thread's warp, and whether there is such a row."""
        warp = self.cluster.warp
        return arith.minsi(warp, ptx.const(self.plan.rows - 1)), ptx.less(warp, self.plan.rows)


class Ring:
    """A block's tiles of weights, in the order in which it uses them."""

    def __init__(self, thread: Thread, copies: ptx.TileCopies, jobs: Sequence[tuple[Value, Value, Value]]):
        """`jobs`: each tile's matrix, and its first row and column."""
        self._plan, self._copies, self._jobs = thread.plan, copies, jobs
        self._ring, self._half = thread.shared["ring"], arith.shrui(thread.cluster.warp, ptx.const(2))
        self._filled = ptx.MBarriers(thread.shared["filled"], thread.plan.stages, WARPS)
        self._warp, self._begun = thread.cluster.warp, 0

    def begin(self, end: int) -> None:
        """Begins to copy the tiles up to `end`, whose stages must be free."""
        for tile in range(self._begun, min(end, self._plan.tiles)):
            # The warps take turns, because starting a copy takes a thread a while.
            is_turn = arith.cmpi(arith.CmpIPredicate.eq, self._warp, ptx.const(tile % WARPS))
            condition = ptx.both(is_turn, utils.single_thread_predicate(scope=utils.ThreadSubset.WARP))
            self._copies.begin(*self._jobs[tile], tile % self._plan.stages, condition)
        self._begun = max(self._begun, min(end, self._plan.tiles))

    def multiply(self, first: int, count: int, wide: int, factor: Value) -> list[list[Value]]:
        """The warp's sums of `wide` panels: four for every 16 of its 32 columns, in the order of `ptx.mma`.

        Args:
          first, count: the tiles, which alternate between the panels.
          factor: rows in shared memory, with as many numbers as `count // wide` tiles have rows.
        """
        plan = self._plan
        group, g, q = ptx.fragment_lane()
        lane = arith.andi(ptx.thread(), ptx.const(31))
        # For ldmatrix, each lane names the address of one row of 8 numbers: row r of matrix m.
        r, m = arith.andi(lane, ptx.const(7)), arith.shrui(lane, ptx.const(3))
        row = ptx.add(ptx.mul(group, 16), ptx.mul(arith.shrui(m, ptx.const(1)), 8), r)
        row_at = ptx.shared_offset(self._ring, row, 2 * PANEL)
        piece = ptx.add(arith.andi(m, ptx.const(1)), ptx.mul(self._half, 4))
        pairs = [ptx.add(row_at, ptx.mul(arith.xori(ptx.add(piece, 2 * pair), r), 16)) for pair in range(2)]
        # The sums of rows beyond the last are not used, so any row will do for them.
        x_row = ptx.shared_offset(factor, arith.minsi(g, ptx.const(plan.rows - 1)), plan.row_bytes(count // wide))
        x_at = ptx.add(x_row, ptx.mul(group, 32), ptx.mul(q, 4))
        sums = [[ptx.float32(0.0)] * 8 for _ in range(wide)]
        for i in range(count):
            tile, panel = first + i, i % wide
            stage = tile % plan.stages
            self._filled.wait(stage, tile // plan.stages % 2)
            if panel == 0:
                texts = [f"ld.shared.b32 $0, [$1+{2 * TILE_ROWS * (i // wide) + half}];" for half in (0, 16)]
                x = [ptx.asm(text, [ptx.i32()], [x_at], volatile=True)[0] for text in texts]
            text = f"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{$0, $1, $2, $3}}, [$4+{TILE_BYTES * stage}];"
            for pair in range(2):
                a = ptx.asm(text, [ptx.i32()] * 4, [pairs[pair]], volatile=True)
                four = slice(4 * pair, 4 * pair + 4)
                sums[panel][four] = ptx.mma(sums[panel][four], a, x)
            is_last = i % TOGETHER == TOGETHER - 1 or i == count - 1
            if is_last and self._begun < min(tile + 1 + plan.stages, plan.tiles):
                ptx.sync_block()
                self.begin(tile + 1 + plan.stages)
        return sums


def block_sums(thread: Thread, sums: Sequence[Sequence[Value]]) -> list[list[Value]]:
    """Adds up the warps' sums of each panel: warp w gets columns 8·w + g, of rows 2·q and 2·q + 1."""
    warp = thread.cluster.warp
    mine = ptx.shared_offset(ptx.shared_offset(thread.shared["sums"], warp, 4 * 32 * 8), thread.cluster.lane, 4)
    for panel, values in enumerate(sums):
        for i, value in enumerate(values):
            ptx.asm(f"st.shared.f32 [$0+{panel * SUMS_BYTES + 4 * 32 * i}], $1;", [], [mine, value])
    ptx.sync_block()
    first = ptx.add(ptx.mul(arith.shrui(warp, ptx.const(2)), 4 * 8), ptx.mul(arith.andi(warp, ptx.const(3)), 2))
    theirs = ptx.shared_offset(ptx.shared_offset(thread.shared["sums"], first, 4 * 32), thread.cluster.lane, 4)

    def total(panel: int, i: int) -> Value:
        shifts = [panel * SUMS_BYTES + 4 * 32 * (8 * group + i) for group in range(4)]
        texts = [f"ld.shared.f32 $0, [$1+{shift}];" for shift in shifts]
        return ptx.tree_sum([ptx.asm(text, [ptx.f32()], [theirs], volatile=True)[0] for text in texts])

    return [[total(panel, i) for i in range(2)] for panel in range(len(sums))]


def send_sums(thread: Thread, exchange: int, sums: Sequence[Value], slot: int, to: Any) -> None:
    """Sends a panel's `block_sums` to a slot of the mailboxes [blocks, SLOTS, T, 64] of the cluster's blocks `to`."""
    plan = thread.plan
    _, g, q = ptx.fragment_lane()
    source = ptx.add(ptx.mul(thread.rank, SLOTS), slot)
    column = ptx.add(ptx.mul(thread.cluster.warp, 8), g)
    for i, value in enumerate(sums[: plan.rows]):
        row = ptx.add(ptx.mul(q, 2), i)
        at = ptx.shared_offset(
            ptx.shared_offset(
                ptx.shared_offset(thread.shared["mailbox"], source, 4 * PANEL * plan.rows), row, 4 * PANEL
            ),
            column,
            4,
        )
        for block in to:
            thread.cluster.send(exchange, ptx.const(block), at, value, ptx.less(row, plan.rows))


def mailbox_pair(thread: Thread, slot: Value | int, row: Value, pair: Value) -> list[Value]:
    """The sums over the cluster's blocks, for two columns of a slot of the mailbox."""
    plan = thread.plan
    row_at = ptx.add(ptx.mul(slot, plan.rows), row)
    at = ptx.add(ptx.shared_offset(thread.shared["mailbox"], row_at, 4 * PANEL), ptx.mul(pair, 8))
    types = [ptx.f32()] * 2
    parts = [
        ptx.load_shared(ptx.add(at, 4 * PANEL * plan.rows * SLOTS * source), types) for source in range(plan.blocks)
    ]
    return [ptx.tree_sum([part[i] for part in parts]) for i in range(2)]


def clear(thread: Thread, workspace: Value, words: int) -> None:
    """Sets all bits of a workspace, for the next kernel."""
    block = ptx.add(ptx.mul(thread.panel, thread.plan.blocks), thread.rank)
    first = ptx.add(ptx.mul(block, THREADS), thread.cluster.thread)
    for start in range(0, words, thread.plan.panels * thread.plan.blocks * THREADS):
        word = ptx.add(first, start)
        store(ptx.offset(workspace, word, 4), ptx.const(-1), ptx.less(word, words))


def block_does(thread: Thread, most: int, body: Callable[[], None]) -> None:
    """Runs `body` in the first `most` blocks of the cluster."""
    ptx.when(ptx.less(thread.rank, most), body)


def gather(thread: Thread, rows: Value, width: int, share: int) -> None:
    """Copies the block's share of rows [T, width], bfloat16, to `second` once written. Synchronises the block."""
    plan = thread.plan
    count = 2 * TILE_ROWS * share // 16
    pieces, targets = [], []
    for start in range(0, plan.rows * count, THREADS):
        each = ptx.add(thread.cluster.thread, start)
        row, piece = ptx.divided(each, count)
        is_piece = ptx.less(each, plan.rows * count)
        from_piece = ptx.add(ptx.mul(thread.rank, count), piece)
        is_read = ptx.both(is_piece, ptx.less(from_piece, width // 8))  # what is beyond counts as 0
        pieces.append((ptx.offset(ptx.offset(rows, row, 2 * width), from_piece, 16), is_read, 4))
        to = ptx.add(ptx.shared_offset(thread.shared["second"], row, plan.row_bytes(share)), ptx.mul(piece, 16))
        targets.append((to, is_piece))
    for (to, is_piece), words in zip(targets, await_all(pieces), strict=True):
        ptx.store(to, words, is_piece, space="shared")
    ptx.sync_block()
