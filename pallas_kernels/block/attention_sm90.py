"""What a thread does in attention: of the cluster's head, its warp has one row and a share of the places.

The new token's key and value go from the product to the scores without a detour, and to the cache.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx, rows
from pallas_kernels.block import memory_sm90
from pallas_kernels.block.memory_sm90 import number
from pallas_kernels.block.plan_sm90 import QKV, QKV_BYTES, RECORD, THREADS, WARPS, Plan
from pallas_kernels.block.stream import STRIP
from pallas_kernels.block.tiles_sm90 import Here, inbox_pair
from pallas_kernels.ptx import Value

_AT_ONCE = 4  # places that a warp loads together, 16 bytes a lane
_FLOOR = -1e30  # of logits: finite, so that what sees nothing gives 0 and not NaN

_Place = tuple[Value, list[Value]]  # a score, and the lane's eight numbers of the value


class _Softmax(NamedTuple):
    """A running softmax to powers of two, of a row: a lane has eight sums, over the places of its eight lanes."""

    maximum: Value
    total: Value
    sums: list[Value]

    def with_places(self, scores: Sequence[Value], values: Sequence[list[Value]]) -> "_Softmax":
        """With some more places, whose scores the warp's lanes know in groups of eight."""
        maximum = self.maximum
        for score in scores:
            maximum = arith.maximumf(maximum, score)
        for distance in (8, 16):
            maximum = arith.maximumf(maximum, _exchanged(maximum, distance))
        rescale = memory_sm90.power(arith.subf(self.maximum, maximum))
        total = arith.mulf(self.total, rescale)
        sums = [arith.mulf(each, rescale) for each in self.sums]
        for score, value in zip(scores, values, strict=True):
            weight = memory_sm90.power(arith.subf(score, maximum))
            total = arith.addf(total, weight)
            sums = [memory_sm90.fma(weight, *both) for both in zip(value, sums, strict=True)]
        return _Softmax(maximum, total, sums)


@dataclasses.dataclass(frozen=True)
class _Word:
    """Two numbers of a row's queries, keys and values, which a thread sums up."""

    exists: Value  # 1, or 0 for a thread without a word
    row: Value
    number: Value  # in the row
    part: Value  # 0 of the query, 1 of the key, 2 of the value
    pair: Value  # number in the part
    bias: Value
    position: Value  # of the row's new token

    of_row = QKV * STRIP // 2  # words

    @classmethod
    def of(cls, here: Here, at: dict[str, Value], number_of: Value) -> "_Word":
        """Begins to load what the sum takes."""
        exists = ptx.less(number_of, here.plan.rows * cls.of_row)
        row, number_in_row = (op(number_of, ptx.const(cls.of_row)) for op in (arith.divui, arith.remui))
        row = arith.minsi(row, ptx.const(here.plan.rows - 1))
        part, pair = (op(number_in_row, ptx.const(STRIP // 2)) for op in (arith.divui, arith.remui))
        column = ptx.add(ptx.mul(ptx.add(ptx.mul(part, here.plan.strips), here.strip), STRIP // 2), pair)
        (bias,) = memory_sm90.load(ptx.offset(at["qkv.bias"], column, 4), 1, exists)
        (position,) = memory_sm90.load(ptx.offset(at["positions"], row, 4), 1, exists)
        return cls(exists, row, number_in_row, part, pair, bias, position)


@dataclasses.dataclass(frozen=True)
class Head:
    """A thread's part in the attention of the cluster's head: its warp has one row, and a share of its places."""

    here: Here
    at: dict[str, Value]  # addresses in global memory by name
    row: Value
    position: Value  # of the row's new token
    first: Value  # the warp's first place
    inside: Value  # bytes to the lane's eighth of a row of 64 numbers
    words: list[_Word]

    @classmethod
    def of(cls, here: Here, at: dict[str, Value]) -> "Head":
        """Begins to load what comes before keys and values. `at`: the kernel's arrays in global memory."""
        warps = cls._warps(here.plan)
        row = arith.shrui(here.place.warp, ptx.const(warps.bit_length() - 1))
        is_row = ptx.less(row, here.plan.rows)
        row = arith.minsi(row, ptx.const(here.plan.rows - 1))
        (position,) = memory_sm90.load(ptx.offset(at["positions"], row, 4), 1, is_row)
        # A warp without a row takes one, but nothing of it.
        is_row = arith.cmpi(arith.CmpIPredicate.ne, is_row, ptx.const(0))
        position = arith.select(is_row, position, ptx.const(-1))
        position = arith.minsi(position, ptx.const(here.plan.places))  # nothing beyond is read, whatever is asked for
        of_row = arith.andi(here.place.warp, ptx.const(warps - 1))
        first = ptx.mul(ptx.add(ptx.mul(here.rank, warps), of_row), _AT_ONCE)
        inside = ptx.mul(arith.andi(here.place.lane, ptx.const(7)), 16)
        starts = range(0, here.plan.rows * _Word.of_row, THREADS)
        words = [_Word.of(here, at, ptx.add(here.place.thread, start)) for start in starts]
        return cls(here, at, row, position, first, inside, words)

    @staticmethod
    def _warps(plan: Plan) -> int:
        """Of a block, for each row."""
        return WARPS // (1 << (plan.rows - 1).bit_length())

    @property
    def _loads(self) -> int:
        """Of keys, and of values, of a warp in a turn. Few warps have more turns, and need more on the way."""
        return 4 if self._warps(self.here.plan) >= 4 else 8

    @property
    def _together(self) -> int:
        """Places that all warps of a row load together, next to each other: so each has its share of a short cache."""
        return _AT_ONCE * self._warps(self.here.plan) * self.here.plan.blocks

    @property
    def step(self) -> int:
        """Places of a turn."""
        return self._loads * self._together

    def _there(self, turn: Value) -> list[Value]:
        """Of each load of a turn, 1 where the lane's place is before the new token's, else 0."""
        first = ptx.add(self.first, ptx.mul(turn, self.step), arith.shrui(self.here.place.lane, ptx.const(3)))
        return [ptx.less(ptx.add(first, self._together * i), self.position) for i in range(self._loads)]

    def load(self, turn: Value) -> list[Value]:
        """Begins to load a turn's keys and values, where there are some: of each load four words."""
        here = self.here
        place = ptx.add(self.first, ptx.mul(turn, self.step), arith.shrui(here.place.lane, ptx.const(3)))
        pair = ptx.add(ptx.mul(self.row, here.plan.strips), here.strip)
        place = ptx.add(ptx.mul(pair, here.plan.places), place)
        words = []
        for name in "kv":
            start = ptx.offset(ptx.offset(self.at[name], place, 2 * STRIP), self.inside, 1)
            for i, is_there in enumerate(self._there(turn)):
                shift = ptx.const(2 * STRIP * self._together * i, ptx.i64())
                words += memory_sm90.load(arith.addi(start, shift), 4, is_there)
        rows.issue()
        return words

    def sum_up(self, exchange: int) -> None:
        """Puts the rows' queries, keys and values together, and the last two into the cache. All threads meet."""
        here = self.here
        here.place.receive(exchange)
        for word in self.words:
            sums = inbox_pair(here, word.part, word.row, word.pair)
            total = ptx.pack(*(arith.addf(*both) for both in zip(sums, ptx.halves(word.bias), strict=True)))
            row_at = ptx.offset32(here.shared["qkv"], word.row, QKV_BYTES)
            memory_sm90.keep(ptx.add(row_at, ptx.mul(word.number, 4)), [total], word.exists)
            self._keep(word, total)
        ptx.asm("bar.sync 0;", [], [])

    def _keep(self, word: _Word, total: Value) -> None:
        """Writes a word of keys or values to its place in the cache, in the cluster's last block."""
        here, plan = self.here, self.here.plan
        is_mine = arith.andi(word.exists, ptx.less(plan.blocks - 2, here.rank))
        has_place = arith.andi(ptx.less(-1, word.position), ptx.less(word.position, plan.places))
        place = ptx.add(ptx.mul(ptx.add(ptx.mul(word.row, plan.strips), here.strip), plan.places), word.position)
        for part, name in ((1, "k"), (2, "v")):
            is_part = arith.andi(ptx.less(word.part, part + 1), ptx.less(part - 1, word.part))
            to = ptx.offset(ptx.offset(self.at[name], place, 2 * STRIP), word.pair, 4)
            memory_sm90.store(to, total, arith.andi(arith.andi(is_mine, has_place), is_part))

    def attend(self, first: list[Value], exchange: int) -> None:
        """Sends the cluster's first block the block's part of each row. `first`: what the first turn has loaded."""
        query = self._part(0)
        more = self.here.plan.places > self.step
        following = self.load(ptx.const(1)) if more else []
        softmax = self._with_turn(
            _Softmax(number(_FLOOR), number(0.0), [number(0.0)] * 8),
            query,
            ptx.const(0),
            first,
            [self._new_token(query)],
        )

        def turn(i: Value, carry: list[Value]) -> list[Value]:
            following = self.load(ptx.add(i, 2))
            old = _Softmax(carry[0], carry[1], carry[2:10])
            softmax = self._with_turn(old, query, ptx.add(i, 1), carry[10:])
            return [softmax.maximum, softmax.total, *softmax.sums, *following]

        if more:
            left = arith.maxsi(ptx.add(self.position, -1), ptx.const(0))  # turns after the first
            carry = [softmax.maximum, softmax.total, *softmax.sums, *following]
            carry = ptx.loop(arith.divui(left, ptx.const(self.step)), carry, turn)
            softmax = _Softmax(carry[0], carry[1], carry[2:10])
        self._keep_record(softmax)
        ptx.asm("bar.sync 0;", [], [])
        self._send_record(exchange)

    def _score(self, query: list[Value], key: list[Value]) -> Value:
        """To a power of two, in each of the eight lanes that have the key."""
        product = arith.mulf(query[0], key[0])
        for pair in zip(query[1:], key[1:], strict=True):
            product = memory_sm90.fma(*pair, product)
        for distance in (4, 2, 1):
            product = arith.addf(product, _exchanged(product, distance))
        return arith.mulf(product, number(self.here.plan.scale * math.log2(math.e)))

    def _part(self, wide: int) -> list[Value]:
        """The lane's eight numbers of the row's query, key or value."""
        row_at = ptx.offset32(self.here.shared["qkv"], self.row, QKV_BYTES)
        at = ptx.add(row_at, 2 * STRIP * wide, self.inside)
        text = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
        return _floats(ptx.asm(text, [ptx.i32()] * 4, [at], volatile=True))

    def _with_turn(
        self, old: _Softmax, query: list[Value], turn: Value, words: list[Value], more: Sequence[_Place] = ()
    ) -> _Softmax:
        """With the places of a turn, and some more."""
        fours = [words[4 * each : 4 * each + 4] for each in range(2 * self._loads)]
        keys, values = (list(map(_floats, fours[start : start + self._loads])) for start in (0, self._loads))
        scores = [
            memory_sm90.where(is_there, self._score(query, key), -math.inf)
            for key, is_there in zip(keys, self._there(turn), strict=True)
        ]
        more_scores, more_values = zip(*more, strict=True) if more else ((), ())
        return old.with_places([*scores, *more_scores], [*values, *more_values])

    def _new_token(self, query: list[Value]) -> _Place:
        """In eight lanes of one warp of the cluster; for all others it is a place without weight."""
        lane = self.here.place.lane
        is_mine = arith.andi(arith.andi(ptx.less(self.first, 1), ptx.less(lane, 8)), ptx.less(-1, self.position))
        return memory_sm90.where(is_mine, self._score(query, self._part(1)), -math.inf), self._part(2)

    def _keep_record(self, softmax: _Softmax) -> None:
        """Puts the warp's softmax where the block's warps put theirs together."""
        lane = self.here.place.lane
        total, *sums = (ptx.warp_sum(each, 8) for each in (softmax.total, *softmax.sums))
        record = ptx.offset32(self.here.shared["sums"], self.here.place.warp, RECORD)
        at = ptx.add(record, ptx.mul(lane, 32))
        memory_sm90.keep(at, sums[:4], ptx.less(lane, 8))
        memory_sm90.keep(ptx.add(at, 16), sums[4:], ptx.less(lane, 8))
        memory_sm90.keep(ptx.add(record, 4 * STRIP), [softmax.maximum, total], ptx.less(lane, 1))

    def _send_record(self, exchange: int) -> None:
        """Sends what the block's warps have of a row, by one warp a row."""
        here, lane = self.here, self.here.place.lane
        row, is_row = here.own_row()
        warps = self._warps(here.plan)
        records = ptx.offset32(here.shared["sums"], row, warps * RECORD)
        maximum, total, sums = self._merged(records, [RECORD * warp for warp in range(warps)])
        to = ptx.offset32(here.shared["records"], ptx.add(ptx.mul(here.rank, here.plan.rows), row), RECORD)
        first_lane = arith.andi(is_row, ptx.less(lane, 1))
        ends = 4 * STRIP
        for at, value, where in (
            (ptx.add(to, ptx.mul(lane, 8)), sums[0], is_row),
            (ptx.add(to, ptx.mul(lane, 8), 4), sums[1], is_row),
            (ptx.add(to, ends), maximum, first_lane),
            (ptx.add(to, ends + 4), total, first_lane),
        ):
            here.place.send(exchange, ptx.const(0), at, value, where)

    def _merged(self, records: Value, shifts: list[int]) -> tuple[Value, Value, list[Value]]:
        """Several softmaxes of a row as one: the maximum, the total and the sums of the lane's two columns."""
        pair = ptx.add(records, ptx.mul(self.here.place.lane, 8))
        ends = [memory_sm90.load_pair(ptx.add(records, shift + 4 * STRIP)) for shift in shifts]
        all_sums = [memory_sm90.load_pair(ptx.add(pair, shift)) for shift in shifts]
        maximum = ends[0][0]
        for each, _ in ends[1:]:
            maximum = arith.maximumf(maximum, each)
        total, sums = number(0.0), [number(0.0)] * 2
        for (own, own_total), own_sums in zip(ends, all_sums, strict=True):
            weight = memory_sm90.power(arith.subf(own, maximum))
            total = memory_sm90.fma(weight, own_total, total)
            sums = [memory_sm90.fma(weight, *both) for both in zip(own_sums, sums, strict=True)]
        return maximum, total, sums

    def finish(self, exchange: int, heads: Value) -> None:
        """Writes what has come of the rows to the heads of all, [T, D] bfloat16, in the cluster's first block."""
        here, plan = self.here, self.here.plan
        row, is_row = here.own_row()
        here.place.receive(exchange)
        records = ptx.offset32(here.shared["records"], row, RECORD)
        _, total, sums = self._merged(records, [plan.rows * RECORD * block for block in range(plan.blocks)])
        # Without keys the sum is 0, and so is the result.
        total = arith.maximumf(total, number(math.ldexp(1.0, -126)))
        mean = [ptx.asm("div.full.f32 $0, $1, $2;", [ptx.f32()], [each, total])[0] for each in sums]
        column = ptx.add(ptx.mul(here.strip, STRIP // 2), here.place.lane)
        to = ptx.offset(heads, ptx.add(ptx.mul(row, plan.width // 2), column), 4)
        memory_sm90.store(to, ptx.pack(*mean), is_row)


def _floats(words: list[Value]) -> list[Value]:
    return [half for word in words for half in ptx.halves(word)]


def _exchanged(value: Value, distance: int) -> Value:
    """The value of the lane at a distance."""
    text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;"
    return ptx.asm(text, [ptx.f32()], [value], volatile=True)[0]
