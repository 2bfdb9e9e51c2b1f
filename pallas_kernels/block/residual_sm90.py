"""The residual stream in the kernel: its norm, of which each block computes a share, and the additions to it."""

import dataclasses
from collections.abc import Callable, Sequence

from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.block.plan_sm90 import RESIDUAL_SLOT, THREADS
from pallas_kernels.block.products_sm90 import Thread, mailbox_pair
from pallas_kernels.block.stream import PANEL
from pallas_kernels.block.workspace_sm90 import load, store
from pallas_kernels.ptx import Value


class Norm:
    """The block's share of the rows' LayerNorm. The loads of its weights begin before they are needed."""

    def __init__(self, thread: Thread, scale: Value, bias: Value):
        plan = thread.plan
        self._thread, self._pairs = thread, PANEL // 2 * plan.share
        self._turns = []
        for start in range(0, plan.rows * self._pairs, THREADS):
            each = ptx.add(thread.cluster.thread, start)
            row, pair = ptx.divided(each, self._pairs)
            is_pair = ptx.less(each, plan.rows * self._pairs)
            column = ptx.add(ptx.mul(thread.rank, self._pairs), pair)
            is_read = ptx.both(is_pair, ptx.less(column, plan.width // 2))  # what is beyond counts as 0
            weights = [load(ptx.offset(vector, column, 4), 1, is_read)[0] for vector in (scale, bias)]
            self._turns.append((is_pair, row, pair, column, is_read, weights))

    def read(self, x: Value, moments: Value, fetch: Callable[..., list[list[Value]]]) -> Callable[[], None]:
        """Reads rows and their moments from these addresses, with `load_all` or `await_all`.

        Returns:
          A function that writes the norm to `factor` and synchronises the block, so that it can be read.
        """
        thread, plan = self._thread, self._thread.plan
        row, is_row = thread.own_row()
        is_panel = ptx.less(thread.cluster.lane, plan.panels)
        panel_at = ptx.offset(moments, ptx.add(ptx.mul(row, plan.panels), thread.cluster.lane), 8)
        pieces = [(panel_at, ptx.both(is_row, is_panel), 2)]
        for _, x_row, _, column, is_read, _ in self._turns:
            pieces.append((ptx.offset(x, ptx.add(ptx.mul(x_row, plan.width // 2), column), 4), is_read, 1))
        of_panel, *words = fetch(pieces)

        def finish() -> None:
            mean, squares = (arith.bitcast(ptx.f32(), each) for each in of_panel)
            # Relative to the first panel's mean, so that both sums can be formed at once without cancellation.
            first = ptx.first_lane(mean)
            away = ptx.where(is_panel, arith.subf(mean, first))
            squares = ptx.warp_sum(ptx.fma(arith.mulf(away, away), ptx.float32(PANEL), squares))
            away = ptx.rounded_product(ptx.warp_sum(away), ptx.float32(1 / plan.panels))
            squares = ptx.fma(arith.mulf(away, away), ptx.float32(-plan.width), squares)
            variance = ptx.fma(squares, ptx.float32(1 / plan.width), ptx.float32(plan.epsilon))
            (factor,) = ptx.asm("rsqrt.approx.f32 $0, $1;", [ptx.f32()], [variance])
            mean_of_all = arith.addf(first, away)
            at = ptx.shared_offset(thread.shared["statistics"], row, 8)
            ptx.store(at, [mean_of_all, factor], ptx.both(is_row, ptx.less(thread.cluster.lane, 1)), space="shared")
            ptx.sync_block()
            self._write([word for (word,) in words])
            ptx.sync_block()

        return finish

    def _write(self, words: Sequence[Value]) -> None:
        thread, plan = self._thread, self._thread.plan
        for (is_pair, row, pair, _, _, weights), word in zip(self._turns, words, strict=True):
            row = arith.minsi(row, ptx.const(plan.rows - 1))
            mean, factor = ptx.load_shared(ptx.shared_offset(thread.shared["statistics"], row, 8), [ptx.f32()] * 2)
            normed = [
                ptx.fma(arith.mulf(arith.subf(each, mean), factor), scale, bias)
                for each, scale, bias in zip(*map(ptx.halves, (word, *weights)), strict=True)
            ]
            at = ptx.add(ptx.shared_offset(thread.shared["factor"], row, plan.row_bytes(plan.share)), ptx.mul(pair, 4))
            ptx.store(at, [ptx.pack(*normed)], is_pair, space="shared")


@dataclasses.dataclass(frozen=True)
class Residual:
    """A warp's part of its row, in a cluster's first block: two columns of the cluster's panel per lane."""

    thread: Thread
    is_row: Value
    word: Value
    place: Value  # number of the word in its array
    moments: Value  # number of the panel's two moments in their array

    @classmethod
    def of(cls, thread: Thread, x: Value) -> "Residual":
        """Begins to load it."""
        plan = thread.plan
        row, is_row = thread.own_row()
        column = ptx.add(ptx.mul(thread.panel, PANEL // 2), thread.cluster.lane)  # of words
        place = ptx.add(ptx.mul(row, plan.width // 2), column)
        (word,) = load(ptx.offset(x, place, 4), 1, is_row)
        ptx.sync_warp()
        return cls(thread, is_row, word, place, ptx.add(ptx.mul(row, plan.panels), thread.panel))

    def add(self, exchange: int, bias: Value, x: Value, moments: Value) -> None:
        """Adds a product's sums, and writes the result and its moments."""
        thread, lane = self.thread, self.thread.cluster.lane
        row, _ = thread.own_row()
        thread.cluster.receive(exchange)
        sums = mailbox_pair(thread, RESIDUAL_SLOT, row, lane)
        added = [arith.addf(*pair) for pair in zip(sums, ptx.halves(bias), strict=True)]
        word = ptx.pack(*(arith.addf(*pair) for pair in zip(ptx.halves(self.word), added, strict=True)))
        store(ptx.offset(x, self.place, 4), word, self.is_row)
        values = ptx.halves(word)
        # Relative to the first number, so that both sums can be formed at once without cancellation.
        first = ptx.first_lane(values[0])
        away = [arith.subf(each, first) for each in values]
        squares = ptx.warp_sum(ptx.fma(away[0], away[0], arith.mulf(away[1], away[1])))
        mean = ptx.rounded_product(ptx.warp_sum(arith.addf(*away)), ptx.float32(1 / PANEL))
        squares = ptx.fma(arith.mulf(mean, mean), ptx.float32(-PANEL), squares)
        mean = arith.addf(first, mean)
        first_lane = ptx.both(self.is_row, ptx.less(lane, 1))
        at = ptx.offset(moments, self.moments, 8)
        for shift, each in ((0, mean), (4, squares)):
            store(ptx.shifted(at, shift), each, first_lane)
