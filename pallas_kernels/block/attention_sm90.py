"""A thread's work in attention: its warp has one row of the cluster's head, and a share of the places.

The new token's key and value go straight from the product to the scores, and also to the cache.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.block import workspace_sm90
from pallas_kernels.block.plan_sm90 import QKV, QKV_BYTES, RECORD, THREADS, WARPS, BlockPlan
from pallas_kernels.block.products_sm90 import Thread, mailbox_pair
from pallas_kernels.block.stream import PANEL
from pallas_kernels.pages import PAGE
from pallas_kernels.ptx import Condition, Value

_BITS = PAGE.bit_length() - 1  # of a place in a page
_AT_ONCE = 4  # places that a warp loads together, 16 bytes a lane
_FLOOR = -1e30  # of logits: finite, so that a row that sees nothing gives 0 and not NaN

_Place = tuple[Value, list[Value]]  # a score, and the lane's eight numbers of the value


class _Softmax(NamedTuple):
    """A row's running softmax, to base 2: a lane has eight sums, over the places of its group of eight lanes."""

    maximum: Value
    total: Value
    sums: list[Value]

    def with_places(self, scores: Sequence[Value], values: Sequence[list[Value]]) -> "_Softmax":
        """Takes up more places, each known to a group of eight of the warp's lanes."""
        maximum = self.maximum
        for score in scores:
            maximum = arith.maximumf(maximum, score)
        for distance in (8, 16):
            maximum = arith.maximumf(maximum, ptx.shuffle_xor(maximum, distance))
        rescale = ptx.exp2(arith.subf(self.maximum, maximum))
        total = arith.mulf(self.total, rescale)
        sums = [arith.mulf(each, rescale) for each in self.sums]
        for score, value in zip(scores, values, strict=True):
            weight = ptx.exp2(arith.subf(score, maximum))
            total = arith.addf(total, weight)
            sums = [ptx.fma(weight, *both) for both in zip(value, sums, strict=True)]
        return _Softmax(maximum, total, sums)


class _First(NamedTuple):
    """What is loaded before a row's queries are known."""

    words: list[Value]  # of the first turn's keys and values
    pages: list[Value]  # where the new keys and values go, one for each `_Word`


@dataclasses.dataclass(frozen=True)
class _Word:
    """Two numbers of a row's queries, keys and values, which one thread sums up."""

    exists: Condition  # whether the thread has a word
    row: Value
    number: Value  # in the row
    part: Value  # 0 for the query, 1 for the key, 2 for the value
    pair: Value  # number in the part
    bias: Value
    position: Value  # of the row's new token

    of_row = QKV * PANEL // 2  # words per row

    @classmethod
    def of(cls, thread: Thread, at: dict[str, Value], number_of: Value) -> "_Word":
        """Begins to load the bias and the position."""
        exists = ptx.less(number_of, thread.plan.rows * cls.of_row)
        row, number_in_row = ptx.divided(number_of, cls.of_row)
        row = arith.minsi(row, ptx.const(thread.plan.rows - 1))
        part, pair = ptx.divided(number_in_row, PANEL // 2)
        column = ptx.add(ptx.mul(ptx.add(ptx.mul(part, thread.plan.panels), thread.panel), PANEL // 2), pair)
        (bias,) = workspace_sm90.load(ptx.offset(at["qkv.bias"], column, 4), 1, exists)
        (position,) = workspace_sm90.load(ptx.offset(at["positions"], row, 4), 1, exists)
        return cls(exists, row, number_in_row, part, pair, bias, position)


@dataclasses.dataclass(frozen=True)
class Head:
    """A thread's part in the attention of the cluster's head: its warp has one row and a share of its places."""

    thread: Thread
    at: dict[str, Value]  # addresses in global memory by name
    row: Value
    position: Value  # of the row's new token
    first: Value  # the warp's first place
    inside: Value  # byte offset of the lane's eighth of a row of 64 numbers
    words: list[_Word]
    page: Value  # the row's, of the lane's number

    @classmethod
    def of(cls, thread: Thread, at: dict[str, Value]) -> "Head":
        """Begins the loads that come before keys and values. `at`: the kernel's arrays in global memory."""
        warps = cls._warps(thread.plan)
        row = arith.shrui(thread.cluster.warp, ptx.const(warps.bit_length() - 1))
        is_row = ptx.less(row, thread.plan.rows)
        row = arith.minsi(row, ptx.const(thread.plan.rows - 1))
        (position,) = workspace_sm90.load(ptx.offset(at["positions"], row, 4), 1, is_row)
        # A warp without a row takes some other, but reads none of its places.
        position = arith.select(is_row, position, ptx.const(-1))
        position = arith.minsi(position, ptx.const(thread.plan.places))  # nothing beyond is read, whatever is asked for
        of_row = arith.andi(thread.cluster.warp, ptx.const(warps - 1))
        first = ptx.mul(ptx.add(ptx.mul(thread.rank, warps), of_row), _AT_ONCE)
        inside = ptx.mul(arith.andi(thread.cluster.lane, ptx.const(7)), 16)
        starts = range(0, thread.plan.rows * _Word.of_row, THREADS)
        words = [_Word.of(thread, at, ptx.add(thread.cluster.thread, start)) for start in starts]
        block = arith.minsi(thread.cluster.lane, ptx.const(thread.plan.pages - 1))
        entry = ptx.add(ptx.mul(row, thread.plan.pages), block)
        (page,) = workspace_sm90.load(ptx.offset(at["table"], entry, 4), 1, ptx.always())
        return cls(thread, at, row, position, first, inside, words, page)

    @staticmethod
    def _warps(plan: BlockPlan) -> int:
        """Warps per block and row."""
        return WARPS // (1 << (plan.rows - 1).bit_length())

    @property
    def _loads(self) -> int:
        """A warp's loads of keys, and of values, per turn: more if few warps share the row's places."""
        return 4 if self._warps(self.thread.plan) >= 4 else 8

    @property
    def _together(self) -> int:
        """Adjacent places that all warps of a row load together, so that each gets its share of a short cache."""
        return _AT_ONCE * self._warps(self.thread.plan) * self.thread.plan.blocks

    @property
    def step(self) -> int:
        """Places per turn."""
        return self._loads * self._together

    def _seen(self, turn: Value) -> list[Condition]:
        """For each load of a turn, whether the lane's place is before the new token's."""
        first = ptx.add(self.first, ptx.mul(turn, self.step), arith.shrui(self.thread.cluster.lane, ptx.const(3)))
        return [ptx.less(ptx.add(first, self._together * i), self.position) for i in range(self._loads)]

    def load(self, turn: Value) -> list[Value]:
        """Begins to load a turn's keys and values, if there are any: four words per load."""
        numbers = self._numbers(turn)
        words = []
        for name in "kv":
            lane_at = ptx.offset(self.at[name], self.inside, 1)
            places = [ptx.offset(lane_at, number, 2 * PANEL) for number in numbers]
            for at, is_seen in zip(places, self._seen(turn), strict=True):
                words += workspace_sm90.load(at, 4, is_seen)
        ptx.sync_warp()
        return words

    def _numbers(self, turn: Value) -> list[Value]:
        """The number in the pool of the place that each load of a turn reads."""
        thread, plan, of_lane = self.thread, self.thread.plan, arith.shrui(self.thread.cluster.lane, ptx.const(3))
        place = ptx.add(self.first, ptx.mul(turn, self.step))
        in_pool = ptx.add(ptx.mul(thread.panel, PAGE), of_lane)
        found = []
        for i in range(self._loads):  # four adjacent places are in one page
            here = ptx.add(place, self._together * i)
            page = ptx.from_lane(self.page, arith.minsi(arith.shrui(here, ptx.const(_BITS)), ptx.const(31)))
            in_page = arith.andi(here, ptx.const(PAGE - 1))
            found.append(ptx.add(ptx.mul(page, plan.panels * PAGE), in_pool, in_page))
        return found

    def sum_up(self, first: _First, exchange: int) -> None:
        """Sums up the rows' queries, keys and values, and caches the last two. Synchronises the block."""
        thread = self.thread
        thread.cluster.receive(exchange)
        for word, page in zip(self.words, first.pages, strict=True):
            sums = mailbox_pair(thread, word.part, word.row, word.pair)
            total = ptx.pack(*(arith.addf(*both) for both in zip(sums, ptx.halves(word.bias), strict=True)))
            row_at = ptx.shared_offset(thread.shared["qkv"], word.row, QKV_BYTES)
            ptx.store(ptx.add(row_at, ptx.mul(word.number, 4)), [total], word.exists, space="shared")
            self._keep(word, page, total)
        ptx.sync_block()

    def _keep(self, word: _Word, page: Value, total: Value) -> None:
        """Writes a word of keys or values to its place in the cache, in the cluster's last block."""
        thread, plan = self.thread, self.thread.plan
        is_mine = ptx.both(word.exists, ptx.less(plan.blocks - 2, thread.rank))
        has_place = ptx.both(ptx.less(-1, word.position), ptx.less(word.position, plan.places))
        place = arith.andi(word.position, ptx.const(PAGE - 1))
        place = ptx.add(ptx.mul(ptx.add(ptx.mul(page, plan.panels), thread.panel), PAGE), place)
        for part, name in ((1, "k"), (2, "v")):
            is_part = ptx.both(ptx.less(word.part, part + 1), ptx.less(part - 1, word.part))
            to = ptx.offset(ptx.offset(self.at[name], place, 2 * PANEL), word.pair, 4)
            workspace_sm90.store(to, total, ptx.both(is_mine, has_place, is_part))

    def load_first(self) -> _First:
        """Begins to load the first turn's keys and values, and the pages that new ones go to."""
        plan, pages = self.thread.plan, []
        for word in self.words:
            block = arith.minsi(arith.shrui(word.position, ptx.const(_BITS)), ptx.const(plan.pages - 1))
            entry = ptx.add(ptx.mul(word.row, plan.pages), arith.maxsi(block, ptx.const(0)))
            pages += workspace_sm90.load(ptx.offset(self.at["table"], entry, 4), 1, word.exists)
        return _First(self.load(ptx.const(0)), pages)

    def attend(self, first: _First, exchange: int) -> None:
        """Sends this block's part of each row to the cluster's first block."""
        query = self._part(0)
        more = self.thread.plan.places > self.step
        following = self.load(ptx.const(1)) if more else []
        softmax = self._with_turn(
            _Softmax(ptx.float32(_FLOOR), ptx.float32(0.0), [ptx.float32(0.0)] * 8),
            query,
            ptx.const(0),
            first.words,
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
        ptx.sync_block()
        self._send_record(exchange)

    def _score(self, query: list[Value], key: list[Value]) -> Value:
        """To a power of two, in each of the eight lanes that have the key."""
        product = arith.mulf(query[0], key[0])
        for pair in zip(query[1:], key[1:], strict=True):
            product = ptx.fma(*pair, product)
        for distance in (4, 2, 1):
            product = arith.addf(product, ptx.shuffle_xor(product, distance))
        return arith.mulf(product, ptx.float32(self.thread.plan.scale * math.log2(math.e)))

    def _part(self, wide: int) -> list[Value]:
        """The lane's eight numbers of the row's query, key or value."""
        row_at = ptx.shared_offset(self.thread.shared["qkv"], self.row, QKV_BYTES)
        at = ptx.add(row_at, 2 * PANEL * wide, self.inside)
        text = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
        return _floats(ptx.asm(text, [ptx.i32()] * 4, [at], volatile=True))

    def _with_turn(
        self, old: _Softmax, query: list[Value], turn: Value, words: list[Value], more: Sequence[_Place] = ()
    ) -> _Softmax:
        """Takes up the places of a turn, and `more`."""
        fours = [words[4 * each : 4 * each + 4] for each in range(2 * self._loads)]
        keys, values = (list(map(_floats, fours[start : start + self._loads])) for start in (0, self._loads))
        scores = [
            ptx.where(is_seen, self._score(query, key), -math.inf)
            for key, is_seen in zip(keys, self._seen(turn), strict=True)
        ]
        more_scores, more_values = zip(*more, strict=True) if more else ((), ())
        return old.with_places([*scores, *more_scores], [*values, *more_values])

    def _new_token(self, query: list[Value]) -> _Place:
        """The new token, as a place: in eight lanes of one warp of the cluster; in all others it has no weight."""
        lane = self.thread.cluster.lane
        is_mine = ptx.both(ptx.less(self.first, 1), ptx.less(lane, 8), ptx.less(-1, self.position))
        return ptx.where(is_mine, self._score(query, self._part(1)), -math.inf), self._part(2)

    def _keep_record(self, softmax: _Softmax) -> None:
        """Writes the warp's softmax to shared memory, where the block's are merged."""
        lane = self.thread.cluster.lane
        total, *sums = (ptx.warp_sum(each, 8) for each in (softmax.total, *softmax.sums))
        record = ptx.shared_offset(self.thread.shared["sums"], self.thread.cluster.warp, RECORD)
        at = ptx.add(record, ptx.mul(lane, 32))
        ptx.store(at, sums[:4], ptx.less(lane, 8), space="shared")
        ptx.store(ptx.add(at, 16), sums[4:], ptx.less(lane, 8), space="shared")
        ptx.store(ptx.add(record, 4 * PANEL), [softmax.maximum, total], ptx.less(lane, 1), space="shared")

    def _send_record(self, exchange: int) -> None:
        """Merges and sends the block's part of each row, one warp per row."""
        thread, lane = self.thread, self.thread.cluster.lane
        row, is_row = thread.own_row()
        warps = self._warps(thread.plan)
        records = ptx.shared_offset(thread.shared["sums"], row, warps * RECORD)
        maximum, total, sums = self._merged(records, [RECORD * warp for warp in range(warps)])
        to = ptx.shared_offset(thread.shared["records"], ptx.add(ptx.mul(thread.rank, thread.plan.rows), row), RECORD)
        first_lane = ptx.both(is_row, ptx.less(lane, 1))
        ends = 4 * PANEL
        for at, value, condition in (
            (ptx.add(to, ptx.mul(lane, 8)), sums[0], is_row),
            (ptx.add(to, ptx.mul(lane, 8), 4), sums[1], is_row),
            (ptx.add(to, ends), maximum, first_lane),
            (ptx.add(to, ends + 4), total, first_lane),
        ):
            thread.cluster.send(exchange, ptx.const(0), at, value, condition)

    def _merged(self, records: Value, shifts: list[int]) -> tuple[Value, Value, list[Value]]:
        """Merges several softmaxes of a row: the maximum, the total and the sums of the lane's two columns."""
        pair = ptx.add(records, ptx.mul(self.thread.cluster.lane, 8))
        ends = [ptx.load_shared(ptx.add(records, shift + 4 * PANEL), [ptx.f32()] * 2) for shift in shifts]
        all_sums = [ptx.load_shared(ptx.add(pair, shift), [ptx.f32()] * 2) for shift in shifts]
        maximum = ends[0][0]
        for each, _ in ends[1:]:
            maximum = arith.maximumf(maximum, each)
        total, sums = ptx.float32(0.0), [ptx.float32(0.0)] * 2
        for (each_maximum, each_total), each_sums in zip(ends, all_sums, strict=True):
            weight = ptx.exp2(arith.subf(each_maximum, maximum))
            total = ptx.fma(weight, each_total, total)
            sums = [ptx.fma(weight, *both) for both in zip(each_sums, sums, strict=True)]
        return maximum, total, sums

    def finish(self, exchange: int, heads: Value) -> None:
        """Writes the rows' results to `heads`, [T, D] bfloat16 of all clusters; in the cluster's first block only."""
        thread, plan = self.thread, self.thread.plan
        row, is_row = thread.own_row()
        thread.cluster.receive(exchange)
        records = ptx.shared_offset(thread.shared["records"], row, RECORD)
        _, total, sums = self._merged(records, [plan.rows * RECORD * block for block in range(plan.blocks)])
        # Without keys the sum is 0, and so is the result.
        total = arith.maximumf(total, ptx.float32(math.ldexp(1.0, -126)))
        mean = [ptx.divide(each, total) for each in sums]
        column = ptx.add(ptx.mul(thread.panel, PANEL // 2), thread.cluster.lane)
        to = ptx.offset(heads, ptx.add(ptx.mul(row, plan.width // 2), column), 4)
        workspace_sm90.store(to, ptx.pack(*mean), is_row)


def _floats(words: list[Value]) -> list[Value]:
    return [half for word in words for half in ptx.halves(word)]
