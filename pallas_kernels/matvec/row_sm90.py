"""One row times packed matrices [O, I], for Hopper: Pallas Mosaic GPU. See RECORD.md.

A warp takes 16 rows of a matrix and loads its share of their columns straight into registers, 256 columns a turn. It
multiplies on the tensor cores, as `packed_sm90` does, but with a single row of x all eight columns of a product are
alike. So each of the four threads that hold a row's sums keeps those of other columns, and only scales these.

Every block needs all of x. So x may be a norm that is still to be computed (`RowNorm`): each block computes all of it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.formats.fragments import TILE
from pallas_kernels.matvec import norm_sm90, strips_sm90
from pallas_kernels.matvec.norm_sm90 import BlockNorm
from pallas_kernels.matvec.row_norm import RowNorm
from pallas_kernels.matvec.strips_sm90 import (
    COLUMNS,
    STRIP,
    TURN,
    Fragments,
    GgmlStrip,
    MXFP4Strip,
    equal,
    lane_of,
    strip_of,
)
from pallas_kernels.ptx import Value

_PROCESSORS: Final = 132
_WARPS: Final = 16  # of a block: with more, they would not have enough registers
_MOST_WARPS: Final = 20  # if rows cannot be spread otherwise
_AHEAD: Final = 2
_LONG: Final = 12  # turns of a warp, from which on prefetching pays
_LOG2_E: Final = 1.4426950408889634

_STORE_BF16: Final = "{ .reg .b16 t; cvt.rn.bf16.f32 t, $1; st.global.b16 [$0], t; }"
_ROUND: Final = (
    "{ .reg .b16 z, t; .reg .b32 w; mov.b16 z, 0; cvt.rn.bf16.f32 t, $1; mov.b32 w, {z, t}; mov.b32 $0, w; }"
)
_PREFETCH: Final = "{ .reg .pred p; setp.ne.s32 p, $1, 0; @p prefetch.global.L2 [$0]; }"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a product is spread over warps."""

    share: int  # warps that share the columns of a strip
    strips: int = 1  # per block
    ahead: int = 0  # turns that are prefetched to the second-level cache before they are loaded

    def threads(self, matrices: int) -> int:
        """Of a block."""
        return 32 * self.share * self.strips * matrices

    def blocks(self, outputs: int) -> int:
        """Of a product with matrices [O, I]."""
        return -(-outputs // (STRIP * self.strips))


@dataclasses.dataclass(frozen=True)
class _RowPlan:
    """Everything that is known when the kernel is built."""

    inner: int  # I
    outputs: int  # O, of a matrix
    matrices: int  # 1, or 2: gate and up
    second: int  # the first strip of up, if both are of one array; else 0
    settings: Settings
    kind: MXFP4Strip | GgmlStrip
    norm: BlockNorm | None = None  # None: x is as it is

    @property
    def tiles(self) -> int:
        return self.inner // TILE

    @property
    def turns(self) -> int:
        return -(-self.tiles // TURN)

    @property
    def threads(self) -> int:
        return self.settings.threads(self.matrices)


def takes(x_TI: jax.Array | jax.ShapeDtypeStruct, parts: Sequence[Fragments]) -> bool:
    """Whether `product` takes these operands."""
    T, inputs = x_TI.shape
    return T == 1 and all(part.shape[1] == inputs and strips_sm90.takes(part) for part in parts)


def takes_gated(x_TI: jax.Array | jax.ShapeDtypeStruct, parts: Sequence[Fragments]) -> bool:
    """Whether `gated` takes these operands."""
    halves_fit = len(parts) == 1 or (len(parts) == 2 and parts[0].shape == parts[1].shape)
    alike = len({getattr(part, "type", "MXFP4") for part in parts}) == 1
    return takes(x_TI, parts) and halves_fit and alike


def takes_normed(norm: RowNorm, parts: Sequence[Fragments]) -> bool:
    """Whether `normed_product` takes these operands."""
    return len(parts) == 1 and takes(norm.normed, parts) and _computes(norm, parts[0].shape[0])


def takes_normed_gated(norm: RowNorm, parts: Sequence[Fragments]) -> bool:
    """Whether `normed_gated` takes these operands."""
    outputs = sum(part.shape[0] for part in parts) // 2
    return takes_gated(norm.normed, parts) and _computes(norm, outputs, matrices=2)


def _computes(norm: RowNorm, outputs: int, matrices: int = 1) -> bool:
    """Whether blocks can compute the norm, and are so few that it pays: all of them run at once."""
    settings = settings_of(outputs, norm.normed.shape[1], matrices)
    return settings.blocks(outputs) <= 2 * _PROCESSORS and norm_sm90.takes(norm, settings.threads(matrices))


def settings_of(outputs: int, inputs: int, matrices: int = 1) -> Settings:
    """How to spread a product of `matrices` matrices [O, I]: one block a multiprocessor, as long as that is enough."""
    turns, total = -(-inputs // COLUMNS), outputs // STRIP
    if matrices == 1 and _PROCESSORS < total <= 2 * _PROCESSORS and _WARPS // 2 <= turns <= _WARPS:
        return Settings(
            share=_WARPS // 2, strips=1
        )  # two smaller blocks start sooner, and a warp has two turns at most
    for strips in range(-(-total // _PROCESSORS), _MOST_WARPS // matrices + 1):
        most = min(turns, max(1, _WARPS // (strips * matrices)))
        shares = [share for share in range(1, most + 1) if share * strips * matrices % 4 == 0]
        if shares:
            # As few turns one after the other as possible, and then as few warps.
            share = min(shares, key=lambda share: (-(-turns // share), share))
            return Settings(share, strips, ahead=_AHEAD if turns >= _LONG * share else 0)
    return Settings(share=1, strips=4 // matrices)


def product(x_1I: jax.Array, parts: Sequence[Fragments], settings: Settings | None = None) -> jax.Array:
    """[1, 1, O] float32: x · matrixᵀ, without bias."""
    outputs = sum(part.shape[0] for part in parts)
    settings = settings or settings_of(outputs, x_1I.shape[1])
    sums = [_row(x_1I, (part,), settings=settings)["out"] for part in parts]
    return sums[0] if len(sums) == 1 else jnp.concatenate(sums, axis=-1)


def gated(x_1I: jax.Array, parts: Sequence[Fragments], settings: Settings | None = None) -> jax.Array:
    """[1, F] bfloat16: silu(x · gateᵀ) · (x · upᵀ). Gate and up are two parts, or the halves of one."""
    outputs = sum(part.shape[0] for part in parts) // 2
    settings = settings or settings_of(outputs, x_1I.shape[1], matrices=2)
    return _row(x_1I, tuple(parts), gated=True, settings=settings)["out"]


def normed_product(
    norm: RowNorm, parts: Sequence[Fragments], settings: Settings | None = None
) -> tuple[jax.Array, jax.Array]:
    """The sum that `norm` is of, and `product` of the norm."""
    settings = settings or settings_of(parts[0].shape[0], norm.normed.shape[1])
    results = _row(norm, tuple(parts), settings=settings)
    return results.get("sum", norm.x), results["out"]


def normed_gated(
    norm: RowNorm, parts: Sequence[Fragments], settings: Settings | None = None
) -> tuple[jax.Array, jax.Array]:
    """The sum that `norm` is of, and `gated` of the norm."""
    outputs = sum(part.shape[0] for part in parts) // 2
    settings = settings or settings_of(outputs, norm.normed.shape[1], matrices=2)
    results = _row(norm, tuple(parts), gated=True, settings=settings)
    return results.get("sum", norm.x), results["out"]


@partial(jax.jit, static_argnames=("gated", "settings"))
def _row(
    x: jax.Array | RowNorm, parts: tuple[Fragments, ...], *, settings: Settings, gated: bool = False
) -> dict[str, jax.Array]:
    """The product "out" of a row or of its norm, and the "sum" if that is not the row itself."""
    norm = x if isinstance(x, RowNorm) else None
    matrices = 2 if gated else 1
    outputs = sum(part.shape[0] for part in parts) // matrices
    plan = _RowPlan(
        inner=parts[0].shape[1],
        outputs=outputs,
        matrices=matrices,
        second=outputs // STRIP if gated and len(parts) == 1 else 0,
        settings=settings,
        kind=strip_of(parts[0]),
        norm=None if norm is None else BlockNorm.of(norm, settings.threads(matrices)),
    )
    arrays = {f"{p.array}{n}": getattr(part, p.array) for n, part in enumerate(parts) for p in plan.kind.pieces}
    shape = jax.ShapeDtypeStruct((1, outputs) if gated else (1, 1, outputs), jnp.bfloat16 if gated else jnp.float32)
    return ptx.launch(
        partial(packed_row, plan),
        ({"x": x} if norm is None else norm_sm90.operands(norm)) | arrays,
        {"out": shape} | ({} if norm is None else norm_sm90.results(norm)),
        {"group": settings.blocks(outputs)},
        {
            "staged": plgpu.SMEM((plan.inner // 2 + COLUMNS // 2,), jnp.uint32),  # x, and zeros after it
            "of_runs": plgpu.SMEM((plan.inner // 32,), jnp.float32),
            "of_warps": plgpu.SMEM((plan.threads // 32 * STRIP,), jnp.float32),
        }
        | ({} if norm is None else norm_sm90.shared(norm)),
        warpgroups=None if plan.threads == 128 else plan.threads // 128,
    )


def packed_row(
    plan: _RowPlan,
    *,
    out: Value,
    staged: Value,
    of_runs: Value,
    of_warps: Value,
    group: Value,
    **arrays: Value,
) -> None:
    """One thread of a block: it shares some strips' columns with the block's other warps."""
    settings = plan.settings
    warp = arith.shrui(utils.thread_idx(), ptx.const(5))
    rest, strip = ptx.divided(warp, settings.strips)
    share, matrix = ptx.divided(rest, plan.matrices)
    # The last block may have warps beyond the last strip, which do its work again.
    strip = arith.minsi(ptx.add(strip, ptx.mul(group, settings.strips)), ptx.const(plan.outputs // STRIP - 1))
    strip = ptx.add(strip, ptx.mul(matrix, plan.second))
    at = {piece.array: _chosen(plan, arrays, piece.array, matrix) for piece in plan.kind.pieces}
    # Loads of x come first: they would wait behind those of weights.
    norm, chunks, of_norm = plan.norm, [], []
    if norm is None:
        chunks = _load_x(plan, arrays["x"])
    else:
        of_norm = norm.load(arrays)
        ptx.keep_loads_before(of_runs)  # an address, so never the least int32
    bases = [piece.base(at[piece.array], strip, plan.tiles) for piece in plan.kind.pieces]

    def load(turn: Value) -> list[Value]:
        last = None
        if plan.tiles % TURN:
            last = arith.minsi(arith.subi(ptx.const(plan.tiles - 1), ptx.mul(turn, TURN)), ptx.const(TURN - 1))
        pairs = zip(plan.kind.pieces, bases, strict=True)
        return [word for piece, base in pairs for word in piece.load(base, turn, last)]

    count = arith.divui(arith.subi(ptx.const(plan.turns + settings.share - 1), share), ptx.const(settings.share))
    first = load(share)
    prefetch = _prefetch(plan, at, strip)
    for number in range(1, settings.ahead):
        prefetch(ptx.add(share, number * settings.share))
    if norm is not None:
        ptx.keep_loads_before(staged)  # otherwise ptxas loads the first weights after the norm
        chunks = norm.run(of_norm, arrays, group)
    _stage(plan, chunks, staged, of_runs)
    ptx.sync_block()

    _, _, q = lane_of()
    zeros = ptx.add(staged, 2 * plan.inner)

    def multiply(acc: list[Value], loaded: list[Value], turn: Value) -> list[Value]:
        sums_at = ptx.add(of_runs, ptx.mul(turn, 4 * COLUMNS // 32), ptx.mul(q, 8))
        return plan.kind.multiply(acc, loaded, plan.kind.x_address(staged, zeros, turn), sums_at)

    def one(number: Value, values: list[Value]) -> list[Value]:
        turn = ptx.add(share, ptx.mul(number, settings.share))
        if settings.ahead:
            prefetch(ptx.add(turn, settings.ahead * settings.share))
        following = load(ptx.add(turn, settings.share))
        return [*multiply(values[:2], values[2:], turn), *following]

    last = arith.subi(count, ptx.const(1))
    values = ptx.loop(last, [*[ptx.float32(0.0)] * 2, *first], one)
    acc = multiply(values[:2], values[2:], ptx.add(share, ptx.mul(last, settings.share)))
    _finish(plan, acc, out, of_warps, group)


def _chosen(plan: _RowPlan, arrays: Mapping[str, Value], name: str, matrix: Value) -> Value:
    """The address of an array of the warp's matrix."""
    if f"{name}1" not in arrays:
        return arrays[f"{name}0"]
    return arith.select(equal(matrix, ptx.const(1)), arrays[f"{name}1"], arrays[f"{name}0"])


def _load_x(plan: _RowPlan, x: Value) -> list[list[Value]]:
    """Begins to load the thread's pieces of x, eight numbers each."""
    pieces = plan.inner // 8
    found = []
    for begin in range(0, pieces, plan.threads):
        number = ptx.add(utils.thread_idx(), begin)
        exists = ptx.NotNegative(arith.subi(ptx.const(pieces - 1), number))
        found.append(ptx.load(ptx.offset(x, number, 16), [ptx.i32()] * 4, exists))
    return found


def _stage(plan: _RowPlan, chunks: list[list[Value]], staged: Value, of_runs: Value) -> None:
    """Writes x to shared memory, zeros after it, and -128 times the sum of each 32 numbers."""
    pieces, (_, _, q) = plan.inner // 8, lane_of()
    for round_, words in enumerate(chunks):
        number = ptx.add(utils.thread_idx(), round_ * plan.threads)
        exists = ptx.less(number, pieces)
        to = ptx.add(staged, ptx.mul(number, 16))
        ptx.store(to, plan.kind.staged(words), exists, space="shared")
        if plan.kind.sums_runs:
            total = ptx.tree_sum([each for word in words for each in ptx.halves(word)])
            total = arith.mulf(ptx.quad_reduce(arith.addf, total), ptx.float32(-128.0))
            run = ptx.add(of_runs, ptx.mul(arith.shrui(number, ptx.const(2)), 4))
            ptx.store(run, [total], arith.andi(exists, equal(q, ptx.const(0))), space="shared")
    at = ptx.add(staged, 2 * plan.inner, ptx.mul(utils.thread_idx(), 16))
    ptx.store(at, [ptx.const(0)] * 4, ptx.less(utils.thread_idx(), COLUMNS // 8), space="shared")


def _prefetch(plan: _RowPlan, at: Mapping[str, Value], strip: Value) -> Callable[[Value], None]:
    """What prefetches a turn: each lane a line of 128 bytes."""
    lane, _, _ = lane_of()
    lines = [(piece, line) for piece in plan.kind.pieces for line in piece.lines()]
    if not plan.settings.ahead or len(lines) > 32:
        return lambda turn: None
    starts = {piece: piece.start(at[piece.array], strip, plan.tiles) for piece in plan.kind.pieces}
    addresses = [(ptx.shifted(starts[piece], line), ptx.const(piece.turn)) for piece, line in lines]
    base, stride = addresses[0]
    for number, (address, step) in enumerate(addresses[1:], 1):
        mine = equal(lane, ptx.const(number))
        base, stride = arith.select(mine, address, base), arith.select(mine, step, stride)

    def run(turn: Value) -> None:
        exists = arith.andi(ptx.less(lane, len(lines)), ptx.less(turn, plan.tiles // TURN))
        (address,) = ptx.asm("mad.wide.s32 $0, $1, $2, $3;", [ptx.values.i64()], [turn, stride, base])
        ptx.asm(_PREFETCH, [], [address, exists])

    return run


def _finish(plan: _RowPlan, acc: list[Value], out: Value, of_warps: Value, group: Value) -> None:
    """Adds up what the block's warps have, and writes it."""
    settings, (_, g, q) = plan.settings, lane_of()
    warp, thread = arith.shrui(utils.thread_idx(), ptx.const(5)), utils.thread_idx()
    acc = [arith.mulf(ptx.quad_reduce(arith.addf, each), ptx.float32(plan.kind.factor)) for each in acc]
    to = ptx.add(of_warps, ptx.mul(warp, 4 * STRIP), ptx.mul(g, 8))
    ptx.store(to, acc, equal(q, ptx.const(0)), space="shared")
    ptx.sync_block()
    rows = STRIP * settings.strips
    row = ptx.add(ptx.mul(group, rows), thread)

    def write() -> None:
        totals = []
        for matrix in range(plan.matrices):
            total = None
            for share in range(settings.share):
                first = 4 * (share * plan.matrices + matrix) * rows
                (number,) = ptx.load_shared(ptx.add(of_warps, ptx.mul(thread, 4)), [ptx.f32()], shift=first)
                total = number if total is None else arith.addf(total, number)
            totals.append(total)
        if plan.matrices == 1:
            ptx.store(ptx.offset(out, row, 4), totals, ptx.always())
            return
        gate, up = (ptx.asm(_ROUND, [ptx.f32()], [total])[0] for total in totals)
        less = ptx.exp2(arith.mulf(gate, ptx.float32(-_LOG2_E)))
        silu = ptx.divide(gate, arith.addf(ptx.float32(1.0), less))
        ptx.asm(_STORE_BF16, [], [ptx.offset(out, row, 2), arith.mulf(silu, up)])

    ptx.when(arith.andi(ptx.less(thread, rows), ptx.less(row, plan.outputs)), write)
