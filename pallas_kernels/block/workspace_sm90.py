"""Words in global memory that this kernel's clusters, and earlier kernels, write."""

from collections.abc import Sequence

from pallas_kernels import ptx
from pallas_kernels.ptx import Condition, Value

Piece = tuple[Value, Condition, int]  # an address in global memory, whether it is to be read, and how many words


def load(at: Value, count: int, condition: Condition, *, shift: int = 0) -> list[Value]:
    """Begins to load 1, 2 or 4 words from L2; 0 if the condition does not hold. `shift` is in bytes."""
    return ptx.load(at, [ptx.i32()] * count, condition, space="global.cg", shift=shift)


def store(at: Value, word: Value, condition: Condition) -> None:
    """Writes a word if the condition holds. Other clusters may read it at the same time."""
    ptx.store(at, [word], condition, space="relaxed.gpu.global")


def load_all(pieces: Sequence[Piece]) -> list[list[Value]]:
    """Begins to load words; 0 for pieces whose condition does not hold."""
    loaded = [load(at, size, condition) for at, condition, size in pieces]
    ptx.sync_warp()
    return loaded


def await_all(pieces: Sequence[Piece]) -> list[list[Value]]:
    """Polls words of a workspace until none has all bits set; 0 for pieces whose condition does not hold."""
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
    operands = [each for at, condition, _ in pieces for each in (at, condition)]
    words = iter(ptx.asm(text, [ptx.i32()] * count, operands, volatile=True))
    return [[next(words) for _ in range(size)] for _, _, size in pieces]
