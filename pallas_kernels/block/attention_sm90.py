"""A thread's work in attention: its warp has one row of the cluster's head, and a share of the places.

The order of a row's sums depends on neither the number of rows nor on where its pages lie:

- its places before the new token's are units of 16, by position. A unit has a softmax of its own (`_Partial`);
- of a cluster of C blocks, block b has the units b, b + C, …. Those whose numbers in the block are the same modulo
  `_SLOTS` are merged one after the other, in a slot of shared memory;
- a block's slots are merged in order, then the blocks, and at last the new token.

How many warps share a row depends on the number of rows, and only decides who computes which units. What does not exist
is empty, and merging with it changes no bit. Products and sums are rounded as said here (`ptx.rounded_product`, `fma`),
whatever ptxas could contract.

The new token's key and value go straight from the product to the result, and also to the cache.
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
from pallas_kernels.ptx import Condition, NotNegative, Value

_BITS = PAGE.bit_length() - 1  # of a place in a page
_GROUPS = 4  # of eight lanes, each with one place of a load: 16 bytes a lane
_LOADS = 4  # of a unit's keys, and of its values
_UNIT = _GROUPS * _LOADS  # places; a page has whole units
_SLOTS = WARPS  # of a row in a block
_ENDS = 4 * PANEL  # bytes from a record's sums to its maximum and total
_FLOOR = -1e30  # of logits: finite, so that a row that sees nothing gives 0 and not NaN


class _Partial(NamedTuple):
    """A softmax over some places, to base 2, in a warp: each lane has the sums of two of the head's columns."""

    maximum: Value
    total: Value
    sums: list[Value]

    @classmethod
    def empty(cls) -> "_Partial":
        """Over no places."""
        return cls(ptx.float32(_FLOOR), ptx.float32(0.0), [ptx.float32(0.0)] * 2)

    @classmethod
    def merged(cls, partials: Sequence["_Partial"]) -> "_Partial":
        """Of all their places."""
        maximum = partials[0].maximum
        for each in partials[1:]:
            maximum = arith.maximumf(maximum, each.maximum)
        total, sums = ptx.float32(0.0), [ptx.float32(0.0)] * 2
        for each in partials:
            weight = ptx.exp2(arith.subf(each.maximum, maximum))
            total = ptx.fma(weight, each.total, total)
            sums = [ptx.fma(weight, *both) for both in zip(each.sums, sums, strict=True)]
        return cls(maximum, total, sums)

    @classmethod
    def load(cls, record: Value, pair: Value, condition: Condition) -> "_Partial":
        """From shared memory, with two of its columns; empty if the condition does not hold."""
        types = [ptx.f32()] * 2
        maximum, total = ptx.load(record, types, condition, space="shared", shift=_ENDS)
        sums = ptx.load(ptx.add(record, ptx.mul(pair, 8)), types, condition, space="shared")
        return cls(ptx.where(condition, maximum, _FLOOR), total, sums)

    def agreed(self) -> "_Partial":
        """With the first lane's maximum and total: it alone writes them, and others need not see that at once."""
        return self._replace(maximum=ptx.first_lane(self.maximum), total=ptx.first_lane(self.total))

    def store(self, record: Value, pair: Value, condition: Condition, is_first_lane: Condition) -> None:
        """Writes it to shared memory if the condition holds."""
        ptx.store(ptx.add(record, ptx.mul(pair, 8)), self.sums, condition, space="shared")
        ends = [self.maximum, self.total]
        ptx.store(record, ends, ptx.both(condition, is_first_lane), space="shared", shift=_ENDS)


class _Unit(NamedTuple):
    """16 places of a row."""

    number: Value  # of the block's
    place: Value  # the first
    left: Value  # places from the first one on that are before the new token's, if positive

    @property
    def exists(self) -> Condition:
        """Whether it has a place before the new token's."""
        return NotNegative(ptx.add(self.left, -1))

    def seen(self, group: Value) -> list[Condition]:
        """For each load, whether the place of this group of lanes is before the new token's."""
        of_group = arith.subi(self.left, group)
        return [NotNegative(ptx.add(of_group, -1 - _GROUPS * i)) for i in range(_LOADS)]


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
    """A thread's part in the attention of the cluster's head: its warp has one row and a share of its units."""

    thread: Thread
    at: dict[str, Value]  # addresses in global memory by name
    row: Value
    is_first: Value  # whether the warp is a row's first
    of_row: Value  # the warp's number among those of its row
    slots: Value  # address in shared memory of the row's first slot
    position: Value  # of the row's new token
    inside: Value  # byte offset of the lane's eighth of a row of 64 numbers
    words: list[_Word]
    page: Value  # the row's, of the lane's number

    @classmethod
    def of(cls, thread: Thread, at: dict[str, Value]) -> "Head":
        """Begins the loads that come before keys and values. `at`: the kernel's arrays in global memory."""
        warps = cls._warps(thread.plan)
        number = arith.shrui(thread.cluster.warp, ptx.const(warps.bit_length() - 1))
        is_row = ptx.less(number, thread.plan.rows)
        row = arith.minsi(number, ptx.const(thread.plan.rows - 1))
        (position,) = workspace_sm90.load(ptx.offset(at["positions"], row, 4), 1, is_row)
        # A warp without a row takes some other, but reads none of its places.
        position = arith.select(is_row, position, ptx.const(-1))
        position = arith.minsi(position, ptx.const(thread.plan.places))  # nothing beyond is read, whatever is asked for
        of_row = arith.andi(thread.cluster.warp, ptx.const(warps - 1))
        inside = ptx.mul(arith.andi(thread.cluster.lane, ptx.const(7)), 16)
        starts = range(0, thread.plan.rows * _Word.of_row, THREADS)
        words = [_Word.of(thread, at, ptx.add(thread.cluster.thread, start)) for start in starts]
        block = arith.minsi(thread.cluster.lane, ptx.const(thread.plan.pages - 1))
        entry = ptx.add(ptx.mul(row, thread.plan.pages), block)
        (page,) = workspace_sm90.load(ptx.offset(at["table"], entry, 4), 1, ptx.always())
        slots = ptx.shared_offset(thread.shared["sums"], number, _SLOTS * RECORD)
        is_first = ptx.both(is_row, ptx.less(of_row, 1))
        return cls(thread, at, row, is_first, of_row, slots, position, inside, words, page)

    @staticmethod
    def _warps(plan: BlockPlan) -> int:
        """Warps per block and row."""
        return WARPS // (1 << (plan.rows - 1).bit_length())

    @property
    def _units(self) -> int:
        """A warp's units per turn: more if few warps share the row's."""
        return 1 if self._warps(self.thread.plan) >= 4 else 2

    @property
    def step(self) -> int:
        """Places per turn of all warps that share a row."""
        return _UNIT * self._units * self._warps(self.thread.plan) * self.thread.plan.blocks

    def _turn(self, turn: Value) -> list[_Unit]:
        """The warp's units in a turn."""
        thread = self.thread
        first = ptx.mul(ptx.add(ptx.mul(turn, self._warps(thread.plan)), self.of_row), self._units)
        units = []
        for i in range(self._units):
            number = ptx.add(first, i)
            place = ptx.mul(ptx.add(ptx.mul(number, thread.plan.blocks), thread.rank), _UNIT)
            units.append(_Unit(number, place, arith.subi(self.position, place)))
        return units

    @property
    def _group(self) -> Value:
        """The lane's, of eight lanes."""
        return arith.shrui(self.thread.cluster.lane, ptx.const(3))

    def load(self, turn: Value) -> list[Value]:
        """Begins to load a turn's keys and values, if there are any: four words per load."""
        units, words = self._turn(turn), []
        numbers = [self._number(unit) for unit in units]
        for name in "kv":
            lane_at = ptx.offset(self.at[name], self.inside, 1)
            for unit, number in zip(units, numbers, strict=True):
                at = ptx.offset(lane_at, number, 2 * PANEL)
                for i, is_seen in enumerate(unit.seen(self._group)):
                    words += workspace_sm90.load(at, 4, is_seen, shift=2 * PANEL * _GROUPS * i)
        ptx.sync_warp()
        return words

    def _number(self, unit: _Unit) -> Value:
        """The number in the pool of the lane's place of a unit's first load."""
        plan, block = self.thread.plan, arith.shrui(unit.place, ptx.const(_BITS))
        page = ptx.from_lane(self.page, arith.minsi(block, ptx.const(31)))
        of_head = ptx.mul(ptx.add(ptx.mul(page, plan.panels), self.thread.panel), PAGE)
        in_page = arith.andi(unit.place, ptx.const(PAGE - 1))
        return ptx.add(of_head, in_page, self._group)

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
        self._keep_turn(query, ptx.const(0), first.words, is_first=True)

        def turn(i: Value, words: list[Value]) -> list[Value]:
            following = self.load(ptx.add(i, 2))
            self._keep_turn(query, ptx.add(i, 1), words)
            return following

        if more:
            left = arith.maxsi(ptx.add(self.position, -1), ptx.const(0))
            ptx.loop(arith.divui(left, ptx.const(self.step)), following, turn)
        ptx.sync_block()
        self._send_record(exchange)

    def _score(self, query: list[Value], key: list[Value]) -> Value:
        """To a power of two, in each of the eight lanes that have the key."""
        product = ptx.rounded_product(query[0], key[0])
        for pair in zip(query[1:], key[1:], strict=True):
            product = ptx.fma(*pair, product)
        for distance in (4, 2, 1):
            product = arith.addf(product, ptx.shuffle_xor(product, distance))
        return ptx.rounded_product(product, ptx.float32(self.thread.plan.scale * math.log2(math.e)))

    def _part(self, part: int) -> list[Value]:
        """The lane's eight numbers of the row's query, key or value."""
        row_at = ptx.shared_offset(self.thread.shared["qkv"], self.row, QKV_BYTES)
        return _floats(ptx.load_shared(ptx.add(row_at, self.inside), [ptx.i32()] * 4, shift=2 * PANEL * part))

    def _keep_turn(self, query: list[Value], turn: Value, words: list[Value], *, is_first: bool = False) -> None:
        """Merges each of a turn's units into its slot. In the first turn, there is nothing in the slots yet."""
        lane = self.thread.cluster.lane
        # What the lane keeps in `_over_groups`, of the eight columns that it has before.
        low, high = (arith.andi(arith.shrui(lane, ptx.const(bit)), ptx.const(1)) for bit in (3, 4))
        pair = ptx.add(ptx.mul(arith.andi(lane, ptx.const(7)), 4), ptx.mul(high, 2), low)
        fours = [_floats(words[i : i + 4]) for i in range(0, len(words), 4)]
        keys, values = fours[: len(fours) // 2], fours[len(fours) // 2 :]
        units, partials = self._turn(turn), []
        for i, unit in enumerate(units):
            own = slice(_LOADS * i, _LOADS * (i + 1))
            partials.append(self._partial(query, keys[own], values[own], unit.seen(self._group)))
        slots = [arith.andi(unit.number, ptx.const(_SLOTS - 1)) for unit in units]
        records = [ptx.add(self.slots, ptx.mul(slot, RECORD)) for slot in slots]
        before = [_Partial.empty()] * len(units)
        if not is_first:
            before = [
                _Partial.load(record, pair, NotNegative(ptx.add(unit.number, -_SLOTS))).agreed()
                for unit, record in zip(units, records, strict=True)
            ]
        for unit, record, *both in zip(units, records, before, partials, strict=True):
            _Partial.merged(both).store(record, pair, unit.exists, ptx.less(lane, 1))

    def _partial(
        self, query: list[Value], keys: list[list[Value]], values: list[list[Value]], seen: Sequence[Condition]
    ) -> _Partial:
        """A unit's softmax. Keys and values that are not seen are 0."""
        scores = [
            ptx.where(is_seen, self._score(query, key), -math.inf) for key, is_seen in zip(keys, seen, strict=True)
        ]
        maximum = ptx.float32(_FLOOR)
        for score in scores:
            maximum = arith.maximumf(maximum, score)
        for distance in (8, 16):
            maximum = arith.maximumf(maximum, ptx.shuffle_xor(maximum, distance))
        weights = [ptx.exp2(arith.subf(score, maximum)) for score in scores]
        sums = [ptx.rounded_product(weights[0], each) for each in values[0]]
        for weight, value in zip(weights[1:], values[1:], strict=True):
            sums = [ptx.fma(weight, *both) for both in zip(value, sums, strict=True)]
        return _Partial(maximum, ptx.warp_sum(ptx.tree_sum(weights), 8), self._over_groups(sums))

    def _over_groups(self, sums: list[Value]) -> list[Value]:
        """Adds up the four groups' sums of eight columns each; each lane keeps two columns."""
        for distance in (16, 8):
            is_upper = ptx.less(0, arith.andi(self.thread.cluster.lane, ptx.const(distance)))
            halves = sums[: len(sums) // 2], sums[len(sums) // 2 :]
            kept, sent = (
                [arith.select(is_upper, *both) for both in zip(*pair, strict=True)] for pair in (halves[::-1], halves)
            )
            sums = [arith.addf(own, ptx.shuffle_xor(each, distance)) for own, each in zip(kept, sent, strict=True)]
        return sums

    def _send_record(self, exchange: int) -> None:
        """Merges and sends the block's part of each row, one warp per row."""
        thread, lane = self.thread, self.thread.cluster.lane
        last = ptx.add(self.position, -1, ptx.mul(thread.rank, -_UNIT))  # place, from the block's first one on
        partials = []
        for slot in range(_SLOTS):  # if not even its first unit exists, it was perhaps never written
            exists = NotNegative(ptx.add(last, -_UNIT * thread.plan.blocks * slot))
            partials.append(_Partial.load(ptx.add(self.slots, RECORD * slot), lane, exists))
        merged = _Partial.merged(partials)
        number = ptx.add(ptx.mul(thread.rank, thread.plan.rows), self.row)
        to = ptx.shared_offset(thread.shared["records"], number, RECORD)
        first_lane = ptx.both(self.is_first, ptx.less(lane, 1))
        for at, value, condition in (
            (ptx.add(to, ptx.mul(lane, 8)), merged.sums[0], self.is_first),
            (ptx.add(to, ptx.mul(lane, 8), 4), merged.sums[1], self.is_first),
            (ptx.add(to, _ENDS), merged.maximum, first_lane),
            (ptx.add(to, _ENDS + 4), merged.total, first_lane),
        ):
            thread.cluster.send(exchange, ptx.const(0), at, value, condition)

    def finish(self, exchange: int, heads: Value) -> None:
        """Writes the rows' results to `heads`, [T, D] bfloat16 of all clusters; in the cluster's first block only."""
        thread, plan, lane = self.thread, self.thread.plan, self.thread.cluster.lane
        newest = self._new_token()
        thread.cluster.receive(exchange)
        record = ptx.shared_offset(thread.shared["records"], self.row, RECORD)
        partials = [
            _Partial.load(ptx.add(record, plan.rows * RECORD * block), lane, ptx.always())
            for block in range(plan.blocks)
        ]
        merged = _Partial.merged([*partials, newest])
        # Without keys the sum is 0, and so is the result.
        total = arith.maximumf(merged.total, ptx.float32(math.ldexp(1.0, -126)))
        mean = [ptx.divide(each, total) for each in merged.sums]
        column = ptx.add(ptx.mul(thread.panel, PANEL // 2), lane)
        to = ptx.offset(heads, ptx.add(ptx.mul(self.row, plan.width // 2), column), 4)
        workspace_sm90.store(to, ptx.pack(*mean), self.is_first)

    def _new_token(self) -> _Partial:
        """The softmax over the row's new token alone, if there is one."""
        exists = NotNegative(self.position)
        score = self._score(self._part(0), self._part(1))
        row_at = ptx.shared_offset(self.thread.shared["qkv"], self.row, QKV_BYTES)
        at = ptx.add(row_at, ptx.mul(self.thread.cluster.lane, 4))
        value = _floats(ptx.load_shared(at, [ptx.i32()], shift=2 * PANEL * 2))
        return _Partial(
            ptx.where(exists, score, _FLOOR),
            ptx.where(exists, ptx.float32(1.0)),
            [ptx.where(exists, each) for each in value],
        )


def _floats(words: list[Value]) -> list[Value]:
    return [half for word in words for half in ptx.halves(word)]
