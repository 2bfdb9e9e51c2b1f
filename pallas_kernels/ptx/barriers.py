"""Barriers, and copies to shared memory that complete on an mbarrier."""

import dataclasses
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.ptx.memory import shared_offset
from pallas_kernels.ptx.values import Condition, Value, add, as_i1, as_value, asm, const, mul

TILE_COLUMNS = 64  # of `TileCopies`


def sync_block() -> None:
    """Waits for all threads of the block."""
    asm("bar.sync 0;", [], [])


@dataclasses.dataclass(frozen=True)
class MBarriers:
    """mbarriers in shared memory; each waits for one thread's arrival and for the bytes that this thread announces."""

    address: Value  # in shared memory
    count: int
    warps: int = 4  # of the block

    def init(self) -> None:
        """Initialises them. All threads must synchronise before they are used."""
        # A warp initialises one at a time, so each warp takes some.
        warp, number = (op(utils.thread_idx(), const(32)) for op in (arith.divui, arith.remui))
        number = add(mul(number, self.warps), warp)
        own = shared_offset(self.address, number, 8)
        text = "@p mbarrier.init.shared::cta.b64 [$0], 1; @p fence.mbarrier_init.release.cluster; }"
        asm(f"{{ .reg .pred p; setp.lt.u32 p, $1, {self.count}; " + text, [], [own, number])

    def at(self, number: int | Value) -> Value:
        """The address of one mbarrier."""
        return add(self.address, 8 * number if isinstance(number, int) else mul(number, 8))

    def wait(self, number: int | Value, parity: int | Value) -> None:
        """Waits until an mbarrier's phase of this parity is complete: of its phases, the first has parity 0."""
        text = "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @!p bra again; }"
        asm("{ .reg .pred p; again: " + text, [], [self.at(number), as_value(parity)])


def expect_bytes(mbarrier: Value, size: int, condition: Condition) -> None:
    """Arrives at an mbarrier and announces bytes, if the condition holds: in one thread per phase."""
    text = f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {size};"
    asm("{ .reg .pred p; setp.ne.s32 p, $1, 0; " + text + " }", [], [mbarrier, as_i1(condition)])


def bulk_copy(to: Value, source: Value, size: int, mbarrier: Value, condition: Condition) -> None:
    """Begins to copy bytes, a multiple of 16, from global to shared memory, if the condition holds."""
    text = f"@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], {size}, [$2];"
    asm("{ .reg .pred p; setp.ne.s32 p, $3, 0; " + text + " }", [], [to, source, mbarrier, as_i1(condition)])


@dataclasses.dataclass(frozen=True)
class TileCopies:
    """Copies of tiles of a bfloat16 matrix to shared memory, by the tensor memory accelerator (TMA).

    A row of a tile is 64 numbers; its 16-byte pieces are permuted (xor with the row number modulo 8), so that the same
    columns of eight rows lie in different banks. What lies outside the matrix is zeros.
    """

    context: Any  # Mosaic's, of the launch
    tiles: Value  # [stages, rows, 64] in shared memory
    mbarriers: Value  # in shared memory: one per stage
    stages: int
    rows: int

    @property
    def bytes(self) -> int:
        """Of a tile."""
        return self.rows * 2 * TILE_COLUMNS

    def begin(
        self,
        matrix: Value,
        row: Value,
        column: Value,
        stage: int,
        condition: Condition | None = None,
        *,
        announced: bool = False,
    ) -> None:
        """Begins a copy, which completes on the stage's mbarrier.

        Args:
          matrix: in global memory, as an array.
          row, column: the first of the tile.
          condition: must hold in exactly one thread of the block; if None, Mosaic chooses the thread.
          announced: whether its bytes are announced to the mbarrier elsewhere.
        """
        phases: Any = None  # we count them ourselves
        barriers = utils.BarrierRef(utils.memref_ptr(self.mbarriers), const(0), phases, self.stages)
        row, column = (arith.index_cast(ir.IndexType.get(), each) for each in (row, column))
        self.context.async_copy(
            src_ref=matrix,
            dst_ref=utils.memref_slice(self.tiles, stage),
            gmem_slice=(utils.ds(row, self.rows), utils.ds(column, TILE_COLUMNS)),
            barrier=barriers[stage],
            swizzle=2 * TILE_COLUMNS,
            arrive=not announced,
            **({} if condition is None else {"predicate": as_i1(condition)}),
        )
