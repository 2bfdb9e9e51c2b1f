"""A thread's registers: constants, inlined PTX, and arithmetic for which MLIR has no short form."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

Value = Any  # ir.Value: one thread's register


@dataclasses.dataclass(frozen=True)
class NotNegative:
    """The condition that a 32-bit integer is 0 or more: the guarded instruction tests the sign, at no extra cost."""

    number: Value


Condition = Value | NotNegative  # an i1, as MLIR's comparisons return it, or a sign


def i32() -> Any:
    """32-bit integers, and anything else of 32 bits."""
    return ir.IntegerType.get_signless(32)


def i64() -> Any:
    """64-bit integers: addresses."""
    return ir.IntegerType.get_signless(64)


def f32() -> Any:
    """float32."""
    return ir.F32Type.get()


def const(value: float, type_: Any = None) -> Value:
    """A constant, a 32-bit integer unless said otherwise."""
    return utils.c(value, i32() if type_ is None else type_)


def float32(value: float) -> Value:
    """A float32 constant."""
    return const(value, f32())


def asm(text: str, outputs: Sequence[Any], inputs: Sequence[Value], *, volatile: bool = False) -> list[Value]:
    """Inlines PTX whose operands $0, $1, … are the outputs, of the given types, and then the inputs.

    An i1 among the inputs arrives as a 32-bit 1 or 0. Volatile instructions keep their order. Outputs may be written
    before all inputs have been read.
    """
    letters = {str(i32()): "r", str(i64()): "l", str(f32()): "f"}
    inputs = [arith.extui(i32(), value) if str(value.type) == "i1" else value for value in inputs]
    constraints = [f"=&{letters[str(type_)]}" for type_ in outputs] + [letters[str(value.type)] for value in inputs]
    several = len(outputs) > 1
    void = ir.Type.parse("!llvm.void")
    kind = llvm.StructType.get_literal(list(outputs)) if several else next(iter(outputs), void)
    side_effects = volatile or not outputs
    result: Any = llvm.inline_asm(kind, inputs, text, ",".join(constraints), has_side_effects=side_effects)
    if several:
        return [llvm.extractvalue(type_, result, [i]) for i, type_ in enumerate(outputs)]
    return [result] if outputs else []


def as_value(value: Value | int) -> Value:
    """An integer as a constant; anything else unchanged."""
    return const(value) if isinstance(value, int) else value


def add(*values: Value | int) -> Value:
    """A sum of 32-bit integers."""
    return functools.reduce(arith.addi, map(as_value, values))


def mul(a: Value | int, b: Value | int) -> Value:
    """A product of 32-bit integers."""
    return arith.muli(as_value(a), as_value(b))


def divided(a: Value, b: int) -> tuple[Value, Value]:
    """The quotient and the remainder of unsigned 32-bit integers."""
    return arith.divui(a, const(b)), arith.remui(a, const(b))


def less(a: Value | int, b: Value | int) -> Value:
    """Whether a < b, as signed 32-bit integers: an i1."""
    return arith.cmpi(arith.CmpIPredicate.slt, as_value(a), as_value(b))


def always() -> Condition:
    """The condition that holds in every thread."""
    return NotNegative(const(0))


def both(*conditions: Condition) -> Condition:
    """The condition that all of them hold."""
    if all(isinstance(condition, NotNegative) for condition in conditions):
        return NotNegative(functools.reduce(arith.ori, [condition.number for condition in conditions]))
    return functools.reduce(arith.andi, map(as_i1, conditions))


def as_i1(condition: Condition) -> Value:
    """The form of a condition that MLIR's operations take."""
    if isinstance(condition, NotNegative):
        return arith.cmpi(arith.CmpIPredicate.sge, condition.number, const(0))
    return condition


def as_predicate(condition: Condition) -> tuple[str, Value]:
    """The form of a condition for inlined PTX: `setp`'s comparison with 0, and the register to compare."""
    return ("ge", condition.number) if isinstance(condition, NotNegative) else ("ne", condition)


def where(condition: Condition, value: Value, otherwise: float = 0.0) -> Value:
    """A float32 number if the condition holds, else a constant."""
    return arith.select(as_i1(condition), value, float32(otherwise))


def fma(a: Value, b: Value, c: Value) -> Value:
    """a · b + c, rounded once."""
    return asm("fma.rn.f32 $0, $1, $2, $3;", [f32()], [a, b, c])[0]


def rounded_product(a: Value, b: Value) -> Value:
    """a · b, never contracted with an addition, as `arith.mulf` may be."""
    return asm("mul.rn.f32 $0, $1, $2;", [f32()], [a, b])[0]


def rotated(first: Value, last: Value, cos: Value, sin: Value) -> tuple[Value, Value]:
    """A pair turned by an angle: in every kernel with the same roundings."""
    return fma(first, cos, arith.negf(rounded_product(last, sin))), fma(last, cos, rounded_product(first, sin))


def rounded_sum(a: Value, b: Value) -> Value:
    """a + b, never contracted with a product, as `arith.addf` may be."""
    return asm("add.rn.f32 $0, $1, $2;", [f32()], [a, b])[0]


def exp2(x: Value) -> Value:
    """2^x, to 2 ulp; subnormal results are 0."""
    return asm("ex2.approx.ftz.f32 $0, $1;", [f32()], [x])[0]


def divide(a: Value, b: Value) -> Value:
    """a / b, to 2 ulp, without a slow path."""
    return asm("div.full.f32 $0, $1, $2;", [f32()], [a, b])[0]


def halves(word: Value) -> list[Value]:
    """The two bfloat16 numbers of a register as float32, the lower first."""
    return [arith.bitcast(f32(), arith.shli(word, const(16))), arith.bitcast(f32(), arith.andi(word, const(-0x10000)))]


def pack(low: Value, high: Value) -> Value:
    """Two float32 numbers, rounded to bfloat16, as a register."""
    return asm("cvt.rn.bf16x2.f32 $0, $2, $1;", [i32()], [low, high])[0]


def tree_sum(values: Sequence[Value]) -> Value:
    """The sum of float32 numbers, added pairwise as a tree."""
    values = list(values)
    while len(values) > 1:
        values = [arith.addf(*pair) for pair in zip(values[0::2], values[1::2], strict=False)] + values[
            len(values) & ~1 :
        ]
    return values[0]
