"""Appending a token's keys and values to the cache in one small kernel: Pallas Mosaic GPU, for Hopper.

Each thread has two numbers of a head, whatever the number of rows. If heads are normed, a head is of one, two or four
warps of a block.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.pages import PAGE
from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.ptx import Value
from pallas_kernels.ptx.rows import load_number, shared_floats

THREADS = 128

_LOAD = "ld.global.nc.f32 $0, [$1];"
_LOAD_BF16 = (
    "{ .reg .b16 z, t; .reg .b32 w; mov.b16 z, 0; ld.global.nc.b16 t, [$1]; mov.b32 w, {z, t}; mov.b32 $0, w; }"
)
_ROUND = "{ .reg .b16 z, t; .reg .b32 w; mov.b16 z, 0; cvt.rn.bf16.f32 t, $1; mov.b32 w, {z, t}; mov.b32 $0, w; }"
_STORE = "{ .reg .b16 t; cvt.rn.bf16.f32 t, $1; st.global.b16 [$0], t; }"


@dataclasses.dataclass(frozen=True)
class _AppendPlan:
    """Everything that is known when the kernel is built."""

    rows: int  # B
    splits: int  # J
    queries: int  # N
    keys: int  # K
    width: int  # H
    has_bias: bool
    rotates: bool
    scales: Any  # dtype of the norms' scales; None: queries and keys are not normed
    epsilon: float  # of the norms

    @property
    def heads(self) -> int:
        return self.queries + 2 * self.keys

    @property
    def half(self) -> int:
        return self.width // 2


@partial(jax.jit, static_argnames=("epsilon",))
def append(
    qkv: PartialSum,
    rotation: tuple[jax.Array, jax.Array] | None,
    slots_B: jax.Array,
    k_YKSH: jax.Array,
    v_YKSH: jax.Array,
    scales: tuple[jax.Array, jax.Array] | None = None,
    epsilon: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.append`. `slots_B`: see `pages.slots`; nothing is written if negative."""
    _, K, _, H = k_YKSH.shape
    splits, _, columns = qkv.parts_JAO.shape
    B = slots_B.shape[0]
    N = columns // H - 2 * K
    has_bias, dtype = qkv.bias_EO is not None, None if scales is None else scales[0].dtype
    plan = _AppendPlan(B, splits, N, K, H, has_bias, rotation is not None, dtype, epsilon)
    # A missing operand is not read, but something has to be passed for it.
    bias = slots_B if qkv.bias_EO is None else qkv.bias_EO.astype(jnp.bfloat16)
    cos, sin = (slots_B, slots_B) if rotation is None else rotation
    q_scale, k_scale = (slots_B, slots_B) if scales is None else scales
    k_ref, v_ref = jax.new_ref(k_YKSH), jax.new_ref(v_YKSH)

    operands = {"parts": qkv.parts_JAO, "bias": bias, "cos": cos, "sin": sin, "slots": slots_B}
    operands |= {"q_scale": q_scale, "k_scale": k_scale}
    results = ptx.launch(
        partial(append_to_cache, plan),
        operands | {"k": k_ref, "v": v_ref},
        {"q": jax.ShapeDtypeStruct((B, N, H), jnp.bfloat16)},
        {"row": B, "part": -(-plan.heads * plan.half // THREADS)},
        {"sums": shared_floats(THREADS // 32)},
    )
    return results["q"], jax.freeze(k_ref), jax.freeze(v_ref)


def append_to_cache(
    plan: _AppendPlan,
    parts: Value,
    bias: Value,
    cos: Value,
    sin: Value,
    slots: Value,
    q_scale: Value,
    k_scale: Value,
    k: Value,
    v: Value,
    q: Value,
    sums: Value,
    row: Value,
    part: Value,
) -> None:
    """One thread of a block: numbers i and i + H/2 of a head."""
    number = ptx.add(ptx.mul(part, THREADS), ptx.thread())
    inside = ptx.less(number, plan.heads * plan.half)

    def pair(number: Value) -> None:
        head, i = ptx.divided(number, plan.half)
        column = ptx.add(ptx.mul(head, plan.width), i)
        (slot,) = ptx.asm("ld.global.nc.b32 $0, [$1];", [ptx.i32()], [ptx.offset(slots, row, 4)])
        first, last = (_sum(plan, parts, bias, row, ptx.add(column, shift)) for shift in (0, plan.half))
        is_query = ptx.less(head, plan.queries)
        if plan.scales is not None:
            first, last = _normed(plan, first, last, arith.select(is_query, q_scale, k_scale), sums, head, i)
        if plan.rotates:
            first, last = _rotate(plan, first, last, cos, sin, row, head, i)
        to = ptx.add(ptx.mul(row, plan.queries), head)
        ptx.when(arith.andi(is_query, inside), lambda: _store(plan, first, last, i, q, to))

        def write() -> None:
            key = ptx.add(head, -plan.queries)
            is_value = arith.cmpi(arith.CmpIPredicate.sge, key, ptx.const(plan.keys))
            key = arith.select(is_value, ptx.add(key, -plan.keys), key)
            page, place = ptx.divided(slot, PAGE)
            place = ptx.add(ptx.mul(ptx.add(ptx.mul(page, plan.keys), key), PAGE), place)
            _store(plan, first, last, i, arith.select(is_value, v, k), place)

        exists = arith.cmpi(arith.CmpIPredicate.sge, slot, ptx.const(0))
        is_written = arith.cmpi(arith.CmpIPredicate.sge, head, ptx.const(plan.queries))
        ptx.when(arith.andi(arith.andi(exists, is_written), inside), write)

    if plan.scales is None:
        ptx.when(inside, lambda: pair(number))
    else:  # all of a block's threads have to take part; those beyond the last head repeat its last pair
        pair(arith.minsi(number, ptx.const(plan.heads * plan.half - 1)))


def _normed(
    plan: _AppendPlan, first: Value, last: Value, scale: Value, sums: Value, head: Value, i: Value
) -> tuple[Value, Value]:
    """The pair divided by its head's root of the mean square, and scaled, unless it belongs to a value."""
    warps = plan.half // 32  # of a head
    squares = ptx.warp_sum(ptx.fma(last, last, ptx.rounded_product(first, first)))
    if warps > 1:
        warp, lane = arith.shrui(ptx.thread(), ptx.const(5)), arith.andi(ptx.thread(), ptx.const(31))
        ptx.store(ptx.shared_offset(sums, warp, 4), [squares], ptx.less(lane, 1), space="shared")
        ptx.sync_block()
        of_head = ptx.shared_offset(sums, arith.andi(warp, ptx.const(-warps)), 4)
        squares = ptx.tree_sum(ptx.load_shared(of_head, [ptx.f32()] * warps))
    mean = ptx.fma(squares, ptx.float32(1 / plan.width), ptx.float32(plan.epsilon))
    (factor,) = ptx.asm("rsqrt.approx.f32 $0, $1;", [ptx.f32()], [mean])
    is_value = arith.cmpi(arith.CmpIPredicate.sge, head, ptx.const(plan.queries + plan.keys))
    size, out = plan.scales.itemsize, []
    for number, shift in ((first, 0), (last, plan.half)):
        of_number = load_number(ptx.offset(scale, i, size), plan.scales, ptx.always(), shift=size * shift)
        (rounded,) = ptx.asm(_ROUND, [ptx.f32()], [ptx.rounded_product(ptx.rounded_product(number, factor), of_number)])
        out.append(arith.select(is_value, number, rounded))
    return out[0], out[1]


def _sum(plan: _AppendPlan, parts: Value, bias: Value, row: Value, column: Value) -> Value:
    at = ptx.offset(parts, ptx.add(ptx.mul(row, plan.heads * plan.width), column), 4)
    stride = 4 * plan.rows * plan.heads * plan.width
    terms = [ptx.asm(_LOAD, [ptx.f32()], [ptx.shifted(at, stride * s)])[0] for s in range(plan.splits)]
    if plan.has_bias:
        terms += ptx.asm(_LOAD_BF16, [ptx.f32()], [ptx.offset(bias, column, 2)])
    total = terms[0]
    for term in terms[1:]:
        total = arith.addf(total, term)
    return ptx.asm(_ROUND, [ptx.f32()], [total])[0]


def _rotate(
    plan: _AppendPlan, first: Value, last: Value, cos: Value, sin: Value, row: Value, head: Value, i: Value
) -> tuple[Value, Value]:
    """The pair turned by its angle, unless it belongs to a value."""
    angle = ptx.add(ptx.mul(row, plan.half), i)
    (c,), (s,) = (ptx.asm(_LOAD, [ptx.f32()], [ptx.offset(table, angle, 4)]) for table in (cos, sin))
    turned = (
        ptx.fma(first, c, arith.negf(ptx.rounded_product(last, s))),
        ptx.fma(last, c, ptx.rounded_product(first, s)),
    )
    is_value = arith.cmpi(arith.CmpIPredicate.sge, head, ptx.const(plan.queries + plan.keys))
    return arith.select(is_value, first, turned[0]), arith.select(is_value, last, turned[1])


def _store(plan: _AppendPlan, first: Value, last: Value, i: Value, array: Value, row: Value) -> None:
    """Puts the pair into a row of H numbers."""
    at = ptx.offset(ptx.offset(array, row, 2 * plan.width), i, 2)
    for value, shift in ((first, 0), (last, plan.half)):
        ptx.asm(_STORE, [], [ptx.shifted(at, 2 * shift), value])
