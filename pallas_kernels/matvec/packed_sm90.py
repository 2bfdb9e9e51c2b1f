"""Products of a few rows with a packed matrix [O, I], for Hopper: Pallas Mosaic GPU. See RECORD.md.

A block streams its share of 64 rows of the matrix, and the same columns of x, through shared memory. Each warp unpacks
16 of the rows in registers, and multiplies them by eight rows of x at a time on the tensor cores. Blocks that share
rows of the matrix each have some of its columns; whoever reads the result adds up their sums.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.formats.fragments import TILE, MXFP4Fragments
from pallas_kernels.formats.ggml import fragments_sm90 as ggml
from pallas_kernels.formats.ggml.fragments import PARTS, QuantizedFragments
from pallas_kernels.formats.mxfp4_sm90 import MISSING, decoded
from pallas_kernels.matvec import row_sm90
from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.ptx import Value

EIGHT: Final = 8  # rows of x per instruction
_EIGHTS: Final = 4  # of them per block, at most: the matrix is read once for every 32 rows
_BLOCKS: Final = 924  # at most: 132 multiprocessors hold seven each
_SPLITS: Final = 8  # blocks that share I, at most: someone has to add up their sums
_TURN: Final = 4  # tiles of 64 columns that are copied together: as many as share a block of 256 values
_UNROLL: Final = 2
_STAGES: Final = 6  # turns in flight per block, at most
_ROOM: Final = 31 * 1024  # bytes of shared memory per block, of which seven fit on a multiprocessor

_STORE_PAIR = "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.v2.f32 [$0], {$1, $2}; }"

Fragments = MXFP4Fragments | QuantizedFragments
Tile = Mapping[str, list[Value]]  # what a thread has of a tile, by array


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What a thread reads of an array, for each tile of 64 columns."""

    array: str
    tile: int  # bytes of a tile in the array
    size: int  # bytes per thread: 2, 4, 8 or 16
    shift: int = 0  # 2^shift threads in turn share them
    places: tuple[int, ...] = (0,)  # where they are in the tile, but for the thread's own distance
    every: int = 1  # tiles that share them

    def copied(self, tiles: int) -> int:
        """The size of that many tiles, in bytes."""
        return tiles // self.every * self.tile

    def moved(self, at: Value, index: Value, unroll: int) -> Value:
        """The address in shared memory `index` times `unroll` tiles further on."""
        return ptx.add(at, ptx.mul(index, unroll * self.tile))

    def load(self, at: Value, tile: int) -> list[Value]:
        """The words of a tile, in shared memory."""
        starts = [place + tile * self.tile for place in self.places]
        if self.size == 2:
            texts = [f"ld.shared.u16 $0, [$1+{start}];" for start in starts]
            return [ptx.asm(text, [ptx.i32()], [at], volatile=True)[0] for text in texts]
        words = [ptx.i32()] * (self.size // 4)
        return [word for start in starts for word in ptx.load_shared(at, words, shift=start)]


class _MXFP4Tiles:
    """Tiles of `MXFP4Fragments`."""

    pieces = (_Piece("words", 2048, 16), _Piece("scales", 128, 2, shift=1))
    x_lane = 32  # bytes of x between lanes
    x_loads = ((0, 4), (16, 4))  # places and words of a lane's loads for a tile
    x_gap = 16  # bytes after a row of x, such that lanes read different banks
    factor = MISSING  # of all sums

    def common(self, loaded: Tile) -> list[ggml.Shared]:
        """What the tiles of a turn share, of pieces that several tiles share."""
        del loaded
        return []

    def multiply(
        self, acc: list[Value], common: list[ggml.Shared], tile: Tile, xs: Sequence[list[Value]]
    ) -> list[Value]:
        """`acc` and a tile's products: four sums for each of xs, which hold 16 numbers of a token each."""
        del common
        planes = decoded(tile["words"], tile["scales"][0])
        for plane in range(4):
            acc = _multiplied(acc, [of_word[plane] for of_word in planes], xs, plane)
        return acc


class _GgmlTiles:
    """Tiles of `QuantizedFragments`."""

    factor = 1.0

    def __init__(self, weight: QuantizedFragments, rows: int):
        self._columns = min(rows, 2)  # of the thread's two columns of sums, those that x has
        self._parts = PARTS[weight.type]
        count, per_scale = weight.words.shape[2], 4 * weight.scales.shape[-1]
        pieces = [_Piece("words", 2048 * count, 16, places=tuple(2048 * i for i in range(count)))]
        if weight.high is not None:
            pieces.append(_Piece("high", 512 * weight.high.shape[-1], 4 * weight.high.shape[-1]))
        pieces.append(_Piece("scales", 32 * per_scale, per_scale, shift=2))
        if weight.blocks is not None:
            size = 4 * weight.blocks.shape[-1]
            pieces.append(_Piece("blocks", 32 * size, size, shift=2, every=_TURN))
        self.pieces = tuple(pieces)
        self.x_lane = self._parts.run // 2
        self.x_gap = 4 * self.x_lane
        self.x_loads = ((0, 4), (64, 4)) if self._parts.run == 32 else ((0, 2), (32, 2), (64, 2), (96, 2))

    def common(self, loaded: Tile) -> list[ggml.Shared]:
        """See `_MXFP4Tiles.common`."""
        return ggml.shared(self._parts, loaded.get("blocks", []))

    def multiply(
        self, acc: list[Value], common: list[ggml.Shared], tile: Tile, xs: Sequence[list[Value]]
    ) -> list[Value]:
        """See `_MXFP4Tiles.multiply`."""
        for j in range(2):
            runs = ggml.runs(self._parts, tile["scales"], common, j)
            for number, run in enumerate(runs):
                columns = (0, 1) if len(runs) == 1 else (number,)
                sums = [ptx.float32(0.0)] * len(acc)
                if run.offsets is not None:
                    for m in columns:
                        sums = _multiplied(sums, ggml.minus_128(), xs, 2 * j + m)
                dots = sums
                for m in columns:
                    a = ggml.operand(self._parts, tile["words"], tile.get("high", []), j, m)
                    dots = _multiplied(dots, a, xs, 2 * j + m)
                acc = self._plus(acc, run.factors, dots)
                if run.offsets is not None:
                    acc = self._plus(acc, run.offsets, sums)
        return acc

    def _plus(self, acc: list[Value], of_rows: list[Value], sums: list[Value]) -> list[Value]:
        """`acc` and sums times a number of the thread's even or odd row."""
        return [
            ptx.fma(of_rows[i % 4 // 2], sums[i], each) if i % 2 < self._columns else each for i, each in enumerate(acc)
        ]


@dataclasses.dataclass(frozen=True)
class _PackedPlan:
    """Everything that is known when the kernel is built."""

    rows: int  # T, of x
    inner: int  # I
    outputs: int  # O
    splits: int  # blocks that share I
    tiles: _MXFP4Tiles | _GgmlTiles

    @property
    def steps(self) -> int:
        """Tiles that a block sums over."""
        return self.inner // (TILE * self.splits)

    @property
    def turn(self) -> int:
        """Tiles that are copied together."""
        return next(turn for turn in (_TURN, 5, 3, 2, 1) if self.steps % turn == 0)

    @property
    def unroll(self) -> int:
        """Tiles that are computed at a time: with more, fewer blocks would have enough registers."""
        return math.gcd(self.turn, _UNROLL)

    @property
    def turns(self) -> int:
        return self.steps // self.turn

    @property
    def x_rows(self) -> int:
        """Rows of x that a block copies."""
        return min(self.rows, self.eights * EIGHT)

    @property
    def x_row(self) -> int:
        """Bytes between rows of x in shared memory."""
        return 2 * TILE * self.turn + self.tiles.x_gap

    @property
    def places(self) -> list[int]:
        """Where the pieces are in a stage, and after them x."""
        return list(itertools.accumulate((piece.copied(self.turn) for piece in self.tiles.pieces), initial=0))

    @property
    def stage(self) -> int:
        """Bytes of a turn in shared memory."""
        return self.places[-1] + self.x_rows * self.x_row

    @property
    def stages(self) -> int:
        return min(self.turns, _STAGES, max(2, _ROOM // self.stage))

    @property
    def eights(self) -> int:
        """Groups of eight rows that a block computes."""
        return min(_EIGHTS, -(-self.rows // EIGHT))


def product(x_TI: jax.Array, parts: Sequence[Fragments], bias_O: jax.Array | None = None) -> PartialSum:
    """See `api.packed_matvec`."""
    if row_sm90.takes(x_TI, parts):
        parts_1TO = row_sm90.product(x_TI, parts)
        return PartialSum(parts_1TO, bias_EO=None if bias_O is None else bias_O[None])
    outputs = sum(part.shape[0] for part in parts)
    splits = splits_of(outputs, x_TI.shape[1])
    sums = [_parts(x_TI, part, splits=splits) for part in parts]
    parts_JTO = sums[0] if len(sums) == 1 else jnp.concatenate(sums, axis=-1)
    return PartialSum(parts_JTO, bias_EO=None if bias_O is None else bias_O[None])


def splits_of(outputs: int, inputs: int) -> int:
    """Blocks that share the columns: they do not depend on the number of rows, and so a row's bits don't either."""
    steps = inputs // TILE
    turns = steps // _TURN if steps % _TURN == 0 else steps
    most = max(1, min(_SPLITS, _BLOCKS * TILE // outputs))
    return max(each for each in range(1, most + 1) if turns % each == 0)


@partial(jax.jit, static_argnames=("splits",))
def _parts(x_TI: jax.Array, weight: Fragments, *, splits: int) -> jax.Array:
    """[splits, T, O] float32."""
    T, inputs = x_TI.shape
    plan = _PackedPlan(
        rows=T,
        inner=inputs,
        outputs=weight.shape[0],
        splits=splits,
        tiles=_MXFP4Tiles() if isinstance(weight, MXFP4Fragments) else _GgmlTiles(weight, T),
    )
    arrays = {piece.array: getattr(weight, piece.array) for piece in plan.tiles.pieces}
    results = ptx.launch(
        partial(packed_matvec, plan),
        {"x": x_TI, **arrays},
        {"out": jax.ShapeDtypeStruct((splits, T, plan.outputs), jnp.float32)},
        {"panel": plan.outputs // TILE, "share": -(-T // (plan.eights * EIGHT)), "split": splits},
        {
            "ring": plgpu.SMEM((plan.stages, plan.stage // 4), jnp.uint32),
            "mbarriers": plgpu.SMEM((2 * plan.stages,), jnp.uint32),
        },
    )
    return results["out"]


def packed_matvec(
    plan: _PackedPlan,
    *,
    x: Value,
    out: Value,
    ring: Value,
    mbarriers: Value,
    panel: Value,
    share: Value,
    split: Value,
    **arrays: Value,
) -> None:
    """One thread of a block: 64 rows of the matrix times up to `eights` · 8 rows of x."""
    first = ptx.mul(share, plan.eights * EIGHT)
    copies = _Copies(plan, x, arrays, ring, ptx.MBarriers(mbarriers, plan.stages), panel, first, split)
    acc = _sums(plan, copies, ring)
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


class _Copies:
    """Copies of turns to the stages of the ring. The first warp begins them."""

    def __init__(
        self,
        plan: _PackedPlan,
        x: Value,
        arrays: Mapping[str, Value],
        ring: Value,
        arrived: ptx.MBarriers,
        panel: Value,
        first: Value,
        split: Value,
    ):
        self._plan, self._ring, self.arrived = plan, ring, arrived
        start = ptx.mul(split, plan.turns)
        turn = ptx.add(ptx.mul(panel, plan.turns * plan.splits), start)
        self._from = [ptx.offset(arrays[piece.array], turn, piece.copied(plan.turn)) for piece in plan.tiles.pieces]
        # The sums of rows beyond the last are not used, so any row will do for them.
        row = arith.minsi(ptx.add(first, ptx.thread()), ptx.const(plan.rows - 1))
        self._x_from = ptx.offset(ptx.offset(x, row, 2 * plan.inner), start, 2 * TILE * plan.turn)

    def begin(self, turn: Value | int, stage: Value | int) -> None:
        """Begins to copy a turn. All threads of the first warp call it."""
        plan, one = self._plan, ptx.less(ptx.thread(), 1)
        mbarrier, to = self.arrived.at(stage), ptx.shared_offset(self._ring, ptx.as_value(stage), plan.stage)
        x_size = 2 * TILE * plan.turn
        ptx.expect_bytes(mbarrier, plan.places[-1] + plan.x_rows * x_size, one)
        for piece, place, source in zip(plan.tiles.pieces, plan.places[:-1], self._from, strict=True):
            size = piece.copied(plan.turn)
            ptx.bulk_copy(ptx.add(to, place), ptx.offset(source, turn, size), size, mbarrier, one)
        x_to = ptx.add(to, plan.places[-1], ptx.mul(ptx.thread(), plan.x_row))
        of_row = ptx.less(ptx.thread(), plan.x_rows)
        ptx.bulk_copy(x_to, ptx.offset(self._x_from, turn, x_size), x_size, mbarrier, of_row)


def _sums(plan: _PackedPlan, copies: _Copies, ring: Value) -> list[Value]:
    """Four sums per eight rows of x: the thread's even and odd row times two of them, in the order of `ptx.mma`."""
    copies.arrived.init()
    ptx.sync_block()
    copying = ptx.less(ptx.thread(), 32)

    def begin_all() -> None:
        for stage in range(plan.stages):
            copies.begin(stage, stage)

    ptx.when(copying, begin_all)
    _, g, q = ptx.fragment_lane()
    own = [
        ptx.add(ptx.mul(arith.shrui(ptx.thread(), ptx.const(piece.shift)), piece.size), place)
        for piece, place in zip(plan.tiles.pieces, plan.places[:-1], strict=True)
    ]
    own_x = [
        ptx.add(
            ptx.mul(arith.minsi(ptx.add(g, EIGHT * eight), ptx.const(plan.x_rows - 1)), plan.x_row),
            ptx.mul(q, plan.tiles.x_lane),
            plan.places[-1],
        )
        for eight in range(plan.eights)
    ]

    def turn(number: Value, carry: list[Value]) -> list[Value]:
        *acc, stage, parity = carry
        copies.arrived.wait(stage, parity)
        begin = ptx.shared_offset(ring, stage, plan.stage)
        at, x_at = ([ptx.add(begin, each) for each in places] for places in (own, own_x))

        pieces = list(zip(plan.tiles.pieces, at, strict=True))
        common = plan.tiles.common({piece.array: piece.load(each, 0) for piece, each in pieces if piece.every > 1})

        def tiles(index: Value, acc: list[Value]) -> list[Value]:
            here = [(piece, piece.moved(each, index, plan.unroll)) for piece, each in pieces if piece.every == 1]
            x_here = [ptx.add(each, ptx.mul(index, 2 * TILE * plan.unroll)) for each in x_at]
            for i in range(plan.unroll):
                tile = {piece.array: piece.load(each, i) for piece, each in here}
                acc = plan.tiles.multiply(acc, common, tile, [_x(plan, each, i) for each in x_here])
            return acc

        acc = ptx.loop(plan.turn // plan.unroll, acc, tiles)
        ptx.sync_block()
        following = ptx.add(number, plan.stages)
        ptx.when(arith.andi(copying, ptx.less(following, plan.turns)), lambda: copies.begin(following, stage))
        last = arith.cmpi(arith.CmpIPredicate.eq, stage, ptx.const(plan.stages - 1))
        return [
            *acc,
            arith.select(last, ptx.const(0), ptx.add(stage, 1)),
            arith.select(last, arith.xori(parity, ptx.const(1)), parity),
        ]

    zeros = [ptx.float32(0.0)] * (4 * plan.eights)
    return ptx.loop(plan.turns, [*zeros, ptx.const(0), ptx.const(0)], turn)[:-2]


def _x(plan: _PackedPlan, at: Value, tile: int) -> list[Value]:
    """16 numbers of a row of x, of a tile's columns."""
    loads = [
        ptx.load_shared(at, [ptx.i32()] * count, shift=2 * TILE * tile + place) for place, count in plan.tiles.x_loads
    ]
    return [value for values in loads for value in values]


def _multiplied(acc: list[Value], a: list[Value], xs: Sequence[list[Value]], instruction: int) -> list[Value]:
    """`acc` and the products of a tile's n-th instruction: four sums for each of xs."""
    products = [
        ptx.mma(acc[4 * eight : 4 * eight + 4], a, x[2 * instruction : 2 * instruction + 2])
        for eight, x in enumerate(xs)
    ]
    return [value for values in products for value in values]
