"""Addresses, loads and stores: 64-bit addresses in global memory, 32-bit ones in shared memory."""

from collections.abc import Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.ptx.values import Condition, Value, as_predicate, as_value, asm, const, i32, i64


def global_address(ref: Value) -> Value:
    """The address of an array in global memory."""
    return llvm.ptrtoint(i64(), utils.memref_ptr(ref))


def shared_address(ref: Value) -> Value:
    """The address of an array in shared memory."""
    return arith.trunci(i32(), llvm.ptrtoint(i64(), utils.memref_ptr(ref)))


def offset(base: Value, index: Value | int, size: int) -> Value:
    """The address in global memory of element `index`, of `size` bytes."""
    (result,) = asm("mad.wide.s32 $0, $1, $2, $3;", [i64()], [as_value(index), const(size), base])
    return result


def shifted(base: Value, size: int) -> Value:
    """The address in global memory that is `size` bytes further on."""
    return arith.addi(base, const(size, i64()))


def shared_offset(base: Value, index: Value, size: int) -> Value:
    """The address in shared memory of element `index`, of `size` bytes."""
    return arith.addi(base, arith.muli(index, const(size)))


def load(
    at: Value, types: Sequence[Any], condition: Condition, *, space: str = "global", shift: int = 0
) -> list[Value]:
    """Begins to load 1, 2 or 4 words, all int32 or all float32; 0 if the condition does not hold.

    Args:
      space: what follows "ld." in PTX, with a cache operator if any, such as "global.cg" or "shared".
      shift: bytes to add to the address.
    """
    count = len(types)
    outputs = [f"${i}" for i in range(count)]
    zeros = "".join(f"mov.b32 {each}, 0;" for each in outputs)
    source = f"${count}+{shift}" if shift else f"${count}"
    comparison, register = as_predicate(condition)
    text = (
        f"{{ .reg .pred p; setp.{comparison}.s32 p, ${count + 1}, 0; {zeros} "
        f"@p ld.{space}{_vector(count)}.b32 {_list(outputs)}, [{source}]; }}"
    )
    return asm(text, types, [at, register], volatile=True)


def store(at: Value, values: Sequence[Value], condition: Condition, *, space: str = "global", shift: int = 0) -> None:
    """Writes 1, 2 or 4 words if the condition holds. See `load`; `space` follows "st." in PTX."""
    count = len(values)
    what = _list([f"${i + 1}" for i in range(count)])
    to = f"$0+{shift}" if shift else "$0"
    comparison, register = as_predicate(condition)
    text = f"{{ .reg .pred p; setp.{comparison}.s32 p, ${count + 1}, 0; "
    text += f"@p st.{space}{_vector(count)}.b32 [{to}], {what}; }}"
    asm(text, [], [at, *values, register])


def arrived(at: Value, empty: int, condition: Condition) -> list[Value]:
    """Waits until none of four words in global memory is `empty`, and returns them; 0 if the condition does not hold.

    Another device may write them.
    """
    comparison, register = as_predicate(condition)
    text = (
        f"{{ .reg .pred p, here; setp.{comparison}.s32 p, $5, 0; "
        "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
        "again: @p ld.volatile.global.v4.b32 {$0, $1, $2, $3}, [$4]; "
        f"setp.ne.s32 here, $0, {empty}; "
        + "".join(f"setp.ne.and.s32 here, ${i}, {empty}, here; " for i in (1, 2, 3))
        + "@!here bra again; }"
    )
    return asm(text, [i32()] * 4, [at, register], volatile=True)


def load_shared(at: Value, types: Sequence[Any], *, shift: int = 0) -> list[Value]:
    """Loads 1, 2 or 4 words from shared memory, all int32 or all float32, in every thread. See `load`."""
    count = len(types)
    what = _list([f"${i}" for i in range(count)])
    return asm(f"ld.shared{_vector(count)}.b32 {what}, [${count}+{shift}];", types, [at], volatile=True)


def load_shared_over(at: Value, words: Sequence[Value], condition: Condition, *, shift: int = 0) -> list[Value]:
    """Loads 1, 2 or 4 int32 words from shared memory if the condition holds, and else gives these. See `load`."""
    count = len(words)
    outputs = [f"${i}" for i in range(count)]
    kept = "".join(f"mov.b32 {each}, ${count + 1 + i};" for i, each in enumerate(outputs))
    comparison, register = as_predicate(condition)
    text = (
        f"{{ .reg .pred p; setp.{comparison}.s32 p, ${2 * count + 1}, 0; {kept} "
        f"@p ld.shared{_vector(count)}.b32 {_list(outputs)}, [${count}+{shift}]; }}"
    )
    return asm(text, [i32()] * count, [at, *words, register], volatile=True)


def _vector(count: int) -> str:
    return "" if count == 1 else f".v{count}"


def _list(operands: list[str]) -> str:
    return operands[0] if len(operands) == 1 else "{" + ", ".join(operands) + "}"
