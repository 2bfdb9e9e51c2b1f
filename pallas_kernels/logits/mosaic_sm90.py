"""A row's logits summed up in one kernel for Hopper: Pallas Mosaic GPU, JAX 0.11 and newer.

A cluster of blocks holds a row in its registers, so it is read once. The blocks exchange their largest logits; then
each adds up its exponentials, and block 0 the blocks' sums. How a row is spread over threads follows from its length
alone, so its bits do not depend on how many rows there are.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.logits.summary import Summary
from pallas_kernels.ptx import Condition, Value, rows

MOST_LOGITS = 1 << 18  # of a row: 64 in each thread of eight blocks
_NONE = 1 << 20  # the place of a logit that there is not: beyond all others


def supports(logits_BV: jax.Array) -> bool:
    """Whether `summary` takes these operands."""
    B, V = logits_BV.shape
    return logits_BV.dtype == jnp.float32 and B > 0 and 0 < V <= MOST_LOGITS


@jax.jit
def summary(logits_BV: jax.Array) -> Summary:
    """See `api.summary`. `supports` must hold for the operands."""
    B, V = logits_BV.shape
    layout = rows.RowLayout.of(1, V)
    entries = layout.blocks * layout.warps

    def logits_summary(*, row: Value, **at: Value) -> None:
        thread = rows.RowThread.of(layout, at["mbarriers"])
        thread.prepare([entries, 2 * entries])
        _Summing(thread, at, row, V).run()

    mailboxes = {name: rows.shared_floats(entries) for name in ("largest_of", "total_of", "token_of")}
    results = {"largest": jnp.float32, "token": jnp.int32, "total": jnp.float32}
    out = ptx.launch(
        logits_summary,
        {"logits": logits_BV},
        {name: jax.ShapeDtypeStruct((B,), dtype) for name, dtype in results.items()},
        {"row": B},
        rows.exchange_memory(2) | mailboxes,
        cluster=layout.blocks,
        warpgroups=layout.threads // 128,
    )
    return Summary(out["largest"], out["token"], out["total"])


@dataclasses.dataclass(frozen=True)
class _Summing:
    """What a thread does."""

    thread: rows.RowThread
    at: Mapping[str, Value]  # addresses of "logits", the results, and a mailbox for what each warp finds of each
    row: Value
    logits: int  # V

    @property
    def _entries(self) -> int:
        """Warps of all blocks: numbers in a mailbox."""
        return self.thread.layout.blocks * self.thread.layout.warps

    def run(self) -> None:
        """Writes the row's results."""
        layout, numbers = self.thread.layout, self._load()
        self.thread.wait_prepared()
        lane_of_block = arith.andi(self.thread.lane, ptx.const(layout.blocks - 1))
        largest = _over_warp(arith.maximumf, _reduced(arith.maximumf, numbers))
        self._send(0, "largest_of", lane_of_block, largest, ptx.less(self.thread.lane, layout.blocks))
        self.thread.receive(0)
        of_warps = self._received("largest_of", -math.inf)
        largest = _over_warp(arith.maximumf, _reduced(arith.maximumf, of_warps))

        first = ptx.less(self.thread.lane, 1)
        self._send(1, "total_of", ptx.const(0), ptx.warp_sum(_total(numbers, largest)), first)
        token = arith.bitcast(ptx.f32(), _least(self._token(numbers, largest)))
        self._send(1, "token_of", ptx.const(0), token, first)
        if layout.blocks == 1:
            self.thread.receive(1)
        # Block 0's first warp goes on alone.
        before = arith.ori(self.thread.rank, self.thread.warp)

        def finish() -> None:
            if layout.blocks > 1:
                self.thread.receive(1)
            total = ptx.warp_sum(ptx.tree_sum(self._received("total_of", 0.0)))
            tokens = self._received("token_of", 4 * _NONE)
            token = arith.minui(_least(_reduced(arith.minui, tokens)), ptx.const(self.logits - 1))
            for name, value in (("largest", largest), ("token", token), ("total", total)):
                ptx.store(ptx.offset(self.at[name], self.row, 4), [value], first)

        ptx.when(arith.cmpi(arith.CmpIPredicate.eq, before, ptx.const(0)), finish)

    def _load(self) -> list[Value]:
        """The thread's logits in ascending order, -inf where there is none: of V = 4·n in fours, else one at a time."""
        layout = self.thread.layout
        # Turns in which all threads have four logits, even those of the last block.
        whole = max(0, self.logits // 4 - (layout.blocks - 1) * layout.per) // layout.threads
        loaded: list[list[Value]] = []
        exists: list[list[Condition]] = []
        for turn in range(layout.turns):
            four = self.thread.float4(self.row, turn)
            at = four.at(self.at["logits"], 4)
            left = arith.subi(arith.subi(self.thread.count, ptx.const(1)), four.in_block)
            inside = [ptx.NotNegative(arith.subi(left, ptx.const(i))) for i in range(4)]
            exists.append([ptx.always()] * 4 if turn < whole else inside)
            if self.logits % 4 == 0:
                loaded.append(rows.load_float4(at, jnp.float32, exists[-1][0]))
            else:
                each = enumerate(exists[-1])
                loaded.append([rows.load_number(at, jnp.float32, is_there, shift=4 * i) for i, is_there in each])
        ptx.sync_warp()
        numbers = [number for words in loaded[:whole] for number in words]
        for words, conditions in zip(loaded[whole:], exists[whole:], strict=True):
            numbers += [ptx.where(*pair, -math.inf) for pair in zip(conditions, words, strict=True)]
        return numbers

    def _token(self, numbers: Sequence[Value], largest: Value) -> Value:
        """The first of the thread's logits that are as large as the largest, far beyond the row's end if none is."""
        place = ptx.const(_NONE)
        for i in reversed(range(len(numbers))):
            text = "{ .reg .pred p; setp.eq.f32 p, $1, $2; selp.b32 $0, $3, $4, p; }"
            (place,) = ptx.asm(text, [ptx.i32()], [numbers[i], largest, ptx.const(i), place])
        turn, i = ptx.divided(place, 4)
        in_block = ptx.add(self.thread.thread, ptx.mul(turn, self.thread.layout.threads))
        return ptx.add(self.thread.first, ptx.mul(in_block, 4), i)

    def _send(self, exchange: int, name: str, block: Value, value: Value, condition: Value) -> None:
        """Sends what the warp found to a block, which may be another one for each lane."""
        entry = ptx.add(ptx.mul(self.thread.rank, self.thread.layout.warps), self.thread.warp)
        mailbox = ptx.add(self.at[name], ptx.mul(entry, 4))
        self.thread.send(exchange, block, mailbox, value, condition)

    def _received(self, name: str, otherwise: float) -> list[Value]:
        """The lane's share of what all warps found; a float or an integer where there is nothing."""
        kind, missing = (
            (ptx.f32(), ptx.float32(otherwise)) if isinstance(otherwise, float) else (ptx.i32(), ptx.const(otherwise))
        )
        found = []
        for start in range(0, self._entries, 32):
            entry = ptx.add(self.thread.lane, start)
            exists = ptx.less(entry, self._entries)
            at = ptx.add(self.at[name], ptx.mul(entry, 4))
            (value,) = ptx.load(at, [kind], exists, space="shared")
            found.append(arith.select(exists, value, missing))
        return found


def _reduced(combine: Callable[[Value, Value], Value], values: Sequence[Value]) -> Value:
    values = list(values)
    while len(values) > 1:
        paired = [combine(*pair) for pair in zip(values[0::2], values[1::2], strict=False)]
        values = paired + values[len(values) & ~1 :]
    return values[0]


def _over_warp(combine: Callable[[Value, Value], Value], value: Value) -> Value:
    """Reduces the lanes' float32 numbers; each gets the result."""
    for distance in (16, 8, 4, 2, 1):
        value = combine(value, ptx.shuffle_xor(value, distance))
    return value


def _least(value: Value) -> Value:
    """The least of the lanes' 32-bit integers."""
    return ptx.asm("redux.sync.min.u32 $0, $1, 0xffffffff;", [ptx.i32()], [value], volatile=True)[0]


def _total(numbers: Sequence[Value], largest: Value) -> Value:
    """The sum of the exponentials of the thread's logits, relative to the largest."""
    log2_e = ptx.float32(math.log2(math.e))
    return ptx.tree_sum([ptx.exp2(arith.mulf(arith.subf(number, largest), log2_e)) for number in numbers])
