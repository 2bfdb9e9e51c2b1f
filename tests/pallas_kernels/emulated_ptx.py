"""Kernels that are written as one thread's work, run on a CPU: all threads of a cluster at once, in NumPy.

`launched` stands in for `ptx.launch`, so a kernel is called as usual, but for `jax.jit`. A value is an array with one
number per thread. Inlined PTX is interpreted, as far as the kernels tested with this use it. What of
`pallas_kernels.ptx` is built on PTX and on MLIR's `arith` runs as it is; an `Emulator` stands in for the rest.

Loads and stores must be aligned and within their array; whatever a kernel has not written is NaN. Whatever a block
sends has arrived at once. A block that waits must have been sent as many bytes as it announced: else it would wait
forever. Clusters run one after the other, and their threads in step, so races go unnoticed.
"""

import functools
import importlib
import itertools
import operator
import re
import types
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.ptx.values import as_i1

_GLOBAL = 1 << 40  # the first address in global memory; in shared memory it is 0
_APART_IN_CLUSTER = 1 << 24  # bytes from a block's shared memory to the next one's
_APART = 256  # bytes: arrays in global memory begin at multiples of it, and end at least as far before the next one
_BUILT_ON = ("barriers", "cluster", "control", "memory", "rows", "values", "warp")  # modules of `pallas_kernels.ptx`


def _bits(value: Any) -> np.ndarray:
    value = np.asarray(value)
    return value.view(np.uint32) if value.itemsize == 4 else value.astype(np.int64).astype(np.uint32)


def _integer(value: Any) -> np.ndarray:
    return _bits(value).view(np.int32)


def _bf16_pair(words: Any) -> tuple[np.ndarray, np.ndarray]:
    words = _bits(words)
    return (words << 16).view(np.float32), (words & np.uint32(0xFFFF0000)).view(np.float32)


def _as_bf16(number: np.ndarray) -> np.ndarray:
    return number.astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32)


def _as_e4m3(number: np.ndarray) -> np.ndarray:
    limited = np.clip(number, -448, 448)  # NaN stays
    return limited.astype(ml_dtypes.float8_e4m3fn).view(np.uint8).astype(np.uint32)


def _permuted(a: np.ndarray, b: np.ndarray, selector: int) -> np.ndarray:
    sources = [each >> 8 * i & 255 for each in (a, b) for i in range(4)]
    return sum((sources[selector >> 4 * i & 15] << 8 * i for i in range(4)), np.zeros_like(a))


def _two_numbers(operation: Callable[..., Any], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    low, high = (operation(*pair) for pair in zip(_bf16_pair(a), _bf16_pair(b), strict=True))
    return _as_bf16(low) | _as_bf16(high) << 16


def _exp2(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp2(x)


def _alike(words: np.ndarray) -> np.ndarray:
    """A bit for each lane that has the same word, of [warps, 32]."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    return np.sum(np.where(words[:, :, None] == words[:, None], bits, np.uint32(0)), axis=-1, dtype=np.uint32)


def _of_floats(operation: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """The instruction on words."""
    return lambda *words: _bits(operation(*(word.view(np.float32) for word in words)))


_INSTRUCTIONS: dict[str, Callable[..., Any]] = {
    "shr.u32": operator.rshift,
    "shr.b32": operator.rshift,
    "shl.b32": operator.lshift,
    "and.b32": operator.and_,
    "mov.b32": lambda a: a,
    "mov.b16": lambda a: a,
    "mov.u32": lambda a: a,
    "lop3.b32": lambda a, b, c, table: (a & b) | c,  # 0xEA, the only one in use
    "prmt.b32": lambda a, b, selector: _permuted(a, b, int(selector)),
    "cvt.f32.f16": lambda a: _bits(a.astype(np.uint16).view(np.float16).astype(np.float32)),
    "cvt.rn.bf16.f32": lambda a: _as_bf16(a.view(np.float32)),
    "cvt.rn.bf16x2.f32": lambda high, low: _as_bf16(low.view(np.float32)) | _as_bf16(high.view(np.float32)) << 16,
    "cvt.rn.satfinite.e4m3x2.f32": lambda high, low: (
        _as_e4m3(low.view(np.float32)) | _as_e4m3(high.view(np.float32)) << 8
    ),
    "add.rn.f32": _of_floats(np.add),
    "mul.rn.f32": _of_floats(np.multiply),
    "fma.rn.f32": _of_floats(lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32)),
    "div.full.f32": _of_floats(np.divide),
    "ex2.approx.f32": _of_floats(_exp2),
    "ex2.approx.ftz.f32": _of_floats(_exp2),
    "lg2.approx.f32": _of_floats(np.log2),
    "rsqrt.approx.f32": _of_floats(lambda a: np.float32(1) / np.sqrt(a)),
    "selp.b32": lambda a, b, p: np.where(p, a, b),
    "setp.eq.f32": lambda a, b: a.view(np.float32) == b.view(np.float32),
    "setp.eq.s32": lambda a, b: _integer(a) == _integer(b),
    "setp.ge.s32": lambda a, b: _integer(a) >= _integer(b),
    "setp.gt.s32": lambda a, b: _integer(a) > _integer(b),
    "setp.ne.s32": lambda a, b: _integer(a) != _integer(b),
    "setp.ne.and.s32": lambda a, b, p: (_integer(a) != _integer(b)) & p,
    "popc.b32": lambda a: np.bitwise_count(a).astype(np.uint32),
    "mov.b64": lambda low, high: low.astype(np.int64) | high.astype(np.int64) << 32,
    # Of each warp, in each of its threads.
    "redux.sync.max.u32": lambda a, mask: a.reshape(-1, 32).max(axis=1).repeat(32),
    "redux.sync.min.u32": lambda a, mask: a.reshape(-1, 32).min(axis=1).repeat(32),
    "match.any.sync.b32": lambda a, mask: _alike(a.reshape(-1, 32)).reshape(-1),
    "mul.rn.bf16x2": lambda a, b: _two_numbers(operator.mul, a, b),
    "add.rn.bf16x2": lambda a, b: _two_numbers(operator.add, a, b),
    "mapa.shared::cluster.u32": lambda a, rank: a + rank * np.uint32(_APART_IN_CLUSTER),
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "mad.wide.s32": lambda a, b, c: _integer(a).astype(np.int64) * _integer(b) + c,
}
_WITHOUT_EFFECT = (".reg", "@!", "bar", "fence", "prefetch")  # here


@functools.cache
def _parsed(text: str) -> list[tuple[str, list[str], bool]]:
    """The instructions of inlined PTX: names, operands, and whether the predicate p guards them."""
    found = []
    for line in text.strip().removeprefix("{").removesuffix("}").replace("\n", " ").split(";"):
        line = line.strip().removeprefix("again:").strip()
        is_guarded = line.startswith("@p ")
        name, _, rest = line.removeprefix("@p ").strip().partition(" ")
        if not name or name.startswith(_WITHOUT_EFFECT):
            continue
        if name == "mov.b32" and "{" in rest:
            name = "unpack" if rest.startswith("{") else "pack"
        assert not is_guarded or name.startswith(("ld.", "st.", "mbarrier.")), f"{name} is not emulated with a guard"
        found.append((name, re.findall(r"[-$\w+]+", rest), is_guarded))
    return found


class Arith:
    """MLIR's `arith`, as far as kernels use it."""

    class CmpIPredicate:
        """Comparisons of integers."""

        eq, ne, sge, slt = operator.eq, operator.ne, operator.ge, operator.lt

        @staticmethod
        def ult(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            """Of the same bits as unsigned numbers."""
            return _bits(a) < _bits(b)

    cmpi = staticmethod(lambda predicate, a, b: predicate(_integer(a), _integer(b)))
    andi = staticmethod(lambda a, b: a & b if np.asarray(a).dtype == bool else _integer(_bits(a) & _bits(b)))
    ori = staticmethod(lambda a, b: a | b if np.asarray(a).dtype == bool else _integer(_bits(a) | _bits(b)))
    xori = staticmethod(lambda a, b: _integer(_bits(a) ^ _bits(b)))
    shli = staticmethod(lambda a, b: _integer(_bits(a) << _bits(b)))
    shrsi = staticmethod(lambda a, b: _integer(a) >> _integer(b))
    shrui = staticmethod(lambda a, b: _integer(_bits(a) >> _bits(b)))
    addi = staticmethod(lambda a, b: a + b if np.asarray(a).dtype == np.int64 else _integer(a) + _integer(b))
    subi = staticmethod(lambda a, b: _integer(a) - _integer(b))
    muli = staticmethod(lambda a, b: _integer(a) * _integer(b))
    divui = staticmethod(lambda a, b: _integer(_bits(a) // _bits(b)))
    remui = staticmethod(lambda a, b: _integer(_bits(a) % _bits(b)))
    minsi = staticmethod(lambda a, b: np.minimum(_integer(a), _integer(b)))
    maxsi = staticmethod(lambda a, b: np.maximum(_integer(a), _integer(b)))
    minui = staticmethod(lambda a, b: _integer(np.minimum(_bits(a), _bits(b))))
    maxui = staticmethod(lambda a, b: _integer(np.maximum(_bits(a), _bits(b))))
    bitcast = staticmethod(lambda kind, a: np.asarray(a).view(kind))
    mulf, addf, subf, negf, maximumf, minimumf = (
        staticmethod(each) for each in (np.multiply, np.add, np.subtract, np.negative, np.maximum, np.minimum)
    )

    @staticmethod
    def select(condition: np.ndarray, value: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
        """One of two numbers of a type, which for integers of 32 bits may be two types here."""
        if np.asarray(value).dtype != np.asarray(otherwise).dtype:
            value, otherwise = _integer(value), _integer(otherwise)
        return np.where(condition, value, otherwise)


def _mma(a: list[np.ndarray], b: list[np.ndarray], acc: list[np.ndarray]) -> list[np.ndarray]:
    """In float64, and then rounded. Threads are [warp, g, q]."""
    by_lane = [np.stack(_bf16_pair(word), axis=-1).reshape(-1, 8, 4, 2) for word in (*a, *b)]
    rows = [np.concatenate(by_lane[i : i + 3 : 2], axis=2).reshape(-1, 8, 16) for i in range(2)]
    A = np.concatenate(rows, axis=1).astype(np.float64)  # [warp, row, k]
    B = np.concatenate(by_lane[4:], axis=2).reshape(-1, 8, 16).astype(np.float64)  # [warp, column, k]
    found = np.einsum("wrk,wck->wrc", A, B).reshape(-1, 2, 8, 4, 2)  # rows g + 8·i, columns 2·q + j
    products = [found[:, i, :, :, j].reshape(-1) for i in range(2) for j in range(2)]
    return [
        _bits((product + before.view(np.float32)).astype(np.float32))
        for product, before in zip(products, acc, strict=True)
    ]


class Emulator:
    """The threads of a cluster, block by block, and the memory that they see."""

    def __init__(self, threads: int, blocks: int = 1):
        self._threads = np.arange(threads * blocks, dtype=np.int32)
        self._rank, thread = np.divmod(self._threads, np.int32(threads))
        self._blocks = blocks
        self._active = np.ones(threads * blocks, bool)
        self._global = self._shared = np.zeros(0, np.uint8)
        self._exists = np.zeros(0, bool)  # which bytes of global memory belong to an array
        self._to_come: dict[int, int] = {}  # bytes, by the address in the cluster of an mbarrier
        self._names = {
            **{name: getattr(self, f"_{name}") for name in ("asm", "choose", "loop", "repeat", "when")},
            "arith": Arith(),
            "f32": lambda: np.float32,
            "i32": lambda: np.uint32,
            "i64": lambda: np.int64,
            "utils": types.SimpleNamespace(thread_idx=lambda: thread, c=self.constant),
        }

    def patch(self, patch: pytest.MonkeyPatch, *kernels: Any) -> None:
        """Lets kernels' modules, and what they are built on, run here."""
        modules = [importlib.import_module(f"pallas_kernels.ptx.{name}") for name in _BUILT_ON]
        for module in (importlib.import_module("pallas_kernels.ptx"), *modules, *kernels):
            for name, function in self._names.items():
                if hasattr(module, name):
                    patch.setattr(module, name, function)

    def constant(self, value: float, kind: Any = np.uint32) -> np.ndarray:
        """A number, in each thread."""
        return self._all(_integer(np.int64(value)) if kind is np.uint32 else kind(value))

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
        self._shared = np.full(sum(sizes) * self._blocks, 0xFF, np.uint8)
        self._to_come.clear()
        return [self._all(np.int32(sum(sizes[:i]))) for i in range(len(sizes))]

    def _all(self, value: Any) -> np.ndarray:
        return value if np.shape(value) == self._threads.shape else np.full(self._threads.shape, value)

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
            per_block = len(memory) // self._blocks
            assert starts.min() >= 0 and starts.max() < per_block, "an address is outside of the block's memory"
            starts = starts + per_block * (self._rank if rank is None else rank)[active]
        places = starts[:, None] + np.arange(size)
        assert places.min() >= 0 and places.max() < len(memory), "an address is outside of memory"
        assert not is_global or np.all(self._exists[places]), "an address is outside of its array"
        return memory, places

    def _read(self, address: np.ndarray, kind: Any, count: int, active: np.ndarray) -> list[np.ndarray]:
        words = np.zeros((len(self._threads), count), kind)
        if active.any():
            array, places = self._bytes(address, np.dtype(kind).itemsize * count, active)
            words[active] = array[places].view(kind)
        return list(words.astype(np.uint32).T)

    def _write(self, address: np.ndarray, data: np.ndarray, active: np.ndarray, rank: np.ndarray | None = None) -> None:
        """Of `data`, [threads, numbers]."""
        if active.any():
            data = data.view(np.uint8)
            array, places = self._bytes(address, data.shape[1], active, rank)
            array[places] = data[active]

    def _when(self, condition: Any, body: Callable[[], None]) -> None:
        before, self._active = self._active, self._active & as_i1(condition)
        if self._active.any():
            body()
        self._active = before

    def _choose(self, condition: Any, kinds: Any, body: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        before, results, condition = self._active, [], as_i1(condition)
        for holds, each in ((condition, body), (~condition, otherwise)):
            self._active = before & holds
            results.append(each())
        self._active = before
        return [Arith.select(condition, *pair) for pair in zip(*results, strict=True)]

    def _repeat(self, carry: Any, body: Callable[..., Any]) -> list[np.ndarray]:
        carry, before = list(carry), self._active
        while self._active.any():
            following, again = body(carry)
            carry = [np.where(self._active, *pair) for pair in zip(following, carry, strict=True)]
            self._active = self._active & as_i1(again)
        self._active = before
        return carry

    def _loop(self, count: Any, carry: Any, body: Callable[..., Any], *, start: int = 0) -> list[np.ndarray]:
        carry, before = list(carry), self._active
        for i in range(start, int(np.max(count))):
            self._active = before & (i < count)
            following = body(self.constant(i), carry)
            carry = [np.where(self._active, *pair) for pair in zip(following, carry, strict=True)]
        self._active = before
        return carry

    def _asm(self, text: str, outputs: Any, inputs: Any, *, volatile: bool = False) -> list[np.ndarray]:
        """Registers that are words have the dtype uint32."""
        registers: dict[str, Any] = {"cluster_ctarank": _bits(self._rank)}
        for i, value in enumerate(inputs):
            wide = np.asarray(value).dtype == np.int64
            registers[f"${len(outputs) + i}"] = self._all(value if wide else _bits(value))
        for name, operands, is_guarded in _parsed(text):
            self._run(name, operands, registers, self._active & registers["p"] if is_guarded else self._active)
        return [registers[f"${i}"].view(kind) for i, kind in enumerate(outputs)]

    def _run(self, name: str, operands: list[str], registers: dict[str, Any], active: np.ndarray) -> None:
        def value(operand: str) -> Any:
            return registers[operand] if operand in registers else np.uint32(int(operand, 0) & 0xFFFFFFFF)

        def address(operand: str) -> np.ndarray:
            register, _, shift = operand.partition("+")
            return registers[register] + int(shift or 0)

        target = operands[0]
        if name in _INSTRUCTIONS:
            registers[target] = self._all(_INSTRUCTIONS[name](*map(value, operands[1:])))
        elif name.startswith("ld."):
            kind = {"u8": np.uint8, "16": np.uint16}.get(name[-2:], np.uint32)
            words = self._read(address(operands[-1]), kind, len(operands) - 1, active)
            for target, word in zip(operands[:-1], words, strict=True):
                registers[target] = np.where(active, word, registers.get(target, word))
        elif name.startswith("st.async"):
            words = np.stack([registers[each] for each in operands[1:-1]], axis=1)
            rank, place = np.divmod(registers[target], np.uint32(_APART_IN_CLUSTER))
            mbarrier = registers[operands[-1]]
            assert np.all(rank == mbarrier // _APART_IN_CLUSTER), "the mbarrier is another block's"
            self._write(place, words, active, rank.astype(np.int32))
            for each, sent in Counter(mbarrier[active].tolist()).items():
                self._to_come[each] -= 4 * words.shape[1] * sent
        elif name.startswith("st."):
            words = np.stack([registers[each] for each in operands[1:]], axis=1)
            kind = {"u8": np.uint8, "16": np.uint16}.get(name[-2:], np.uint32)
            self._write(address(target), words.astype(kind), active)
        elif name.startswith("mbarrier."):
            self._use(name, operands, np.unique((address(operands[-2]) + self._rank * _APART_IN_CLUSTER)[active]))
        elif name.startswith("shfl."):
            lane = value(operands[2])
            source = self._threads ^ lane if "bfly" in name else (self._threads & ~31) + lane
            registers[target] = registers[operands[1]][source]
        elif name.startswith("mma."):
            a, b, acc = ([registers[each] for each in operands[i:j]] for i, j in ((4, 8), (8, 10), (10, 14)))
            registers.update(zip(operands, _mma(a, b, acc), strict=False))
        elif name == "unpack":
            registers[target], registers[operands[1]] = value(operands[2]) & 0xFFFF, value(operands[2]) >> 16
        else:
            assert name == "pack", f"{name} is not emulated"
            registers[target] = self._all(value(operands[1]) | value(operands[2]) << 16)

    def _use(self, name: str, operands: list[str], mbarriers: np.ndarray) -> None:
        """What is done to these mbarriers, given by their addresses in the cluster."""
        for mbarrier in mbarriers.tolist():
            if name.startswith("mbarrier.init."):
                self._to_come[mbarrier] = 0
            elif name.startswith("mbarrier.arrive.expect_tx."):
                self._to_come[mbarrier] += int(operands[-1])
            else:
                assert name.startswith("mbarrier.try_wait."), f"{name} is not emulated"
                assert self._to_come[mbarrier] == 0, f"bytes to come: {self._to_come[mbarrier]}"


ALREADY_THERE = _GLOBAL  # the address of what is in global memory before a kernel's operands


def launched(*kernels: Any, before: np.ndarray | None = None) -> Callable[..., dict[str, Any]]:
    """What stands in for `ptx.launch`. References are written to.

    Args:
      kernels: the modules that the kernel is from.
      before: memory at the address `ALREADY_THERE`, which the kernel may change.
    """

    def launch(
        thread: Callable[..., None],
        operands: Mapping[str, Any],
        results: Mapping[str, Any],
        grid: Mapping[str, int],
        shared: Mapping[str, Any] | None = None,
        *,
        cluster: int = 1,
        warpgroups: int | None = None,
    ) -> dict[str, Any]:
        emulator = Emulator(128 * (warpgroups or 1), cluster)
        start = None if before is None else emulator.array(before)
        refs = {name: operand for name, operand in operands.items() if isinstance(operand, jax.Ref)}
        given = {name: np.asarray(refs[name][...] if name in refs else each) for name, each in operands.items()}
        empty = {name: np.full(each.shape, 0xFF, np.uint8) for name, each in results.items()}
        given |= {name: nothing.repeat(results[name].dtype.itemsize) for name, nothing in empty.items()}
        at = {name: emulator.array(each) for name, each in given.items()}
        sizes = {name: -(-4 * each.shape[0] // 16) * 16 for name, each in (shared or {}).items()}
        with pytest.MonkeyPatch.context() as patch:
            emulator.patch(patch, *kernels)
            for indices in itertools.product(*map(range, grid.values())):
                here = dict(zip(sizes, emulator.share(*sizes.values()), strict=True))
                thread(**at, **here, **dict(zip(grid, map(emulator.constant, indices), strict=True)))

        if before is not None and start is not None:
            before[...] = emulator.result(start, before.size, before.dtype).reshape(before.shape)

        def written(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            dtype = ml_dtypes.bfloat16 if dtype == jnp.bfloat16 else dtype
            return emulator.result(at[name], int(np.prod(shape)), dtype).reshape(shape)

        for name, ref in refs.items():
            ref[...] = jnp.asarray(written(name, ref.shape, ref.dtype))
        return {name: written(name, each.shape, each.dtype) for name, each in results.items()}

    return launch
