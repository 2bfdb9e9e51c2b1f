"""Kernels whose blocks form clusters, launched on a CPU: all threads of a cluster at once, in NumPy. See `Emulator`.

`launched` stands in for `ptx.launch`, so a kernel is called as usual, but for `jax.jit`. Whatever a block sends has
arrived at once. A block that waits must have been sent as many numbers as it prepared for: else it would wait forever.
"""

import functools
import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.ptx.cluster import ClusterThread
from tests.pallas_kernels.emulated_ptx import Emulator

_BUILT_ON = ("values", "memory", "warp", "cluster", "rows", "control", "barriers")


class ClusterEmulator(Emulator):
    """The threads of a cluster, block by block, and their memory: each block has its own part of shared memory."""

    def __init__(self, threads: int, blocks: int):
        super().__init__(threads * blocks)
        self._rank, self._per_block = (self._threads // threads).astype(np.int32), 0
        self._counts: Sequence[int] = []
        self._sent = np.zeros((0, blocks), int)  # numbers, of each exchange to each block
        in_block = (self._threads % threads).astype(np.int32)
        self.utils.thread_idx = lambda: in_block
        more = {
            "arith": self.arith,
            "fragment_lane": lambda: (in_block % 128 >> 5, in_block % 32 >> 2, in_block % 4),
            "utils": self.utils,
            "as_predicate": lambda condition: ("ne", condition.astype(np.int32)),
            "both": lambda *conditions: functools.reduce(np.logical_and, conditions),
            "cluster_rank": lambda blocks: self._rank,
            "i64": lambda: np.int64,
            "pack": lambda low, high: self._asm("cvt.rn.bf16x2.f32 $0, $2, $1;", [np.uint32], [low, high])[0],
            "shuffle_xor": lambda value, distance: value[self._threads ^ distance],
            "sync_warp": lambda: None,
            "thread": lambda: in_block & 127,
            "times": np.multiply,
            "where": lambda condition, value, otherwise=0.0: np.where(condition, value, np.float32(otherwise)),
        }
        names = {**vars(self.ptx), **more}
        self._names = {name: function for name, function in names.items() if name != "tree_sum"}

    def patch(self, patch: pytest.MonkeyPatch, *kernels: Any) -> None:
        """Lets kernels' modules, and what they are built on, run here."""
        modules = [importlib.import_module(f"pallas_kernels.ptx.{name}") for name in _BUILT_ON]
        for module in (importlib.import_module("pallas_kernels.ptx"), *modules, *kernels):
            for name, function in self._names.items():
                if hasattr(module, name):
                    patch.setattr(module, name, function)
        patch.setattr(ClusterThread, "prepare", lambda thread, counts: self._prepare(counts))
        patch.setattr(ClusterThread, "wait_prepared", lambda thread: None)
        patch.setattr(ClusterThread, "receive", lambda thread, exchange: self._receive(exchange))
        patch.setattr(ClusterThread, "send", lambda thread, exchange, *sent: self._send(exchange, *sent))

    def share(self, *sizes: int) -> list[np.ndarray]:
        """As `Emulator.share`, in each block."""
        self._per_block, blocks = sum(sizes), int(self._rank.max()) + 1
        self._shared = np.full(self._per_block * blocks, 0xFF, np.uint8)
        return [(self._rank * self._per_block + sum(sizes[:i])).astype(np.int32) for i in range(len(sizes))]

    def _prepare(self, counts: Sequence[int]) -> None:
        self._counts, self._sent = counts, np.zeros((len(counts), int(self._rank.max()) + 1), int)

    def _send(self, exchange: int, rank: Any, address: Any, value: Any, condition: Any) -> None:
        np.add.at(self._sent[exchange], rank[self._active & condition].astype(int), 1)
        at = address + (rank.astype(np.int32) - self._rank) * self._per_block
        self._store(at, [value], condition, space="shared")

    def _receive(self, exchange: int) -> None:
        for block in np.unique(self._rank[self._active]):
            assert self._sent[exchange, block] == self._counts[exchange], f"block {block}, exchange {exchange}"


def launched(*kernels: Any) -> Callable[..., dict[str, Any]]:
    """What stands in for `ptx.launch`, given the modules that the kernel is from."""

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
        emulator = ClusterEmulator(128 * (warpgroups or 1), cluster)
        given = {name: np.asarray(operand) for name, operand in operands.items()}
        empty = {name: np.full(each.shape, 0xFF, np.uint8) for name, each in results.items()}
        given |= {name: nothing.repeat(results[name].dtype.itemsize) for name, nothing in empty.items()}
        at = {name: emulator.array(each) for name, each in given.items()}
        sizes = {name: -(-4 * each.shape[0] // 16) * 16 for name, each in (shared or {}).items()}
        with pytest.MonkeyPatch.context() as patch:
            emulator.patch(patch, *kernels)
            for indices in itertools.product(*map(range, grid.values())):
                here = dict(zip(sizes, emulator.share(*sizes.values()), strict=True))
                thread(**at, **here, **dict(zip(grid, map(emulator.ptx.const, indices), strict=True)))

        def written(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            dtype = ml_dtypes.bfloat16 if dtype == jnp.bfloat16 else dtype
            return emulator.result(at[name], int(np.prod(shape)), dtype).reshape(shape)

        return {name: written(name, each.shape, each.dtype) for name, each in results.items()}

    return launch
