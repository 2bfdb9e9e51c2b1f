"""Products of a few rows with a packed matrix [O, I], for Hopper: Pallas Mosaic GPU. See RECORD.md.

A warp streams 16 rows of the matrix from memory to registers, unpacks them there, and multiplies them by eight rows of
x at a time on the tensor cores, as the experts' kernel does (`moe.mosaic_sm90`). Blocks that share rows of the matrix
each have some of its columns; whoever reads the result adds up their sums.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.formats.fragments import TILE, MXFP4Fragments
from pallas_kernels.formats.ggml import fragments_sm90 as ggml
from pallas_kernels.formats.ggml.fragments import PARTS, QuantizedFragments
from pallas_kernels.formats.mxfp4_sm90 import MISSING, decoded
from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.ptx import Value

EIGHT: Final = 8  # rows of x per instruction
_EIGHTS: Final = 4  # of them per block, at most: the matrix is read once for every 32 rows
_BLOCKS: Final = 528  # to aim for: 132 multiprocessors hold four each
_UNROLL: Final = 4  # tiles whose loads are in flight while as many are computed; 256 columns

_STORE_PAIR = "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.v2.f32 [$0], {$1, $2}; }"

Fragments = MXFP4Fragments | QuantizedFragments
Tile = Mapping[str, list[Value]]  # what a thread has of a tile, by array


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What a thread loads of an array, for each tile of 64 columns."""

    array: str
    tile: int  # bytes of a tile in the array
    size: int  # bytes per thread: 2, 4, 8 or 16
    shift: int = 0  # 2^shift threads in turn share them
    place: int = 0  # bytes before them, of the tile's
    every: int = 1  # tiles that share them

    def begin(self, array: Value, tile: Value) -> Value:
        """The address of what the thread has of a tile."""
        at = ptx.offset(array, tile if self.every == 1 else ptx.divided(tile, self.every)[0], self.tile)
        return ptx.shifted(ptx.offset(at, arith.shrui(ptx.thread(), ptx.const(self.shift)), self.size), self.place)

    def moved(self, at: Value, turn: Value, unroll: int) -> Value:
        """The address `turn` turns further on."""
        return ptx.offset(at, turn, unroll // self.every * self.tile)

    def count(self, tile: int) -> int:
        """How many words a thread loads for the tile of that number in a turn."""
        return max(1, self.size // 4) if tile % self.every == 0 else 0

    def load(self, at: Value, tile: int) -> list[Value]:
        """Begins to load them."""
        count, where = self.count(tile), tile // self.every * self.tile
        if not count:
            return []
        if self.size == 2:
            return ptx.asm(f"ld.global.nc.u16 $0, [$1+{where}];", [ptx.i32()], [at], volatile=True)
        words = ", ".join(f"${i}" for i in range(count))
        vector = f"v{count}.b32 {{{words}}}" if count > 1 else "b32 $0"
        text = f"ld.global.nc.L1::no_allocate.{vector}, [${count}+{where}];"
        return ptx.asm(text, [ptx.i32()] * count, [at], volatile=True)


class _MXFP4Tiles:
    """Tiles of `MXFP4Fragments`."""

    pieces = (_Piece("words", 2048, 16), _Piece("scales", 128, 2, shift=1))
    x_lane, x_loads = 32, ((0, 4), (16, 4))  # bytes between a token's lanes; places and words of the loads for a tile
    factor = MISSING  # of all sums

    def multiply(self, acc: list[Value], tile: Tile, xs: Sequence[list[Value]]) -> list[Value]:
        """`acc` and a tile's products: four sums for each of xs, which hold 16 numbers of a token each."""
        planes = decoded(tile["words"], tile["scales"][0])
        for plane in range(4):
            acc = _multiplied(acc, [of_word[plane] for of_word in planes], xs, plane)
        return acc


class _GgmlTiles:
    """Tiles of `QuantizedFragments`."""

    factor = 1.0

    def __init__(self, weight: QuantizedFragments):
        self._parts = PARTS[weight.type]
        per_byte, per_scale = weight.words.shape[2], 4 * weight.scales.shape[-1]
        pieces = [_Piece("words", 2048 * per_byte, 16, place=2048 * i) for i in range(per_byte)]
        if weight.high is not None:
            pieces.append(_Piece("high", 512 * weight.high.shape[-1], 4 * weight.high.shape[-1]))
        pieces.append(_Piece("scales", 32 * per_scale, per_scale, shift=2))
        if weight.blocks is not None:
            size = 4 * weight.blocks.shape[-1]
            pieces.append(_Piece("blocks", 32 * size, size, shift=2, every=_UNROLL))
        self.pieces = tuple(pieces)
        self.x_lane = self._parts.run // 2
        self.x_loads = ((0, 4), (64, 4)) if self._parts.run == 32 else ((0, 2), (32, 2), (64, 2), (96, 2))

    def multiply(self, acc: list[Value], tile: Tile, xs: Sequence[list[Value]]) -> list[Value]:
        """See `_MXFP4Tiles.multiply`."""
        shared = ggml.shared_numbers(self._parts, tile.get("blocks", []))
        for j in range(2):
            runs = ggml.runs(self._parts, tile["scales"], shared, j)
            for number, run in enumerate(runs):
                zeros = [ptx.float32(0.0)] * len(acc)
                dots, sums = zeros, zeros
                for m in (0, 1) if len(runs) == 1 else (number,):
                    a = ggml.operand(self._parts, tile["words"], tile.get("high", []), j, m)
                    dots = _multiplied(dots, a, xs, 2 * j + m)
                    if run.offsets is not None:
                        sums = _multiplied(sums, ggml.ones(), xs, 2 * j + m)
                acc = _plus(acc, run.factors, dots)
                if run.offsets is not None:
                    acc = _plus(acc, run.offsets, sums)
        return acc


@dataclasses.dataclass(frozen=True)
class _PackedPlan:
    """Everything that is known when the kernel is built."""

    rows: int  # T, of x
    inner: int  # I
    outputs: int  # O
    splits: int  # blocks that share I
    unroll: int  # tiles whose loads are in flight while as many are computed
    tiles: _MXFP4Tiles | _GgmlTiles

    @property
    def steps(self) -> int:
        """Tiles that a block sums over."""
        return self.inner // (TILE * self.splits)

    @property
    def eights(self) -> int:
        """Groups of eight rows that a block computes."""
        return min(_EIGHTS, -(-self.rows // EIGHT))


def product(x_TI: jax.Array, parts: Sequence[Fragments], bias_O: jax.Array | None = None) -> PartialSum:
    """See `api.packed_matvec`."""
    outputs = sum(part.shape[0] for part in parts)
    splits = splits_of(outputs, x_TI.shape[1])
    sums = [_parts(x_TI, part, splits=splits) for part in parts]
    parts_JTO = sums[0] if len(sums) == 1 else jnp.concatenate(sums, axis=-1)
    return PartialSum(parts_JTO, bias_EO=None if bias_O is None else bias_O[None])


def splits_of(outputs: int, inputs: int) -> int:
    """Blocks that share the columns: they do not depend on the number of rows, and so a row's bits don't either."""
    steps = inputs // TILE
    turns = steps // _UNROLL if steps % _UNROLL == 0 else steps
    wanted = _BLOCKS * TILE / outputs
    return min(
        (each for each in range(1, turns + 1) if turns % each == 0), key=lambda each: abs(math.log(each / wanted))
    )


@partial(jax.jit, static_argnames=("splits",))
def _parts(x_TI: jax.Array, weight: Fragments, *, splits: int) -> jax.Array:
    """[splits, T, O] float32."""
    T, inputs = x_TI.shape
    steps = inputs // (TILE * splits)
    plan = _PackedPlan(
        rows=T,
        inner=inputs,
        outputs=weight.shape[0],
        splits=splits,
        unroll=next(unroll for unroll in (_UNROLL, 5, 3, 2, 1) if steps % unroll == 0),
        tiles=_MXFP4Tiles() if isinstance(weight, MXFP4Fragments) else _GgmlTiles(weight),
    )
    arrays = {piece.array: getattr(weight, piece.array) for piece in plan.tiles.pieces}
    results = ptx.launch(
        partial(packed_matvec, plan),
        {"x": x_TI, **arrays},
        {"out": jax.ShapeDtypeStruct((splits, T, plan.outputs), jnp.float32)},
        {"panel": plan.outputs // TILE, "share": -(-T // (plan.eights * EIGHT)), "split": splits},
    )
    return results["out"]


def packed_matvec(
    plan: _PackedPlan, *, x: Value, out: Value, panel: Value, share: Value, split: Value, **arrays: Value
) -> None:
    """One thread of a block: 64 rows of the matrix times up to `eights` · 8 rows of x."""
    first = ptx.mul(share, plan.eights * EIGHT)
    acc = _sums(plan, x, arrays, panel, first, split)
    _, _, q = ptx.fragment_lane()
    for eight in range(plan.eights):
        for column in range(2):
            row = ptx.add(first, ptx.mul(q, 2), EIGHT * eight + column)
            at = ptx.offset(out, ptx.add(ptx.mul(split, plan.rows), row), 4 * plan.outputs)
            even, odd = (arith.mulf(acc[4 * eight + column + 2 * r], ptx.float32(plan.tiles.factor)) for r in range(2))
            ptx.asm(_STORE_PAIR, [], [ptx.offset(at, _even_row(panel), 4), even, odd, ptx.less(row, plan.rows)])


def _even_row(panel: Value) -> Value:
    """The number of the thread's even row in the matrix."""
    warp, g, _ = ptx.fragment_lane()
    return ptx.add(ptx.mul(panel, TILE), ptx.mul(warp, 16), ptx.mul(g, 2))


def _sums(
    plan: _PackedPlan, x: Value, arrays: Mapping[str, Value], panel: Value, first: Value, split: Value
) -> list[Value]:
    """Four sums per eight rows of x: the thread's even and odd row times two of them, in the order of `ptx.mma`."""
    _, g, q = ptx.fragment_lane()
    start = ptx.mul(split, plan.steps)
    number = ptx.add(ptx.mul(panel, plan.steps * plan.splits), start)
    pieces = plan.tiles.pieces
    ats = [piece.begin(arrays[piece.array], number) for piece in pieces]
    x_at, present = [], []
    for eight in range(plan.eights):
        row = ptx.add(first, g, EIGHT * eight)
        row_at = ptx.offset(ptx.offset(x, row, 2 * plan.inner), ptx.mul(start, TILE), 2)
        x_at.append(ptx.offset(row_at, q, plan.tiles.x_lane))
        present.append(ptx.less(row, plan.rows))

    def load(turn: Value) -> list[Value]:
        here = [piece.moved(at, turn, plan.unroll) for piece, at in zip(pieces, ats, strict=True)]
        loads = [piece.load(at, i) for i in range(plan.unroll) for piece, at in zip(pieces, here, strict=True)]
        return [value for values in loads for value in values]

    def compute(turn: Value, acc: list[Value], loaded: list[Value]) -> list[Value]:
        x_from = [ptx.offset(at, ptx.mul(turn, plan.unroll), 2 * TILE) for at in x_at]
        values = iter(loaded)
        shared: dict[str, list[Value]] = {}
        for i in range(plan.unroll):
            tile: dict[str, list[Value]] = {}
            for piece in pieces:
                new = list(itertools.islice(values, piece.count(i)))
                tile.setdefault(piece.array, []).extend(new or shared[piece.array])
            shared = tile
            xs = [_x(plan, at, condition, i) for at, condition in zip(x_from, present, strict=True)]
            acc = plan.tiles.multiply(acc, tile, xs)
        return acc

    zeros = [ptx.float32(0.0)] * (4 * plan.eights)
    return ptx.prefetched_loop(plan.steps // plan.unroll, zeros, load, compute)


def _x(plan: _PackedPlan, at: Value, present: Value, tile: int) -> list[Value]:
    """16 numbers of a token, of a tile's columns."""
    loads = [
        ptx.load(at, [ptx.i32()] * count, present, space="global.nc", shift=2 * TILE * tile + place)
        for place, count in plan.tiles.x_loads
    ]
    return [value for values in loads for value in values]


def _multiplied(acc: list[Value], a: list[Value], xs: Sequence[list[Value]], instruction: int) -> list[Value]:
    """`acc` and the products of a tile's n-th instruction: four sums for each of xs."""
    products = [
        ptx.mma(acc[4 * eight : 4 * eight + 4], a, x[2 * instruction : 2 * instruction + 2])
        for eight, x in enumerate(xs)
    ]
    return [value for values in products for value in values]


def _plus(acc: list[Value], of_rows: list[Value], sums: list[Value]) -> list[Value]:
    """`acc` and sums times a number of the thread's even or odd row."""
    return [ptx.fma(of_rows[i % 4 // 2], sums[i], acc[i]) for i in range(len(acc))]
