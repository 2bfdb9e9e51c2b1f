"""Rows of numbers, each spread over the threads of a cluster's blocks: what kernels that reduce them have in common.

A row's D numbers are taken in fours. Block b of the row has the fours b · per … (b + 1) · per - 1, thread i of it those
of number i, i + threads, … among them. With one row, the chip waits for these few threads: so several blocks share it.

Blocks send each other numbers with `st.async`, which tells an mbarrier of the receiver when they are there. A barrier
of the cluster would do, but its release waits until all that was written to global memory before has arrived there.

Versions, as compiled for sm_90a:
  - `ld.global.nc` everywhere: ptxas puts off such loads beyond barriers, until their values are used; so `ld.global`.
  - `ld.global`, in the right order: ptxas still moves them down to the next barrier; so a `bar.warp.sync` after each
    group of loads (`issue`), which keeps them where they are and waits for none.
  - `barrier.cluster.arrive.release` after writing to the other blocks' memory: MEMBAR.ALL.GPU; so `st.async`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.ptx import Value

LARGEST_WIDTH = 8192  # of a row, whose numbers are held in registers
MOST_ROWS = 128  # for more, what XLA makes of the operations is as good
_MOST_THREADS = 512
_MOST_BLOCKS = 8  # of a cluster, wherever it runs


@dataclasses.dataclass(frozen=True)
class Spread:
    """How rows are spread over blocks and threads."""

    width: int  # D, a multiple of 4
    blocks: int  # of a row, up to 8; by `of`, and for `row_sum`, a power of two
    threads: int  # of a block, a multiple of 128

    @classmethod
    def of(cls, rows: int, width: int, *, threads: int = 128) -> "Spread":
        """As many blocks a row as the chip has room for and the row has work for.

        `threads` is the least number of threads in a block that is wanted for other reasons.
        """
        blocks = _MOST_BLOCKS
        while blocks > 1 and (rows * blocks > 128 or width < 256 * blocks):
            blocks //= 2
        per = -(-width // (4 * blocks))
        turns = -(-per // _MOST_THREADS)
        needed = 128 * -(-per // (128 * turns))
        return cls(width, blocks, min(max(needed, 128 * -(-threads // 128)), _MOST_THREADS))

    @property
    def per(self) -> int:
        """Fours of a block."""
        return -(-self.width // (4 * self.blocks))

    @property
    def turns(self) -> int:
        """Fours of a thread."""
        return -(-self.per // self.threads)

    @property
    def warps(self) -> int:
        """Of a block."""
        return self.threads // 32

    @property
    def senders(self) -> int:
        """Warps of a block that have numbers."""
        return -(-min(self.per, self.threads) // 32)

    @property
    def sums(self) -> int:
        """Float32 numbers that each block gets in a `row_sum`."""
        return self.blocks * self.senders


@dataclasses.dataclass(frozen=True)
class Four:
    """Four numbers of a row, of one thread."""

    row: Value
    width: int
    first: Value  # number of the first of them in the row
    here: Value  # and in the block's part of the row
    present: Value  # negative if the row has no such numbers

    def at(self, ref: Value, size: int, row: Value | None = None) -> Value:
        """Where they are in a row of an array [rows, width] in global memory, of numbers of `size` bytes."""
        return ptx.offset(
            ptx.offset(ptx.address(ref), self.row if row is None else row, self.width * size), self.first, size
        )

    def inside(self, part: Value) -> Value:
        """Where they are in the block's part of the row, float32 in shared memory."""
        return ptx.offset32(part, self.here, 4)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a thread is."""

    spread: Spread
    block: Value  # number of its block in the cluster
    thread: Value  # number of the thread in its block
    meetings: Value  # address in shared memory of an mbarrier for each exchange of numbers between blocks

    @classmethod
    def here(cls, spread: Spread, meetings: Value) -> "Place":
        """This thread's. `meetings`: shared memory for an mbarrier for each exchange."""
        block = ptx.const(0)
        if spread.blocks > 1:
            (block,) = ptx.asm("mov.u32 $0, %cluster_ctarank;", [ptx.i32()], [])
        return cls(spread, block, utils.thread_idx(), ptx.shared_address(meetings))

    def prepare(self, counts: Sequence[int]) -> None:
        """Prepares exchanges, of each of which a block gets so many numbers.

        Before the first `send`, there must be a `met`.
        """
        if self.spread.blocks == 1:
            return
        begun = "".join(
            f"@p mbarrier.init.shared::cta.b64 [$0+{8 * i}], 1;"
            f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0+{8 * i}], {4 * count};"
            for i, count in enumerate(counts)
        )
        ptx.asm(
            f"{{ .reg .pred p; setp.eq.s32 p, $1, 0; {begun} fence.mbarrier_init.release.cluster;"
            "barrier.cluster.arrive.relaxed.aligned; }",
            [],
            [self.meetings, self.thread],
        )

    def met(self) -> None:
        """Waits until all blocks of the row can be sent to."""
        if self.spread.blocks > 1:
            ptx.asm("barrier.cluster.wait.aligned;", [], [])

    def send(self, exchange: int, block: Value, address: Value, value: Value, where: Value) -> None:
        """Writes a float32 number to a block's shared memory, where `where` is not 0."""
        if self.spread.blocks == 1:
            text = "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p st.shared.f32 [$0], $1; }"
            ptx.asm(text, [], [address, value, where])
            return
        # From here to there is as far for whatever lies in shared memory.
        (there,) = ptx.asm("mapa.shared::cluster.u32 $0, $1, $2;", [ptx.i32()], [self.meetings, block])
        away = arith.subi(there, self.meetings)
        ptx.asm(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0;"
            "@p st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [$0], $1, [$2]; }",
            [],
            [ptx.add(address, away), value, ptx.add(there, 8 * exchange), where],
        )

    def receive(self, exchange: int) -> None:
        """Waits for what an exchange sends to this block."""
        if self.spread.blocks == 1:
            ptx.asm("bar.sync 0;", [], [])
            return
        ptx.asm(
            "{ .reg .pred p; again:"
            f"mbarrier.try_wait.parity.shared::cta.b64 p, [$0+{8 * exchange}], 0; @!p bra again; }}",
            [],
            [self.meetings],
        )

    @property
    def lane(self) -> Value:
        """The thread's number in its warp."""
        return arith.andi(self.thread, ptx.const(31))

    @property
    def warp(self) -> Value:
        """The warp's number in its block."""
        return arith.shrui(self.thread, ptx.const(5))

    @property
    def first(self) -> Value:
        """The first of the block's numbers in the row."""
        return ptx.mul(self.block, 4 * self.spread.per)

    @property
    def count(self) -> Value:
        """How many numbers of the row the block has: 0 or fewer where the row was at an end before."""
        left = arith.subi(ptx.const(self.spread.width), self.first)
        return arith.minsi(left, ptx.const(4 * self.spread.per))

    def four(self, row: Value, turn: int) -> Four:
        """What the thread has in a turn."""
        here = ptx.mul(ptx.add(self.thread, turn * self.spread.threads), 4)
        present = arith.subi(arith.subi(self.count, ptx.const(1)), here)
        return Four(row, self.spread.width, ptx.add(self.first, here), here, present)


def kernel(
    name: str,
    run: Callable[[Mapping[str, Value], Value], None],
    spread: Spread,
    num_rows: int,
    operands: Mapping[str, jax.Array],
    results: Mapping[str, jax.ShapeDtypeStruct],
    scratch: Mapping[str, Any],
) -> dict[str, jax.Array]:
    """Runs what a thread does, `run(arrays, row)`, where `arrays` are the operands, results and scratch by name."""

    def body(*refs: Any, **scratch_refs: Any) -> None:
        named = dict(zip([*operands, *results], refs, strict=True)) | scratch_refs

        @plgpu.inline_mgpu(arg_types=({each: plgpu.RefType() for each in named}, plgpu.Layout.WG_SPLAT(())))
        def inline(ctx: Any, named: dict[str, Value], row: Any) -> tuple[()]:
            del ctx
            run(named, row.registers.item())
            return ()

        inline(named, jax.lax.axis_index("row"))

    body.__name__ = name
    cluster: dict[str, Any] = {"cluster": (spread.blocks,), "cluster_names": ("block",)} if spread.blocks > 1 else {}
    launched = plgpu.kernel(
        body,
        out_type=tuple(results.values()),
        scratch_types=dict(scratch),
        grid=(num_rows,),
        grid_names=("row",),
        num_threads=spread.threads // 128,
        thread_name="warpgroup",
        **cluster,
    )
    return dict(zip(results, launched(*operands.values()), strict=True))


def scratch(exchanges: int) -> dict[str, Any]:
    """Shared memory for `Place.here`."""
    return {"meetings": shared(2 * exchanges)}


def shared(size: int) -> Any:
    """An array of float32 numbers in shared memory."""
    return plgpu.SMEM((size,), jnp.float32)


def issue() -> None:
    """What is loaded before this is begun before this: else the compiler puts it off until it is used."""
    ptx.asm("bar.warp.sync 0xffffffff;", [], [])


def row_sum(place: Place, exchange: int, value: Value, sums: Value) -> Value:
    """The float32 sum over the row's threads, in a fixed order, in each of them.

    `sums` is the address in shared memory of `Spread.sums` numbers, which nothing else uses.
    """
    spread = place.spread
    value = ptx.warp_sum(value)
    mine = ptx.offset32(sums, ptx.add(ptx.mul(place.block, spread.senders), place.warp), 4)
    # Lane b writes to block b. The others must name a block too.
    target = arith.andi(place.lane, ptx.const(spread.blocks - 1))
    inside = arith.andi(ptx.less(place.lane, spread.blocks), ptx.less(place.warp, spread.senders))
    place.send(exchange, target, mine, value, inside)
    place.receive(exchange)
    parts: list[Value] = []
    for i in range(0, spread.sums, 4):
        if i + 4 <= spread.sums:
            text = f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4+{4 * i}];"
            parts += ptx.asm(text, [ptx.f32()] * 4, [sums], volatile=True)
            continue
        for j in range(i, spread.sums):
            parts += ptx.asm(f"ld.shared.f32 $0, [$1+{4 * j}];", [ptx.f32()], [sums], volatile=True)
    return ptx.total(parts)


def where(present: Value, number: Value) -> Value:
    """A float32 number, or 0 where `present` is negative."""
    is_there = arith.cmpi(arith.CmpIPredicate.sge, present, ptx.const(0))
    return arith.select(is_there, number, ptx.const(0.0, ptx.f32()))


def load_four(address: Value, dtype: jax.typing.DTypeLike, present: Value) -> list[Value]:
    """Begins to load four numbers, bfloat16 or float32, from global memory; 0 where `present` is negative."""
    if dtype == jnp.float32:
        return ptx.asm(
            "{ .reg .pred p; setp.ge.s32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
            "@p ld.global.v4.f32 {$0, $1, $2, $3}, [$4]; }",
            [ptx.f32()] * 4,
            [address, present],
            volatile=True,
        )
    return ptx.asm(
        "{ .reg .pred p; setp.ge.s32 p, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0; @p ld.global.v2.b32 {$0, $1}, [$2]; }",
        [ptx.i32()] * 2,
        [address, present],
        volatile=True,
    )


def load_one(address: Value, dtype: jax.typing.DTypeLike, present: Value, shift: int = 0) -> Value:
    """Loads a number from global memory: bfloat16 or float32 as float32, or int32.

    It is 0 where `present` is negative. The number lies `shift` bytes after the address.
    """
    if dtype == jnp.bfloat16:
        text = (
            "{ .reg .pred p; .reg .b32 t; setp.ge.s32 p, $2, 0; mov.b32 t, 0; @p ld.global.u16 t, [$1+%d];"
            "shl.b32 t, t, 16; mov.b32 $0, t; }"
        )
    else:
        text = "{ .reg .pred p; setp.ge.s32 p, $2, 0; mov.b32 $0, 0; @p ld.global.b32 $0, [$1+%d]; }"
    kind = ptx.i32() if dtype == jnp.int32 else ptx.f32()
    return ptx.asm(text % shift, [kind], [address, present], volatile=True)[0]


def four(loaded: Sequence[Value]) -> list[Value]:
    """What `load_four` has loaded, as float32."""
    if len(loaded) == 4:
        return list(loaded)
    return [number for word in loaded for number in ptx.halves(word)]


def store_four(address: Value, words: Sequence[Value], present: Value) -> None:
    """Writes four bfloat16 numbers to global memory, where `present` is not negative."""
    ptx.asm(
        "{ .reg .pred p; setp.ge.s32 p, $3, 0; @p st.global.v2.b32 [$0], {$1, $2}; }", [], [address, *words, present]
    )


def keep_four(address: Value, numbers: Sequence[Value], present: Value) -> None:
    """Writes four float32 numbers to this block's shared memory, where `present` is not negative."""
    ptx.asm(
        "{ .reg .pred p; setp.ge.s32 p, $5, 0; @p st.shared.v4.f32 [$0], {$1, $2, $3, $4}; }",
        [],
        [address, *numbers, present],
    )
