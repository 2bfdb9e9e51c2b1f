"""The residual stream in the kernel: its norm, of which each block has a share, and what is added to it."""

import dataclasses
from collections.abc import Callable, Sequence

from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx, rows
from pallas_kernels.block.memory_sm90 import fma, keep, load, load_pair, number, store, where
from pallas_kernels.block.plan_sm90 import RESIDUAL_SLOT, THREADS
from pallas_kernels.block.stream import STRIP
from pallas_kernels.block.tiles_sm90 import Here, inbox_pair
from pallas_kernels.ptx import Value


class Norm:
    """The block's share of the rows' LayerNorm. All weights are begun to be loaded before they are needed."""

    def __init__(self, here: Here, scale: Value, bias: Value):
        plan = here.plan
        self._here, self._pairs = here, STRIP // 2 * plan.share
        self._turns = []
        for start in range(0, plan.rows * self._pairs, THREADS):
            each = ptx.add(here.place.thread, start)
            row, pair = (op(each, ptx.const(self._pairs)) for op in (arith.divui, arith.remui))
            is_pair = ptx.less(each, plan.rows * self._pairs)
            column = ptx.add(ptx.mul(here.rank, self._pairs), pair)
            is_there = arith.andi(is_pair, ptx.less(column, plan.width // 2))  # what is beyond counts as 0
            weights = [load(ptx.offset(vector, column, 4), 1, is_there)[0] for vector in (scale, bias)]
            self._turns.append((is_pair, row, pair, column, is_there, weights))

    def read(self, x: Value, moments: Value, fetch: Callable[..., list[list[Value]]]) -> Callable[[], None]:
        """Reads rows and their moments, at these addresses, by `load_all` or `await_all`.

        Returns:
          What writes the norm to `factor`. All threads meet, so that it can be read.
        """
        here, plan = self._here, self._here.plan
        row, is_row = here.own_row()
        is_strip = ptx.less(here.place.lane, plan.strips)
        strip_at = ptx.offset(moments, ptx.add(ptx.mul(row, plan.strips), here.place.lane), 8)
        pieces = [(strip_at, arith.andi(is_row, is_strip), 2)]
        for _, x_row, _, column, is_there, _ in self._turns:
            pieces.append((ptx.offset(x, ptx.add(ptx.mul(x_row, plan.width // 2), column), 4), is_there, 1))
        of_strip, *words = fetch(pieces)

        def finish() -> None:
            mean, squares = (arith.bitcast(ptx.f32(), each) for each in of_strip)
            # Relative to the first strip's mean, so that both sums are made at once and nothing is cancelled.
            first = ptx.first_lane(mean)
            away = where(is_strip, arith.subf(mean, first), 0.0)
            squares = ptx.warp_sum(fma(arith.mulf(away, away), number(STRIP), squares))
            away = arith.mulf(ptx.warp_sum(away), number(1 / plan.strips))
            squares = fma(arith.mulf(away, away), number(-plan.width), squares)
            variance = fma(squares, number(1 / plan.width), number(plan.epsilon))
            (factor,) = ptx.asm("rsqrt.approx.f32 $0, $1;", [ptx.f32()], [variance])
            mean_of_all = arith.addf(first, away)
            at = ptx.offset32(here.shared["statistics"], row, 8)
            keep(at, [mean_of_all, factor], arith.andi(is_row, ptx.less(here.place.lane, 1)))
            ptx.asm("bar.sync 0;", [], [])
            self._write([word for (word,) in words])
            ptx.asm("bar.sync 0;", [], [])

        return finish

    def _write(self, words: Sequence[Value]) -> None:
        here, plan = self._here, self._here.plan
        for (is_pair, row, pair, _, _, weights), word in zip(self._turns, words, strict=True):
            row = arith.minsi(row, ptx.const(plan.rows - 1))
            mean, factor = load_pair(ptx.offset32(here.shared["statistics"], row, 8))
            normed = [
                fma(arith.mulf(arith.subf(each, mean), factor), scale, bias)
                for each, scale, bias in zip(*map(ptx.halves, (word, *weights)), strict=True)
            ]
            at = ptx.add(ptx.offset32(here.shared["factor"], row, plan.row_bytes(plan.share)), ptx.mul(pair, 4))
            keep(at, [ptx.pack(*normed)], is_pair)


@dataclasses.dataclass(frozen=True)
class Residual:
    """What a warp of a cluster's first block has of its row: two columns a lane of the cluster's strip."""

    here: Here
    is_row: Value
    word: Value
    place: Value  # number of the word in its array
    moments: Value  # number of the strip's two moments in their array

    @classmethod
    def of(cls, here: Here, x: Value) -> "Residual":
        """Begins to load it."""
        plan = here.plan
        row, is_row = here.own_row()
        column = ptx.add(ptx.mul(here.strip, STRIP // 2), here.place.lane)  # of words
        place = ptx.add(ptx.mul(row, plan.width // 2), column)
        (word,) = load(ptx.offset(x, place, 4), 1, is_row)
        rows.issue()
        return cls(here, is_row, word, place, ptx.add(ptx.mul(row, plan.strips), here.strip))

    def add(self, exchange: int, bias: Value, x: Value, moments: Value) -> None:
        """Adds a product's sums, and writes the result and its moments."""
        here, lane = self.here, self.here.place.lane
        row, _ = here.own_row()
        here.place.receive(exchange)
        sums = inbox_pair(here, RESIDUAL_SLOT, row, lane)
        added = [arith.addf(*pair) for pair in zip(sums, ptx.halves(bias), strict=True)]
        word = ptx.pack(*(arith.addf(*pair) for pair in zip(ptx.halves(self.word), added, strict=True)))
        store(ptx.offset(x, self.place, 4), word, self.is_row)
        values = ptx.halves(word)
        # Relative to the first number, so that both sums are made at once and nothing is cancelled.
        first = ptx.first_lane(values[0])
        away = [arith.subf(each, first) for each in values]
        squares = ptx.warp_sum(fma(away[0], away[0], arith.mulf(away[1], away[1])))
        mean = arith.mulf(ptx.warp_sum(arith.addf(*away)), number(1 / STRIP))
        squares = fma(arith.mulf(mean, mean), number(-STRIP), squares)
        mean = arith.addf(first, mean)
        first_lane = arith.andi(self.is_row, ptx.less(lane, 1))
        at = ptx.offset(moments, self.moments, 8)
        for shift, each in ((0, mean), (4, squares)):
            store(arith.addi(at, ptx.const(shift, ptx.i64())), each, first_lane)
