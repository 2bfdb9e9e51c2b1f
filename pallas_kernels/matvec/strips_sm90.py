"""A strip of 16 rows of a packed matrix, as a warp loads it and multiplies it by one row of x: for `row_sm90`."""

import dataclasses
from collections.abc import Sequence
from typing import Final

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.formats.fragments import TILE, MXFP4Fragments
from pallas_kernels.formats.ggml import fragments_sm90 as ggml
from pallas_kernels.formats.ggml.fragments import PARTS, QuantizedFragments
from pallas_kernels.formats.mxfp4_sm90 import PLANES_MISSING, planes, power_of_two
from pallas_kernels.ptx import Value

STRIP: Final = 16  # rows of a matrix that a warp takes
TURN: Final = 4  # tiles of 64 columns that it takes at a time
COLUMNS: Final = TURN * TILE
_SHIFT: Final = 48  # x is multiplied by 2^48 for MXFP4, so that products with 2^-126 times its values are not subnormal

Fragments = MXFP4Fragments | QuantizedFragments


@dataclasses.dataclass(frozen=True)
class Piece:
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

    def base(self, at: Value, strip: Value, tiles: int) -> Value:
        """The address of a lane's first load in a strip of so many tiles."""
        lane, g, q = lane_of()
        panel_at, number = self._panel(at, strip, tiles)
        if self.each_thread:
            return ptx.offset(panel_at, ptx.add(ptx.mul(number, 32), lane), self.size)
        own = ptx.offset(panel_at, ptx.add(ptx.mul(number, 8), g), self.size)
        return ptx.offset(own, q, self.tile) if self.by_tile else own

    def load(self, base: Value, turn: Value, last: Value | None = None) -> list[Value]:
        """Begins to load a turn: words by tile, place and number.

        Args:
          last: of the turn's tiles, if there may be fewer than four: it is loaded in place of those that do not exist.
        """
        at, tiles = ptx.offset(base, turn, self.turn), range(TURN if self.each_thread else 1)
        if last is None:
            from_ = [(at, i * self.tile) for i in tiles]
        elif self.each_thread:
            from_ = [(ptx.offset(at, arith.minsi(ptx.const(i), last), self.tile), 0) for i in tiles]
        else:
            _, _, q = lane_of()
            from_ = [(ptx.offset(at, arith.minsi(arith.subi(last, q), ptx.const(0)), self.tile), 0)]
        places = range(0, self.places * 128 * self.size, 128 * self.size)
        return [word for at, shift in from_ for place in places for word in _load(at, self.size // 4, shift + place)]

    def lines(self) -> list[int]:
        """Where the 128-byte lines of a strip's turn begin, from the strip's first byte on."""
        bytes_ = self.size * (32 if self.each_thread else 8)
        return [
            i * self.tile + place * 128 * self.size + line
            for i in range(TURN if self.by_tile else 1)
            for place in range(self.places)
            for line in range(0, bytes_, 128)
        ]

    def start(self, at: Value, strip: Value, tiles: int) -> Value:
        """The address of a strip's first byte."""
        panel_at, number = self._panel(at, strip, tiles)
        return ptx.offset(panel_at, number, self.size * (32 if self.each_thread else 8))

    def _panel(self, at: Value, strip: Value, tiles: int) -> tuple[Value, Value]:
        """The address of the strip's 64 rows, and its number among their strips."""
        panel, number = ptx.divided(strip, TILE // STRIP)
        return ptx.offset(at, ptx.mul(panel, tiles if self.by_tile else tiles // TURN), self.tile), number


class MXFP4Strip:
    """A strip of `MXFP4Fragments`."""

    pieces = (Piece("words", 16), Piece("scales", 4, each_thread=False))
    sums_runs = False  # whether sums of x are needed
    factor = PLANES_MISSING * 2.0**-_SHIFT  # of all sums

    def staged(self, words: list[Value]) -> list[Value]:
        """Pairs of x as they lie in shared memory."""
        power = ptx.const((127 + _SHIFT << 7) * 0x10001)
        return [ptx.asm("mul.rn.bf16x2 $0, $1, $2;", [ptx.i32()], [word, power])[0] for word in words]

    def x_address(self, x: Value, zeros: Value, turn: Value) -> Value:
        """Where a lane's numbers of x are.

        The product's even columns are for the first 32 of a tile, and the odd ones for the others.
        """
        _, g, q = lane_of()
        mine = equal(arith.andi(g, ptx.const(1)), arith.shrui(q, ptx.const(1)))
        here = ptx.add(x, ptx.mul(q, 32), ptx.mul(turn, 2 * COLUMNS))
        return arith.select(mine, here, zeros)

    def multiply(self, acc: list[Value], loaded: list[Value], x_at: Value, sums_at: Value) -> list[Value]:
        """`acc`, the sums of the thread's even and odd row, and a turn's products."""
        del sums_at
        _, _, q = lane_of()
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


class GgmlStrip:
    """A strip of `QuantizedFragments` with a scale for 32 columns."""

    factor = 1.0

    def __init__(self, weight: QuantizedFragments):
        self._parts = PARTS[weight.type]
        self.sums_runs = ggml.has_offsets(self._parts)
        pieces = [Piece("words", 16, places=weight.words.shape[2])]
        if weight.high is not None:
            pieces.append(Piece("high", 4 * weight.high.shape[-1]))
        pieces.append(Piece("scales", 4 * weight.scales.shape[-1], each_thread=False))
        if weight.blocks is not None:
            pieces.append(Piece("blocks", 4 * weight.blocks.shape[-1], each_thread=False, by_tile=False))
        self.pieces = tuple(pieces)

    def staged(self, words: list[Value]) -> list[Value]:
        """See `MXFP4Strip`."""
        return words

    def x_address(self, x: Value, zeros: Value, turn: Value) -> Value:
        """See `MXFP4Strip`."""
        del zeros
        _, _, q = lane_of()
        return ptx.add(x, ptx.mul(q, 16), ptx.mul(turn, 2 * COLUMNS))

    def multiply(self, acc: list[Value], loaded: list[Value], x_at: Value, sums_at: Value) -> list[Value]:
        """See `MXFP4Strip`."""
        _, _, q = lane_of()
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


def takes(part: Fragments) -> bool:
    """Whether there is a strip of this type and width: only MXFP4's may end within a turn."""
    if isinstance(part, MXFP4Fragments):
        return part.shape[1] % TILE == 0
    return PARTS[part.type].run == 32 and part.shape[1] % COLUMNS == 0


def strip_of(part: Fragments) -> "MXFP4Strip | GgmlStrip":
    """What a warp does with a strip of this type."""
    return MXFP4Strip() if isinstance(part, MXFP4Fragments) else GgmlStrip(part)


def _kept(own: list[Value], sums: Sequence[Value], q: Value, tile: int) -> list[Value]:
    """The sums of tile q, once all tiles up to it have been seen."""
    if not own:
        return list(sums)
    mine = equal(q, ptx.const(tile))
    return [arith.select(mine, new, old) for new, old in zip(sums, own, strict=True)]


def _of_tile(words: list[Value], tile: int) -> list[Value]:
    per = len(words) // TURN
    return words[per * tile : per * (tile + 1)]


def lane_of() -> tuple[Value, Value, Value]:
    """The number 4·g + q of the thread in its warp, g, and q."""
    lane = arith.andi(utils.thread_idx(), ptx.const(31))
    return lane, arith.shrui(lane, ptx.const(2)), arith.andi(lane, ptx.const(3))


def equal(a: Value, b: Value) -> Value:
    """Whether two 32-bit integers are equal: an i1."""
    return arith.cmpi(arith.CmpIPredicate.eq, a, b)


def _load(at: Value, count: int, shift: int) -> list[Value]:
    """Loads 1, 2 or 4 words that nobody else will."""
    what = ", ".join(f"${i}" for i in range(count))
    kind = "" if count == 1 else f".v{count}"
    text = f"ld.global.nc.L1::no_allocate{kind}.b32 {{{what}}}, [${count}+{shift}];"
    if count == 1:
        text = text.replace("{$0}", "$0")
    return ptx.asm(text, [ptx.i32()] * count, [at], volatile=True)
