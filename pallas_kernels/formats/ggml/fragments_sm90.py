"""ggml's fragments become operands of the tensor cores, in a thread's registers: for kernels for Hopper.

A code c of four to six bits is put into the mantissa of 128, which makes the bfloat16 number 128 + c. Types without
offsets subtract 128 and the code of zero. Those with offsets need the sum of x over each run of columns in any case:
the tensor cores multiply it by -128, and products with codes begin with that.
"""

import dataclasses
from typing import Final

from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.formats.ggml.fragments import Parts
from pallas_kernels.ptx import Value

_MINUS_128: Final = 0xC300C300 - 2**32  # two bfloat16 numbers
_OR: Final = "{ .reg .b32 t; %s.b32 t, $1, %d; lop3.b32 $0, t, 0x%08X, $2, 0xEA; }"  # $2 | bits of $1
_SIGNED: Final = """{ .reg .b32 t, low, sign; shr.u32 t, $1, %d;
lop3.b32 low, t, 0x007F007F, 0x43004300, 0xEA; lop3.b32 sign, t, 0x00800080, 0xC300C300, 0xEA;
add.rn.bf16x2 $0, low, sign; }"""  # 128 + the lower bits, minus 128 or 256
_HALVES: Final = "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
_BYTE: Final = "{ .reg .b32 t; prmt.b32 t, $1, 0x4B000000, 0x754%d; mov.b32 $0, t; }"


@dataclasses.dataclass(frozen=True)
class Run:
    """What 32 columns share, or 16: for both of a thread's rows."""

    factors: list[Value]
    offsets: list[Value] | None  # divided by -128


def halves(word: Value) -> list[Value]:
    """The two half-precision numbers of a register as float32, the lower first."""
    return ptx.asm(_HALVES, [ptx.f32()] * 2, [word])


def operand(parts: Parts, words: list[Value], high: list[Value], j: int, m: int) -> list[Value]:
    """Operand A of instruction (j, m) of a tile: `ptx.mma`'s four registers, by u and r."""
    return [_pair(parts, words, high, j, m, u, r) for u in range(2) for r in range(2)]


def _pair(parts: Parts, words: list[Value], high: list[Value], j: int, m: int, u: int, r: int) -> Value:
    if parts.bits == 8:
        return ptx.asm(_SIGNED % (8 * u), [ptx.i32()], [words[4 * j + 2 * m + r]])[0]
    pair = _or(words[2 * j + r], 8 * m + 4 * u, 0x000F000F, ptx.const(0x43004300))
    if parts.bits == 5:
        pair = _or(high[0], 8 * r + 4 * j + 2 * m + u - 4, 0x00100010, pair)
    if parts.bits == 6:
        pair = _or(high[j], 8 * r + 4 * m + 2 * u - 4, 0x00300030, pair)
    if has_offsets(parts):
        return pair
    # In bfloat16, 128 to 191 have the exponent of 128, and so have their negatives.
    zero = ptx.const((0xC300 + parts.zero) * 0x10001 - 2**32)
    return ptx.asm("add.rn.bf16x2 $0, $1, $2;", [ptx.i32()], [pair, zero])[0]


def _or(word: Value, shift: int, mask: int, pair: Value) -> Value:
    """`pair` and the bits of `word`, shifted to the right, under a mask."""
    direction = "shr" if shift >= 0 else "shl"
    return ptx.asm(_OR % (direction, abs(shift), mask), [ptx.i32()], [word, pair])[0]


def has_offsets(parts: Parts) -> bool:
    """Whether a type adds something to the scaled codes."""
    return parts.zero == 0 and parts.bits < 8


@dataclasses.dataclass(frozen=True)
class Shared:
    """What 256 columns share: by r, what integers of their runs are multiplied by, and that times -2^23."""

    numbers: list[Value]
    less: list[Value]

    def times(self, word: Value, place: int, r: int) -> Value:
        """A byte of a register times the number of row r: exactly, as it becomes the last byte of 2^23."""
        (number,) = ptx.asm(_BYTE % place, [ptx.f32()], [word])
        return ptx.fma(self.numbers[r], number, self.less[r])


def shared(parts: Parts, blocks: list[Value]) -> list[Shared]:
    """By field: factors, and minima divided by 128 (offsets are -minima)."""
    found = []
    for word, scale in zip(blocks[: len(parts.shared)], (1.0, 1 / 128), strict=False):
        numbers = [arith.mulf(each, ptx.float32(scale)) for each in halves(word)]
        found.append(Shared(numbers, [arith.mulf(each, ptx.float32(-(2.0**23))) for each in numbers]))
    return found


def runs(parts: Parts, scales: list[Value], of_256: list[Shared], j: int) -> list[Run]:
    """What the runs of a tile's j-th 32 columns share: one, or two of 16 columns."""
    if not parts.shared:
        per = len(scales) // 2
        numbers, *offsets = [halves(word) for word in scales[per * j : per * (j + 1)]]
        return [Run(numbers, [arith.mulf(each, ptx.float32(-1 / 128)) for each in offsets[0]] if offsets else None)]
    factors = of_256[0]
    if parts.run == 16:
        word = arith.xori(scales[j], ptx.const(0x80808080 - 2**32))  # signed bytes, plus 128
        below = [arith.mulf(each, ptx.float32(128.0)) for each in factors.numbers]
        return [
            Run([arith.subf(factors.times(word, 2 * r + m, r), below[r]) for r in range(2)], None) for m in range(2)
        ]
    offsets = [of_256[1].times(scales[j], 2 * r + 1, r) for r in range(2)]
    return [Run([factors.times(scales[j], 2 * r, r) for r in range(2)], offsets)]


def minus_128() -> list[Value]:
    """Operand A of -128, whose product is that times the sum of x over 16 columns."""
    return [ptx.const(_MINUS_128)] * 4
