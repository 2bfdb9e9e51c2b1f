"""A thread's words: loading and storing where a condition holds, and waiting for what other clusters write."""

from collections.abc import Sequence

from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx, rows
from pallas_kernels.ptx import Value

Piece = tuple[Value, Value, int]  # an address in global memory, 1 where it is there, else 0, and how many words


def load(at: Value, count: int, condition: Value) -> list[Value]:
    """Begins to load 1, 2 or 4 words from global memory; 0 where the condition is 0. See `rows.issue`."""
    outputs = [f"${i}" for i in range(count)]
    zeros = "".join(f"mov.b32 {each}, 0;" for each in outputs)
    vector = {1: ""}.get(count, f".v{count}")
    into = outputs[0] if count == 1 else "{" + ", ".join(outputs) + "}"
    text = (
        f"{{ .reg .pred p; setp.ne.s32 p, ${count + 1}, 0; {zeros} @p ld.global.cg{vector}.b32 {into}, [${count}]; }}"
    )
    return ptx.asm(text, [ptx.i32()] * count, [at, condition], volatile=True)


def store(at: Value, word: Value, condition: Value) -> None:
    """Writes a word to global memory, where the condition is not 0. Other clusters may read it meanwhile."""
    ptx.asm("{ .reg .pred p; setp.ne.s32 p, $2, 0; @p st.relaxed.gpu.global.b32 [$0], $1; }", [], [at, word, condition])


def keep(at: Value, values: Sequence[Value], condition: Value) -> None:
    """Writes 1, 2 or 4 words to shared memory, where the condition is not 0."""
    count = len(values)
    vector = {1: ""}.get(count, f".v{count}")
    what = "$1" if count == 1 else "{" + ", ".join(f"${i + 1}" for i in range(count)) + "}"
    text = f"{{ .reg .pred p; setp.ne.s32 p, ${count + 1}, 0; @p st.shared{vector}.b32 [$0], {what}; }}"
    ptx.asm(text, [], [at, *values, condition])


def where(condition: Value, value: Value, otherwise: float) -> Value:
    """The float32 value where the condition is not 0."""
    holds = arith.cmpi(arith.CmpIPredicate.ne, condition, ptx.const(0))
    return arith.select(holds, value, number(otherwise))


def load_pair(at: Value) -> list[Value]:
    """Two float32 numbers of shared memory."""
    return ptx.asm("ld.shared.v2.f32 {$0, $1}, [$2];", [ptx.f32()] * 2, [at], volatile=True)


def fma(a: Value, b: Value, c: Value) -> Value:
    """a · b + c."""
    return ptx.asm("fma.rn.f32 $0, $1, $2, $3;", [ptx.f32()], [a, b, c])[0]


def power(x: Value) -> Value:
    """2^x."""
    return ptx.asm("ex2.approx.ftz.f32 $0, $1;", [ptx.f32()], [x])[0]


def number(value: float) -> Value:
    """A float32 constant."""
    return ptx.const(value, ptx.f32())


def load_all(pieces: Sequence[Piece]) -> list[list[Value]]:
    """Begins to load words; 0 of what is not there."""
    loaded = [load(at, size, is_there) for at, is_there, size in pieces]
    rows.issue()
    return loaded


def await_all(pieces: Sequence[Piece]) -> list[list[Value]]:
    """Loads words of a relay until none of them has all bits set; 0 of what is not there."""
    count = sum(size for _, _, size in pieces)
    declared, begun, loads, tests = "", "", "", ""
    first = 0
    for i, (_, _, size) in enumerate(pieces):
        outputs = [f"${first + j}" for j in range(size)]
        first += size
        declared += f" .reg .pred p{i};"
        begun += f" setp.ne.s32 p{i}, ${count + 2 * i + 1}, 0;" + "".join(f" mov.b32 {each}, 0;" for each in outputs)
        vector = {1: ""}.get(size, f".v{size}")
        into = outputs[0] if size == 1 else "{" + ", ".join(outputs) + "}"
        loads += f" @p{i} ld.relaxed.gpu.global{vector}.b32 {into}, [${count + 2 * i}];"
        tests += "".join(f" setp.eq.or.s32 missing, {each}, -1, missing;" for each in outputs)
    text = (
        f"{{ .reg .pred missing;{declared}{begun} again:{loads} setp.ne.s32 missing, 0, 0;{tests}"
        " @missing bra again; }"
    )
    operands = [each for at, is_there, _ in pieces for each in (at, is_there)]
    words = iter(ptx.asm(text, [ptx.i32()] * count, operands, volatile=True))
    return [[next(words) for _ in range(size)] for _, _, size in pieces]
