"""Where the warps of a block keep partial results: slots of shared memory. For Hopper, in PTX.

A thread keeps its own sums, in the layout in which they leave the tensor cores, so nothing waits for another thread
until a block has all of them.
"""

import dataclasses
from collections.abc import Callable

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.attention.decode.merge_sm90 import Partial, mixed, shares
from pallas_kernels.attention.decode.plan_sm90 import EIGHT, DecodePlan
from pallas_kernels.attention.decode.split import FLOOR
from pallas_kernels.ptx import Condition, Value

_THREAD = 80  # bytes of a thread's 16 columns of a query, and of the gap
_GAP = 64  # where that begins


@dataclasses.dataclass(frozen=True)
class Slots:
    """A block's. A query's sums of 64 columns are the numbers of four threads."""

    plan: DecodePlan
    memory: Value  # address in shared memory

    def clear(self) -> None:
        """Makes all empty. The block must synchronise before it uses them."""
        plan, zero = self.plan, ptx.float32(0.0)
        count = plan.most_slots * plan.slot_bytes // _THREAD
        for begin in range(0, count, plan.threads):
            number = ptx.add(utils.thread_idx(), begin)
            exists = ptx.always() if begin + plan.threads <= count else ptx.less(number, count)
            at = ptx.shared_offset(self.memory, number, _THREAD)
            for shift in range(0, _GAP, 16):
                ptx.store(at, [zero] * 4, exists, space="shared", shift=shift)
            ptx.store(at, [ptx.float32(FLOOR), zero], exists, space="shared", shift=_GAP)

    def add(
        self,
        slot: Value,
        lane: Value,
        maxima: list[Value],
        totals: list[Value],
        sums: Callable[[int], list[list[Value]]],
    ) -> None:
        """Merges a warp's partial result of 8 or 16 queries into a slot that only this warp writes to.

        Args:
          lane: 4·g + q, which has queries g and, if there are so many, g + 8.
          maxima, totals: of each of its queries.
          sums: of each 64 columns, given their number: eight times four numbers, for queries g, g, g + 8 and g + 8 in
            columns 16·q + i and 16·q + 8 + i, i from 0 to 7.
        """
        plan = self.plan
        rows = [self._row(slot, lane, half) for half in range(plan.eights)]
        factors = [self._add_totals(*row, *pair) for row, *pair in zip(rows, maxima, totals, strict=True)]
        for j in range(plan.width // 64):
            each = sums(j)
            for half, (at, exists) in enumerate(rows):
                for place in range(4):
                    column, first = place // 2, 4 * (place % 2)
                    mine = [each[first + i][2 * half + column] for i in range(4)]
                    shift = 4 * _THREAD * j + 16 * place
                    if plan.adds:
                        old = ptx.load_shared(at, [ptx.f32()] * 4, shift=shift)
                        of_old, of_new = factors[half]
                        mine = [mixed(x, of_old, y, of_new) for x, y in zip(old, mine, strict=True)]
                    ptx.store(at, mine, exists, space="shared", shift=shift)

    def _row(self, slot: Value, lane: Value, half: int) -> tuple[Value, Condition]:
        """The address of the thread's numbers of a query, and whether there is such a query."""
        plan = self.plan
        g, q = arith.shrui(lane, ptx.const(2)), arith.andi(lane, ptx.const(3))
        query, condition = ptx.add(g, EIGHT * half), ptx.always()
        if plan.queries < EIGHT * (half + 1):
            condition = ptx.less(query, plan.queries)
            query = arith.minsi(query, ptx.const(plan.queries - 1))
        row = ptx.add(ptx.mul(slot, plan.queries), query)
        return ptx.shared_offset(ptx.shared_offset(self.memory, row, plan.sums_row), q, _THREAD), condition

    def _add_totals(self, at: Value, exists: Condition, maximum: Value, total: Value) -> tuple[Value, Value]:
        """Returns the factors for the sums of the slot and for those that are added."""
        of_old, of_new = ptx.float32(0.0), ptx.float32(1.0)
        if self.plan.adds:
            old_maximum, old_total = ptx.load_shared(at, [ptx.f32()] * 2, shift=_GAP)
            maximum, of_old, of_new = shares(old_maximum, maximum)
            total = mixed(old_total, of_old, total, of_new)
        ptx.store(at, [maximum, total], exists, space="shared", shift=_GAP)
        return of_old, of_new

    def float4(self, slot: int, query: Value, column: Value) -> Partial:
        """A query's partial result in four adjacent columns, `column` being divided by 4."""
        plan = self.plan
        row = ptx.shared_offset(self.memory, query, plan.sums_row)
        of_thread = ptx.mul(arith.shrui(column, ptx.const(2)), _THREAD)
        at = ptx.add(row, of_thread, ptx.mul(arith.andi(column, ptx.const(3)), 16))
        shift = plan.slot_bytes * slot
        pair = ptx.load_shared(row, [ptx.f32()] * 2, shift=shift + _GAP)
        return Partial.of([*pair, *ptx.load_shared(at, [ptx.f32()] * 4, shift=shift)])
