"""Tokens grouped by their experts, in one kernel of one block, for Hopper: Pallas Mosaic GPU, JAX 0.11 and newer.

An expert's groups follow one another, so the place of a pair (token, one of its experts) is the first place of its
expert's groups plus the number of earlier pairs of that expert. A warp has consecutive pairs and counts them by expert,
32 at a time; then each expert adds up its counts over the warps, and the first warp the groups over the experts.
Nothing is added atomically, so the order of pairs is that of tokens, always.

Slots are filled in shared memory and then copied: written where they belong, each would be a transaction of its own.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.moe.routing import Groups, Routing, most_groups
from pallas_kernels.ptx import Condition, Value, rows

MOST_PAIRS = 8192
MOST_EXPERTS = 128
_MOST_SLOTS = 1 << 15  # of all groups: 128 KB
_MOST_THREADS = 1024


def supports(experts_TX: jax.Array, num_experts: int, slots: int) -> bool:
    """Whether `sorted_groups` takes these operands."""
    pairs = experts_TX.size
    return (
        experts_TX.dtype == jnp.int32
        and 0 < pairs <= MOST_PAIRS
        and 0 < num_experts <= MOST_EXPERTS
        and slots % 4 == 0
        and most_groups(pairs, num_experts, slots) * slots <= _MOST_SLOTS
    )


@dataclasses.dataclass(frozen=True)
class _GroupsPlan:
    """Everything that is known when the kernel is built."""

    pairs: int  # T · X
    choices: int  # X
    experts: int  # E
    slots: int  # M, of a group
    groups: int  # U

    @property
    def threads(self) -> int:
        """Of the block: as many as there are pairs, if it may have so many."""
        return min(_MOST_THREADS, -(-self.pairs // 128) * 128)

    @property
    def warps(self) -> int:
        """Of the block."""
        return self.threads // 32

    @property
    def turns(self) -> int:
        """Pairs of a thread."""
        return -(-self.pairs // self.threads)

    def shared(self) -> dict[str, int]:
        """Words in shared memory. Of experts there are `MOST_EXPERTS`, also if fewer exist."""
        of_experts = {name: MOST_EXPERTS for name in ("totals", "firsts", "ends")}
        return {"counts": self.warps * MOST_EXPERTS, **of_experts, "slots": self.groups * self.slots}


@partial(jax.jit, static_argnames=("num_experts", "largest"))
def sorted_groups(experts_TX: jax.Array, num_experts: int, largest: int) -> tuple[Routing, jax.Array]:
    """`routing.sorted_groups`, and how many slots of each group are used, int32. `supports` must hold."""
    (T, X), M = experts_TX.shape, largest
    U = most_groups(T * X, num_experts, M)
    plan = _GroupsPlan(T * X, X, num_experts, M, U)

    def moe_groups(**at: Value) -> None:
        _Grouping(plan, at, utils.thread_idx()).run()

    shapes = {"groups": (U,), "used": (U,), "rows": (U, M), "places": (T, X)}
    out = ptx.launch(
        moe_groups,
        {"experts": experts_TX},
        {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()},
        {"block": 1},
        {name: rows.shared_floats(size) for name, size in plan.shared().items()},
        warpgroups=plan.threads // 128,
    )
    return Routing(Groups(out["groups"], out["rows"]), out["places"]), out["used"]


@dataclasses.dataclass(frozen=True)
class _Pair:
    """One of a thread's pairs."""

    number: Value
    is_one: Value  # whether there are so many
    expert: Value
    exists: Value  # whether the expert does


@dataclasses.dataclass(frozen=True)
class _Grouping:
    """What a thread does."""

    plan: _GroupsPlan
    at: Mapping[str, Value]  # addresses of "experts", the results, and what is shared
    thread: Value  # its number in the block

    @property
    def lane(self) -> Value:
        """Its number in the warp."""
        return arith.andi(self.thread, ptx.const(31))

    @property
    def warp(self) -> Value:
        """The warp's number in the block."""
        return arith.shrui(self.thread, ptx.const(5))

    def run(self) -> None:
        """Writes the results."""
        pairs = self._load()
        self._clear()
        ptx.sync_block()
        ranks = [self._rank(pair) for pair in pairs]
        ptx.sync_block()
        ptx.when(ptx.less(self.thread, MOST_EXPERTS), self._add_warps)
        ptx.sync_block()
        ptx.when(ptx.less(self.warp, 1), self._add_groups)
        ptx.sync_block()
        for pair, rank in zip(pairs, ranks, strict=True):
            self._place(pair, rank)
        self._describe_groups()
        ptx.sync_block()
        self._copy_slots()

    def _load(self) -> list[_Pair]:
        """Begins to load the experts of the thread's pairs: a warp's are consecutive."""
        first = ptx.add(ptx.mul(self.warp, 32 * self.plan.turns), self.lane)
        numbers = [ptx.add(first, 32 * turn) for turn in range(self.plan.turns)]
        are_ones = [ptx.less(number, self.plan.pairs) for number in numbers]
        loaded = [
            ptx.load(ptx.offset(self.at["experts"], number, 4), [ptx.i32()], is_one)[0]
            for number, is_one in zip(numbers, are_ones, strict=True)
        ]
        ptx.sync_warp()
        pairs = []
        for number, is_one, expert in zip(numbers, are_ones, loaded, strict=True):
            exists = arith.cmpi(arith.CmpIPredicate.ult, expert, ptx.const(self.plan.experts))
            pairs.append(_Pair(number, is_one, expert, arith.andi(exists, is_one)))
        return pairs

    def _clear(self) -> None:
        """Counts become 0, one vector a thread, and slots empty."""
        zero, empty = ptx.const(0), ptx.const(-1)
        ptx.store(ptx.shared_offset(self.at["counts"], self.thread, 16), [zero] * 4, ptx.always(), space="shared")
        self._each_vector(lambda vector, condition: ptx.store(vector, [empty] * 4, condition, space="shared"))

    def _rank(self, pair: _Pair) -> Value:
        """How many earlier pairs of the warp have the expert; it is counted."""
        # Pairs without an expert are alike, too, but count nothing.
        (alike,) = ptx.asm("match.any.sync.b32 $0, $1, 0xffffffff;", [ptx.i32()], [self._key(pair)], volatile=True)
        before = arith.subi(arith.shli(ptx.const(1), self.lane), ptx.const(1))
        (earlier,) = ptx.asm("popc.b32 $0, $1;", [ptx.i32()], [arith.andi(alike, before)])
        is_last = arith.cmpi(arith.CmpIPredicate.eq, arith.shrui(alike, self.lane), ptx.const(1))
        count_at = self._count_of(pair)
        (count,) = ptx.load(count_at, [ptx.i32()], pair.exists, space="shared")
        rank = ptx.add(count, earlier)
        ptx.sync_warp()
        ptx.store(count_at, [ptx.add(rank, 1)], ptx.both(pair.exists, is_last), space="shared")
        ptx.sync_warp()
        return rank

    def _key(self, pair: _Pair) -> Value:
        return arith.select(pair.exists, pair.expert, ptx.const(-1))

    def _count_of(self, pair: _Pair) -> Value:
        """The address of the warp's count of the pair's expert."""
        return ptx.shared_offset(self.at["counts"], ptx.add(ptx.mul(self.warp, MOST_EXPERTS), pair.expert), 4)

    def _add_warps(self) -> None:
        """Each count becomes the sum of those of earlier warps: a thread has an expert."""
        at = ptx.shared_offset(self.at["counts"], self.thread, 4)
        shifts = [4 * MOST_EXPERTS * warp for warp in range(self.plan.warps)]
        counts = [ptx.load_shared(at, [ptx.i32()], shift=shift)[0] for shift in shifts]
        total = ptx.const(0)
        for shift, count in zip(shifts, counts, strict=True):
            ptx.store(at, [total], ptx.always(), space="shared", shift=shift)
            total = ptx.add(total, count)
        ptx.store(ptx.shared_offset(self.at["totals"], self.thread, 4), [total], ptx.always(), space="shared")

    def _add_groups(self) -> None:
        """The number of each expert's first group, and of the one after its last: four experts a lane."""
        counts = ptx.load_shared(ptx.shared_offset(self.at["totals"], self.lane, 16), [ptx.i32()] * 4)
        ends, total = [], ptx.const(0)
        for count in counts:
            total = ptx.add(total, arith.divui(ptx.add(count, self.plan.slots - 1), ptx.const(self.plan.slots)))
            ends.append(total)
        through = total  # this lane's and all earlier ones
        for distance in (1, 2, 4, 8, 16):
            before = ptx.from_lane(through, arith.maxsi(arith.subi(self.lane, ptx.const(distance)), ptx.const(0)))
            through = arith.select(ptx.less(self.lane, distance), through, ptx.add(through, before))
        before = arith.subi(through, total)
        ends = [ptx.add(before, end) for end in ends]
        for name, values in (("firsts", [before, *ends[:3]]), ("ends", ends)):
            at = ptx.shared_offset(self.at[name], self.lane, 16)
            ptx.store(at, values, ptx.always(), space="shared")

    def _place(self, pair: _Pair, rank: Value) -> None:
        """Writes the pair's place, and its token to that slot."""
        (earlier,) = ptx.load(self._count_of(pair), [ptx.i32()], pair.exists, space="shared")
        first_at = ptx.shared_offset(self.at["firsts"], pair.expert, 4)
        (first,) = ptx.load(first_at, [ptx.i32()], pair.exists, space="shared")
        place = ptx.add(ptx.mul(first, self.plan.slots), earlier, rank)
        token = arith.divui(pair.number, ptx.const(self.plan.choices))
        ptx.store(ptx.shared_offset(self.at["slots"], place, 4), [token], pair.exists, space="shared")
        place = arith.select(pair.exists, place, ptx.const(-1))
        ptx.store(ptx.offset(self.at["places"], pair.number, 4), [place], pair.is_one)

    def _describe_groups(self) -> None:
        """Writes each group's expert, the last for those at the end that are empty, and its number of used slots."""
        for start in range(0, self.plan.groups, self.plan.threads):
            group = ptx.add(self.thread, start)
            is_one = ptx.less(group, self.plan.groups)
            expert = ptx.const(0)  # the number of those whose groups end before
            for step in (64, 32, 16, 8, 4, 2, 1):
                at = ptx.shared_offset(self.at["ends"], expert, 4)
                (end,) = ptx.load_shared(at, [ptx.i32()], shift=4 * (step - 1))
                expert = arith.select(ptx.less(group, end), expert, ptx.add(expert, step))
            expert = arith.minsi(expert, ptx.const(self.plan.experts - 1))
            first, total = (
                ptx.load_shared(ptx.shared_offset(self.at[name], expert, 4), [ptx.i32()])[0]
                for name in ("firsts", "totals")
            )
            left = arith.subi(total, ptx.mul(arith.subi(group, first), self.plan.slots))
            used = arith.minsi(arith.maxsi(left, ptx.const(0)), ptx.const(self.plan.slots))
            for name, value in (("groups", expert), ("used", used)):
                ptx.store(ptx.offset(self.at[name], group, 4), [value], is_one)

    def _copy_slots(self) -> None:
        """Copies the slots to where they belong."""
        start = self.at["slots"]

        def copy(vector: Value, condition: Condition) -> None:
            words = ptx.load(vector, [ptx.i32()] * 4, condition, space="shared")
            ptx.store(ptx.offset(self.at["rows"], arith.subi(vector, start), 1), words, condition)

        self._each_vector(copy)

    def _each_vector(self, body: Callable[[Value, Condition], None]) -> None:
        """Calls `body` with the addresses of the thread's slots, four at a time, and whether there are so many."""
        vectors = self.plan.groups * self.plan.slots // 4
        for first in range(0, vectors, self.plan.threads):
            number = ptx.add(self.thread, first)
            body(ptx.shared_offset(self.at["slots"], number, 16), ptx.less(number, vectors))
