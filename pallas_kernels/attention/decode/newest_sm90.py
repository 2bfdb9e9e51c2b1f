"""A row's newest token in decode attention: its queries, key and value, from their product to where they are used.

A warp takes a head at a time. It begins to load before the keys and values of the pages, and adds up, norms and rotates
while those are under way. The block's heads then lie in shared memory, from where its warps take their queries.

Every block has the row's newest key and value from there. What its pages hold at the newest place is loaded, too, but
never used: `Newest.over` puts the new numbers in its stead. So it is harmless that another block may be writing them
there meanwhile, that L1 may keep what was there before, and that all of this is loaded as what does not change (`.nc`).
A key or a value is whole sectors of memory, so its neighbours are what they were. No other row sees the place: pages
that rows share are full or copied. In a layer with a window, a page is used again only when no row sees it any more.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.attention.decode.plan_sm90 import EIGHT, DecodePlan, ProductPlan
from pallas_kernels.attention.decode.turns_sm90 import Seen, Thread, Words, load_count
from pallas_kernels.formats import fp8_sm90
from pallas_kernels.pages import PAGE
from pallas_kernels.ptx import Value
from pallas_kernels.ptx.rows import load_number

_WARP = 32  # pairs of a head that a warp takes at once
_FLOAT32, _BFLOAT16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
_ROUND = "{ .reg .b16 z, t; .reg .b32 w; mov.b16 z, 0; cvt.rn.bf16.f32 t, $1; mov.b32 w, {z, t}; mov.b32 $0, w; }"
_STORE = "{{ .reg .b16 t; cvt.rn.bf16.f32 t, $1; st.{}.b16 [$0], t; }}"


class _Pair(NamedTuple):
    """Numbers i and i + H/2 of a head."""

    first: Value
    last: Value


class _Head(NamedTuple):
    """A head that the warp takes. A lane has every 32nd pair."""

    number: Value  # among the block's: its queries, the key, the value
    terms: list[list[_Pair]]  # of each pair
    scales: list[_Pair]  # of its norm, for each pair


@dataclasses.dataclass(frozen=True)
class Newest:
    """A thread's part in the block's heads."""

    plan: DecodePlan
    product: ProductPlan
    arrays: dict[str, Value]  # addresses by name
    at: Thread
    slot: Value  # page · PAGE + place; negative if the row has no new token
    angles: list[_Pair]  # cos and sin, for each pair
    heads: list[_Head]

    @staticmethod
    def words(plan: DecodePlan) -> int:
        """32-bit words of shared memory that a block needs."""
        return (plan.queries + 2) * plan.width // 2

    @classmethod
    def of(cls, plan: DecodePlan, product: ProductPlan, arrays: dict[str, Value], at: Thread) -> "Newest":
        """Begins to load what they come from."""
        ptx.keep_loads_before(arrays["memory"])  # so that the table's come first
        slot = load_count(arrays["slots"], at.block.row)
        angles = _load_angles(plan, arrays, at) if product.rotates else []
        heads = [_load_head(plan, product, arrays, at, begin) for begin in _turns(plan)]
        ptx.keep_loads_before(arrays["heads"])  # ptxas would first wait for the table
        return cls(plan, product, arrays, at, slot, angles, heads)

    def keep(self, entry: Value) -> None:
        """Puts the block's heads to shared memory, and one block the key and the value to their place in the pages.

        The block must synchronise before it reads them. `entry` says which share of the row is the block's.
        """
        plan, block = self.plan, self.at.block
        is_first = ptx.both(ptx.less(entry, 1), ptx.less(block.rank, 1), ptx.less(block.first, 1))
        writes = ptx.both(is_first, ptx.less(-1, self.slot))
        for begin, head in zip(_turns(plan), self.heads, strict=True):
            pairs = self._finished(head)
            key = ptx.add(head.number, -plan.queries)
            packed = fp8_sm90.Vector.of([_rounded(number) for pair in pairs for number in pair]) if plan.fp8 else None
            if packed is not None:
                is_query, again = ptx.less(key, 0), iter(packed.as_read())
                pairs = [_Pair(*(arith.select(is_query, number, next(again)) for number in pair)) for pair in pairs]
            self._store(ptx.shared_offset(self.arrays["heads"], head.number, plan.row), pairs, "shared")
            exists = ptx.less(ptx.add(self.at.warp, begin), plan.queries + 2)
            is_mine = ptx.both(writes, exists, ptx.less(-1, key))

            def write(key: Value = key, pairs: list[_Pair] = pairs, packed: fp8_sm90.Vector | None = packed) -> None:
                page, place = ptx.divided(self.slot, PAGE)
                place = ptx.add(ptx.mul(ptx.add(ptx.mul(page, plan.keys), block.head), PAGE), place)
                is_value = ptx.less(0, key)
                pool = arith.select(is_value, self.arrays["v"], self.arrays["k"])
                row = ptx.offset(pool, place, plan.cache_row)
                if packed is None:
                    self._store(row, pairs, "global")
                    return
                exponents = arith.select(is_value, self.arrays["v_exponents"], self.arrays["k_exponents"])
                shifts = [shift + more for shift in _shifts(plan) for more in (0, plan.width // 2)]
                packed.store(row, self.at.lane, shifts, ptx.offset(exponents, place, 1))

            ptx.when(is_mine, write)

    def _store(self, row: Value, pairs: list[_Pair], space: str) -> None:
        """Puts the lane's pairs into a row of H numbers."""
        is_shared = space == "shared"
        at = ptx.shared_offset(row, self.at.lane, 2) if is_shared else ptx.offset(row, self.at.lane, 2)
        for pair, shift in zip(pairs, _shifts(self.plan), strict=True):
            for number, more in zip(pair, (shift, shift + self.plan.width // 2), strict=True):
                to = ptx.add(at, 2 * more) if is_shared else ptx.shifted(at, 2 * more)
                ptx.asm(_STORE.format(space), [], [to, number])

    def _finished(self, head: _Head) -> list[_Pair]:
        """Summed up and, unless it is a value, normed and rotated; of bfloat16 before the rotation."""
        pairs = [
            _Pair(*(_rounded(_sum(list(terms))) for terms in zip(*of_pair, strict=True))) for of_pair in head.terms
        ]
        is_value = ptx.less(self.plan.queries, head.number)
        turned = pairs
        if head.scales:
            turned = self._normed(turned, head.scales)
        if self.angles:
            turned = [_Pair(*ptx.rotated(*pair, *angle)) for pair, angle in zip(turned, self.angles, strict=True)]
        return [
            _Pair(*(arith.select(is_value, *numbers) for numbers in zip(*both, strict=True)))
            for both in zip(pairs, turned, strict=True)
        ]

    def _normed(self, pairs: list[_Pair], scales: list[_Pair]) -> list[_Pair]:
        """Divided by the head's root of the mean square, and scaled."""
        squares = [ptx.warp_sum(ptx.fma(last, last, ptx.rounded_product(first, first))) for first, last in pairs]
        mean = ptx.fma(ptx.tree_sum(squares), ptx.float32(1 / self.plan.width), ptx.float32(self.product.epsilon))
        (factor,) = ptx.asm("rsqrt.approx.f32 $0, $1;", [ptx.f32()], [mean])

        def normed(number: Value, scale: Value) -> Value:
            return _rounded(ptx.rounded_product(ptx.rounded_product(number, factor), scale))

        return [_Pair(*map(normed, pair, scale)) for pair, scale in zip(pairs, scales, strict=True)]

    def query_words(self, half: int) -> Words:
        """The thread's query of the block's, as `warp_sm90.load_queries` takes it from memory."""
        query = arith.minsi(ptx.add(self.at.g, EIGHT * half), ptx.const(self.plan.queries - 1))
        row = ptx.shared_offset(ptx.shared_offset(self.arrays["heads"], query, self.plan.row), self.at.q, 16)
        return [ptx.load_shared(row, [ptx.i32()] * 4, shift=64 * i) for i in range(self.plan.width // 32)]

    def over(self, keys: Words, values: Words, seen: Seen, first: Value) -> tuple[Words, Words]:
        """A tile's keys and values, from place `first` on, with the newest ones at their place if it is in the tile."""
        plan = self.plan
        newest = ptx.add(seen.count, -1)
        if plan.folded:
            newest = arith.andi(newest, ptx.const(PAGE - 1))
        ahead = arith.subi(newest, first)
        key, value = (ptx.shared_offset(self.arrays["heads"], ptx.const(plan.queries + i), plan.row) for i in (0, 1))
        ahead_of_mine = arith.subi(ahead, self.at.g)
        key, per = ptx.shared_offset(key, self.at.q, 16), plan.width // 32
        keys = [
            ptx.load_shared_over(key, words, _equal(ahead_of_mine, EIGHT * (number // per)), shift=64 * (number % per))
            for number, words in enumerate(keys)
        ]
        ahead_of_mine = arith.subi(ahead, ptx.mul(self.at.q, 2))
        value, across = ptx.shared_offset(value, self.at.g, 16), plan.width // 64

        def replaced(number: int, words: list[Value]) -> list[Value]:
            sixteen, j, row = number // (4 * across), number // 4 % across, number % 4
            place = 2 * EIGHT * sixteen + (0, 1, 8, 9)[row]
            return ptx.load_shared_over(value, words, _equal(ahead_of_mine, place), shift=128 * j)

        return keys, [replaced(*each) for each in enumerate(values)]

    def over_exponents(self, of_keys: Words, of_values: Words, seen: Seen, first: Value) -> tuple[Words, Words]:
        """The same for the exponents in float8: in shared memory, the newest key and value have their scale already."""
        plan = self.plan
        if not plan.fp8:
            return of_keys, of_values
        newest = ptx.add(seen.count, -1)
        if plan.folded:
            newest = arith.andi(newest, ptx.const(PAGE - 1))
        ahead = arith.subi(newest, ptx.add(first, ptx.mul(self.at.q, 2)))

        def replaced(number: int, words: list[Value]) -> list[Value]:
            for i in (0, 1):
                is_newest = _equal(ahead, EIGHT * number + i)
                which, byte = (i, 0) if len(words) == 2 else (0, i)
                one = fp8_sm90.without_scale(words[which], byte)
                words = [arith.select(is_newest, one, word) if at == which else word for at, word in enumerate(words)]
            return words

        of_keys, of_values = ([replaced(*each) for each in enumerate(words)] for words in (of_keys, of_values))
        return of_keys, of_values


def _turns(plan: DecodePlan) -> range:
    """The first warp's head in each of the block's turns."""
    return range(0, plan.queries + 2, plan.warps)


def _shifts(plan: DecodePlan) -> range:
    """A lane's pairs of a head, counted from its first one."""
    return range(0, plan.width // 2, _WARP)


def _load_angles(plan: DecodePlan, arrays: dict[str, Value], at: Thread) -> list[_Pair]:
    first = ptx.add(ptx.mul(at.block.row, plan.width // 2), at.lane)
    tables = [ptx.offset(arrays[name], first, 4) for name in ("cos", "sin")]
    return [
        _Pair(*(load_number(table, jnp.float32, ptx.always(), shift=4 * shift) for table in tables))
        for shift in _shifts(plan)
    ]


def _load_head(plan: DecodePlan, product: ProductPlan, arrays: dict[str, Value], at: Thread, begin: int) -> _Head:
    """Begins to load the warp's head, counted from number `begin` on; the last instead of those beyond it."""
    number = arith.minsi(ptx.add(at.warp, begin), ptx.const(plan.queries + 1))
    query = arith.minsi(ptx.add(at.block.first, number), ptx.const(plan.group - 1))
    query = ptx.add(ptx.mul(at.block.head, plan.group), query)
    queries, kind = plan.keys * plan.group, ptx.add(number, -plan.queries)  # 0: the key; 1: the value
    other = ptx.add(ptx.mul(kind, plan.keys), at.block.head, queries)
    is_query = ptx.less(kind, 0)
    columns = (queries + 2 * plan.keys) * plan.width
    column = ptx.add(ptx.mul(arith.select(is_query, query, other), plan.width), at.lane)
    piece = ptx.offset(arrays["parts"], ptx.add(ptx.mul(at.block.row, columns), column), 4)
    sources = [(ptx.shifted(piece, 4 * product.rows * columns * i), _FLOAT32) for i in range(product.pieces)]
    if product.has_bias:
        sources.append((ptx.offset(arrays["bias"], column, 2), _BFLOAT16))
    terms = [[_load_pair(plan, *source, shift) for source in sources] for shift in _shifts(plan)]
    scales = []
    if product.scales is not None:
        scale = arith.select(is_query, arrays["q_scale"], arrays["k_scale"])
        scale = ptx.offset(scale, at.lane, product.scales.itemsize)
        scales = [_load_pair(plan, scale, product.scales, shift) for shift in _shifts(plan)]
    return _Head(number, terms, scales)


def _load_pair(plan: DecodePlan, at: Value, dtype: jnp.dtype, shift: int) -> _Pair:
    size = dtype.itemsize
    return _Pair(*(load_number(at, dtype, ptx.always(), shift=size * (shift + more)) for more in (0, plan.width // 2)))


def _equal(a: Value, b: int) -> Value:
    return arith.cmpi(arith.CmpIPredicate.eq, a, ptx.const(b))


def _sum(terms: list[Value]) -> Value:
    total = terms[0]
    for term in terms[1:]:
        total = arith.addf(total, term)
    return total


def _rounded(number: Value) -> Value:
    """To bfloat16."""
    return ptx.asm(_ROUND, [ptx.f32()], [number])[0]
