"""Kernels that are written as one thread's work, run on a CPU: all threads of a block at once, in NumPy.

An `Emulator` stands in for `pallas_kernels.ptx`, MLIR's `arith` and Mosaic's `utils` in the modules of a kernel. A
value is an array with one number per thread. Inlined PTX is interpreted, as far as the kernels tested with this use
it. Loads and stores must be aligned and within their array; whatever a kernel has not written in shared memory is
NaN. Blocks run one after the other, but those of a cluster at once, and all threads in step, so races go unnoticed.
"""

import operator
import re
import types
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

_GLOBAL = 1 << 40  # the first address in global memory; in shared memory it is 0
_APART_IN_CLUSTER = 1 << 24  # bytes from a block's shared memory to the next one's
_APART = 256  # bytes: arrays in global memory begin at multiples of it, and end at least as far before the next one


def _bits(value: Any) -> np.ndarray:
    value = np.asarray(value)
    return value.view(np.uint32) if value.dtype == np.float32 else value.astype(np.int64).astype(np.uint32)


def _integer(value: Any) -> np.ndarray:
    return _bits(value).view(np.int32)


def _bf16_pair(words: Any) -> tuple[np.ndarray, np.ndarray]:
    words = _bits(words)
    return (words << 16).view(np.float32), (words & np.uint32(0xFFFF0000)).view(np.float32)


def _as_bf16(number: np.ndarray) -> np.ndarray:
    return number.astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32)


def _permuted(a: np.ndarray, b: np.ndarray, selector: int) -> np.ndarray:
    sources = [each >> 8 * i & 255 for each in (a, b) for i in range(4)]
    return sum((sources[selector >> 4 * i & 15] << 8 * i for i in range(4)), np.zeros_like(a))


def _two_numbers(operation: Callable[..., Any], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    low, high = (operation(*pair) for pair in zip(_bf16_pair(a), _bf16_pair(b), strict=True))
    return _as_bf16(low) | _as_bf16(high) << 16


_INSTRUCTIONS: dict[str, Callable[..., Any]] = {
    "shr.u32": operator.rshift,
    "shr.b32": operator.rshift,
    "shl.b32": operator.lshift,
    "and.b32": operator.and_,
    "mov.b32": lambda a: a,
    "mov.b16": lambda a: a,
    "lop3.b32": lambda a, b, c, table: (a & b) | c,  # 0xEA, the only one in use
    "prmt.b32": lambda a, b, selector: _permuted(a, b, int(selector)),
    "cvt.f32.f16": lambda a: _bits(a.astype(np.uint16).view(np.float16).astype(np.float32)),
    "cvt.rn.bf16.f32": lambda a: _as_bf16(a.view(np.float32)),
    "mul.rn.bf16x2": lambda a, b: _two_numbers(operator.mul, a, b),
    "add.rn.bf16x2": lambda a, b: _two_numbers(operator.add, a, b),
    "mapa.shared::cluster.u32": lambda a, rank: a + rank * np.uint32(_APART_IN_CLUSTER),
    "cvt.rn.bf16x2.f32": lambda high, low: _as_bf16(low.view(np.float32)) | _as_bf16(high.view(np.float32)) << 16,
    "mad.wide.s32": lambda a, b, c: _integer(a).astype(np.int64) * _integer(b) + c,
}


def _selected(condition: np.ndarray, a: np.ndarray, b: Any) -> np.ndarray:
    """Words stay words."""
    return np.where(condition, a, b) if a.dtype == np.int64 else np.where(condition, _bits(a), _bits(b)).view(a.dtype)


class Arith:
    """MLIR's `arith`, as far as kernels use it."""

    class CmpIPredicate:
        """Comparisons of integers."""

        eq, sge, slt = operator.eq, operator.ge, operator.lt

    cmpi = staticmethod(lambda predicate, a, b: predicate(_integer(a), _integer(b)))
    andi = staticmethod(lambda a, b: a & b if np.asarray(a).dtype == bool else _integer(_bits(a) & _bits(b)))
    xori = staticmethod(lambda a, b: _integer(_bits(a) ^ _bits(b)))
    shrui = staticmethod(lambda a, b: _integer(_bits(a) >> _bits(b)))
    shli = staticmethod(lambda a, b: _integer(_bits(a) << _bits(b)))
    bitcast = staticmethod(lambda kind, a: _bits(a).view(kind))
    divui = staticmethod(lambda a, b: _integer(_bits(a) // _bits(b)))
    remui = staticmethod(lambda a, b: _integer(_bits(a) % _bits(b)))
    subi = staticmethod(lambda a, b: _integer(a) - _integer(b))
    minsi = staticmethod(lambda a, b: np.minimum(_integer(a), _integer(b)))
    maxsi = staticmethod(lambda a, b: np.maximum(_integer(a), _integer(b)))
    select = staticmethod(lambda condition, a, b: _selected(condition, np.asarray(a), b))
    mulf, addf, subf = (staticmethod(each) for each in (np.multiply, np.add, np.subtract))
    maximumf = staticmethod(np.maximum)


class Emulator:
    """The threads of a block or of a cluster's blocks, and the memory that they see."""

    def __init__(self, threads: int, blocks: int = 1):
        self._threads = np.arange(threads * blocks, dtype=np.int32)
        self._rank, self._thread = np.divmod(self._threads, np.int32(threads))
        self._active = np.ones(threads * blocks, bool)
        self._global = self._shared = np.zeros(0, np.uint8)
        self._exists = np.zeros(0, bool)  # which bytes of global memory belong to an array
        self.arith = Arith()
        self.utils = types.SimpleNamespace(thread_idx=lambda: self._thread)
        names = ("asm", "choose", "load", "load_shared", "loop", "mma", "quad_reduce", "repeat", "store", "when")
        self.ptx = types.SimpleNamespace(
            **{name: getattr(self, f"_{name}") for name in names},
            NotNegative=lambda number: _integer(number) >= 0,
            add=lambda *each: sum(map(_integer, each[1:]), _integer(each[0])),
            always=lambda: np.ones(self._threads.shape, bool),
            as_value=lambda value: self._all(np.int32(value)) if isinstance(value, int) else value,
            both=lambda *each: np.logical_and.reduce(each),
            cluster_rank=lambda blocks: self._rank,
            const=lambda value: self._all(_integer(np.int64(value))),
            divide=np.divide,
            divided=lambda a, b: (Arith.divui(a, b), Arith.remui(a, b)),
            exp2=self._exp2,
            f32=lambda: np.float32,
            float32=lambda value: self._all(np.float32(value)),
            fma=lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
            from_lane=lambda value, lane: value[(self._threads & ~31) + lane],
            halves=lambda word: list(_bf16_pair(word)),
            i32=lambda: np.uint32,
            keep_loads_before=lambda number: None,
            less=lambda a, b: _integer(a) < _integer(b),
            mul=lambda a, b: _integer(a) * _integer(b),
            offset=lambda base, index, size: base + _integer(index).astype(np.int64) * size,
            pack=lambda low, high: _as_bf16(low) | _as_bf16(high) << 16,
            rounded_product=np.multiply,
            rounded_sum=np.add,
            shared_offset=lambda base, index, size: _integer(base) + _integer(index) * size,
            shifted=operator.add,
            sync_block=lambda: None,
            sync_warp=lambda: None,
            thread=lambda: self._thread & 127,
            tree_sum=lambda values: sum(values[1:], values[0]),
            values=types.SimpleNamespace(i64=lambda: np.int64),
            where=lambda condition, value, otherwise=0.0: np.where(condition, value, np.float32(otherwise)),
        )

    def array(self, array: Any) -> np.ndarray:
        """The address of an array in global memory, which is copied there."""
        data, start = np.frombuffer(np.asarray(array).tobytes(), np.uint8), len(self._global)
        after = _APART + -len(data) % _APART
        self._global = np.concatenate([self._global, data, np.zeros(after, np.uint8)])
        self._exists = np.concatenate([self._exists, np.ones(len(data), bool), np.zeros(after, bool)])
        return self._all(np.int64(_GLOBAL + start))

    def result(self, address: np.ndarray, count: int, dtype: Any) -> np.ndarray:
        """What the first numbers of an array in global memory are now."""
        start = int(address[0]) - _GLOBAL
        return self._global[start : start + count * np.dtype(dtype).itemsize].view(dtype)

    def share(self, *sizes: int) -> list[np.ndarray]:
        """The addresses of new arrays in each block's shared memory, of so many bytes."""
        self._shared = np.full(sum(sizes) * (1 + int(self._rank[-1])), 0xFF, np.uint8)
        return [self._all(np.int32(sum(sizes[:i]))) for i in range(len(sizes))]

    def _all(self, value: Any) -> np.ndarray:
        return np.broadcast_to(value, self._threads.shape).copy()

    def _bytes(
        self, address: np.ndarray, size: int, active: np.ndarray, rank: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The memory that the active threads' addresses are in, and where, [active, size].

        Shared memory is that of the thread's own block, or of the block of this rank in its cluster.
        """
        starts = address[active].astype(np.int64)
        assert not np.any(starts % size), "an address is not aligned"
        is_global = bool(np.all(starts >= _GLOBAL))
        memory, starts = (self._global, starts - _GLOBAL) if is_global else (self._shared, starts)
        if not is_global:
            per_block = len(memory) // (1 + int(self._rank[-1]))
            assert starts.min() >= 0 and starts.max() < per_block, "an address is outside of the block's memory"
            starts = starts + per_block * (self._rank if rank is None else rank)[active]
        places = starts[:, None] + np.arange(size)
        assert places.min() >= 0 and places.max() < len(memory), "an address is outside of memory"
        assert not is_global or np.all(self._exists[places]), "an address is outside of its array"
        return memory, places

    def _read(self, address: np.ndarray, kinds: Sequence[Any], active: np.ndarray) -> list[np.ndarray]:
        kind = np.uint16 if kinds[0] == np.uint16 else np.uint32
        words = np.zeros((len(self._threads), len(kinds)), kind)
        if active.any():
            array, places = self._bytes(address, np.dtype(kind).itemsize * len(kinds), active)
            words[active] = array[places].view(kind)
        return [words[:, i].copy().view(kind) for i, kind in enumerate(kinds)]

    def _write(self, address: np.ndarray, data: np.ndarray, active: np.ndarray, rank: np.ndarray | None = None) -> None:
        """Of `data`, uint8 [threads, size]."""
        if active.any():
            array, places = self._bytes(address, data.shape[1], active, rank)
            array[places] = data[active]

    def _load(self, at: Any, kinds: Any, condition: Any, *, space: str = "global", shift: int = 0) -> list[np.ndarray]:
        return self._read(at + shift, kinds, self._active & condition)

    def _load_shared(self, at: Any, kinds: Any, *, shift: int = 0) -> list[np.ndarray]:
        return self._read(at + shift, kinds, self._active)

    def _store(self, at: Any, values: Any, condition: Any, *, space: str = "global", shift: int = 0) -> None:
        words = np.stack([self._all(_bits(value)) for value in values], axis=1)
        self._write(at + shift, words.view(np.uint8), self._active & condition)

    def _when(self, condition: Any, body: Callable[[], None]) -> None:
        before, self._active = self._active, self._active & condition
        if self._active.any():
            body()
        self._active = before

    def _choose(self, condition: Any, kinds: Any, body: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        before, results = self._active, []
        for holds, each in ((condition, body), (~condition, otherwise)):
            self._active = before & holds
            results.append(each())
        self._active = before
        return [np.where(condition, *pair) for pair in zip(*results, strict=True)]

    def _repeat(self, carry: Any, body: Callable[..., Any]) -> list[np.ndarray]:
        carry, before = list(carry), self._active
        while self._active.any():
            following, again = body(carry)
            carry = [np.where(self._active, *pair) for pair in zip(following, carry, strict=True)]
            self._active = self._active & again
        self._active = before
        return carry

    def _loop(self, count: Any, carry: Any, body: Callable[..., Any], *, start: int = 0) -> list[np.ndarray]:
        carry, before = list(carry), self._active
        for i in range(start, int(np.max(count))):
            self._active = before & (i < count)
            carry = [
                np.where(self._active, *pair) for pair in zip(body(self._all(np.int32(i)), carry), carry, strict=True)
            ]
        self._active = before
        return carry

    @staticmethod
    def _exp2(x: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.exp2(x)

    def _quad_reduce(self, combine: Callable[..., Any], value: np.ndarray) -> np.ndarray:
        for distance in (1, 2):
            value = combine(value, value[self._threads ^ distance])
        return value

    def _mma(self, acc: Any, a: Any, b: Any) -> list[np.ndarray]:
        """In float64, and then rounded. Threads are [warp, g, q]."""
        by_lane = [np.stack(_bf16_pair(word), axis=-1).reshape(-1, 8, 4, 2) for word in (*a, *b)]
        rows = [np.concatenate(by_lane[i : i + 3 : 2], axis=2).reshape(-1, 8, 16) for i in range(2)]
        A = np.concatenate(rows, axis=1).astype(np.float64)  # [warp, row, k]
        B = np.concatenate(by_lane[4:], axis=2).reshape(-1, 8, 16).astype(np.float64)  # [warp, column, k]
        found = np.einsum("wrk,wck->wrc", A, B).reshape(-1, 2, 8, 4, 2)  # rows g + 8·i, columns 2·q + j
        return [
            (found[:, i, :, :, j].reshape(-1) + acc[2 * i + j]).astype(np.float32) for i in range(2) for j in range(2)
        ]

    def _asm(self, text: str, outputs: Any, inputs: Any, *, volatile: bool = False) -> list[np.ndarray]:
        registers: dict[str, Any] = {}
        for i, value in enumerate(inputs):
            wide = np.asarray(value).dtype == np.int64
            registers[f"${len(outputs) + i}"] = self._all(value if wide else _bits(value))
        for line in text.strip().removeprefix("{").removesuffix("}").replace("\n", " ").split(";"):
            active = self._active
            name, _, rest = line.strip().partition(" ")
            if name == "@p":
                active = self._active & registers["p"]
                name, _, rest = rest.partition(" ")
            if name and not name.startswith((".reg", "again:", "@!p", "prefetch", "mbarrier", "fence", "barrier")):
                self._run(name, rest, registers, active)
        return [registers[f"${i}"].view(kind) for i, kind in enumerate(outputs)]

    def _run(self, name: str, rest: str, registers: dict[str, Any], active: np.ndarray) -> None:
        """One instruction. Registers that are words have the dtype uint32."""
        operands = re.findall(r"[$\w+]+", rest)

        def value(operand: str) -> Any:
            return registers[operand] if operand in registers else np.uint32(int(operand, 0) & 0xFFFFFFFF)

        if name.startswith("ld."):
            (address, _, shift), targets = operands[-1].partition("+"), operands[:-1]
            kind = np.uint16 if name.endswith("u16") else np.uint32
            words = self._read(registers[address] + int(shift or 0), [kind] * len(targets), active)
            for target, word in zip(targets, words, strict=True):
                registers[target] = np.where(active, word, registers.get(target, np.uint32(0))).astype(np.uint32)
        elif name.startswith("st.async"):
            address, *numbers, mbarrier = operands
            words = np.stack([registers[each] for each in numbers], axis=1)
            rank, place = np.divmod(registers[address], np.uint32(_APART_IN_CLUSTER))
            assert np.all(rank == registers[mbarrier] // _APART_IN_CLUSTER), "the mbarrier is another block's"
            self._write(place, words.view(np.uint8), active, rank.astype(np.int32))
        elif name == "st.global.b16":
            half = registers[operands[1]].astype(np.uint16)[:, None].view(np.uint8)
            self._write(registers[operands[0]], half, active)
        elif name.startswith("st.global"):
            words = np.stack([registers[each] for each in operands[1:]], axis=1)
            self._write(registers[operands[0]], words.view(np.uint8), active)
        elif name.startswith("setp."):
            registers[operands[0]] = {"ne": operator.ne, "eq": operator.eq}[name.split(".")[1]](
                *map(value, operands[1:])
            )
        elif name == "mov.b32" and rest.startswith("{"):
            registers[operands[0]], registers[operands[1]] = value(operands[2]) & 0xFFFF, value(operands[2]) >> 16
        elif name == "mov.b32" and "{" in rest:
            registers[operands[0]] = self._all(value(operands[1]) | value(operands[2]) << 16)
        else:
            registers[operands[0]] = self._all(_INSTRUCTIONS[name](*map(value, operands[1:])))
