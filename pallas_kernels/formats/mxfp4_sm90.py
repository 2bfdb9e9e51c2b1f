"""MXFP4 fragments become operands of the tensor cores, in a thread's registers: for kernels for Hopper."""

from typing import Final

from pallas_kernels import ptx
from pallas_kernels.ptx import Value

# A scale s becomes the bfloat16 number 2^(s + _OFFSET - 127), so s may be up to `fragments.LARGEST_SCALE`. Planes are
# 2^-126 times their values. The missing factor comes last. If s is below 66, numbers of less than 2^-58 may count as 0.
_OFFSET = 62
PLANES_MISSING: Final = 2.0**126  # of `planes`
MISSING = 2.0 ** (126 - _OFFSET)  # of `decoded`

_FACTOR = "{ .reg .b32 t; prmt.b32 t, $1, 0, %s; mad.lo.u32 $0, t, 128, %d; }"
_DECODE = """{ .reg .b32 a, b, c;
and.b32 a, $4, 0x81C081C0; mul.rn.bf16x2 $0, a, $5;
shl.b32 a, $4, 3; and.b32 a, a, 0x81C081C0; mul.rn.bf16x2 $1, a, $5;
shl.b32 a, $4, 6; and.b32 a, a, 0x81C081C0; mul.rn.bf16x2 $2, a, $5;
shl.b32 a, $4, 1; shr.u32 b, $4, 4; shr.u32 c, $4, 5; and.b32 b, b, 0x00C000C0;
lop3.b32 b, a, 0x80008000, b, 0xEA; lop3.b32 b, c, 0x01000100, b, 0xEA; mul.rn.bf16x2 $3, b, $5; }"""
_PLANES = """{ .reg .b32 a, b, c;
and.b32 $0, $4, 0x81C081C0;
shl.b32 a, $4, 3; and.b32 $1, a, 0x81C081C0;
shl.b32 a, $4, 6; and.b32 $2, a, 0x81C081C0;
shl.b32 a, $4, 1; shr.u32 b, $4, 4; shr.u32 c, $4, 5; and.b32 b, b, 0x00C000C0;
lop3.b32 b, a, 0x80008000, b, 0xEA; lop3.b32 $3, c, 0x01000100, b, 0xEA; }"""
_POWER = "{ .reg .b32 t; prmt.b32 t, $1, 0, 0x%d444; shr.u32 t, t, 1; mov.b32 $0, t; }"


def decoded(words: list[Value], scales: Value) -> list[list[Value]]:
    """Each word's four planes, pairs of bfloat16 numbers, still without the factor `MISSING`."""
    even, odd = (
        ptx.asm(_FACTOR % (byte, (_OFFSET << 7) * 0x10001), [ptx.i32()], [scales])[0] for byte in ("0x4040", "0x4141")
    )
    return [ptx.asm(_DECODE, [ptx.i32()] * 4, [word, (even, odd)[i % 2]]) for i, word in enumerate(words)]


def planes(word: Value) -> list[Value]:
    """A word's four planes, pairs of bfloat16 numbers without scales, of which ±0.5 is subnormal: 2^-126 times them."""
    return ptx.asm(_PLANES, [ptx.i32()] * 4, [word])


def power_of_two(scales: Value, byte: int) -> Value:
    """A scale as a float32 number; 2^-127 becomes 0."""
    return ptx.asm(_POWER % byte, [ptx.f32()], [scales])[0]
