"""One row times packed matrices [O, I], for Hopper: Pallas Mosaic GPU. See RECORD.md.

A warp takes 16 rows of a matrix and loads its share of their columns straight into registers, 256 columns a turn. It
multiplies on the tensor cores, as `packed_sm90` does, but with a single row of x all eight columns of a product are
alike. So each of the four threads that hold a row's sums keeps those of other columns, and only scales these.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.formats.fragments import TILE, MXFP4Fragments
from pallas_kernels.formats.ggml import fragments_sm90 as ggml
from pallas_kernels.formats.ggml.fragments import PARTS, QuantizedFragments
from pallas_kernels.formats.mxfp4_sm90 import PLANES_MISSING, planes, power_of_two
from pallas_kernels.ptx import Value

STRIP: Final = 16  # rows of a matrix that a warp takes
TURN: Final = 4  # tiles of 64 columns that it takes at a time
_COLUMNS: Final = TURN * TILE
_PROCESSORS: Final = 132
_WARPS: Final = 24  # of a block, at most: with more, they would not have enough registers
_LOG2_E: Final = 1.4426950408889634
_SHIFT: Final = 48  # x is multiplied by 2^48 for MXFP4, so that products with 2^-126 times its values are not subnormal

Fragments = MXFP4Fragments | QuantizedFragments

_TIMES_2_48: Final = "mul.rn.bf16x2 $0, $1, $2;"
_STORE_BF16: Final = "{ .reg .b16 t; cvt.rn.bf16.f32 t, $1; st.global.b16 [$0], t; }"
_ROUND: Final = "{ .reg .b16 z, t; .reg .b32 w; mov.b16 z, 0; cvt.rn.bf16.f32 t, $1; mov.b32 w, {z, t}; mov.b32 $0, w; }"
_PREFETCH: Final = "{ .reg .pred p; setp.ne.s32 p, $1, 0; @p prefetch.global.L2 [$0]; }"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a product is spread over warps."""

    share: int  # warps that share the columns of a strip
    strips: int = 1  # per block
    ahead: int = 0  # turns that are prefetched to the second-level cache before they are loaded
    early: bool = True  # whether a turn is loaded while the one before is multiplied


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What a lane loads of an array in a turn."""

    array: str
    size: int  # bytes of a load: 4, 8 or 16
    places: int = 1  # loads of each tile
    each_thread: bool = True  # each lane has its own part of all four tiles; else those of a row share one load
    by_tile: bool = True  # of tile q in lane 4·g + q, if lanes share; else one for the whole turn

    @property
    def tile(self) -> int:
        """Bytes of a tile, or of a turn, in 64 rows of a matrix."""
        return self.places * self.size * (128 if self.each_thread else 32)

    @property
    def turn(self) -> int:
        """Bytes of a turn."""
        return self.tile * (TURN if self.by_tile else 1)

    @property
    def words(self) -> int:
        """Registers of a turn."""
        return self.size // 4 * self.places * (TURN if self.each_thread else 1)

    def base(self, at: Value, strip: Value, turns: int) -> Value:
        """The address of a lane's first load in a strip."""
        lane, g, q = _lane()
        panel, number = ptx.divided(strip, TILE // STRIP)
        panel_at = ptx.offset(at, ptx.mul(panel, turns), self.turn)
        if self.each_thread:
            return ptx.offset(panel_at, ptx.add(ptx.mul(number, 32), lane), self.size)
        own = ptx.offset(panel_at, ptx.add(ptx.mul(number, 8), g), self.size)
        return ptx.offset(own, q, self.tile) if self.by_tile else own

    def load(self, base: Value, turn: Value) -> list[Value]:
        """Begins to load a turn: words by tile, place and number."""
        at = ptx.offset(base, turn, self.turn)
        tiles = TURN if self.each_thread else 1
        shifts = [i * self.tile + place * 128 * self.size for i in range(tiles) for place in range(self.places)]
        return [word for shift in shifts for word in _load(at, self.size // 4, shift)]

    def lines(self) -> list[int]:
        """Where the 128-byte lines of a strip's turn begin, from the strip's first byte on."""
        bytes_ = self.size * (32 if self.each_thread else 8)
        return [
            i * self.tile + place * 128 * self.size + line
            for i in range(TURN if self.by_tile else 1)
            for place in range(self.places)
            for line in range(0, bytes_, 128)
        ]

    def start(self, at: Value, strip: Value, turns: int) -> Value:
        """The address of a strip's first byte."""
        panel, number = ptx.divided(strip, TILE // STRIP)
        panel_at = ptx.offset(at, ptx.mul(panel, turns), self.turn)
        return ptx.offset(panel_at, number, self.size * (32 if self.each_thread else 8))


class _MXFP4Row:
    """A strip of `MXFP4Fragments`."""

    pieces = (_Piece("words", 16), _Piece("scales", 4, each_thread=False))
    sums_runs = False  # whether sums of x are needed
    factor = PLANES_MISSING * 2.0**-_SHIFT  # of all sums

    def staged(self, words: list[Value]) -> list[Value]:
        """Pairs of x as they lie in shared memory."""
        power = ptx.const((127 + _SHIFT << 7) * 0x10001)
        return [ptx.asm(_TIMES_2_48, [ptx.i32()], [word, power])[0] for word in words]

    def x_address(self, x: Value, zeros: Value, turn: Value) -> Value:
        """Where a lane's numbers of x are: even columns of the product are for the first 32 of a tile, odd for others."""
        _, g, q = _lane()
        mine = _equal(arith.andi(g, ptx.const(1)), arith.shrui(q, ptx.const(1)))
        here = ptx.add(x, ptx.mul(q, 32), ptx.mul(turn, 2 * _COLUMNS))
        return arith.select(mine, here, zeros)

    def multiply(self, acc: list[Value], loaded: list[Value], x_at: Value, sums_at: Value) -> list[Value]:
        """`acc`, the sums of the thread's even and odd row, and a turn's products."""
        del sums_at
        _, _, q = _lane()
        words, scales = loaded[:16], loaded[16]
        own: list[Value] = []
        for i in range(TURN):
            x = [word for shift in (0, 16) for word in ptx.load_shared(x_at, [ptx.i32()] * 4, shift=128 * i + shift)]
            of_words = [planes(word) for word in words[4 * i : 4 * i + 4]]
            sums = [ptx.float32(0.0)] * 4
            for plane in range(4):
                sums = ptx.mma(sums, [of_word[plane] for of_word in of_words], x[2 * plane : 2 * plane + 2])
            own = _kept(own, sums, q, i)
        # By row, then by half of the tile. In the word of scales, halves come first.
        powers = [power_of_two(scales, 2 * half + r) for r in range(2) for half in range(2)]
        for half in range(2):
            acc = [ptx.fma(powers[2 * r + half], own[2 * r + half], acc[r]) for r in range(2)]
        return acc


class _GgmlRow:
    """A strip of `QuantizedFragments` with a scale for 32 columns."""

    factor = 1.0

    def __init__(self, weight: QuantizedFragments):
        self._parts = PARTS[weight.type]
        self.sums_runs = ggml.has_offsets(self._parts)
        pieces = [_Piece("words", 16, places=weight.words.shape[2])]
        if weight.high is not None:
            pieces.append(_Piece("high", 4 * weight.high.shape[-1]))
        pieces.append(_Piece("scales", 4 * weight.scales.shape[-1], each_thread=False))
        if weight.blocks is not None:
            pieces.append(_Piece("blocks", 4 * weight.blocks.shape[-1], each_thread=False, by_tile=False))
        self.pieces = tuple(pieces)

    def staged(self, words: list[Value]) -> list[Value]:
        """See `_MXFP4Row`."""
        return words

    def x_address(self, x: Value, zeros: Value, turn: Value) -> Value:
        """See `_MXFP4Row`."""
        del zeros
        _, _, q = _lane()
        return ptx.add(x, ptx.mul(q, 16), ptx.mul(turn, 2 * _COLUMNS))

    def multiply(self, acc: list[Value], loaded: list[Value], x_at: Value, sums_at: Value) -> list[Value]:
        """See `_MXFP4Row`."""
        _, _, q = _lane()
        of = {}
        for piece in self.pieces:
            of[piece.array], loaded = loaded[: piece.words], loaded[piece.words :]
        own: list[list[Value]] = [[], []]
        for i in range(TURN):
            words, high = (_of_tile(of.get(name, []), i) for name in ("words", "high"))
            for j in range(2):
                x = ptx.load_shared(x_at, [ptx.i32()] * 4, shift=128 * i + 64 * j)
                sums = [ptx.float32(0.0)] * 4
                for m in range(2):
                    sums = ptx.mma(sums, ggml.operand(self._parts, words, high, j, m), x[2 * m : 2 * m + 2])
                own[j] = _kept(own[j], sums[::2], q, i)
        common = ggml.shared(self._parts, of.get("blocks", []))
        less = ptx.load_shared(sums_at, [ptx.f32()] * 2) if self.sums_runs else []
        for j in range(2):
            (run,) = ggml.runs(self._parts, of["scales"], common, j)
            dots = [arith.addf(each, less[j]) for each in own[j]] if less else own[j]
            acc = [ptx.fma(*each) for each in zip(run.factors, dots, acc, strict=True)]
            if run.offsets is not None:
                acc = [ptx.fma(offset, less[j], each) for offset, each in zip(run.offsets, acc, strict=True)]
        return acc


@dataclasses.dataclass(frozen=True)
class _RowPlan:
    """Everything that is known when the kernel is built."""

    inner: int  # I
    outputs: int  # O, of a matrix
    matrices: int  # 1, or 2: gate and up
    second: int  # the first strip of up, if both are of one array; else 0
    settings: Settings
    kind: _MXFP4Row | _GgmlRow

    @property
    def turns(self) -> int:
        return self.inner // _COLUMNS

    @property
    def warps(self) -> int:
        return self.settings.share * self.settings.strips * self.matrices

    @property
    def threads(self) -> int:
        return 32 * self.warps


def takes(x_TI: jax.Array, parts: Sequence[Fragments]) -> bool:
    """Whether `product` takes these operands."""
    T, inputs = x_TI.shape
    return T == 1 and inputs % _COLUMNS == 0 and all(_takes(part) for part in parts)


def takes_gated(x_TI: jax.Array, parts: Sequence[Fragments]) -> bool:
    """Whether `gated` takes these operands."""
    halves_fit = len(parts) == 1 or (len(parts) == 2 and parts[0].shape == parts[1].shape)
    alike = len({getattr(part, "type", "MXFP4") for part in parts}) == 1
    return takes(x_TI, parts) and halves_fit and alike


def _takes(part: Fragments) -> bool:
    return isinstance(part, MXFP4Fragments) or PARTS[part.type].run == 32


def settings_of(outputs: int, inputs: int, matrices: int = 1) -> Settings:
    """How to spread a product of `matrices` matrices [O, I]: one block a multiprocessor, as long as that is enough."""
    turns = inputs // _COLUMNS
    strips = -(-outputs // (STRIP * _PROCESSORS))
    while strips * matrices <= _WARPS:
        shares = [n for n in range(1, turns + 1) if n * strips * matrices in range(4, _WARPS + 1, 4)]
        if shares:
            # As few turns one after the other as possible, and then as few warps.
            return Settings(share=min(shares, key=lambda share: (-(-turns // share), share)), strips=strips)
        strips += 1
    return Settings(share=1, strips=4 // matrices)


def product(x_1I: jax.Array, parts: Sequence[Fragments], settings: Settings | None = None) -> jax.Array:
    """[1, 1, O] float32: x · matrixᵀ, without bias."""
    outputs = sum(part.shape[0] for part in parts)
    settings = settings or settings_of(outputs, x_1I.shape[1])
    sums = [_row(x_1I, (part,), settings=settings) for part in parts]
    return sums[0] if len(sums) == 1 else jnp.concatenate(sums, axis=-1)


def gated(x_1I: jax.Array, parts: Sequence[Fragments], settings: Settings | None = None) -> jax.Array:
    """[1, F] bfloat16: silu(x · gateᵀ) · (x · upᵀ). Gate and up are two parts, or the halves of one."""
    outputs = sum(part.shape[0] for part in parts) // 2
    settings = settings or settings_of(outputs, x_1I.shape[1], matrices=2)
    return _row(x_1I, tuple(parts), gated=True, settings=settings)


@partial(jax.jit, static_argnames=("gated", "settings"))
def _row(x_1I: jax.Array, parts: tuple[Fragments, ...], *, settings: Settings, gated: bool = False) -> jax.Array:
    outputs = sum(part.shape[0] for part in parts) // (2 if gated else 1)
    plan = _RowPlan(
        inner=x_1I.shape[1],
        outputs=outputs,
        matrices=2 if gated else 1,
        second=outputs // STRIP if gated and len(parts) == 1 else 0,
        settings=settings,
        kind=_MXFP4Row() if isinstance(parts[0], MXFP4Fragments) else _GgmlRow(parts[0]),
    )
    arrays = {f"{p.array}{n}": getattr(part, p.array) for n, part in enumerate(parts) for p in plan.kind.pieces}
    shape = jax.ShapeDtypeStruct((1, outputs) if gated else (1, 1, outputs), jnp.bfloat16 if gated else jnp.float32)
    results = ptx.launch(
        partial(packed_row, plan),
        {"x": x_1I, **arrays},
        {"out": shape},
        {"group": -(-outputs // (STRIP * settings.strips))},
        {
            "staged": plgpu.SMEM((plan.inner // 2 + _COLUMNS // 2,), jnp.uint32),  # x, and zeros after it
            "of_runs": plgpu.SMEM((plan.inner // 32,), jnp.float32),
            "of_warps": plgpu.SMEM((plan.warps * STRIP,), jnp.float32),
        },
        warpgroups=None if plan.threads == 128 else plan.threads // 128,
    )
    return results["out"]


def packed_row(
    plan: _RowPlan,
    *,
    x: Value,
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
    chunks = _load_x(plan, x)
    bases = [piece.base(at[piece.array], strip, plan.turns) for piece in plan.kind.pieces]

    def load(turn: Value) -> list[Value]:
        return [
            word for piece, base in zip(plan.kind.pieces, bases, strict=True) for word in piece.load(base, turn)
        ]

    count = arith.divui(arith.subi(ptx.const(plan.turns + settings.share - 1), share), ptx.const(settings.share))
    first = load(share) if settings.early else []
    prefetch = _prefetch(plan, at, strip)
    for number in range(1, settings.ahead):
        prefetch(ptx.add(share, number * settings.share))
    _stage(plan, chunks, staged, of_runs)
    ptx.sync_block()

    _, _, q = _lane()
    zeros = ptx.add(staged, 2 * plan.inner)

    def multiply(acc: list[Value], loaded: list[Value], turn: Value) -> list[Value]:
        sums_at = ptx.add(of_runs, ptx.mul(turn, 4 * _COLUMNS // 32), ptx.mul(q, 8))
        return plan.kind.multiply(acc, loaded, plan.kind.x_address(staged, zeros, turn), sums_at)

    def one(number: Value, values: list[Value]) -> list[Value]:
        turn = ptx.add(share, ptx.mul(number, settings.share))
        if settings.ahead:
            prefetch(ptx.add(turn, settings.ahead * settings.share))
        if not settings.early:
            return multiply(values, load(turn), turn)
        following = load(ptx.add(turn, settings.share))
        return [*multiply(values[:2], values[2:], turn), *following]

    acc = [ptx.float32(0.0)] * 2
    if settings.early:
        acc = ptx.loop(arith.subi(count, ptx.const(1)), [*acc, *first], one)
        last = ptx.add(share, ptx.mul(arith.subi(count, ptx.const(1)), settings.share))
        acc = multiply(acc[:2], acc[2:], last)
    else:
        acc = ptx.loop(count, acc, one)
    _finish(plan, acc, out, of_warps, group)


def _chosen(plan: _RowPlan, arrays: Mapping[str, Value], name: str, matrix: Value) -> Value:
    """The address of an array of the warp's matrix."""
    if f"{name}1" not in arrays:
        return arrays[f"{name}0"]
    return arith.select(_equal(matrix, ptx.const(1)), arrays[f"{name}1"], arrays[f"{name}0"])


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
    pieces, (_, _, q) = plan.inner // 8, _lane()
    for round_, words in enumerate(chunks):
        number = ptx.add(utils.thread_idx(), round_ * plan.threads)
        exists = ptx.less(number, pieces)
        to = ptx.add(staged, ptx.mul(number, 16))
        ptx.store(to, plan.kind.staged(words), exists, space="shared")
        if plan.kind.sums_runs:
            total = ptx.tree_sum([each for word in words for each in ptx.halves(word)])
            total = arith.mulf(ptx.quad_reduce(arith.addf, total), ptx.float32(-128.0))
            run = ptx.add(of_runs, ptx.mul(arith.shrui(number, ptx.const(2)), 4))
            ptx.store(run, [total], arith.andi(exists, _equal(q, ptx.const(0))), space="shared")
    at = ptx.add(staged, 2 * plan.inner, ptx.mul(utils.thread_idx(), 16))
    ptx.store(at, [ptx.const(0)] * 4, ptx.less(utils.thread_idx(), _COLUMNS // 8), space="shared")


def _prefetch(plan: _RowPlan, at: Mapping[str, Value], strip: Value) -> "_Prefetch":
    """What prefetches a turn: each lane a line of 128 bytes."""
    lane, _, _ = _lane()
    lines = [(piece, line) for piece in plan.kind.pieces for line in piece.lines()]
    if not plan.settings.ahead or len(lines) > 32:
        return lambda turn: None
    base, stride, number = None, None, 0
    for piece in plan.kind.pieces:
        start = piece.start(at[piece.array], strip, plan.turns)
        for line in piece.lines():
            here, size = ptx.shifted(start, line), ptx.const(piece.turn)
            if base is None:
                base, stride = here, size
            else:
                mine = _equal(lane, ptx.const(number))
                base, stride = arith.select(mine, here, base), arith.select(mine, size, stride)
            number += 1

    def run(turn: Value) -> None:
        exists = arith.andi(ptx.less(lane, len(lines)), ptx.less(turn, plan.turns))
        (address,) = ptx.asm("mad.wide.s32 $0, $1, $2, $3;", [ptx.values.i64()], [turn, stride, base])
        ptx.asm(_PREFETCH, [], [address, exists])

    return run


def _finish(plan: _RowPlan, acc: list[Value], out: Value, of_warps: Value, group: Value) -> None:
    """Adds up what the block's warps have, and writes it."""
    settings, (_, g, q) = plan.settings, _lane()
    warp, thread = arith.shrui(utils.thread_idx(), ptx.const(5)), utils.thread_idx()
    acc = [arith.mulf(ptx.quad_reduce(arith.addf, each), ptx.float32(plan.kind.factor)) for each in acc]
    to = ptx.add(of_warps, ptx.mul(warp, 4 * STRIP), ptx.mul(g, 8))
    ptx.store(to, acc, _equal(q, ptx.const(0)), space="shared")
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


def _kept(own: list[Value], sums: Sequence[Value], q: Value, tile: int) -> list[Value]:
    """The sums of tile q, once all tiles up to it have been seen."""
    if not own:
        return list(sums)
    mine = _equal(q, ptx.const(tile))
    return [arith.select(mine, new, old) for new, old in zip(sums, own, strict=True)]


def _of_tile(words: list[Value], tile: int) -> list[Value]:
    per = len(words) // TURN
    return words[per * tile : per * (tile + 1)]


def _lane() -> tuple[Value, Value, Value]:
    """The number 4·g + q of the thread in its warp, g, and q."""
    lane = arith.andi(utils.thread_idx(), ptx.const(31))
    return lane, arith.shrui(lane, ptx.const(2)), arith.andi(lane, ptx.const(3))


def _equal(a: Value, b: Value) -> Value:
    return arith.cmpi(arith.CmpIPredicate.eq, a, b)


def _load(at: Value, count: int, shift: int) -> list[Value]:
    """Loads 1, 2 or 4 words that nobody else will."""
    what = ", ".join(f"${i}" for i in range(count))
    kind = "" if count == 1 else f".v{count}"
    text = f"ld.global.nc.L1::no_allocate{kind}.b32 {{{what}}}, [${count}+{shift}];"
    if count == 1:
        text = text.replace("{$0}", "$0")
    return ptx.asm(text, [ptx.i32()] * count, [at], volatile=True)
