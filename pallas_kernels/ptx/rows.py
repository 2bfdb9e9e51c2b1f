"""Rows of numbers, each spread over the threads of a cluster's blocks, for kernels that reduce rows.

A row's D numbers are taken four at a time, one `Float4` per thread and turn. The block of rank b has the float4s
b · per … (b + 1) · per - 1, and its thread i has those numbered i, i + threads, … among them. If there is only one row,
the whole chip waits for its few threads, so several blocks share it.

How many blocks share a row depends on the number of rows; the row's bits must not. So what a row is added up from
depends on its width alone: a warp adds each of its strips of 128 numbers by itself, and the strips' sums are added in
one order, whichever warps and blocks they are from (`row_sum`). A row consists of up to eight parts, each of as many
strips, and a block has all strips of one part or of several: kernels that add more than one number a row have a sum for
each part (`route`). A product that is added to something is either rounded first (`rounded_product`) or not (`fma`),
explicitly: what ptxas makes of a multiplication and an addition could be another thing in each layout.

Versions tried, as compiled for sm_90a:
  - `ld.global.nc` everywhere: ptxas delays such loads past barriers, until their values are used. Hence `ld.global`.
  - `ld.global`, in the right order: ptxas still moves them down to the next barrier. Hence `sync_warp` after each group
    of loads, which keeps them in place without waiting for them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels.ptx import memory
from pallas_kernels.ptx.cluster import MOST_BLOCKS, ClusterThread
from pallas_kernels.ptx.values import (
    Condition,
    NotNegative,
    Value,
    add,
    as_predicate,
    asm,
    both,
    const,
    f32,
    halves,
    i32,
    less,
    mul,
    tree_sum,
)
from pallas_kernels.ptx.warp import warp_sum

STRIP = 128  # numbers that a warp adds at a time: a float4 per lane
LARGEST_WIDTH = 8192  # of a row: its numbers are held in registers
MOST_ROWS = 128  # beyond, XLA's code is as good, unless terms have rows of their own
MOST_THREADS = 512  # of a block


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """How rows are spread over blocks and threads."""

    width: int  # D, a multiple of 4
    blocks: int  # per row, a power of two, up to `parts`
    threads: int  # per block, a multiple of 128

    @classmethod
    def of(cls, rows: int, width: int, *, threads: int = 128) -> "RowLayout":
        """As many blocks per row as the chip has room for and the row has work for.

        `threads` is the least number of threads that a block needs for other reasons.
        """
        blocks = _parts(width)
        while blocks > 1 and rows * blocks > 128:
            blocks //= 2
        float4s = cls(width, blocks, threads).float4s
        turns = -(-float4s // MOST_THREADS)
        needed = 128 * -(-float4s // (128 * turns))
        return cls(width, blocks, min(max(needed, 128 * -(-threads // 128)), MOST_THREADS))

    @property
    def parts(self) -> int:
        """Parts that a row consists of: blocks that share it, at most."""
        return _parts(self.width)

    @property
    def strips(self) -> int:
        """Strips that a row consists of."""
        return -(-self.width // STRIP)

    @property
    def strips_per_part(self) -> int:
        """Strips of a part; the row's last parts may have fewer, or none."""
        return -(-self.strips // self.parts)

    @property
    def parts_per_block(self) -> int:
        """Parts that a block has."""
        return self.parts // self.blocks

    @property
    def per(self) -> int:
        """Float4s per block, if the row has them."""
        return self.parts_per_block * self.strips_per_part * STRIP // 4

    @property
    def float4s(self) -> int:
        """Float4s of the first block, which no other has more of."""
        return min(self.per, -(-self.width // 4))

    @property
    def turns(self) -> int:
        """Float4s per thread."""
        return -(-self.float4s // self.threads)

    @property
    def warps(self) -> int:
        """Warps per block."""
        return self.threads // 32


def _parts(width: int) -> int:
    parts = MOST_BLOCKS
    while parts > 1 and width < 256 * parts:
        parts //= 2
    return parts


@dataclasses.dataclass(frozen=True)
class Float4:
    """Four adjacent numbers of a row, which one thread has."""

    row: Value
    width: int
    first: Value  # index of the first of them in the row
    in_block: Value  # and in the block's part of the row
    exists: Condition  # whether the row has such numbers

    def at(self, array: Value, size: int, row: Value | None = None) -> Value:
        """Their address in a row of an array [rows, width] in global memory, of numbers of `size` bytes."""
        row_at = memory.offset(array, self.row if row is None else row, self.width * size)
        return memory.offset(row_at, self.first, size)

    def inside(self, part: Value) -> Value:
        """Their address in the block's part of the row, float32 in shared memory."""
        return memory.shared_offset(part, self.in_block, 4)


@dataclasses.dataclass(frozen=True)
class RowThread(ClusterThread):
    """A thread of a cluster that shares a row."""

    layout: RowLayout

    @classmethod
    def of(cls, layout: RowLayout, mbarriers: Value) -> "RowThread":
        """This thread."""
        thread = ClusterThread.here(layout.blocks, mbarriers)
        return cls(thread.blocks, thread.rank, thread.thread, mbarriers, layout)

    @property
    def first(self) -> Value:
        """The first of the block's numbers in the row."""
        return mul(self.rank, 4 * self.layout.per)

    @property
    def count(self) -> Value:
        """How many numbers of the row the block has: 0 or fewer if the row ended before."""
        left = arith.subi(const(self.layout.width), self.first)
        return arith.minsi(left, const(4 * self.layout.per))

    def float4(self, row: Value, turn: int) -> Float4:
        """The thread's numbers in a turn."""
        in_block = mul(add(self.thread, turn * self.layout.threads), 4)
        exists = NotNegative(arith.subi(arith.subi(self.count, const(1)), in_block))
        return Float4(row, self.layout.width, add(self.first, in_block), in_block, exists)


def exchange_memory(exchanges: int) -> dict[str, Any]:
    """Shared memory for a `RowThread`'s mbarriers."""
    return {"mbarriers": shared_floats(2 * exchanges)}


def shared_floats(size: int) -> Any:
    """An array of float32 numbers in shared memory."""
    return plgpu.SMEM((size,), jnp.float32)


def row_sum(thread: RowThread, exchange: int, values: Sequence[Value], sums: Value) -> Value:
    """The float32 sum over the row's threads and their turns, in each of them: in an order by the row's width alone.

    Args:
      values: one per turn, 0 in threads without a float4.
      sums: address of the mailbox: `RowLayout.strips` numbers in shared memory, which nothing else uses.
    """
    layout = thread.layout
    # Lane b writes to block b. The other lanes must name some block too.
    target = arith.andi(thread.lane, const(layout.blocks - 1))
    for turn, value in enumerate(values):
        in_block = add(thread.warp, turn * layout.warps)
        exists = less(mul(in_block, STRIP), thread.count)
        strip = add(mul(thread.rank, 4 * layout.per // STRIP), in_block)
        mine = memory.shared_offset(sums, strip, 4)
        thread.send(exchange, target, mine, warp_sum(value), both(less(thread.lane, layout.blocks), exists))
    thread.receive(exchange)
    parts: list[Value] = []
    for i in range(0, layout.strips, 4):
        if i + 4 <= layout.strips:
            text = f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4+{4 * i}];"
            parts += asm(text, [f32()] * 4, [sums], volatile=True)
            continue
        for j in range(i, layout.strips):
            parts += asm(f"ld.shared.f32 $0, [$1+{4 * j}];", [f32()], [sums], volatile=True)
    return tree_sum(parts)


def load_float4(address: Value, dtype: jax.typing.DTypeLike, condition: Condition) -> list[Value]:
    """Begins to load four numbers, bfloat16 or float32, from global memory; 0 if the condition does not hold."""
    return memory.load(address, [f32()] * 4 if dtype == jnp.float32 else [i32()] * 2, condition)


def as_floats(loaded: Sequence[Value]) -> list[Value]:
    """The result of `load_float4`, as float32."""
    if len(loaded) == 4:
        return list(loaded)
    return [number for word in loaded for number in halves(word)]


def load_number(address: Value, dtype: jax.typing.DTypeLike, condition: Condition, shift: int = 0) -> Value:
    """Loads a number from global memory: bfloat16 or float32 as float32, or int32; 0 if the condition does not hold.

    `shift` is in bytes, added to the address.
    """
    if dtype != jnp.bfloat16:
        return memory.load(address, [i32() if dtype == jnp.int32 else f32()], condition, shift=shift)[0]
    comparison, register = as_predicate(condition)
    text = (
        f"{{ .reg .pred p; .reg .b32 t; setp.{comparison}.s32 p, $2, 0; mov.b32 t, 0; @p ld.global.u16 t, [$1+{shift}];"
        "shl.b32 t, t, 16; mov.b32 $0, t; }"
    )
    return asm(text, [f32()], [address, register], volatile=True)[0]
