"""The work of one warp in decode attention: it streams, multiplies and weighs its tiles of places. For Hopper.

Each thread loads, from memory to registers, exactly what it will use itself: 16 bytes per load, each load as soon as
its registers are free. So a warp waits for no other warp.

In the products on the tensor cores (`ptx.mma`) the queries are the rows. A sum may run in any order that is the same
for both factors, so a thread can take 16 bytes of a key at a time. Scores come out where the product with the values
expects its weights.
"""

import dataclasses
import math
from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.attention.decode import split
from pallas_kernels.attention.decode.gather_sm90 import EIGHT, Block, SoftmaxPlan
from pallas_kernels.pages import PAGE
from pallas_kernels.ptx import Value

_BITS = PAGE.bit_length() - 1  # of a place in a page

_LOAD = "ld.global.nc.b32 $0, [$1];"
_LOAD_ANEW = "{ .reg .pred p; setp.eq.s32 p, $3, 0; mov.b32 $0, $2; @p ld.global.nc.b32 $0, [$1]; }"  # if $3 is 0
_LOAD_FOUR = "ld.global.nc.v4.b32 {{$0, $1, $2, $3}}, [$4+{}];"
_STREAM_FOUR = "ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {{$0, $1, $2, $3}}, [$4+{}];"
Words = list[list[Value]]  # 16 bytes each


@dataclasses.dataclass(frozen=True)
class DecodePlan(SoftmaxPlan):
    """Everything that is known when the kernel is built."""

    places: int  # that a row sees at most: those of all its pages or, if folded, of one
    warp_tile: int  # places that a warp computes at a time: a multiple of 16 that divides PAGE
    scale: float
    pages: int  # Z: of a row's table
    windowed: bool = False  # whether a row sees its places from `starts` on, and not from the first on
    # Whether it sees no more than a page's places, in up to two pages. Then the pages lie one on the other: of place x
    # of a page, the second's is taken before the start, and the first's from there on.
    folded: bool = False

    @property
    def row(self) -> int:
        """Bytes of a key, or of a value."""
        return 2 * self.width

    @property
    def tile(self) -> int:
        """Places that a block computes at a time: splits get whole numbers of these."""
        return self.warp_tile * self.warps

    @property
    def stride(self) -> int:
        """Places from one of a warp's tiles to its next."""
        return self.tile * self.blocks


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


@dataclasses.dataclass(frozen=True)
class Run:
    """A warp's places: a tile every `plan.stride` places, from `first` to before `end`."""

    first: Value
    end: Value
    start: Value | None  # with a window, the first place that is seen
    count: Value  # and behind the last one

    def left(self, plan: DecodePlan, turn: Value | int) -> Value:
        """Places from the start of a turn's tile to the end; may be negative."""
        return arith.subi(arith.subi(self.end, self.first), ptx.mul(turn, plan.stride))

    def turns(self, plan: DecodePlan) -> Value:
        """The number of tiles, at least 1: the first is loaded before it is known whether there is one."""
        left = arith.maxsi(self.left(plan, 0), ptx.const(1))
        return arith.divui(ptx.add(left, plan.stride - 1), ptx.const(plan.stride))

    def seen(self, plan: DecodePlan, turn: Value | int, q: Value) -> Words:
        """Whether the thread's two places in every eight of a turn's tile are seen."""
        mine, places = ptx.mul(q, 2), range(0, plan.warp_tile, EIGHT)
        if self.start is None:
            left = arith.subi(self.left(plan, turn), mine)
            return [[ptx.less(place + i, left) for i in (0, 1)] for place in places]
        first = ptx.add(self.first, ptx.mul(turn, plan.stride), mine)
        return [[self._sees(plan, ptx.add(first, place + i)) for i in (0, 1)] for place in places]

    def _sees(self, plan: DecodePlan, place: Value) -> Value:
        is_before = ptx.less(place, self.start)
        if plan.folded:
            in_pages = arith.select(is_before, ptx.add(place, PAGE), place)
            return ptx.both(ptx.less(in_pages, self.count), ptx.less(place, self.end))
        return ptx.both(ptx.less(self.start, ptx.add(place, 1)), ptx.less(place, self.end))


def run(plan: DecodePlan, counts: Value, starts: Value, at: Thread) -> Run:
    """The warp's share of its split's places (see `split.run`)."""
    (count,) = ptx.asm(_LOAD, [ptx.i32()], [ptx.offset(counts, at.block.row, 4)], volatile=True)
    start = None
    if plan.windowed:
        (start,) = ptx.asm(_LOAD, [ptx.i32()], [ptx.offset(starts, at.block.row, 4)], volatile=True)
    end = arith.maxsi(arith.minsi(count, ptx.const(plan.places)), ptx.const(0))
    tile = ptx.add(ptx.mul(at.block.rank, plan.warps), at.warp)
    first = ptx.mul(tile, plan.warp_tile)
    if plan.splits == 1:  # `first` need not wait for the count
        return Run(first, end, start, count)
    tiles = arith.divui(ptx.add(end, plan.tile - 1), ptx.const(plan.tile))
    length = ptx.mul(arith.divui(ptx.add(tiles, plan.splits - 1), ptx.const(plan.splits)), plan.tile)
    begin = ptx.mul(at.block.part, length)
    return Run(ptx.add(begin, first), arith.minsi(ptx.add(begin, length), end), start, count)


def load_queries(plan: DecodePlan, q: Value, at: Thread) -> list[list[Value]]:
    """The queries as first factors of `ptx.mma`, one for every 16 columns of the product with keys.

    Missing rows may hold anything, because their results are not used.
    """
    halves = []
    for half in range(plan.eights):
        query = arith.minsi(ptx.add(at.block.first, at.g, EIGHT * half), ptx.const(plan.group - 1))
        row = ptx.offset(ptx.offset(q, ptx.add(ptx.mul(at.block.pair(plan), plan.group), query), plan.row), at.q, 16)
        words = [_load(_LOAD_FOUR, row, 64 * i) for i in range(plan.width // 32)]
        halves.append([four[i : i + 2] for four in words for i in (0, 2)])
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

    def two_pages(self) -> list[Value]:
        """Begins to load the pages of a folded window, or its only one."""
        entry = ptx.offset(self.table, ptx.mul(self.at.block.row, self.plan.pages), 4)
        entries = [ptx.shifted(entry, 4 * i) for i in range(self.plan.pages)]
        return [ptx.asm(_LOAD, [ptx.i32()], [each], volatile=True)[0] for each in entries]

    def hold(self, turn: Value | int, held: Value | None = None) -> Value:
        """Begins to load, a lane each, the pages of the tiles of 32 turns from `turn` on.

        If there are some `held` already, only for a turn that is a multiple of 32. (Loaded one by one a turn ahead,
        each would cost a trip to memory, because ptxas moves such loads to where they are used.)
        """
        block = arith.shrui(self._first(ptx.add(turn, self.at.lane)), ptx.const(_BITS))
        entry = ptx.offset(self.table, ptx.add(ptx.mul(self.at.block.row, self.plan.pages), block), 4)
        if held is None:
            return ptx.asm(_LOAD, [ptx.i32()], [entry], volatile=True)[0]
        return ptx.asm(
            _LOAD_ANEW, [ptx.i32()], [entry, held, arith.andi(ptx.as_value(turn), ptx.const(31))], volatile=True
        )[0]

    def page(self, turn: Value | int, held: Value) -> list[Value]:
        """The page of a turn's tile, of those that are held."""
        return [ptx.from_lane(held, arith.andi(ptx.as_value(turn), ptx.const(31)))]

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
        first = ptx.add(self.run.first, ptx.mul(turn, self.plan.stride))
        return arith.minsi(first, ptx.const(self.plan.places - self.plan.warp_tile))

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
                pair = arith.select(ptx.less(inside, self.run.start), pairs[1], pairs[0])
                found.append((ptx.offset(cache, ptx.add(pair, inside), plan.row), 0))
            return found
        # A tile lies within a page.
        first = ptx.add(pairs[0], arith.andi(self._first(turn), ptx.const(PAGE - 1)))
        row = ptx.offset(cache, ptx.add(first, mine), plan.row)
        return [(row, plan.row * place) for place in places]


class Loaded(NamedTuple):
    """What a warp loads before it computes: its first tile, and the pages of it and others."""

    keys: Words
    values: Words
    pages: list[Value]  # of a folded window; else what `hold` has loaded

    @classmethod
    def of(cls, stream: CacheStream) -> "Loaded":
        """Begins to load them."""
        if stream.plan.folded:
            first = pages = stream.two_pages()
        else:
            pages = [stream.hold(0)]
            first = stream.page(0, *pages)
        return cls(stream.keys(0, first), stream.values(0, first), pages)


def attend(stream: CacheStream, a: list[list[Value]], loaded: Loaded) -> tuple[list[Value], list[Value], list[Value]]:
    """The warp's softmax: per query, the maximum and the thread's part of the sum; and the sums of values.

    There are four sums of values for every eight columns of `_multiply`.

    Args:
      a: from `load_queries`.
    """
    plan, eights = stream.plan, stream.plan.eights
    zero, least = ptx.float32(0.0), ptx.float32(split.FLOOR)
    state = [least] * eights + [zero] * (eights + plan.width // 2)
    sizes = len(loaded.keys), len(loaded.values)

    def weigh(scores: Words, state: list[Value]) -> tuple[Words, list[Value], list[Value]]:
        weights, rescales, maxima, totals = _softmax(scores, state[:eights], state[eights : 2 * eights])
        sums = [
            arith.mulf(each, rescales[i % 4 // 2]) if i % 4 // 2 < eights else each
            for i, each in enumerate(state[2 * eights :])
        ]
        return weights, [*maxima, *totals], sums

    turns, many = stream.run.turns(plan), len(loaded.pages)

    def step(following: Value, carry: list[Value]) -> list[Value]:
        held, carry = carry[:many], carry[many:]
        pages = held
        if not plan.folded:
            held = [stream.hold(following, *held)]
            pages = stream.page(following, *held)
        keys, values, state = _apart(carry, *sizes)
        scores = _scores(plan, a, keys)
        if plan.windowed:
            seen = stream.run.seen(plan, ptx.add(following, -1), stream.at.q)
            scores, values = _seen_scores(scores, seen), _seen_values(plan, values, seen)
        keys = stream.keys(following, pages)
        weights, softmax, sums = weigh(scores, state)
        sums = _multiply(plan, sums, weights, values)
        values = stream.values(following, pages)
        return [*held, *chain(*keys, *values), *softmax, *sums]

    carry = ptx.loop(turns, [*loaded.pages, *chain(*loaded.keys, *loaded.values), *state], step, start=1)
    # Without a window, only a warp's last tile may be partly or entirely missing.
    keys, values, state = _apart(carry[many:], *sizes)
    seen = stream.run.seen(plan, arith.subi(turns, ptx.const(1)), stream.at.q)
    weights, softmax, sums = weigh(_seen_scores(_scores(plan, a, keys), seen), state)
    sums = _multiply(plan, sums, weights, _seen_values(plan, values, seen))
    return softmax[:eights], softmax[eights:], sums


def _apart(carry: list[Value], keys: int, values: int) -> tuple[Words, Words, list[Value]]:
    words = [carry[4 * i : 4 * i + 4] for i in range(keys + values)]
    return words[:keys], words[keys:], carry[4 * (keys + values) :]


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
        scores.append([arith.mulf(each, scale) for each in acc[: 2 * plan.eights]])
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


def _softmax(
    scores: Words, maxima: list[Value], totals: list[Value]
) -> tuple[Words, list[Value], list[Value], list[Value]]:
    """The weights of `_scores`' scores; the factors for older sums; the new maxima and sums of weights."""
    weights: Words = [[] for _ in scores]
    rescales, new_maxima, new_totals = [], [], []
    for half, (maximum, total) in enumerate(zip(maxima, totals, strict=True)):
        mine = [each[2 * half : 2 * half + 2] for each in scores]
        largest = [arith.maximumf(*pair) for pair in mine]
        while len(largest) > 1:
            largest = [*largest[2:], arith.maximumf(*largest[:2])]
        new = arith.maximumf(maximum, ptx.quad_reduce(arith.maximumf, largest[0]))
        rescale = ptx.exp2(arith.subf(maximum, new))
        powers = [[ptx.exp2(arith.subf(score, new)) for score in pair] for pair in mine]
        for weight, pair in zip(weights, powers, strict=True):
            weight += pair
        rescales.append(rescale)
        new_maxima.append(new)
        sums = ptx.tree_sum([each for pair in powers for each in pair])
        new_totals.append(arith.addf(arith.mulf(total, rescale), sums))
    return weights, rescales, new_maxima, new_totals


def _multiply(plan: DecodePlan, sums: list[Value], weights: Words, values: Words) -> list[Value]:
    """Adds weights times values.

    The thread has four rows of every 16 places; numbers of adjacent rows are paired. Column g of product i is column
    8·g + i of each 64.
    """
    sums = list(sums)
    zero = ptx.const(0)
    across = plan.width // 64
    for sixteen in range(plan.warp_tile // 16):
        packed = [
            [ptx.pack(*pair[2 * half : 2 * half + 2]) if half < plan.eights else zero for half in (0, 1)]
            for pair in weights[2 * sixteen : 2 * sixteen + 2]
        ]
        a = [*packed[0], *packed[1]]
        for j in range(across):
            rows = values[4 * (across * sixteen + j) :][:4]
            for i in range(8):
                selector = "0x7632" if i % 2 else "0x5410"
                text = f"prmt.b32 $0, $1, $2, {selector};"
                b = [ptx.asm(text, [ptx.i32()], [rows[r][i // 2], rows[r + 1][i // 2]])[0] for r in (0, 2)]
                place = slice(4 * (8 * j + i), 4 * (8 * j + i) + 4)
                sums[place] = ptx.mma(sums[place], a, b)
    return sums
