"""The blocks of a cluster send each other numbers, through mailboxes in shared memory.

They send with `st.async`, which signals an mbarrier of the receiver when the numbers have arrived. A cluster barrier
would work too, but its release waits until all earlier writes to global memory have completed. (For sm_90a,
`barrier.cluster.arrive.release` after writing to other blocks' memory compiles to MEMBAR.ALL.GPU.)
"""

import dataclasses
from collections.abc import Sequence

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith

from pallas_kernels.ptx.barriers import sync_block
from pallas_kernels.ptx.values import Condition, Value, add, as_i1, asm, const, i32

MOST_BLOCKS = 8  # of a cluster on any device


def cluster_rank(blocks: int) -> Value:
    """The block's number in its cluster of `blocks`."""
    return const(0) if blocks == 1 else asm("mov.u32 $0, %cluster_ctarank;", [i32()], [])[0]


@dataclasses.dataclass(frozen=True)
class ClusterThread:
    """A thread of a cluster's block, and the exchanges of numbers between the blocks."""

    blocks: int  # of the cluster
    rank: Value  # the block's number in the cluster
    thread: Value  # the thread's number in its block
    mbarriers: Value  # address in shared memory of one mbarrier per exchange

    @classmethod
    def here(cls, blocks: int, mbarriers: Value) -> "ClusterThread":
        """This thread."""
        return cls(blocks, cluster_rank(blocks), utils.thread_idx(), mbarriers)

    @property
    def lane(self) -> Value:
        """The thread's number in its warp."""
        return arith.andi(self.thread, const(31))

    @property
    def warp(self) -> Value:
        """The warp's number in its block."""
        return arith.shrui(self.thread, const(5))

    def prepare(self, counts: Sequence[int]) -> None:
        """Prepares exchanges, given how many numbers a block receives in each.

        Call `wait_prepared` before the first `send`.
        """
        if self.blocks == 1:
            return
        begun = "".join(
            f"@p mbarrier.init.shared::cta.b64 [$0+{8 * i}], 1;"
            f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0+{8 * i}], {4 * count};"
            for i, count in enumerate(counts)
        )
        asm(
            f"{{ .reg .pred p; setp.eq.s32 p, $1, 0; {begun} fence.mbarrier_init.release.cluster;"
            "barrier.cluster.arrive.relaxed.aligned; }",
            [],
            [self.mbarriers, self.thread],
        )

    def wait_prepared(self) -> None:
        """Waits until all blocks of the cluster are ready to receive."""
        if self.blocks > 1:
            asm("barrier.cluster.wait.aligned;", [], [])

    def send(self, exchange: int, rank: Value, address: Value, value: Value, condition: Condition) -> None:
        """Writes a float32 number to the shared memory of the block of that rank, if the condition holds.

        `address` is the mailbox's in this block's own shared memory: all blocks have the same layout.
        """
        if self.blocks == 1:
            text = "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p st.shared.f32 [$0], $1; }"
            asm(text, [], [address, value, as_i1(condition)])
            return
        # The distance to the other block's memory is the same for every address.
        (there,) = asm("mapa.shared::cluster.u32 $0, $1, $2;", [i32()], [self.mbarriers, rank])
        away = arith.subi(there, self.mbarriers)
        asm(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0;"
            "@p st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [$0], $1, [$2]; }",
            [],
            [add(address, away), value, add(there, 8 * exchange), as_i1(condition)],
        )

    def receive(self, exchange: int) -> None:
        """Waits until this block has received everything of an exchange."""
        if self.blocks == 1:
            sync_block()
            return
        asm(
            "{ .reg .pred p; again:"
            f"mbarrier.try_wait.parity.shared::cta.b64 p, [$0+{8 * exchange}], 0; @!p bra again; }}",
            [],
            [self.mbarriers],
        )
