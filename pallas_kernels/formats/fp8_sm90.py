"""Numbers of float8_e4m3fn in a thread's registers, and their scales. For Hopper, in PTX.

What `pallas_kernels.fp8_pages` says of pages holds here: nothing is inexact but the rounding. A key's scale multiplies
its scores, a value's scale its weights, which gives the bits that bfloat16 numbers would give.
"""

import dataclasses

from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.fp8_pages import BIAS, LARGEST, LEAST, MANTISSA, NOT_FINITE, RANGE
from pallas_kernels.ptx import Value

# A byte's exponent and mantissa, where bfloat16 has them, are 2^-120 of the number. If the exponent is 0, both are
# subnormal, which this multiplication takes as they are.
_PAIR = """{{ .reg .b32 t, s, power; prmt.b32 t, $1, $2, {}; shr.u32 s, t, 4; and.b32 s, s, 0x07F007F0;
lop3.b32 t, t, 0x80008000, s, 0xEA; mov.b32 power, 0x7B807B80; mul.rn.bf16x2 $0, t, power; }}"""
# Two numbers, rounded to nearest, ties to even: the first is the lower byte.
_ROUND = "{ .reg .b16 t, zero; cvt.rn.satfinite.e4m3x2.f32 t, $2, $1; mov.b16 zero, 0; mov.b32 $0, {t, zero}; }"
_STORE = "{{ .reg .b32 t; shr.u32 t, $1, {}; st.global.u8 [$0], t; }}"
_STORE_FIRST = "{ .reg .pred p; setp.eq.s32 p, $2, 0; @p st.global.u8 [$0], $1; }"
_STORE_PAIR = "{{ .reg .pred p; setp.ne.s32 p, $2, 0; @p st.global.u16 [$0+{}], $1; }}"
_STORE_BYTE = "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p st.global.u8 [$0], $1; }"
_POWER = "{{ .reg .b32 t; shr.u32 t, $1, {}; and.b32 t, t, 0xFF; shl.b32 $0, t, 23; }}"


def pair(a: Value, i: int, b: Value, j: int) -> Value:
    """Byte i of one word and byte j of another, as two numbers of bfloat16 in a register."""
    selector = i | i << 4 | (4 + j) << 8 | (4 + j) << 12
    return ptx.asm(_PAIR.format(selector), [ptx.i32()], [a, b])[0]


def numbers(words: list[Value]) -> list[Value]:
    """Adjacent numbers, four in a word, as bfloat16, two in a word. What has four words already is returned."""
    if len(words) == 4:
        return words
    return [pair(word, i, word, i + 1) for word in words for i in (0, 2)]


def power(exponents: Value, byte: int) -> Value:
    """A scale, which a byte of a word has the exponent of, as float32."""
    return ptx.asm(_POWER.format(8 * byte), [ptx.f32()], [exponents])[0]


def powers(words: list[list[Value]]) -> list[list[Value]]:
    """Scales of adjacent places: of each, the exponents in one word, or in one word each."""
    return [
        [power(each[i] if len(each) == 2 else each[0], 0 if len(each) == 2 else i) for i in (0, 1)] for each in words
    ]


def without_scale(exponents: Value, byte: int) -> Value:
    """The word with the exponent of 1 in a byte."""
    return arith.ori(arith.andi(exponents, ptx.const(~(0xFF << 8 * byte))), ptx.const(BIAS << 8 * byte))


@dataclasses.dataclass(frozen=True)
class Vector:
    """A key or value as the pages store it. Its numbers are spread over the lanes of a warp, or of part of one."""

    exponent: Value
    pairs: list[Value]  # the lane's numbers, two in a word's lower bytes

    @classmethod
    def of(cls, numbers: list[Value], lanes: int = 32) -> "Vector":
        """Rounds a vector held by `lanes` lanes, a power of two, with the bits of `fp8_pages.rounded`."""
        magnitudes = [arith.andi(arith.bitcast(ptx.i32(), number), ptx.const(0x7FFFFFFF)) for number in numbers]
        largest = magnitudes[0]
        for each in magnitudes[1:]:
            largest = arith.maxui(largest, each)
        largest = _largest(largest, lanes)
        is_beyond = ptx.less(LARGEST, arith.andi(largest, ptx.const((1 << MANTISSA) - 1)))
        exponent = ptx.add(arith.shrui(largest, ptx.const(MANTISSA)), -RANGE)
        exponent = arith.select(is_beyond, ptx.add(exponent, 1), exponent)
        exponent = arith.maxsi(exponent, ptx.const(LEAST))
        factor = _float32(arith.subi(ptx.const(2 * BIAS), exponent))
        scaled = [ptx.rounded_product(number, factor) for number in numbers]
        pairs = [ptx.asm(_ROUND, [ptx.i32()], scaled[i : i + 2])[0] for i in range(0, len(scaled), 2)]
        is_finite = ptx.less(largest, 0xFF << MANTISSA)
        return cls(arith.select(is_finite, exponent, ptx.const(NOT_FINITE)), pairs)

    def as_read(self) -> list[Value]:
        """The lane's numbers with their scale, as float32."""
        scale = _float32(self.exponent)
        return [
            ptx.rounded_product(number, scale) for word in self.pairs for number in ptx.halves(pair(word, 0, word, 1))
        ]

    def store(self, row: Value, lane: Value, shifts: list[int], exponent: Value) -> None:
        """Writes the lane's numbers, `shifts` bytes from its first place in a row, and the vector's exponent."""
        at = ptx.offset(row, lane, 1)
        for i, shift in enumerate(shifts):
            ptx.asm(_STORE.format(8 * (i % 2)), [], [ptx.shifted(at, shift), self.pairs[i // 2]])
        ptx.asm(_STORE_FIRST, [], [exponent, self.exponent, lane])

    def store_adjacent(
        self, at: Value, shifts: tuple[int, int], exponent: Value, *, is_first: Value, condition: Value
    ) -> None:
        """If the condition holds, writes each pair of the lane's numbers at its shift from `at`, in bytes.

        The vector's first lane also writes the exponent.
        """
        for shift, word in zip(shifts, self.pairs, strict=True):
            ptx.asm(_STORE_PAIR.format(shift), [], [at, word, condition])
        ptx.asm(_STORE_BYTE, [], [exponent, self.exponent, ptx.both(condition, is_first)])


def _largest(number: Value, lanes: int) -> Value:
    """The largest integer in a group of `lanes` lanes, returned to each of them."""
    if lanes == 32:
        return ptx.asm("redux.sync.max.u32 $0, $1, 0xffffffff;", [ptx.i32()], [number], volatile=True)[0]
    while lanes > 1:
        lanes //= 2
        other = ptx.shuffle_xor(arith.bitcast(ptx.f32(), number), lanes)
        number = arith.maxui(number, arith.bitcast(ptx.i32(), other))
    return number


def _float32(exponent: Value) -> Value:
    """2^(exponent - 127)."""
    return arith.bitcast(ptx.f32(), arith.shli(exponent, ptx.const(MANTISSA)))
