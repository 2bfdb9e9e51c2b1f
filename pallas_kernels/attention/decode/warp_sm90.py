"""The work of one warp in decode attention: it streams, multiplies and weighs its tiles of places. For Hopper.

Each thread loads, from memory to registers, exactly what it will use itself: 16 bytes per load, each load as soon as
its registers are free. So a warp waits for no other warp.

In the products on the tensor cores (`ptx.mma`) the queries are the rows. A sum may run in any order that is the same
for both factors, so a thread can take 16 bytes of a key at a time. Scores come out where the product with the values
expects its weights.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from itertools import chain
from typing import NamedTuple

from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.attention.decode import split
from pallas_kernels.attention.decode.newest_sm90 import Newest
from pallas_kernels.attention.decode.plan_sm90 import EIGHT, DecodePlan
from pallas_kernels.attention.decode.slots_sm90 import Slots
from pallas_kernels.attention.decode.turns_sm90 import Run, Seen, Thread, Words
from pallas_kernels.formats import fp8_sm90
from pallas_kernels.pages import PAGE
from pallas_kernels.ptx import Value

_BITS = PAGE.bit_length() - 1  # of a place in a page

_LOAD = "ld.global.nc.b32 $0, [$1];"
_LOAD_FOUR = "ld.global.nc.v4.b32 {{$0, $1, $2, $3}}, [$4+{}];"
_STREAM_FOUR = "ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {{$0, $1, $2, $3}}, [$4+{}];"
_STREAM_TWO = "ld.global.nc.L1::no_allocate.L2::128B.v2.b32 {{$0, $1}}, [$2+{}];"
_LOAD_BYTES = {1: "ld.global.nc.u8 $0, [$1+{}];", 2: "ld.global.nc.u16 $0, [$1+{}];"}


def load_queries(plan: DecodePlan, q: Value, at: Thread) -> list[list[Value]]:
    """The queries as first factors of `ptx.mma`, see `query_factors`.

    Missing rows may hold anything, because their results are not used.
    """

    def words(half: int) -> Words:
        query = arith.minsi(ptx.add(at.block.first, at.g, EIGHT * half), ptx.const(plan.group - 1))
        row = ptx.offset(ptx.offset(q, ptx.add(ptx.mul(at.block.pair(plan), plan.group), query), plan.row), at.q, 16)
        return [_load(_LOAD_FOUR, row, 64 * i) for i in range(plan.width // 32)]

    return query_factors(plan, words)


def query_factors(plan: DecodePlan, words: Callable[[int], Words]) -> list[list[Value]]:
    """The queries as first factors of `ptx.mma`, one for every 16 columns of the product with keys.

    Args:
      words: gives, for a half of the queries, the 16 bytes from 16·q on in every 64 of query g.
    """
    halves = [[four[i : i + 2] for four in words(half) for i in (0, 2)] for half in range(plan.eights)]
    zero = ptx.const(0)
    others = halves[1] if plan.eights == 2 else [[zero, zero]] * len(halves[0])
    return [
        [low, other_low, high, other_high]
        for (low, high), (other_low, other_high) in zip(halves[0], others, strict=True)
    ]


def _load(text: str, address: Value, place: int, words: int = 4) -> list[Value]:
    return ptx.asm(text.format(place), [ptx.i32()] * words, [address], volatile=True)


class Tile(NamedTuple):
    """What a thread loads of a warp's tile."""

    keys: Words
    values: Words
    key_exponents: Words  # of the scales in float8, of the thread's two places in every eight; none for bfloat16
    value_exponents: Words

    @classmethod
    def of_both(cls, keys: tuple[Words, Words], values: tuple[Words, Words]) -> "Tile":
        """Of what `CacheStream` loads."""
        return cls(keys[0], values[0], keys[1], values[1])

    def words(self) -> list[Value]:
        """All of its words."""
        return [word for words in self for word in chain(*words)]

    def like(self, words: list[Value]) -> "Tile":
        """Other words in the same arrangement."""
        rest = iter(words)
        return Tile(*([[next(rest) for _ in each] for each in part] for part in self))


@dataclasses.dataclass(frozen=True)
class CacheStream:
    """The thread's loads of its warp's tiles. It also loads places beyond the count, but none beyond the last page."""

    plan: DecodePlan
    arrays: dict[str, Value]  # addresses by name: all keys and values, and the exponents of their scales if in float8
    table: Value
    at: Thread
    run: Run
    seen: Seen

    def pages(self) -> list[Value]:
        """Begins to load the pages of the warp's tiles: of a folded window, both or its only one."""
        return self._two_pages() if self.plan.folded else self._held()

    def _two_pages(self) -> list[Value]:
        entry = ptx.offset(self.table, ptx.mul(self.at.block.row, self.plan.pages), 4)
        entries = [ptx.shifted(entry, 4 * i) for i in range(self.plan.pages)]
        return [ptx.asm(_LOAD, [ptx.i32()], [each], volatile=True)[0] for each in entries]

    def _held(self) -> list[Value]:
        """Begins to load, a lane each, the pages of the tiles of 32 turns and, if there may be more, of the next 32.

        (Loaded a turn ahead, each would cost a trip to memory, because ptxas moves such loads to where they are used.)
        """
        held = []
        for begin in range(0, self.plan.most_turns, 32):
            page = arith.shrui(self._first(ptx.add(self.at.lane, begin)), ptx.const(_BITS))
            entry = ptx.offset(self.table, ptx.add(ptx.mul(self.at.block.row, self.plan.pages), page), 4)
            held += ptx.asm(_LOAD, [ptx.i32()], [entry], volatile=True)
        return held

    def page(self, turn: Value | int, pages: list[Value]) -> list[Value]:
        """Where a turn's tile lies: its page, of those that `pages` has loaded, or both of a folded window."""
        if self.plan.folded:
            return pages
        turn = ptx.as_value(turn)
        page, *more = (ptx.from_lane(each, arith.andi(turn, ptx.const(31))) for each in pages)
        for number, each in enumerate(more, 1):
            page = arith.select(ptx.less(turn, 32 * number), page, each)
        return [page]

    def keys(self, turn: Value | int, pages: list[Value]) -> tuple[Words, Words]:
        """The numbers from 8·q on in every 32, of place g in every eight; and exponents."""
        plan, places = self.plan, range(0, self.plan.warp_tile, EIGHT)
        first = ptx.offset(self.arrays["k"], self.at.q, EIGHT * plan.cache_row // plan.width)
        rows = self._rows(first, turn, pages, self.at.g, places)
        keys = [self._eight(row, begin, 32 * i) for row, begin in rows for i in range(plan.width // 32)]
        return keys, self._exponents("k_exponents", turn, pages)

    def values(self, turn: Value | int, pages: list[Value]) -> tuple[Words, Words]:
        """The numbers from 8·g on in every 64, of places 2·q, 2·q + 1 and 8 further in every 16; and exponents."""
        plan = self.plan
        places = [first + i for first in range(0, plan.warp_tile, 2 * EIGHT) for i in (0, 1, 8, 9)]
        first = ptx.offset(self.arrays["v"], self.at.g, EIGHT * plan.cache_row // plan.width)
        rows = self._rows(first, turn, pages, ptx.mul(self.at.q, 2), places)
        values = [
            self._eight(row, begin, 64 * j)
            for sixteen in range(0, len(rows), 4)
            for j in range(plan.width // 64)
            for row, begin in rows[sixteen : sixteen + 4]
        ]
        return values, self._exponents("v_exponents", turn, pages)

    def _eight(self, row: Value, begin: int, column: int) -> list[Value]:
        """Begins to load eight adjacent numbers."""
        if self.plan.fp8:
            return _load(_STREAM_TWO, row, begin + column, 2)
        return _load(_STREAM_FOUR, row, begin + 2 * column)

    def _exponents(self, name: str, turn: Value | int, pages: list[Value]) -> Words:
        """Begins to load the exponents of the thread's two places in every eight: in one word, or two if two pages may
        have them."""
        if not self.plan.fp8:
            return []
        each = 1 if self.plan.folded else 2
        places = [first + i for first in range(0, self.plan.warp_tile, EIGHT) for i in range(0, 2, each)]
        rows = self._rows(self.arrays[name], turn, pages, ptx.mul(self.at.q, 2), places, 1)
        words = [_load(_LOAD_BYTES[each], row, begin, 1)[0] for row, begin in rows]
        return [words[i : i + 2 // each] for i in range(0, len(words), 2 // each)]

    def _first(self, turn: Value | int) -> Value:
        """The first place of a turn's tile, or of the last tile if the turn is beyond it."""
        return arith.minsi(self.run.place(turn), ptx.const(self.plan.places - self.plan.warp_tile))

    def _rows(
        self,
        cache: Value,
        turn: Value | int,
        pages: list[Value],
        mine: Value,
        places: Iterable[int],
        size: int | None = None,
    ) -> list[tuple[Value, int]]:
        """Where the thread reads: addresses, and bytes to add to them. `places` count from the tile's place `mine`.

        `size`: bytes of a place, by default those of a key's or a value's numbers.
        """
        plan, size = self.plan, self.plan.cache_row if size is None else size
        pairs = [ptx.mul(ptx.add(ptx.mul(page, plan.keys), self.at.block.head), PAGE) for page in pages]
        if len(pairs) == 2:  # a page for each place
            first, found = ptx.add(self._first(turn), mine), []
            for place in places:
                inside = ptx.add(first, place)
                pair = arith.select(ptx.less(inside, self.seen.start), pairs[1], pairs[0])
                found.append((ptx.offset(cache, ptx.add(pair, inside), size), 0))
            return found
        # A tile lies within a page.
        first = ptx.add(pairs[0], arith.andi(self._first(turn), ptx.const(PAGE - 1)))
        row = ptx.offset(cache, ptx.add(first, mine), size)
        return [(row, size * place) for place in places]


class Loaded(NamedTuple):
    """What a warp loads before it computes: the pages of its tiles, and its first tile."""

    tile: Tile
    pages: list[Value]  # see `CacheStream.pages`

    @classmethod
    def of(cls, stream: CacheStream, pages: list[Value]) -> "Loaded":
        """Begins to load the tile."""
        first = stream.page(0, pages)
        tile = Tile.of_both(stream.keys(0, first), stream.values(0, first))
        ptx.keep_loads_before(pages[0])
        return cls(tile, pages)


def attend(
    stream: CacheStream, a: list[list[Value]], loaded: Loaded, slots: Slots, newest: Newest | None = None
) -> None:
    """The softmax of each of the warp's tiles, merged into the block's slots.

    Args:
      a: from `query_factors`.
      newest: the row's newest key and value, if the pages do not have them yet.
    """
    plan, run, seen, at = stream.plan, stream.run, stream.seen, stream.at
    turns = run.turns(seen) if plan.most_turns > 1 else ptx.const(1)

    def finish(turn: Value, scores: Words, values: Words, scales: Words) -> None:
        weights, maxima, totals = _softmax(plan, scores)
        factors = _packed(plan, _scaled(weights, scales))
        slots.add(run.slot(turn), at.lane, maxima, totals, lambda j: _multiply(plan, factors, values, j))

    def with_newest(turn: Value, tile: Tile) -> Tile:
        if newest is None:
            return tile
        keys, values = ([fp8_sm90.numbers(words) for words in each] for each in tile[:2])
        keys, values = newest.over(keys, values, seen, run.place(turn))
        exponents = newest.over_exponents(tile.key_exponents, tile.value_exponents, seen, run.place(turn))
        return Tile(keys, values, *exponents)

    def step(following: Value, carry: list[Value]) -> list[Value]:
        turn = ptx.add(following, -1)
        pages = stream.page(following, loaded.pages)
        tile = loaded.tile.like(carry)
        if plan.folded:
            tile = with_newest(turn, tile)
        scores, values, scales = _scores(plan, a, tile), tile.values, fp8_sm90.powers(tile.value_exponents)
        if plan.windowed:
            places = seen.places(plan, run.place(turn), at.q)
            scores, values = _seen_scores(scores, places), _seen_values(plan, values, places)
            scales = _seen_scales(scales, places)
        keys = stream.keys(following, pages)
        ptx.keep_loads_before(pages[0])
        finish(turn, scores, values, scales)
        return Tile.of_both(keys, stream.values(following, pages)).words()

    carry = loaded.tile.words()
    if plan.most_turns > 1:
        carry = ptx.loop(turns, carry, step, start=1)
    # Without a window, only a warp's last tile may be partly or entirely missing. Unless pages lie one on the other,
    # no other has the newest place.
    last = ptx.add(turns, -1)
    tile = with_newest(last, loaded.tile.like(carry))
    places = seen.places(plan, run.place(last), at.q)
    scores = _seen_scores(_scores(plan, a, tile), places)
    scales = _seen_scales(fp8_sm90.powers(tile.value_exponents), places)
    finish(last, scores, _seen_values(plan, tile.values, places), scales)


def _scores(plan: DecodePlan, a: list[list[Value]], tile: Tile) -> Words:
    """Queries times the keys of every eight places, to base 2: per half of the queries, the thread's two places."""
    keys, powers = tile.keys, fp8_sm90.powers(tile.key_exponents)
    zero = ptx.float32(0.0)
    scale = ptx.float32(plan.scale * split.LOG2_E)
    per = plan.width // 32
    scores = []
    for number in range(plan.warp_tile // EIGHT):
        acc = [zero] * 4
        for i, eight in enumerate(keys[per * number : per * (number + 1)]):
            words = fp8_sm90.numbers(eight)
            for half in (0, 1):
                acc = ptx.mma(acc, a[2 * i + half], words[2 * half : 2 * half + 2])
        acc = acc[: 2 * plan.eights]
        (acc,) = _scaled([acc], powers[number : number + 1])
        scores.append([ptx.rounded_product(each, scale) for each in acc])
    return scores


def _scaled(numbers: Words, powers: Words) -> Words:
    """Scores or weights times the scales of their places in float8, if there are any."""
    if not powers:
        return numbers
    return [
        [ptx.rounded_product(number, power[i % 2]) for i, number in enumerate(each)]
        for each, power in zip(numbers, powers, strict=True)
    ]


def _seen_scales(powers: Words, seen: Words) -> Words:
    """Scales of values, with 0 where `seen` does not hold: the weights are 0 there, but the scales may be infinite."""
    zero = ptx.float32(0.0)
    return [
        [arith.select(*each, zero) for each in zip(ok, power, strict=True)]
        for ok, power in zip(seen[: len(powers)], powers, strict=True)
    ]


def _seen_scores(scores: Words, seen: Words) -> Words:
    """Scores, with -infinity where `seen` (of the thread's two places in every eight) does not hold."""
    least = ptx.float32(-math.inf)
    return [
        [arith.select(ok[i % 2], score, least) for i, score in enumerate(each)]
        for each, ok in zip(scores, seen, strict=True)
    ]


def _seen_values(plan: DecodePlan, values: Words, seen: Words) -> Words:
    """Values, with 0 where `seen` does not hold: the weights are 0 there, but the values may be NaN."""
    zero = ptx.const(0)
    across = plan.width // 64
    result = []
    for number, words in enumerate(values):
        sixteen, row = number // (4 * across), number % 4
        ok = seen[2 * sixteen + row // 2][row % 2]
        result.append([arith.select(ok, word, zero) for word in words])
    return result


def _softmax(plan: DecodePlan, scores: Words) -> tuple[Words, list[Value], list[Value]]:
    """The weights of `_scores`' scores; and per half of the queries, their maximum and sum, in each of four threads."""
    weights: Words = [[] for _ in scores]
    maxima, totals = [], []
    for half in range(plan.eights):
        mine = [each[2 * half : 2 * half + 2] for each in scores]
        largest = [arith.maximumf(*pair) for pair in mine]
        while len(largest) > 1:
            largest = [*largest[2:], arith.maximumf(*largest[:2])]
        maximum = arith.maximumf(ptx.float32(split.FLOOR), ptx.quad_reduce(arith.maximumf, largest[0]))
        powers = [[ptx.exp2(arith.subf(score, maximum)) for score in pair] for pair in mine]
        for weight, pair in zip(weights, powers, strict=True):
            weight += pair
        maxima.append(maximum)
        totals.append(ptx.quad_reduce(arith.addf, ptx.tree_sum([each for pair in powers for each in pair])))
    return weights, maxima, totals


def _packed(plan: DecodePlan, weights: Words) -> Words:
    """Weights as first factors of `ptx.mma`, one for every 16 places."""
    zero, result = ptx.const(0), []
    for sixteen in range(plan.warp_tile // 16):
        packed = [
            [ptx.pack(*pair[2 * half : 2 * half + 2]) if half < plan.eights else zero for half in (0, 1)]
            for pair in weights[2 * sixteen : 2 * sixteen + 2]
        ]
        result.append([*packed[0], *packed[1]])
    return result


def _multiply(plan: DecodePlan, factors: Words, values: Words, j: int) -> Words:
    """Weights times values of the columns from 64·j on: four sums for every eight columns.

    The thread has four rows of every 16 places; numbers of adjacent rows are paired. Column g of product i is column
    8·g + i of the 64.

    Args:
      factors: from `_packed`.
    """
    across = plan.width // 64
    sums = [[ptx.float32(0.0)] * 4] * 8
    for sixteen, a in enumerate(factors):
        rows = values[4 * (across * sixteen + j) :][:4]
        for i in range(8):
            b = [_paired(rows[r], rows[r + 1], i) for r in (0, 2)]
            sums = [*sums[:i], ptx.mma(sums[i], a, b), *sums[i + 1 :]]
    return sums


def _paired(row: list[Value], following: list[Value], i: int) -> Value:
    """The i-th of eight numbers of two rows, as bfloat16 in a register."""
    if len(row) == 2:
        return fp8_sm90.pair(row[i // 4], i % 4, following[i // 4], i % 4)
    selector = "0x7632" if i % 2 else "0x5410"
    return ptx.asm(f"prmt.b32 $0, $1, $2, {selector};", [ptx.i32()], [row[i // 2], following[i // 2]])[0]
