"""Products with the chosen experts, from MXFP4 fragments, for Hopper: Pallas Mosaic GPU. See RECORD.md.

A warp streams 16 rows of one expert from memory to registers, unpacks them there, and multiplies them by eight tokens
at a time on the tensor cores. For eight tokens, no weight is read twice, and none is written anywhere.

A token's bits do not depend on how many there are: a weight's columns are divided into runs by its shape alone
(`runs_of`), each run is one ascending chain of products, and the runs are added in order: by a block that has several
of them, by whoever reads the parts, or, if an activation follows, by the last block of the cluster that shares them.
`grouped_sm90` has the same runs.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import dispatch, ptx, tiles
from pallas_kernels.formats.fragments import TILE, MXFP4Fragments
from pallas_kernels.formats.mxfp4_sm90 import MISSING, decoded
from pallas_kernels.moe import cluster_sm90
from pallas_kernels.moe.activation import SwiGLU
from pallas_kernels.moe.plan_sm90 import EIGHT, ExpertsPlan
from pallas_kernels.moe.routing import Groups, route
from pallas_kernels.moe.runs import runs_of_width
from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.ptx import Value

_BLOCKS: Final = 264  # of the product up: with fewer than two on each of 132 multiprocessors, clusters are faster
_LOAD_X = (
    "{ .reg .pred p; setp.ge.s32 p, $9, 0; "
    + " ".join(f"mov.b32 ${i}, 0;" for i in range(8))
    + "@p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$8]; @p ld.global.nc.v4.b32 {$4, $5, $6, $7}, [$8+16]; }"
)
_LOAD_IF = "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, -1; @p ld.global.nc.b32 $0, [$1]; }"
_STORE_BF16 = "{ .reg .pred p; .reg .b16 t; setp.ne.s32 p, $2, 0; cvt.rn.bf16.f32 t, $1; @p st.global.b16 [$0], t; }"
_STORE_PAIR = "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.v2.f32 [$0], {$1, $2}; }"


def routed(
    x_TD: jax.Array,
    experts_TX: jax.Array,
    weights_TX: jax.Array,
    gate_up: MXFP4Fragments,
    gate_up_bias_E2F: jax.Array,
    down: MXFP4Fragments,
    down_bias_ED: jax.Array,
    *,
    alpha: float,
    limit: float,
) -> PartialSum:
    """See `api.moe`."""
    groups, places_TX = route(experts_TX, down_bias_ED.shape[0])
    bias = gate_up_bias_E2F.astype(jnp.bfloat16)
    settings = _settings("up", experts_TX, gate_up)
    h_UMF = product(x_TD, groups, gate_up, bias, activation=SwiGLU(alpha, limit), runs=runs_of(gate_up), **settings)
    h_AF = h_UMF.reshape(-1, h_UMF.shape[-1])
    settings = _settings("down", experts_TX, down)
    y_JUMD = product(h_AF, groups, down, runs=runs_of(down), sorted=True, **settings)
    y_JAD = y_JUMD.reshape(y_JUMD.shape[0], -1, y_JUMD.shape[-1])
    return PartialSum(y_JAD, places_TX, weights_TX, down_bias_ED, experts_TX)


def _settings(part: str, experts_TX: jax.Array, weight: MXFP4Fragments) -> Any:
    (T, X), (E, outputs, inputs) = experts_TX.shape, weight.shape
    shape: tiles.Shape = {tiles.ROWS: T, "part": part, "chosen": X, "experts": E, "in": inputs, "out": outputs}
    return tiles.lookup(dispatch.device_kind(), "moe/mosaic", shape) or heuristic(shape)


def runs_of(weight: MXFP4Fragments) -> int:
    """The runs of a product, up or down."""
    return runs_of_width(weight.shape[-1])


def heuristic(shape: tiles.Shape) -> tiles.Settings:
    """The settings for a shape that is not in the table; RECORD.md has the measurements."""
    rows = int(shape[tiles.ROWS])
    blocks = int(shape["out"]) // TILE * rows * int(shape["chosen"])
    are_few = rows <= 8 if shape["part"] == "down" else blocks < _BLOCKS
    return {
        "unroll": 9 if rows == 1 else 5,
        "splits": runs_of_width(int(shape["in"])) if are_few else 1,
        "eights": 1 if rows <= 64 else 2,
    }


def tunable(shape: tiles.Shape) -> list[tiles.Settings]:
    """See `tiles`."""
    rows, usual = int(shape[tiles.ROWS]), heuristic(shape)
    others: list[tiles.Settings] = [
        {"unroll": unroll, "splits": splits, "eights": eights}
        for eights in ([1] if rows <= 8 else [1, 2] if rows <= 32 else [1, 2, 4])
        for splits in sorted({1, runs_of_width(int(shape["in"]))})
        for unroll in (3, 5, 9)
    ]
    return [usual, *(each for each in others if each != usual)]


@partial(jax.jit, static_argnames=("activation", "unroll", "runs", "splits", "eights", "sorted"))
def product(
    x_AI: jax.Array,
    groups: Groups,
    weight: MXFP4Fragments,
    bias_EO: jax.Array | None = None,
    *,
    activation: SwiGLU | None = None,
    unroll: int,
    runs: int = 1,
    splits: int = 1,
    eights: int = 1,
    sorted: bool = False,
) -> jax.Array:
    """Each group's tokens times its expert's weight.

    Args:
      x_AI: bfloat16; one row per token, or per slot if `sorted`.
      weight: [E, O, I].
      bias_EO: for the activation.
      runs: which the sums' order follows from; it must divide the weight's steps.
      unroll, splits, eights: see `ExpertsPlan`; lowered to numbers that divide evenly. They do not change the order.

    Returns:
      float32 [splits, U, M, O], still to be summed over the first axis, in ascending order; with an activation,
      bfloat16 [U, M, O / 2]. Slots without a token may hold anything.
    """
    U, M = groups.rows_UM.shape
    num_tiles, steps = weight.words.shape[1:3]
    splits = math.gcd(splits, runs)
    plan = ExpertsPlan(
        num_experts=weight.shape[0],
        num_groups=U,
        slots=M,
        steps=steps // runs,
        runs=runs,
        splits=splits,
        tiles=num_tiles,
        unroll=next(u for u in range(unroll, 0, -1) if steps // runs % u == 0),
        eights=min(eights, -(-M // EIGHT)),
        sorted=sorted,
    )
    outputs = weight.shape[1]
    bias = groups.experts_U if bias_EO is None else bias_EO  # something has to be passed, even if unread
    grid = {"tile": num_tiles, "group": U, "share": -(-M // (plan.eights * EIGHT))}
    if activation is None:
        out, cluster = jax.ShapeDtypeStruct((splits, U, M, outputs), jnp.float32), 1
        grid["split"] = splits
    else:
        out, cluster = jax.ShapeDtypeStruct((U, M, outputs // 2), jnp.bfloat16), splits

    operands = {"x": x_AI, "rows": groups.rows_UM, "experts": groups.experts_U}
    operands |= {"words": weight.words, "scales": weight.scales, "bias": bias}
    results = ptx.launch(
        partial(moe_product, plan, activation),
        operands,
        {"out": out},
        grid,
        cluster_sm90.memory(cluster, plan.sums),
        cluster=cluster,
    )
    return results["out"]


def moe_product(
    plan: ExpertsPlan,
    activation: SwiGLU | None,
    *,
    x: Value,
    rows: Value,
    experts: Value,
    words: Value,
    scales: Value,
    bias: Value,
    out: Value,
    tile: Value,
    group: Value,
    share: Value,
    split: Value | None = None,
    **shared: Value,
) -> None:
    """One thread of a block: 64 rows of an expert times up to `eights` · 8 tokens. A block without tokens returns.

    All blocks of a cluster have the same rows and tokens, so they return, or compute, together.
    """
    first = ptx.mul(share, plan.eights * EIGHT)  # slot of the group
    (begins,) = ptx.asm(_LOAD_IF, [ptx.i32()], [ptx.offset(rows, _place(plan, group, first), 4), ptx.const(1)])
    (expert,) = ptx.asm("ld.global.nc.b32 $0, [$1];", [ptx.i32()], [ptx.offset(experts, group, 4)])
    exists = arith.cmpi(arith.CmpIPredicate.ult, expert, ptx.const(plan.num_experts))

    # While those two loads are under way.
    thread = cluster_sm90.prepared(plan.splits if split is None else 1, plan.sums, shared)

    def compute() -> None:
        if activation is None:
            acc = _sums(plan, x, rows, words, scales, expert, tile, group, first, split)
            _write_parts(plan, acc, out, tile, group, first, split)
            return
        biases = _load_biases(plan, bias, expert, tile)
        acc = _sums(plan, x, rows, words, scales, expert, tile, group, first, thread.rank)
        write = partial(_write_activation, plan, activation, biases, out, tile, group, first)
        cluster_sm90.totals(thread, acc, shared, write)

    ptx.when(arith.andi(exists, arith.cmpi(arith.CmpIPredicate.sge, begins, ptx.const(0))), compute)


def _place(plan: ExpertsPlan, group: Value, slot: Value) -> Value:
    return ptx.add(ptx.mul(group, plan.slots), slot)


def _sums(
    plan: ExpertsPlan,
    x: Value,
    rows: Value,
    words: Value,
    scales: Value,
    expert: Value,
    tile: Value,
    group: Value,
    first: Value,
    split: Value,
) -> list[Value]:
    """Four sums per eight tokens: the thread's even and odd row times two tokens, in the order of `ptx.mma`."""
    _, g, q = ptx.fragment_lane()
    start = ptx.mul(split, plan.steps * plan.own)
    x_at, tokens = [], []
    for eight in range(plan.eights):
        slot = ptx.add(first, g, EIGHT * eight)
        place = _place(plan, group, slot)
        (token,) = ptx.asm(_LOAD_IF, [ptx.i32()], [ptx.offset(rows, place, 4), ptx.less(slot, plan.slots)])
        row_at = ptx.offset(x, place if plan.sorted else token, 2 * plan.columns)
        x_at.append(ptx.offset(row_at, ptx.add(ptx.mul(start, TILE), ptx.mul(q, 16)), 2))
        tokens.append(token)
    number = ptx.add(ptx.mul(ptx.add(ptx.mul(expert, plan.tiles), tile), plan.steps * plan.runs), start)
    words_at = ptx.offset(ptx.offset(words, number, 2048), ptx.thread(), 16)
    scales_at = ptx.offset(ptx.offset(scales, number, 128), arith.shrui(ptx.thread(), ptx.const(1)), 2)

    def load(turn: Value) -> list[Value]:
        words_from, scales_from = (
            ptx.offset(at, ptx.mul(turn, plan.unroll), size) for at, size in ((words_at, 2048), (scales_at, 128))
        )
        loaded: list[Value] = []
        for i in range(plan.unroll):
            four = f"ld.global.nc.L1::no_allocate.v4.b32 {{$0, $1, $2, $3}}, [$4+{2048 * i}];"
            loaded += ptx.asm(four, [ptx.i32()] * 4, [words_from], volatile=True)
            loaded += ptx.asm(f"ld.global.nc.u16 $0, [$1+{128 * i}];", [ptx.i32()], [scales_from], volatile=True)
        return loaded

    def compute(turn: Value, acc: list[Value], loaded: list[Value]) -> list[Value]:
        from_ = [ptx.offset(at, ptx.mul(turn, plan.unroll), 2 * TILE) for at in x_at]
        for i in range(plan.unroll):
            xs = [
                ptx.asm(_LOAD_X, [ptx.i32()] * 8, [ptx.shifted(at, 2 * TILE * i), token])
                for at, token in zip(from_, tokens, strict=True)
            ]
            acc = _multiply(acc, loaded[5 * i : 5 * i + 4], loaded[5 * i + 4], xs)
        return acc

    return _in_runs(plan, load, compute)


def _in_runs(
    plan: ExpertsPlan,
    load: Callable[[Value], list[Value]],
    compute: Callable[[Value, list[Value], list[Value]], list[Value]],
) -> list[Value]:
    """The sums of the block's runs, added in order. Each load begins one turn ahead, also from run to run."""
    count, turns = plan.sums, plan.steps // plan.unroll
    zeros = [ptx.float32(0.0)] * count

    def through(run: Value, turns_here: int, loaded: list[Value]) -> tuple[list[Value], list[Value]]:
        """The sums after some turns of a run, and what was loaded for the next one."""

        def turn(i: Value, values: list[Value]) -> list[Value]:
            number = ptx.add(ptx.mul(run, turns), i)
            following = load(ptx.add(number, 1))
            return [*compute(number, values[:count], values[count:]), *following]

        values = ptx.loop(turns_here, [*zeros, *loaded], turn)
        return values[:count], values[count:]

    def added(totals: list[Value], acc: list[Value]) -> list[Value]:
        """The factor is a power of two: this rounds as if the products had it, as where each block has one run."""
        return [ptx.fma(one, ptx.float32(MISSING), total) for one, total in zip(acc, totals, strict=True)]

    def whole_run(run: Value, carry: list[Value]) -> list[Value]:
        acc, loaded = through(run, turns, carry[count:])
        return [*added(carry[:count], acc), *loaded]

    # To -0, 0 and -0 can be added, and are what they were.
    carry = ptx.loop(plan.own - 1, [*[ptx.float32(-0.0)] * count, *load(ptx.const(0))], whole_run)
    acc, loaded = through(ptx.const(plan.own - 1), turns - 1, carry[count:])
    return added(carry[:count], compute(ptx.const(plan.own * turns - 1), acc, loaded))


def _multiply(acc: list[Value], words: list[Value], scales: Value, xs: list[list[Value]]) -> list[Value]:
    """Adds a tile's products: words and scales as in `fragments`, xs with 16 numbers of a token per eight tokens."""
    planes = decoded(words, scales)
    sums = list(acc)
    for plane in range(4):
        a = [word_planes[plane] for word_planes in planes]
        for eight, x in enumerate(xs):
            sums[4 * eight : 4 * eight + 4] = ptx.mma(sums[4 * eight : 4 * eight + 4], a, x[2 * plane : 2 * plane + 2])
    return sums


def _even_row(tile: Value) -> Value:
    """The number of the thread's even row in its expert."""
    warp, g, _ = ptx.fragment_lane()
    return ptx.add(ptx.mul(tile, TILE), ptx.mul(warp, 16), ptx.mul(g, 2))


def _tokens(plan: ExpertsPlan, acc: list[Value], first: Value) -> list[tuple[Value, Value, Value]]:
    """For each of the thread's tokens: its slot, the even row's sum and the odd row's sum."""
    twice_q = ptx.mul(ptx.fragment_lane()[2], 2)
    return [
        (ptx.add(first, twice_q, EIGHT * eight + column), acc[4 * eight + column], acc[4 * eight + 2 + column])
        for eight in range(plan.eights)
        for column in range(2)
    ]


def _write_parts(
    plan: ExpertsPlan, acc: list[Value], out: Value, tile: Value, group: Value, first: Value, split: Value
) -> None:
    for slot, even, odd in _tokens(plan, acc, first):
        place = ptx.add(ptx.mul(split, plan.num_groups * plan.slots), _place(plan, group, slot))
        at = ptx.offset(ptx.offset(out, place, 4 * plan.rows), _even_row(tile), 4)
        ptx.asm(_STORE_PAIR, [], [at, even, odd, ptx.less(slot, plan.slots)])


def _load_biases(plan: ExpertsPlan, bias: Value, expert: Value, tile: Value) -> Value:
    """Begins to load the biases of the thread's even and odd row, two bfloat16 numbers: before the weights.

    After them, every block would end by waiting for the memory once more.
    """
    at = ptx.offset(ptx.offset(bias, expert, 2 * plan.rows), _even_row(tile), 2)
    (pair,) = ptx.load(at, [ptx.i32()], ptx.always())
    ptx.keep_loads_before(expert)
    return pair


def _write_activation(
    plan: ExpertsPlan,
    activation: SwiGLU,
    biases: Value,
    out: Value,
    tile: Value,
    group: Value,
    first: Value,
    acc: list[Value],
) -> None:
    gate_bias, up_bias = ptx.halves(biases)
    for slot, even, odd in _tokens(plan, acc, first):
        value = activated(activation, arith.addf(even, gate_bias), arith.addf(odd, up_bias))
        at = ptx.offset(out, _place(plan, group, slot), plan.rows)
        at = ptx.offset(at, arith.shrui(_even_row(tile), ptx.const(1)), 2)
        ptx.asm(_STORE_BF16, [], [at, value, ptx.less(slot, plan.slots)])


def activated(activation: SwiGLU, gate: Value, up: Value) -> Value:
    """min(gate, limit) · sigmoid(alpha · gate) · (clip(up) + 1)."""
    limit, below, one = (ptx.float32(value) for value in (activation.limit, -activation.limit, 1.0))
    gate, up = arith.minimumf(gate, limit), arith.maximumf(arith.minimumf(up, limit), below)
    exponent = ptx.float32(-activation.alpha * math.log2(math.e))
    (power,) = ptx.asm("ex2.approx.f32 $0, $1;", [ptx.f32()], [arith.mulf(gate, exponent)])
    return ptx.divide(arith.mulf(gate, arith.addf(up, one)), arith.addf(power, one))
