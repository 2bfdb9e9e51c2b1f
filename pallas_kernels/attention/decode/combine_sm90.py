"""Merges what several clusters computed of a row, as a kernel of its own. For Hopper, in PTX."""

import functools

import jax
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.attention.decode import merge_sm90
from pallas_kernels.attention.decode.merge_sm90 import Partial
from pallas_kernels.attention.decode.plan_sm90 import DecodePlan
from pallas_kernels.attention.decode.split import FLOOR, MAX_SPLITS
from pallas_kernels.attention.decode.turns_sm90 import Seen, shift_of
from pallas_kernels.ptx import Value

THREADS = 128  # per block
_STORE = "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $2, $1; st.global.b32 [$0], t; }"


def combine(
    plan: DecodePlan, out_BKJGH: jax.Array, totals_BKJG2: jax.Array, counts_B: jax.Array, sinks_N: jax.Array | None
) -> jax.Array:
    """The rows' results, bfloat16 [B, N, H].

    Args:
      out_BKJGH: float32, the entries' sums of weights times values. Those that a row does not use may be anything.
      totals_BKJG2: float32, the entries' maxima and sums of weights.
      counts_B, sinks_N: as in `decode`.
    """
    B, K, _, G, H = out_BKJGH.shape
    # Missing sinks are not read, but something has to be passed for them.
    sinks = counts_B if sinks_N is None else sinks_N
    results = ptx.launch(
        functools.partial(combine_splits, plan),
        {"out": out_BKJGH, "totals": totals_BKJG2, "counts": counts_B, "sinks": sinks},
        {"result": jax.ShapeDtypeStruct((B, K * G, H), jnp.bfloat16)},
        {"row": B, "part": -(-_pairs(plan) // THREADS)},
    )
    return results["result"]


def _pairs(plan: DecodePlan) -> int:
    """Pairs of numbers in a row."""
    return plan.keys * plan.group * plan.width // 2


def combine_splits(
    plan: DecodePlan,
    *,
    out: Value,
    totals: Value,
    counts: Value,
    sinks: Value,
    result: Value,
    row: Value,
    part: Value,
) -> None:
    """One thread of a block: two numbers of one query's result. Threads beyond the last one repeat its work."""
    pairs = _pairs(plan)
    number = arith.minsi(ptx.add(ptx.mul(part, THREADS), ptx.thread()), ptx.const(pairs - 1))
    query, column = ptx.divided(number, plan.width // 2)
    key, place = ptx.divided(query, plan.group)
    ranges = Seen.of(plan, counts, None, row).ranges(plan)
    sink = None if plan.sinks is None else merge_sm90.load_sink(sinks, plan.sinks, query)
    shift = shift_of(plan, ranges)
    first = ptx.mul(ptx.add(ptx.mul(row, plan.keys), key), plan.entries)

    def load(entry: Value) -> Partial:
        """Begins to load an entry, empty if the row does not use it."""
        exists = ptx.less(arith.shrui(entry, shift), ranges)
        at = ptx.add(ptx.mul(ptx.add(first, entry), plan.group), place)
        pair = ptx.load(ptx.offset(totals, at, 8), [ptx.f32()] * 2, exists, space="global.nc")
        sums = ptx.load(
            ptx.offset(ptx.offset(out, at, 4 * plan.width), column, 8), [ptx.f32()] * 2, exists, space="global.nc"
        )
        return Partial(ptx.where(exists, pair[0], FLOOR), pair[1], sums)

    def turn(number: Value, carry: list[Value]) -> list[Value]:
        begin = ptx.mul(number, MAX_SPLITS)
        entries = [load(ptx.add(begin, i)) for i in range(MAX_SPLITS)]
        return _merged(plan, shift, carry, entries)

    used = arith.shli(ranges, shift)
    turns = arith.divui(ptx.add(used, MAX_SPLITS - 1), ptx.const(MAX_SPLITS))
    numbers = ptx.loop(turns, Partial.empty(2).numbers(), turn)
    values = merge_sm90.finished(Partial.of(numbers), sink)
    ptx.asm(_STORE, [], [ptx.offset(result, ptx.add(ptx.mul(row, pairs), number), 4), *values])


def _merged(plan: DecodePlan, shift: Value, carry: list[Value], entries: list[Partial]) -> list[Value]:
    """The ranges so far, and those of these entries, of which 2^shift are a range's."""

    def by(each: int) -> list[Value]:
        size = 1 << each
        ranges = [merge_sm90.tree(entries.__getitem__, size, begin) for begin in range(0, len(entries), size)]
        return merge_sm90.chain([Partial.of(carry), *ranges]).numbers()

    def among(shifts: tuple[int, ...]) -> list[Value]:
        if len(shifts) == 1:
            return by(shifts[0])
        is_first = ptx.less(shift, shifts[0] + 1)
        return ptx.choose(
            is_first, [ptx.f32()] * len(carry), functools.partial(by, shifts[0]), functools.partial(among, shifts[1:])
        )

    return among(plan.shifts)
