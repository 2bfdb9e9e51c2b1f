"""The choice of experts for a few rows in one kernel, on Hopper: Pallas Mosaic GPU, JAX 0.11 and newer.

A row is spread over a cluster of blocks. Each multiplies its part of the row with its part of the router's rows, of
which a thread reads 16 bytes at a time, eight experts' weights of one input. The blocks' sums meet in block 0, whose
first warp chooses.

Logits, being rounded to bfloat16, have 16 bits: a logit and the number of its expert fit into one integer, so that a
maximum of integers finds both, the lower number of equals.

The norm before it can be done by the same kernel: the router's weights do not wait for it, so they are on their way
while it is computed, and a kernel's start is saved.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx, rows
from pallas_kernels.add_norm import mosaic_sm90 as add_norm
from pallas_kernels.parts import Parts
from pallas_kernels.ptx import Value

MOST_EXPERTS = 128
_OCTET = 8  # experts whose weights are read at a time
_FLIGHT = 12  # loads of 16 bytes that a thread has begun at a time
_WANTED = 8  # loads of a thread, if there are threads enough


def supports(
    x_TD: jax.Array,
    terms: Parts | None,
    scale_D: jax.Array,
    bias_D: jax.Array | None,
    router_DE: jax.Array,
    router_bias_E: jax.Array,
    positions_T: jax.Array,
    *,
    top: int,
) -> bool:
    """Whether `norm_route` takes these operands."""
    E = router_DE.shape[1]
    return (
        add_norm.supports(x_TD, terms, scale_D, bias_D)
        and router_DE.dtype == jnp.bfloat16
        and router_bias_E.dtype in (jnp.bfloat16, jnp.float32)
        and positions_T.dtype == jnp.int32
        and E in (8, 16, 32, 64, MOST_EXPERTS)
        and 1 <= top <= E
    )


def spread_of(num_rows: int, width: int, experts: int) -> rows.Spread:
    """As `Spread.of`, with threads enough for the router's weights."""
    blocks = rows.Spread.of(num_rows, width).blocks
    return rows.Spread.of(num_rows, width, threads=-(-width * experts // (_OCTET * blocks * _WANTED)))


def scratch(spread: rows.Spread, experts: int) -> dict[str, Any]:
    """Shared memory for `Router.choose`: the block's part of x, its warps' logits, and in block 0 those of blocks."""
    sizes = {"x_part": 4 * spread.per, "parts": spread.warps * experts, "logits": sent(spread, experts)}
    return {name: rows.shared(size) for name, size in sizes.items()}


def sent(spread: rows.Spread, experts: int) -> int:
    """Numbers that block 0 gets."""
    return spread.blocks * experts


def results(num_rows: int, top: int) -> dict[str, Any]:
    """What `Router.choose` writes."""
    return {
        "experts": jax.ShapeDtypeStruct((num_rows, top), jnp.int32),
        "weights": jax.ShapeDtypeStruct((num_rows, top), jnp.float32),
    }


class Loaded(NamedTuple):
    """What a thread has begun to load."""

    weights: list[list[Value]]  # of the first steps
    biases: list[Value]  # of the experts whose number is the lane's, modulo 32; 0 where there is none
    position: Value  # of the token; negative is padding


@dataclasses.dataclass(frozen=True)
class Router:
    """What a thread does to choose a row's experts, in steps between which it can do other things."""

    refs: Mapping[str, Value]  # "router", "router_bias", "positions", and those of `results` and `scratch`
    row: Value
    place: rows.Place
    experts: int  # E
    top: int
    exchange: int  # number of that by which block 0 gets the logits

    @property
    def octets(self) -> int:
        """Threads that read a row of the router together."""
        return self.experts // _OCTET

    @property
    def at_once(self) -> int:
        """Rows of the router that a block reads at a time."""
        return self.place.spread.threads // self.octets

    @property
    def steps(self) -> int:
        """Rows of the router that a thread reads."""
        return -(-4 * self.place.spread.per // self.at_once)

    @property
    def _octet(self) -> Value:
        return arith.andi(self.place.thread, ptx.const(self.octets - 1))

    @property
    def _row(self) -> Value:
        """The first of the block's numbers that the thread multiplies."""
        return arith.shrui(self.place.thread, ptx.const(self.octets.bit_length() - 1))

    def begin(self, bias_dtype: jax.typing.DTypeLike) -> Loaded:
        """Begins to load what waits for nothing."""
        size = jnp.dtype(bias_dtype).itemsize
        biases = [
            rows.load_one(
                ptx.offset(ptx.address(self.refs["router_bias"]), expert, size),
                bias_dtype,
                arith.subi(ptx.const(self.experts - 1), expert),
            )
            for expert in self._experts()
        ]
        position_at = ptx.offset(ptx.address(self.refs["positions"]), self.row, 4)
        return Loaded(self._load(0), biases, rows.load_one(position_at, jnp.int32, ptx.const(0)))

    def keep(self, numbers: Iterable[tuple[rows.Four, list[Value]]]) -> Value:
        """Writes the thread's part of x to shared memory, four bfloat16 numbers at a time: `choose`'s x."""
        x = ptx.shared_address(self.refs["x_part"])
        for four, words in numbers:
            rows.keep_four(four.inside(x), rows.four(words), four.present)
        ptx.asm("bar.sync 0;", [], [])
        return x

    def choose(self, loaded: Loaded, x: Value) -> None:
        """Chooses, and writes what is chosen.

        Args:
          loaded: what `begin` has begun to load.
          x: address of the block's part of x in shared memory, which must be there for all its threads.
        """
        parts, logits = (ptx.shared_address(self.refs[name]) for name in ("parts", "logits"))
        self._multiply(loaded.weights, x, parts)
        self._gather(parts, logits)
        if self.place.spread.blocks == 1:
            self.place.receive(self.exchange)
        # Block 0's first warp goes on alone.
        before = arith.ori(self.place.block, self.place.warp)

        def finish() -> None:
            if self.place.spread.blocks > 1:
                self.place.receive(self.exchange)
            experts, weights = self._choose(logits, loaded.biases)
            padding = arith.shrsi(loaded.position, ptx.const(31))  # all bits, or none
            experts = [arith.ori(expert, padding) for expert in experts]
            first = ptx.less(self.place.lane, 1)
            for name, values, letter in (("experts", experts, "b32"), ("weights", weights, "f32")):
                at = ptx.offset(ptx.address(self.refs[name]), self.row, 4 * self.top)
                for i, value in enumerate(values):
                    text = f"{{ .reg .pred p; setp.ne.s32 p, $2, 0; @p st.global.{letter} [$0+{4 * i}], $1; }}"
                    ptx.asm(text, [], [at, value, first])

        ptx.when(arith.cmpi(arith.CmpIPredicate.eq, before, ptx.const(0)), finish)

    def _load(self, start: int) -> list[list[Value]]:
        """Begins to load the weights of steps `start` and following; 0 where the block has no row."""
        at = ptx.offset(ptx.address(self.refs["router"]), ptx.add(self.place.first, self._row), 2 * self.experts)
        at = ptx.offset(at, self._octet, 2 * _OCTET)
        left = arith.subi(self.place.count, self._row)
        return [
            ptx.asm(
                f"{{ .reg .pred p; setp.gt.s32 p, $5, {self.at_once * step};"
                "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
                "@p ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, "
                f"[$4+{2 * self.experts * self.at_once * step}]; }}",
                [ptx.i32()] * 4,
                [at, left],
                volatile=True,
            )
            for step in range(start, min(start + _FLIGHT, self.steps))
        ]

    def _experts(self) -> list[Value]:
        return [ptx.add(self.place.lane, i) for i in range(0, self.experts, 32)]

    def _multiply(self, loaded: list[list[Value]], x: Value, parts: Value) -> None:
        """The products, summed over each warp's threads."""
        acc = [ptx.const(0.0, ptx.f32())] * _OCTET
        x_at = ptx.offset32(x, self._row, 4)
        left = arith.subi(self.place.count, self._row)
        for start in range(0, self.steps, _FLIGHT):
            for i, words in enumerate(loaded if start == 0 else self._load(start)):
                row = self.at_once * (start + i)
                (number,) = ptx.asm(
                    f"{{ .reg .pred p; setp.gt.s32 p, $2, {row}; mov.b32 $0, 0;@p ld.shared.f32 $0, [$1+{4 * row}]; }}",
                    [ptx.f32()],
                    [x_at, left],
                    volatile=True,
                )
                weights = [weight for word in words for weight in ptx.halves(word)]
                acc = [
                    ptx.asm("fma.rn.f32 $0, $1, $2, $3;", [ptx.f32()], [number, weight, one])[0]
                    for weight, one in zip(weights, acc, strict=True)
                ]
        acc = [ptx.warp_sum(one, self.octets) for one in acc]
        at = ptx.offset32(parts, self.place.warp, 4 * self.experts)
        at = ptx.offset32(at, self._octet, 4 * _OCTET)
        present = arith.subi(ptx.const(self.octets - 1), self.place.lane)
        for i in (0, 4):
            rows.keep_four(ptx.add(at, 4 * i), acc[i : i + 4], present)

    def _gather(self, parts: Value, logits: Value) -> None:
        """The warps' sums, each expert's by the thread of its number, added and sent to block 0."""
        spread, thread = self.place.spread, self.place.thread
        ptx.asm("bar.sync 0;", [], [])
        inside = ptx.less(thread, self.experts)
        at = ptx.offset32(parts, thread, 4)
        sums = [
            ptx.asm(
                "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0;"
                f"@p ld.shared.f32 $0, [$1+{4 * self.experts * warp}]; }}",
                [ptx.f32()],
                [at, inside],
                volatile=True,
            )[0]
            for warp in range(spread.warps)
        ]
        mine = ptx.offset32(ptx.offset32(logits, self.place.block, 4 * self.experts), thread, 4)
        self.place.send(self.exchange, ptx.const(0), mine, ptx.total(sums), inside)

    def _choose(self, logits: Value, biases: list[Value]) -> tuple[list[Value], list[Value]]:
        experts = self._experts()
        keys = []
        for expert, bias in zip(experts, biases, strict=True):
            inside = ptx.less(expert, self.experts)
            parts = [
                ptx.asm(
                    "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0;"
                    f"@p ld.shared.f32 $0, [$1+{4 * self.experts * block}]; }}",
                    [ptx.f32()],
                    [ptx.offset32(logits, expert, 4), inside],
                    volatile=True,
                )[0]
                for block in range(self.place.spread.blocks)
            ]
            word = ptx.pack(arith.addf(ptx.total(parts), bias), ptx.const(0.0, ptx.f32()))
            # Numbers in the order of integers: all bits of a negative one are turned, of another the sign.
            sign = arith.shrui(word, ptx.const(15))
            order = arith.xori(word, ptx.add(ptx.mul(sign, 0x7FFF), 0x8000))
            key = ptx.add(ptx.mul(order, 0x10000), arith.subi(ptx.const(0xFFFF), expert))
            keys.append(ptx.mul(key, inside))

        chosen, numbers = [], []
        for _ in range(self.top):
            best = keys[0]
            for key in keys[1:]:
                best = arith.maxui(best, key)
            (best,) = ptx.asm("redux.sync.max.u32 $0, $1, 0xffffffff;", [ptx.i32()], [best], volatile=True)
            keys = [arith.select(arith.cmpi(arith.CmpIPredicate.eq, key, best), ptx.const(0), key) for key in keys]
            numbers.append(arith.subi(ptx.const(0xFFFF), arith.andi(best, ptx.const(0xFFFF))))
            order = arith.shrui(best, ptx.const(16))
            sign = arith.shrui(order, ptx.const(15))
            word = arith.xori(order, arith.subi(ptx.const(0xFFFF), ptx.mul(sign, 0x7FFF)))
            chosen.append(ptx.halves(word)[0])
        powers = []
        for logit in chosen:
            exponent = arith.mulf(arith.subf(logit, chosen[0]), ptx.const(1.4426950408889634, ptx.f32()))
            powers += ptx.asm("ex2.approx.f32 $0, $1;", [ptx.f32()], [exponent])
        total = ptx.total(powers)
        return numbers, [ptx.asm("div.full.f32 $0, $1, $2;", [ptx.f32()], [power, total])[0] for power in powers]


@partial(jax.jit, static_argnames=("epsilon", "center", "top"))
def norm_route(
    x_TD: jax.Array,
    terms: Parts | None,
    scale_D: jax.Array,
    bias_D: jax.Array | None,
    router_DE: jax.Array,
    router_bias_E: jax.Array,
    positions_T: jax.Array,
    *,
    epsilon: float,
    center: bool,
    top: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See `api.norm_route`. The operands must be such as `supports` says."""
    T, D = x_TD.shape
    E = router_DE.shape[1]
    spread = spread_of(T, D, E)
    norm = add_norm.Norm(terms, add_norm.operands(x_TD, terms, scale_D, bias_D), epsilon, center)
    counts = [*add_norm.counts(spread), sent(spread, E)]

    def run(refs: Mapping[str, Value], row: Value) -> None:
        place = rows.Place.here(spread, refs["meetings"])
        place.prepare(counts)
        router = Router(refs, row, place, E, top, exchange=add_norm.EXCHANGES)
        # First, for no kernel before has read them: they come from farther away than what the norm waits for.
        loaded = router.begin(router_bias_E.dtype)
        normed = norm.run(place, refs, row, loaded=len(loaded.weights))
        router.choose(loaded, router.keep(normed))

    out = rows.kernel(
        "norm_route",
        run,
        spread,
        T,
        norm.operands | {"router": router_DE, "router_bias": router_bias_E, "positions": positions_T},
        add_norm.results(x_TD, terms) | results(T, top),
        rows.scratch(len(counts)) | add_norm.scratch(spread) | scratch(spread, E),
    )
    return out.get("sum", x_TD), out["normed"], out["experts"], out["weights"]
