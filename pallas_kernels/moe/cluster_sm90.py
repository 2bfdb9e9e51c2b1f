"""The blocks of a cluster share a product's columns: the last one gets the others' sums, and adds them in order."""

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.ptx import ClusterThread, Value
from pallas_kernels.ptx.rows import exchange_memory, shared_floats

_THREADS = 128  # of a block


def memory(blocks: int, sums: int) -> dict[str, Any]:
    """Shared memory for a cluster whose threads have so many sums each."""
    return {} if blocks == 1 else exchange_memory(1) | {"mailbox": shared_floats(_received(blocks, sums))}


def _received(blocks: int, sums: int) -> int:
    """Numbers that the last block gets."""
    return (blocks - 1) * sums * _THREADS


def prepared(blocks: int, sums: int, shared: Mapping[str, Value]) -> ClusterThread:
    """This thread, whose block announces what it expects. `shared` has the addresses of `memory`."""
    thread = ClusterThread.here(blocks, shared.get("mbarriers"))
    thread.prepare([_received(blocks, sums)])  # by all blocks, though only the last waits for it
    return thread


def totals(
    thread: ClusterThread, sums: list[Value], shared: Mapping[str, Value], finish: Callable[[list[Value]], None]
) -> None:
    """Calls `finish` with the sums over the cluster's blocks, added in ascending order, in the last block alone."""
    if thread.blocks == 1:
        finish(sums)
        return
    last = thread.blocks - 1

    def mailbox(rank: Value | int, i: int) -> Value:
        place = ptx.add(ptx.mul(rank, len(sums) * _THREADS), i * _THREADS, ptx.thread())
        return ptx.shared_offset(shared["mailbox"], place, 4)

    thread.wait_prepared()
    for i, own in enumerate(sums):
        thread.send(0, ptx.const(last), mailbox(thread.rank, i), own, ptx.less(thread.rank, last))

    def add() -> None:
        thread.receive(0)
        received = [
            [ptx.load_shared(mailbox(rank, i), [ptx.f32()])[0] for rank in range(last)] for i in range(len(sums))
        ]
        finish([reduce(ptx.rounded_sum, [*others, own]) for others, own in zip(received, sums, strict=True)])

    ptx.when(arith.cmpi(arith.CmpIPredicate.eq, thread.rank, ptx.const(last)), add)
