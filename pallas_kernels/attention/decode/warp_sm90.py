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
from pallas_kernels.pages import PAGE
from pallas_kernels.ptx import Value

_BITS = PAGE.bit_length() - 1  # of a place in a page

_LOAD = "ld.global.nc.b32 $0, [$1];"
_LOAD_FOUR = "ld.global.nc.v4.b32 {{$0, $1, $2, $3}}, [$4+{}];"
_STREAM_FOUR = "ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {{$0, $1, $2, $3}}, [$4+{}];"


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


def _load(text: str, address: Value, place: int) -> list[Value]:
    return ptx.asm(text.format(place), [ptx.i32()] * 4, [address], volatile=True)


@dataclasses.dataclass(frozen=True)
class CacheStream:
    """The thread's loads of its warp's tiles. It also loads places beyond the count, but none beyond the last page."""

    plan: DecodePlan
    k: Value  # address of all keys
    v: Value
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

    def keys(self, turn: Value | int, pages: list[Value]) -> Words:
        """The 16 bytes from 16·q on in every 64, of place g in every eight."""
        places = range(0, self.plan.warp_tile, EIGHT)
        rows = self._rows(ptx.offset(self.k, self.at.q, 16), turn, pages, self.at.g, places)
        return [_load(_STREAM_FOUR, row, begin + 64 * i) for row, begin in rows for i in range(self.plan.width // 32)]

    def values(self, turn: Value | int, pages: list[Value]) -> Words:
        """The 16 bytes from 16·g on in every 128, of places 2·q, 2·q + 1, 2·q + 8 and 2·q + 9 in every 16."""
        places = [first + i for first in range(0, self.plan.warp_tile, 2 * EIGHT) for i in (0, 1, 8, 9)]
        rows = self._rows(ptx.offset(self.v, self.at.g, 16), turn, pages, ptx.mul(self.at.q, 2), places)
        return [
            _load(_STREAM_FOUR, row, begin + 128 * j)
            for sixteen in range(0, len(rows), 4)
            for j in range(self.plan.width // 64)
            for row, begin in rows[sixteen : sixteen + 4]
        ]

    def _first(self, turn: Value | int) -> Value:
        """The first place of a turn's tile, or of the last tile if the turn is beyond it."""
        return arith.minsi(self.run.place(turn), ptx.const(self.plan.places - self.plan.warp_tile))

    def _rows(
        self, cache: Value, turn: Value | int, pages: list[Value], mine: Value, places: Iterable[int]
    ) -> list[tuple[Value, int]]:
        """Where the thread reads: addresses, and bytes to add to them. `places` count from the tile's place `mine`."""
        plan = self.plan
        pairs = [ptx.mul(ptx.add(ptx.mul(page, plan.keys), self.at.block.head), PAGE) for page in pages]
        if len(pairs) == 2:  # a page for each place
            first, found = ptx.add(self._first(turn), mine), []
            for place in places:
                inside = ptx.add(first, place)
                pair = arith.select(ptx.less(inside, self.seen.start), pairs[1], pairs[0])
                found.append((ptx.offset(cache, ptx.add(pair, inside), plan.row), 0))
            return found
        # A tile lies within a page.
        first = ptx.add(pairs[0], arith.andi(self._first(turn), ptx.const(PAGE - 1)))
        row = ptx.offset(cache, ptx.add(first, mine), plan.row)
        return [(row, plan.row * place) for place in places]


class Loaded(NamedTuple):
    """What a warp loads before it computes: the pages of its tiles, and its first tile."""

    keys: Words
    values: Words
    pages: list[Value]  # see `CacheStream.pages`

    @classmethod
    def of(cls, stream: CacheStream, pages: list[Value]) -> "Loaded":
        """Begins to load the tile."""
        first = stream.page(0, pages)
        loaded = cls(stream.keys(0, first), stream.values(0, first), pages)
        ptx.keep_loads_before(pages[0])
        return loaded


def attend(
    stream: CacheStream, a: list[list[Value]], loaded: Loaded, slots: Slots, newest: Newest | None = None
) -> None:
    """The softmax of each of the warp's tiles, merged into the block's slots.

    Args:
      a: from `query_factors`.
      newest: the row's newest key and value, if the pages do not have them yet.
    """
    plan, run, seen, at = stream.plan, stream.run, stream.seen, stream.at
    sizes = len(loaded.keys), len(loaded.values)
    turns = run.turns(seen) if plan.most_turns > 1 else ptx.const(1)

    def finish(turn: Value, scores: Words, values: Words) -> None:
        weights, maxima, totals = _softmax(plan, scores)
        factors = _packed(plan, weights)
        slots.add(run.slot(turn), at.lane, maxima, totals, lambda j: _multiply(plan, factors, values, j))

    def with_newest(turn: Value, keys: Words, values: Words) -> tuple[Words, Words]:
        return (keys, values) if newest is None else newest.over(keys, values, seen, run.place(turn))

    def step(following: Value, carry: list[Value]) -> list[Value]:
        turn = ptx.add(following, -1)
        pages = stream.page(following, loaded.pages)
        keys, values = _apart(carry, *sizes)
        if plan.folded:
            keys, values = with_newest(turn, keys, values)
        scores = _scores(plan, a, keys)
        if plan.windowed:
            places = seen.places(plan, run.place(turn), at.q)
            scores, values = _seen_scores(scores, places), _seen_values(plan, values, places)
        keys = stream.keys(following, pages)
        ptx.keep_loads_before(pages[0])
        finish(turn, scores, values)
        values = stream.values(following, pages)
        return [*chain(*keys, *values)]

    carry = [*chain(*loaded.keys, *loaded.values)]
    if plan.most_turns > 1:
        carry = ptx.loop(turns, carry, step, start=1)
    # Without a window, only a warp's last tile may be partly or entirely missing. Unless pages lie one on the other,
    # no other has the newest place.
    last = ptx.add(turns, -1)
    keys, values = with_newest(last, *_apart(carry, *sizes))
    places = seen.places(plan, run.place(last), at.q)
    finish(last, _seen_scores(_scores(plan, a, keys), places), _seen_values(plan, values, places))


def _apart(carry: list[Value], keys: int, values: int) -> tuple[Words, Words]:
    words = [carry[4 * i : 4 * i + 4] for i in range(keys + values)]
    return words[:keys], words[keys:]


def _scores(plan: DecodePlan, a: list[list[Value]], keys: Words) -> Words:
    """Queries times the keys of every eight places, to base 2: per half of the queries, the thread's two places."""
    zero = ptx.float32(0.0)
    scale = ptx.float32(plan.scale * split.LOG2_E)
    per = plan.width // 32
    scores = []
    for number in range(plan.warp_tile // EIGHT):
        acc = [zero] * 4
        for i, words in enumerate(keys[per * number : per * (number + 1)]):
            for half in (0, 1):
                acc = ptx.mma(acc, a[2 * i + half], words[2 * half : 2 * half + 2])
        scores.append([ptx.rounded_product(each, scale) for each in acc[: 2 * plan.eights]])
    return scores


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
            selector = "0x7632" if i % 2 else "0x5410"
            text = f"prmt.b32 $0, $1, $2, {selector};"
            b = [ptx.asm(text, [ptx.i32()], [rows[r][i // 2], rows[r + 1][i // 2]])[0] for r in (0, 2)]
            sums = [*sums[:i], ptx.mma(sums[i], a, b), *sums[i + 1 :]]
    return sums
