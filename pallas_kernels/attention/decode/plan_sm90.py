"""The order in which a row's tiles are merged in decode attention for Hopper, and who computes which of them.

A row's places are tiles of `warp_tile` places, by position. What is merged with what follows from the tiles' numbers:

- a tile has a softmax of its own: per query a maximum, a sum of weights, and sums of values (`merge_sm90.Partial`);
- a range has `RANGE` places. Its tiles whose numbers are the same modulo `strands` are a strand, and are merged one
  after the other;
- a range's strands are merged in pairs of neighbours, then these likewise, until one is left;
- a row's ranges are merged one after the other, and at last the sink.

So a row's bits depend on what it sees, on its shapes and on `warp_tile` only. All else in a plan says who computes
what, and where it is merged: in one warp's slot of shared memory, by the threads of a block, by the blocks of a
cluster, or by `combine_sm90`. Whatever does not exist is empty, and merging with it changes no bit.
"""

import dataclasses
import functools
from typing import Any

from pallas_kernels.attention.decode.split import MAX_SPLITS, PROGRAMS

EIGHT = 8  # queries in half an instruction
QUERIES = 2 * EIGHT  # per block, at most
RANGE = 4096  # places that one cluster shares by default, so that nothing is left to combine
_STRANDS = 16
_MOST_BYTES = 200 * 1024  # of a block's slots
_MULTIPROCESSORS = 132  # of an H200: more blocks in clusters would only wait for each other
_MOST_BLOCKS = 8  # of a cluster
_FEWEST_SPLITS = 4  # fewer would not make up for combining them
FEW_WARPS, MANY_WARPS = 4, 8  # of a block


def power_of_two(number: int) -> int:
    """The least that is not less."""
    return 1 << (number - 1).bit_length()


def log2(power: int) -> int:
    """Of a power of two."""
    return power.bit_length() - 1


@dataclasses.dataclass(frozen=True)
class ProductPlan:
    """The product that rows' queries, and their newest keys and values, come from. See `newest_sm90`."""

    rows: int  # B
    pieces: int  # J: of the sum
    has_bias: bool
    rotates: bool
    scales: Any  # dtype of the norms' scales; None: queries and keys are not normed
    epsilon: float  # of the norms


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """Everything that is known when the kernel is built."""

    keys: int  # K
    group: int  # G
    width: int  # H
    places: int  # that a row sees at most: those of all its pages or, if folded, of one
    warp_tile: int  # places that a warp computes at a time: a multiple of 16 that divides PAGE
    scale: float
    sinks: str | None  # their dtype, bfloat16 or float32
    pages: int  # Z: of a row's table
    windowed: bool = False  # whether a row sees its places from `starts` on, and not from the first on
    # Whether it sees no more than a page's places, in up to two pages. Then the pages lie one on the other: of place x
    # of a page, the second's is taken before the start, and the first's from there on.
    folded: bool = False
    splits: int = 1  # J: clusters that share a row's places
    blocks: int = 1  # per cluster, a power of two
    warps: int = FEW_WARPS  # per block, a power of two and a multiple of 4
    product: ProductPlan | None = None  # None: queries are given, and the newest keys and values are in the pages
    fp8: bool = False  # whether the pages are `Fp8Pages`

    @property
    def threads(self) -> int:
        """Per block."""
        return 32 * self.warps

    @property
    def row(self) -> int:
        """Bytes of a query, or of a key or a value in bfloat16."""
        return 2 * self.width

    @property
    def cache_row(self) -> int:
        """Bytes of a key's or a value's numbers in the pages."""
        return self.width if self.fp8 else self.row

    @property
    def queries(self) -> int:
        """That a block computes, at most."""
        return min(self.group, QUERIES)

    @property
    def eights(self) -> int:
        """Groups of eight queries that a block has room for."""
        return 1 if self.group <= EIGHT else 2

    @property
    def float4s(self) -> int:
        """Float4s in a block's result."""
        return self.queries * self.width // 4

    @property
    def sums_row(self) -> int:
        """Bytes of a query's sums in a slot: 16 columns per thread, and a gap against bank conflicts.

        In the first gap of each thread are the query's maximum and sum of weights.
        """
        return 5 * self.width

    @property
    def slot_bytes(self) -> int:
        """Bytes of shared memory for one partial result."""
        return self.queries * self.sums_row

    @functools.cached_property
    def strands(self) -> int:
        """Of a range: as many as one block has slots for."""
        count = _STRANDS
        while count > 1 and count * self.slot_bytes > _MOST_BYTES:
            count //= 2
        return count

    @property
    def range_tiles(self) -> int:
        """Tiles of a range."""
        return RANGE // self.warp_tile

    @property
    def tiles(self) -> int:
        """Of the places that a row sees at most."""
        return self.places // self.warp_tile

    @property
    def ranges(self) -> int:
        """In these places."""
        return -(-self.tiles // self.range_tiles)

    @property
    def loops(self) -> bool:
        """Whether a block may have several ranges, one after the other."""
        return self.ranges > self.splits

    @property
    def entries(self) -> int:
        """Results of a row and head that are left to combine, at most."""
        return max(self.splits, self.ranges)

    @property
    def chain(self) -> int:
        """Tiles of a strand at most, as a power of two."""
        return power_of_two(-(-min(self.tiles, self.range_tiles) // self.strands))

    @property
    def own_strands(self) -> int:
        """Strands of a block if its cluster has a whole range."""
        return self.strands // self.blocks

    def is_apart(self, shift: int) -> bool:
        """Whether warps share strands, and keep tiles apart, if 2^shift clusters share a range."""
        return self.own_strands >> shift < self.warps

    @property
    def kept(self) -> int:
        """Slots of a strand whose tiles are kept apart."""
        fewest = self.own_strands if self.splits == 1 else 1
        return max(self.chain, self.warps // fewest)

    def slots(self, shift: int = 0) -> int:
        """Slots of a block, one per strand or, kept apart, per tile, if 2^shift clusters share a range."""
        strands = self.own_strands >> shift
        if self.is_apart(shift):
            return strands * self.kept
        if self.blocks == self.splits == 1:
            return min(strands, max(self.warps, power_of_two(self.tiles)))
        return strands

    @functools.cached_property
    def shifts(self) -> tuple[int, ...]:
        """Base-2 logarithms of how many clusters may share a range: 0, and those that need no more slots."""
        if self.splits == 1:
            return (0,)
        most = max(self.slots(), self.own_strands)
        return tuple(i for i in range(log2(self.own_strands) + 1) if i == 0 or self.slots(i) <= most)

    @property
    def most_slots(self) -> int:
        """That a block has room for."""
        return max(map(self.slots, self.shifts))

    @property
    def most_turns(self) -> int:
        """Tiles of a warp, at most."""
        turns = []
        for shift in self.shifts:
            strands = self.own_strands >> shift
            tiles = self.chain * max(1, -(-min(strands, self.tiles) // self.warps))
            turns.append(-(-tiles // max(1, self.warps // strands)))
        return max(turns)

    @property
    def adds(self) -> bool:
        """Whether a slot may be written more than once."""
        return self.chain > 1 and not all(map(self.is_apart, self.shifts))

    @property
    def clears(self) -> bool:
        """Whether some slots may never be written."""
        return self.adds or self.most_slots > self.warps or self.splits > 1

    @property
    def fits(self) -> bool:
        """Whether a block has enough shared memory."""
        return self.most_slots * self.slot_bytes <= _MOST_BYTES


def deal(plan: DecodePlan, rows: int) -> DecodePlan:
    """Who computes what by default, if there are `rows` (B · K) of them.

    More ranges than one cluster has are for several clusters or, with many rows, for one block after the other. Few
    places lower the number of blocks, but never below one tile per block.
    """
    # If no multiprocessor has a second block, more warps have more loads in flight, and take fewer turns.
    warps = MANY_WARPS if rows <= _MULTIPROCESSORS and not plan.folded else FEW_WARPS
    splits = min(PROGRAMS // rows, MAX_SPLITS)
    if plan.ranges > 1 and splits >= _FEWEST_SPLITS:
        return dataclasses.replace(plan, splits=splits, blocks=1, warps=FEW_WARPS)
    room = 1 if plan.ranges > 1 else max(1, _MULTIPROCESSORS // rows)
    needed = power_of_two(-(-plan.tiles // warps))
    blocks = min(_MOST_BLOCKS, 1 << log2(room), needed, plan.strands)
    dealt = dataclasses.replace(plan, splits=1, blocks=blocks, warps=warps)
    while not dealt.fits and dealt.blocks > 1:
        dealt = dataclasses.replace(dealt, blocks=dealt.blocks // 2)
    return dealt if dealt.fits else dataclasses.replace(dealt, warps=FEW_WARPS)
