"""Which tiles a warp computes in decode attention, and which of their places its row sees. For Hopper, in PTX."""

import dataclasses
from itertools import pairwise

from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.attention.decode.gather_sm90 import Block
from pallas_kernels.attention.decode.plan_sm90 import EIGHT, RANGE, DecodePlan, log2
from pallas_kernels.pages import PAGE
from pallas_kernels.ptx import Value

Words = list[list[Value]]  # registers, by what they are of
_LOAD = "ld.global.nc.b32 $0, [$1];"


@dataclasses.dataclass(frozen=True)
class Thread:
    """Which thread this is."""

    block: Block
    warp: Value  # in the block
    lane: Value  # 4·g + q

    @property
    def g(self) -> Value:
        """Lane / 4."""
        return arith.shrui(self.lane, ptx.const(2))

    @property
    def q(self) -> Value:
        """Lane mod 4."""
        return arith.andi(self.lane, ptx.const(3))


def load_count(numbers: Value, row: Value) -> Value:
    """Begins to load a row's number."""
    return ptx.asm(_LOAD, [ptx.i32()], [ptx.offset(numbers, row, 4)], volatile=True)[0]


@dataclasses.dataclass(frozen=True)
class Seen:
    """Which places the row sees."""

    end: Value  # none from here on
    count: Value  # of all that are in use, those of a folded window's second page included
    start: Value | None  # with a window, the first

    @classmethod
    def of(cls, plan: DecodePlan, counts: Value, starts: Value | None, row: Value) -> "Seen":
        """Begins to load it."""
        count = load_count(counts, row)
        start = None if starts is None else load_count(starts, row)
        end = arith.maxsi(arith.minsi(count, ptx.const(plan.places)), ptx.const(0))
        return cls(end, count, start)

    def within(self, number: Value) -> "Seen":
        """The same, up to the end of a range."""
        end = ptx.mul(ptx.add(number, 1), RANGE)
        return dataclasses.replace(self, end=arith.minsi(self.end, end))

    def tiles(self, plan: DecodePlan) -> Value:
        """How many tiles there are."""
        return _rounded_up(self.end, plan.warp_tile)

    def ranges(self, plan: DecodePlan) -> Value:
        """How many ranges there are."""
        return _rounded_up(self.tiles(plan), plan.range_tiles)

    def places(self, plan: DecodePlan, first: Value, q: Value) -> Words:
        """Whether the thread's two places in every eight of the tile that begins at `first` are seen."""
        first, places = ptx.add(first, ptx.mul(q, 2)), range(0, plan.warp_tile, EIGHT)
        if self.start is None:
            left = arith.subi(self.end, first)
            return [[ptx.less(place + i, left) for i in (0, 1)] for place in places]
        return [[self._sees(plan, ptx.add(first, place + i)) for i in (0, 1)] for place in places]

    def _sees(self, plan: DecodePlan, place: Value) -> Value:
        is_before = ptx.less(place, self.start)
        if plan.folded:
            in_pages = arith.select(is_before, ptx.add(place, PAGE), place)
            return ptx.both(ptx.less(in_pages, self.count), ptx.less(place, self.end))
        return ptx.both(ptx.less(self.start, ptx.add(place, 1)), ptx.less(place, self.end))


@dataclasses.dataclass(frozen=True)
class Share:
    """What a cluster has of a row: a range, or 2^-shift of one, the strands from a certain one on."""

    range: Value
    shift: Value
    number: Value  # among those that share the range

    @classmethod
    def of(cls, plan: DecodePlan, seen: Seen, entry: Value) -> "Share":
        """The one whose result is this entry."""
        shift = shift_of(plan, seen.ranges(plan))
        number = arith.andi(entry, ptx.add(_power(shift), -1))
        return cls(arith.shrui(entry, shift), shift, number)

    @classmethod
    def whole(cls, number: Value) -> "Share":
        """A whole range."""
        return cls(number, ptx.const(0), ptx.const(0))


def shift_of(plan: DecodePlan, ranges: Value) -> Value:
    """The base-2 logarithm of how many clusters share a range, if a row has so many: more, the fewer there are."""
    shift, ranges = ptx.const(0), arith.maxsi(ranges, ptx.const(1))
    for before, each in pairwise(plan.shifts):
        is_few = ptx.less(ptx.mul(ranges, 1 << each), plan.splits + 1)
        shift = ptx.add(shift, arith.select(is_few, ptx.const(each - before), ptx.const(0)))
    return shift


def _rounded_up(value: Value, power: int) -> Value:
    """A number divided by a power of two."""
    return arith.shrui(ptx.add(value, power - 1), ptx.const(log2(power)))


def _power(shift: Value) -> Value:
    return arith.shli(ptx.const(1), shift)


@dataclasses.dataclass(frozen=True)
class Run:
    """A warp's tiles, a turn each.

    If its block has more strands than warps, it has 2^cycle of them, of which it computes a tile in turn. Else 2^apart
    warps share a strand.
    """

    plan: DecodePlan
    share: Share
    cycle: Value
    apart: Value
    strand: Value  # the warp's first, among the block's
    ahead: Value  # of the warps that share its strand, how many are before it
    first: Value  # its first tile

    @classmethod
    def of(cls, plan: DecodePlan, share: Share, at: Thread) -> "Run":
        """The warp's."""
        strands = arith.subi(ptx.const(log2(plan.own_strands)), share.shift)  # of the block, as a logarithm
        more = arith.subi(strands, ptx.const(log2(plan.warps)))
        zero = ptx.const(0)
        low = arith.minsi(strands, ptx.const(log2(plan.warps)))
        strand, ahead = arith.andi(at.warp, ptx.add(_power(low), -1)), arith.shrui(at.warp, low)
        block = ptx.add(ptx.mul(share.number, plan.blocks), at.block.rank)
        first = ptx.add(arith.shli(block, strands), strand, ptx.mul(ahead, plan.strands))
        apart = arith.maxsi(arith.subi(zero, more), zero)
        return cls(plan, share, arith.maxsi(more, zero), apart, strand, ahead, first)

    @property
    def _step(self) -> Value:
        """Tiles from a turn to that of the strand's next tile, as a logarithm."""
        return ptx.add(self.apart, log2(self.plan.strands))

    def _strand(self, turn: Value) -> Value:
        """How far a turn's strand is from the first."""
        return ptx.mul(arith.andi(turn, ptx.add(_power(self.cycle), -1)), self.plan.warps)

    def place(self, turn: Value | int) -> Value:
        """The first place of a turn's tile; it need not exist."""
        turn = ptx.as_value(turn)
        along = arith.shli(arith.shrui(turn, self.cycle), self._step)
        tile = ptx.add(ptx.mul(self.share.range, self.plan.range_tiles), self.first, along, self._strand(turn))
        return ptx.mul(tile, self.plan.warp_tile)

    def slot(self, turn: Value) -> Value:
        """Where a turn's result is kept."""
        strand = ptx.add(self.strand, self._strand(turn))
        tile = ptx.add(ptx.mul(strand, self.plan.kept), arith.shli(turn, self.apart), self.ahead)
        return arith.select(ptx.less(0, self.apart), tile, strand)

    def turns(self, seen: Seen) -> Value:
        """The number of tiles, at least 1: the first is loaded before it is known whether there is one."""
        plan = self.plan
        tiles = arith.subi(seen.tiles(plan), ptx.mul(self.share.range, plan.range_tiles))
        last = arith.maxsi(arith.subi(ptx.add(tiles, -1), self.first), ptx.const(0))
        cycles = arith.shrui(last, self._step)
        rest = arith.shrui(arith.andi(last, ptx.add(_power(self._step), -1)), ptx.const(log2(plan.warps)))
        rest = arith.minsi(rest, ptx.add(_power(self.cycle), -1))
        return ptx.add(arith.shli(cycles, self.cycle), rest, 1)
