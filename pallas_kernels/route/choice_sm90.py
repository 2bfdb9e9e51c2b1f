"""The choice of a token's experts by one warp, for Hopper.

Logits are rounded to bfloat16, so a logit and its expert's number fit in one 32-bit integer. The maximum of these
integers finds both, and the lower number among equals.
"""

import math
from collections.abc import Sequence

from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.ptx import Value

MOST_EXPERTS = 128


def lane_experts(lane: Value, experts: int) -> list[Value]:
    """The experts that a lane has: those whose number modulo 32 is the lane, and perhaps one that does not exist."""
    return [ptx.add(lane, i) for i in range(0, experts, 32)]


def chosen(logits: Sequence[Value], lane: Value, *, experts: int, top: int) -> tuple[list[Value], list[Value]]:
    """The `top` experts of a token in descending order, and their weights, in all lanes of its warp.

    Args:
      logits: float32, of `lane_experts`; any for those that do not exist.
    """
    keys = []
    for expert, logit in zip(lane_experts(lane, experts), logits, strict=True):
        word = ptx.pack(logit, ptx.float32(0.0))
        # To compare floats as integers: flip all bits of a negative number, and the sign bit of any other.
        sign = arith.shrui(word, ptx.const(15))
        order = arith.xori(word, ptx.add(ptx.mul(sign, 0x7FFF), 0x8000))
        key = ptx.add(ptx.mul(order, 0x10000), arith.subi(ptx.const(0xFFFF), expert))
        keys.append(arith.select(ptx.less(expert, experts), key, ptx.const(0)))

    best_logits, numbers = [], []
    for _ in range(top):
        best = keys[0]
        for key in keys[1:]:
            best = arith.maxui(best, key)
        (best,) = ptx.asm("redux.sync.max.u32 $0, $1, 0xffffffff;", [ptx.i32()], [best], volatile=True)
        keys = [arith.select(arith.cmpi(arith.CmpIPredicate.eq, key, best), ptx.const(0), key) for key in keys]
        numbers.append(arith.subi(ptx.const(0xFFFF), arith.andi(best, ptx.const(0xFFFF))))
        order = arith.shrui(best, ptx.const(16))
        sign = arith.shrui(order, ptx.const(15))
        word = arith.xori(order, arith.subi(ptx.const(0xFFFF), ptx.mul(sign, 0x7FFF)))
        best_logits.append(ptx.halves(word)[0])
    powers = []
    for logit in best_logits:
        exponent = arith.mulf(arith.subf(logit, best_logits[0]), ptx.float32(math.log2(math.e)))
        powers += ptx.asm("ex2.approx.f32 $0, $1;", [ptx.f32()], [exponent])
    total = ptx.tree_sum(powers)
    return numbers, [ptx.divide(power, total) for power in powers]
