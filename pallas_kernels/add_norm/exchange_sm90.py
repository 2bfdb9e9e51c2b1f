"""A thread's part in adding up a row over devices: see `pallas_kernels.peers`."""

import dataclasses
from typing import Final

from jaxlib.mlir.dialects import arith

from pallas_kernels import peers, ptx
from pallas_kernels.ptx import Value, rows

_CANONICAL: Final = 0x7FFFFFFF  # what arithmetic gives for NaN


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What a thread sends and receives. All sends of a kernel come before its first `received`."""

    count: int  # devices
    box: int
    width: int  # D
    own: Value  # the address of the device's mailboxes
    rank: Value
    others: tuple[Value, ...]  # the addresses of all mailboxes, by rank; its own is among them and not used

    @classmethod
    def of(cls, given: peers.Peers, box: int, table: Value) -> "Exchange":
        """Loads what is needed to reach the others."""
        own = _words(table, 0)
        pairs = [_words(table, number) for number in range(2, 2 + given.count)]
        rank = ptx.load(ptx.shifted(table, 8), [ptx.i32()], ptx.always())[0]
        return cls(given.count, box, given.width, _address(own), rank, tuple(map(_address, pairs)))

    def is_first_of(self, sharers: int) -> Value | None:
        """Whether this device is the first of its group of `sharers`, by rank; None if every device is."""
        if sharers == 1:
            return None
        return arith.cmpi(arith.CmpIPredicate.eq, arith.remui(self.rank, ptx.const(sharers)), ptx.const(0))

    def send(self, four: rows.Float4, numbers: list[Value]) -> None:
        """Writes four numbers of the device's own sum into the others' mailboxes."""
        words = [_arithmetic(arith.bitcast(ptx.i32(), number)) for number in numbers]
        place = self._place(four, self.rank)
        for rank, mailbox in enumerate(self.others):
            away = arith.cmpi(arith.CmpIPredicate.ne, self.rank, ptx.const(rank))
            to = ptx.offset(mailbox, place, 4)
            ptx.store(to, words, ptx.both(four.exists, away), space="volatile.global")

    def received(self, four: rows.Float4, numbers: list[Value]) -> list[Value]:
        """The sums over devices, in the order of ranks, of what was sent and what the others sent."""
        total: list[Value] = []
        for rank in range(self.count):
            away = ptx.both(four.exists, arith.cmpi(arith.CmpIPredicate.ne, self.rank, ptx.const(rank)))
            at = ptx.offset(self.own, self._place(four, ptx.const(rank)), 4)
            words = ptx.arrived(at, peers.EMPTY, away)
            ptx.store(at, [ptx.const(peers.EMPTY)] * 4, away, space="volatile.global")
            sent = [arith.bitcast(ptx.f32(), word) for word in words]
            mine = arith.cmpi(arith.CmpIPredicate.eq, self.rank, ptx.const(rank))
            sent = [arith.select(mine, number, other) for number, other in zip(numbers, sent, strict=True)]
            total = sent if not total else [arith.addf(*pair) for pair in zip(total, sent, strict=True)]
        return total

    def _place(self, four: rows.Float4, rank: Value) -> Value:
        """Where in a device's mailboxes the numbers are that the device of a rank sends."""
        sender = ptx.add(rank, self.box * self.count)
        row = ptx.add(ptx.mul(sender, peers.MOST_ROWS), four.row)
        return ptx.add(ptx.mul(row, self.width), four.first)


def _words(table: Value, number: int) -> list[Value]:
    return ptx.load(table, [ptx.i32()] * 2, ptx.always(), shift=8 * number)


def _address(words: list[Value]) -> Value:
    (address,) = ptx.asm("mov.b64 $0, {$1, $2};", [ptx.values.i64()], words)
    return address


def _arithmetic(word: Value) -> Value:
    """The word, or NaN as arithmetic writes it for the one word that means an empty place."""
    empty = arith.cmpi(arith.CmpIPredicate.eq, word, ptx.const(peers.EMPTY))
    return arith.select(empty, ptx.const(_CANONICAL), word)
