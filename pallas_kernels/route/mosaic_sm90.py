"""The norm and the choice of experts, for a few rows, in one kernel for Hopper: Pallas Mosaic GPU, JAX 0.11 and newer.

A row is spread over a cluster of blocks. Each multiplies its parts of the row by the router's rows for them, of which a
thread reads 16 bytes at a time: eight experts' weights of one input. The parts' sums meet in block 0, whose first warp
chooses.

A row's bits must not depend on how many blocks share it, which the number of rows decides. So a warp adds pieces of a
few inputs, each from zero; a part's pieces are added in one order, and the parts in one.

The same kernel computes the norm first: the router's weights do not depend on it, so they are loaded meanwhile, and one
kernel launch is saved.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.add_norm import mosaic_sm90 as add_norm
from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.peers import Peers
from pallas_kernels.ptx import Value, rows
from pallas_kernels.route.choice_sm90 import MOST_EXPERTS, chosen, lane_experts

_VECTOR = 8  # experts whose weights one 16-byte load reads
_LEAST_PIECE = 32  # inputs of a piece: their sums, [pieces, E], meet in shared memory
_WEIGHTS = 2048  # of a piece: eight loads per thread, unless one of the limits applies
_MANY_THREADS = 384  # more than these have registers for fewer loads in flight
_FLIGHT = 16, 12  # 16-byte loads that a thread has in flight: with few and with many threads


def supports(
    x_TD: jax.Array,
    terms: PartialSum | None,
    scale_D: jax.Array,
    router_DE: jax.Array,
    router_bias_E: jax.Array,
    positions_T: jax.Array,
    *,
    top: int,
) -> bool:
    """Whether `norm_route` takes these operands."""
    E = router_DE.shape[1]
    return (
        x_TD.shape[0] <= rows.MOST_ROWS
        and add_norm.supports(x_TD, terms, scale_D)
        and router_DE.dtype == jnp.bfloat16
        and router_bias_E.dtype in (jnp.bfloat16, jnp.float32)
        and positions_T.dtype == jnp.int32
        and E in (8, 16, 32, 64, MOST_EXPERTS)
        and 1 <= top <= E
    )


def layout_of(num_rows: int, width: int, experts: int) -> rows.RowLayout:
    """Like `RowLayout.of`, with enough threads for the router's weights."""
    pieces = _pieces(rows.RowLayout.of(num_rows, width), experts)
    turns = -(-pieces // (rows.MOST_THREADS // 32))
    return rows.RowLayout.of(num_rows, width, threads=32 * -(-pieces // turns))


def piece_of(experts: int) -> int:
    """Inputs of a piece: a strip's, or evenly many of them."""
    return max(_LEAST_PIECE, min(rows.STRIP, _WEIGHTS // experts))


def _pieces(layout: rows.RowLayout, experts: int) -> int:
    """Pieces that a block has, those beyond the row's end included."""
    return 4 * layout.per // piece_of(experts)


def shared(layout: rows.RowLayout, experts: int) -> dict[str, Any]:
    """Shared memory for `Router.choose`: the block's part of x, its pieces' sums, and in block 0 all parts' logits."""
    sizes = {"x_part": 4 * layout.per, "parts": _pieces(layout, experts) * experts, "logits": sent(layout, experts)}
    return {name: rows.shared_floats(size) for name, size in sizes.items()}


def sent(layout: rows.RowLayout, experts: int) -> int:
    """Numbers that block 0 receives."""
    return layout.parts * experts


def results(num_rows: int, top: int) -> dict[str, Any]:
    """What `Router.choose` writes."""
    return {
        "experts": jax.ShapeDtypeStruct((num_rows, top), jnp.int32),
        "weights": jax.ShapeDtypeStruct((num_rows, top), jnp.float32),
    }


class Loaded(NamedTuple):
    """What a thread is loading."""

    weights: list[list[Value]]  # of the first steps
    biases: list[Value]  # of the experts whose number modulo 32 is the lane; 0 if there is none
    position: Value  # of the token; negative is padding


@dataclasses.dataclass(frozen=True)
class Router:
    """What a thread does to choose a row's experts, in steps, with other work possible between them."""

    at: Mapping[str, Value]  # addresses of "router", "router_bias", "positions", and those of `results` and `shared`
    row: Value
    thread: rows.RowThread
    experts: int  # E
    top: int
    exchange: int  # the number of the one in which block 0 gets the logits

    @property
    def vectors(self) -> int:
        """Threads that read a row of the router together."""
        return self.experts // _VECTOR

    @property
    def piece(self) -> int:
        """Inputs of a piece: rows of the router that a warp adds at a time."""
        return piece_of(self.experts)

    @property
    def offsets(self) -> list[int]:
        """For each load of a thread, how many rows of the router after the thread's first one: piece by piece."""
        at_once, layout = 32 // self.vectors, self.thread.layout
        turns = -(-_pieces(layout, self.experts) // layout.warps)
        return [
            turn * layout.warps * self.piece + step for turn in range(turns) for step in range(0, self.piece, at_once)
        ]

    @property
    def flight(self) -> int:
        """Loads that a thread has in flight."""
        return _FLIGHT[self.thread.layout.threads > _MANY_THREADS]

    @property
    def _vector(self) -> Value:
        return arith.andi(self.thread.thread, ptx.const(self.vectors - 1))

    @property
    def _row(self) -> Value:
        """The first of the block's numbers that the thread multiplies."""
        in_piece = arith.shrui(self.thread.lane, ptx.const(self.vectors.bit_length() - 1))
        return ptx.add(ptx.mul(self.thread.warp, self.piece), in_piece)

    def begin(self, bias_dtype: jax.typing.DTypeLike) -> Loaded:
        """Begins the loads that depend on nothing."""
        size = jnp.dtype(bias_dtype).itemsize
        biases = [
            rows.load_number(
                ptx.offset(self.at["router_bias"], expert, size),
                bias_dtype,
                ptx.NotNegative(arith.subi(ptx.const(self.experts - 1), expert)),
            )
            for expert in self._experts()
        ]
        position_at = ptx.offset(self.at["positions"], self.row, 4)
        return Loaded(self._load(0), biases, rows.load_number(position_at, jnp.int32, ptx.always()))

    def keep(self, numbers: Iterable[tuple[rows.Float4, list[Value]]]) -> Value:
        """Writes the thread's part of x to shared memory, four bfloat16 numbers at a time: `choose`'s x."""
        x = self.at["x_part"]
        for four, words in numbers:
            ptx.store(four.inside(x), rows.as_floats(words), four.exists, space="shared")
        ptx.sync_block()
        return x

    def choose(self, loaded: Loaded, x: Value) -> None:
        """Chooses, and writes the choice.

        Args:
          loaded: what `begin` returned.
          x: address of the block's part of x in shared memory, visible to all its threads.
        """
        parts, logits = self.at["parts"], self.at["logits"]
        self._multiply(loaded.weights, x, parts)
        self._gather(parts, logits)
        if self.thread.layout.blocks == 1:
            self.thread.receive(self.exchange)
        # Block 0's first warp goes on alone.
        before = arith.ori(self.thread.rank, self.thread.warp)

        def finish() -> None:
            if self.thread.layout.blocks > 1:
                self.thread.receive(self.exchange)
            experts, weights = self._choose(logits, loaded.biases)
            padding = arith.shrsi(loaded.position, ptx.const(31))  # all bits, or none
            experts = [arith.ori(expert, padding) for expert in experts]
            first = ptx.less(self.thread.lane, 1)
            for name, values in (("experts", experts), ("weights", weights)):
                at = ptx.offset(self.at[name], self.row, 4 * self.top)
                for i, value in enumerate(values):
                    ptx.store(at, [value], first, shift=4 * i)

        ptx.when(arith.cmpi(arith.CmpIPredicate.eq, before, ptx.const(0)), finish)

    def _load(self, start: int) -> list[list[Value]]:
        """Begins to load the weights of the steps from `start` on; 0 for rows that the block does not have."""
        at = ptx.offset(self.at["router"], ptx.add(self.thread.first, self._row), 2 * self.experts)
        at = ptx.offset(at, self._vector, 2 * _VECTOR)
        left = arith.subi(self.thread.count, self._row)
        return [
            ptx.asm(
                f"{{ .reg .pred p; setp.gt.s32 p, $5, {row};"
                "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
                f"@p ld.global.L1::no_allocate.v4.b32 {{$0, $1, $2, $3}}, [$4+{2 * self.experts * row}]; }}",
                [ptx.i32()] * 4,
                [at, left],
                volatile=True,
            )
            for row in self.offsets[start : start + self.flight]
        ]

    def _experts(self) -> list[Value]:
        return lane_experts(self.thread.lane, self.experts)

    def _multiply(self, loaded: list[list[Value]], x: Value, parts: Value) -> None:
        """The products, and their sums over each piece."""
        steps = self.piece // (32 // self.vectors)  # of a piece
        acc = [ptx.float32(0.0)] * _VECTOR
        x_at = ptx.shared_offset(x, self._row, 4)
        left = arith.subi(self.thread.count, self._row)
        for step, row in enumerate(self.offsets):
            if step and step % self.flight == 0:
                loaded = self._load(step)
            (number,) = ptx.asm(
                f"{{ .reg .pred p; setp.gt.s32 p, $2, {row}; mov.b32 $0, 0;@p ld.shared.f32 $0, [$1+{4 * row}]; }}",
                [ptx.f32()],
                [x_at, left],
                volatile=True,
            )
            weights = [weight for word in loaded[step % self.flight] for weight in ptx.halves(word)]
            acc = [ptx.fma(number, weight, one) for weight, one in zip(weights, acc, strict=True)]
            if step % steps == steps - 1:
                self._keep_piece(acc, step // steps, parts)
                acc = [ptx.float32(0.0)] * _VECTOR

    def _keep_piece(self, acc: list[Value], turn: int, parts: Value) -> None:
        """Adds the warp's threads' sums, and writes them to shared memory."""
        acc = [ptx.warp_sum(one, self.vectors) for one in acc]
        piece = ptx.add(self.thread.warp, turn * self.thread.layout.warps)
        at = ptx.shared_offset(parts, piece, 4 * self.experts)
        at = ptx.shared_offset(at, self._vector, 4 * _VECTOR)
        exists = ptx.NotNegative(arith.subi(ptx.const(_pieces(self.thread.layout, self.experts) - 1), piece))
        condition = ptx.both(exists, ptx.NotNegative(arith.subi(ptx.const(self.vectors - 1), self.thread.lane)))
        for i in (0, 4):
            ptx.store(ptx.add(at, 4 * i), acc[i : i + 4], condition, space="shared")

    def _gather(self, parts: Value, logits: Value) -> None:
        """Adds the pieces of each part and expert, and sends the sums to block 0."""
        layout = self.thread.layout
        own = layout.parts_per_block * self.experts  # sums of the block
        pieces = _pieces(layout, self.experts) // layout.parts_per_block
        ptx.sync_block()
        first = ptx.mul(self.thread.rank, own)
        for start in range(0, own, layout.threads):
            number = ptx.add(self.thread.thread, start)
            part, expert = ptx.divided(number, self.experts)
            inside = ptx.less(number, own)
            at = ptx.shared_offset(ptx.shared_offset(parts, part, 4 * self.experts * pieces), expert, 4)
            sums = [
                ptx.load(at, [ptx.f32()], inside, space="shared", shift=4 * self.experts * piece)[0]
                for piece in range(pieces)
            ]
            mine = ptx.shared_offset(logits, ptx.add(first, number), 4)
            self.thread.send(self.exchange, ptx.const(0), mine, ptx.tree_sum(sums), inside)

    def _choose(self, logits: Value, biases: list[Value]) -> tuple[list[Value], list[Value]]:
        found = []
        for expert, bias in zip(self._experts(), biases, strict=True):
            inside = ptx.less(expert, self.experts)
            parts = [
                ptx.load(
                    ptx.shared_offset(logits, expert, 4),
                    [ptx.f32()],
                    inside,
                    space="shared",
                    shift=4 * self.experts * part,
                )[0]
                for part in range(self.thread.layout.parts)
            ]
            found.append(arith.addf(ptx.tree_sum(parts), bias))
        return chosen(found, self.thread.lane, experts=self.experts, top=self.top)


@partial(jax.jit, static_argnames=("epsilon", "top"))
def norm_route(
    x_TD: jax.Array,
    terms: PartialSum | None,
    scale_D: jax.Array,
    router_DE: jax.Array,
    router_bias_E: jax.Array,
    positions_T: jax.Array,
    *,
    peers: Peers | None = None,
    epsilon: float,
    top: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See `api.norm_route`. `supports` must hold for the operands."""
    T, D = x_TD.shape
    E = router_DE.shape[1]
    layout = layout_of(T, D, E)
    norm = add_norm.Norm.of(x_TD, terms, scale_D, None, peers=peers, epsilon=epsilon, center=False)
    counts = [*add_norm.counts(layout), sent(layout, E)]

    def norm_route(*, row: Value, **at: Value) -> None:
        thread = rows.RowThread.of(layout, at["mbarriers"])
        thread.prepare(counts)
        router = Router(at, row, thread, E, top, exchange=add_norm.EXCHANGES)
        # First, because no earlier kernel has read them: they come from farther away than what the norm waits for.
        loaded = router.begin(router_bias_E.dtype)
        normed = norm.run(thread, at, row, loaded=len(loaded.weights))
        router.choose(loaded, router.keep(normed))

    memory = rows.exchange_memory(len(counts)) | add_norm.shared(layout) | shared(layout, E)
    out = ptx.launch(
        norm_route,
        norm.operands | {"router": router_DE, "router_bias": router_bias_E, "positions": positions_T},
        add_norm.results(x_TD, terms) | results(T, top),
        {"row": T},
        dict(sorted(memory.items())),  # the order of the addresses that were measured
        cluster=layout.blocks,
        warpgroups=layout.threads // 128,
    )
    return out.get("sum", x_TD), out["normed"], out["experts"], out["weights"]
