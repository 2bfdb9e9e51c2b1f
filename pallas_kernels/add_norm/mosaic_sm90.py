"""The residual sum and its norm in one kernel for Hopper: Pallas Mosaic GPU, JAX 0.11 and newer.

It is for a few rows, and for many whose terms lie in other rows, as experts leave them.

`Norm` is the work of a thread, which other kernels can include: `route.mosaic_sm90` continues from the norm.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.add_norm.exchange_sm90 import Exchange
from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.peers import Peers
from pallas_kernels.ptx import Condition, Value, rows

EXCHANGES = 2  # of `Norm`: one for the mean, one for the variance
_FLIGHT = 24  # 16-byte loads of parts that a thread has in flight, at most
_LOADS = 16384  # 16-byte loads that fit in the registers of a block's threads
_OTHERS = 14  # of these, per thread, for other things
_MOST_SUMMANDS = 64  # pieces of one number: the sum is unrolled
_FLOATS = (jnp.bfloat16, jnp.float32)


def supports(x_TD: jax.Array, terms: PartialSum | None, scale_D: jax.Array, bias_D: jax.Array | None = None) -> bool:
    """Whether `add_norm` takes these operands."""
    T, D = x_TD.shape
    return (
        x_TD.dtype == jnp.bfloat16
        and T >= 1
        and (T <= rows.MOST_ROWS or _are_gathered(terms))
        and D % 8 == 0
        and D <= rows.LARGEST_WIDTH
        and all(each is None or each.dtype in _FLOATS for each in (scale_D, bias_D))
        and (terms is None or _supports(terms, T, D))
    )


def _are_gathered(terms: PartialSum | None) -> bool:
    """Whether XLA would gather the terms first: it writes and reads them once more."""
    return terms is not None and terms.rows_TX is not None and not terms.over


def _supports(terms: PartialSum, T: int, D: int) -> bool:
    J, A, width = terms.parts_JAO.shape
    places = [terms.rows_TX, terms.weights_TX, terms.bias_rows_TX]
    return (
        terms.parts_JAO.dtype == jnp.float32
        and width == D
        and 1 <= J * terms.num_terms <= _MOST_SUMMANDS
        and (terms.rows_TX is not None or A == T)
        and all(each is None or each.shape == (T, terms.num_terms) for each in places)
        and all(each is None or each.dtype == jnp.int32 for each in (terms.rows_TX, terms.bias_rows_TX))
        and (terms.weights_TX is None or terms.weights_TX.dtype == jnp.float32)
        and (terms.bias_EO is None or terms.bias_EO.dtype in _FLOATS)
    )


@partial(jax.jit, static_argnames=("epsilon", "center"))
def add_norm(
    x_TD: jax.Array,
    terms: PartialSum | None,
    scale_D: jax.Array,
    bias_D: jax.Array | None = None,
    *,
    peers: Peers | None = None,
    epsilon: float,
    center: bool,
) -> tuple[jax.Array, jax.Array]:
    """See `api.add_norm`. `supports` must hold for the operands; peers are needed for terms of several devices."""
    T, D = x_TD.shape
    layout = rows.RowLayout.of(T, D)
    norm = Norm.of(x_TD, terms, scale_D, bias_D, peers=peers, epsilon=epsilon, center=center)

    def add_norm(*, row: Value, **at: Value) -> None:
        thread = rows.RowThread.of(layout, at["mbarriers"])
        thread.prepare(counts(layout))
        norm.run(thread, at, row)

    out = ptx.launch(
        add_norm,
        norm.operands,
        results(x_TD, terms),
        {"row": T},
        rows.exchange_memory(EXCHANGES) | shared(layout),
        cluster=layout.blocks,
        warpgroups=layout.threads // 128,
    )
    return out.get("sum", x_TD), out["normed"]


def _operands(
    x_TD: jax.Array, terms: PartialSum | None, scale_D: jax.Array, bias_D: jax.Array | None, peers: Peers | None
) -> dict[str, jax.Array]:
    """What `Norm` reads, by name; missing operands are left out."""
    named = {"x": x_TD, "scale": scale_D, "bias": bias_D, "peers": None if peers is None else peers.own_table()}
    if terms is not None:
        named |= {
            "term_parts": terms.parts_JAO,
            "term_rows": terms.rows_TX,
            "term_weights": terms.weights_TX,
            "term_bias": terms.bias_EO,
            "term_bias_rows": terms.bias_rows_TX,
        }
    return {name: operand for name, operand in named.items() if operand is not None}


def results(x_TD: jax.Array, terms: PartialSum | None) -> dict[str, Any]:
    """What `Norm` writes: without terms, the sum is x."""
    names = ("normed",) if terms is None else ("sum", "normed")
    return {name: jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype) for name in names}


def counts(layout: rows.RowLayout) -> list[int]:
    """Numbers that a block receives in each of `Norm`'s exchanges."""
    return [layout.strips] * EXCHANGES


def shared(layout: rows.RowLayout) -> dict[str, Any]:
    """Shared memory for `Norm`: the mailboxes of its exchanges."""
    return {"sums": rows.shared_floats(EXCHANGES * _padded(layout))}


def _padded(layout: rows.RowLayout) -> int:
    return -(-layout.strips // 4) * 4


@dataclasses.dataclass(frozen=True)
class Norm:
    """What a thread does to add to a row and normalise it."""

    terms: PartialSum | None
    operands: dict[str, jax.Array]  # see `_operands`
    epsilon: float
    center: bool
    peers: Peers | None = None  # if other devices have terms

    @classmethod
    def of(
        cls,
        x_TD: jax.Array,
        terms: PartialSum | None,
        scale_D: jax.Array,
        bias_D: jax.Array | None,
        *,
        peers: Peers | None,
        epsilon: float,
        center: bool,
    ) -> "Norm":
        """For these operands, of which `peers` are only used by terms of several devices."""
        peers = peers if terms is not None and terms.over else None
        return cls(terms, _operands(x_TD, terms, scale_D, bias_D, peers), epsilon, center, peers)

    def run(
        self, thread: rows.RowThread, at: Mapping[str, Value], row: Value, *, loaded: int = 0
    ) -> list[tuple[rows.Float4, list[Value]]]:
        """Writes the sum and the norm, and returns the norm: the thread's float4s, each as two words of bfloat16.

        Uses the thread's first exchanges. Calls `thread.wait_prepared`.

        Args:
          at: addresses by the names of its operands, `results` and `shared`.
          loaded: 16-byte loads that the thread began before and whose values it holds.
        """
        fours = [thread.float4(row, turn) for turn in range(thread.layout.turns)]
        zero = ptx.const(0)

        def load(name: str, four: rows.Float4, row: Value) -> list[Value]:
            dtype = self.operands[name].dtype
            return rows.load_float4(four.at(at[name], dtype.itemsize, row), dtype, four.exists)

        # Loads that depend on nothing begin first; those of terms have to wait for the row numbers.
        indices = None if self.terms is None else _load_indices(self.terms, at, row)
        exchange = None
        if self.terms is not None and self.peers is not None:
            exchange = Exchange.of(self.peers, self.terms.box, at["peers"])
        x = [load("x", four, row) for four in fours]
        scale = [load("scale", four, zero) for four in fours]
        bias = [load("bias", four, zero) for four in fours] if "bias" in at else []
        ptx.sync_warp()

        sums = [rows.as_floats(words) for words in x]
        if self.terms is not None and indices is not None:
            loaded_terms = [_Term.of(self.terms, *each) for each in indices]
            flight = min(_FLIGHT, _LOADS // thread.layout.threads - _OTHERS - loaded)
            adds_bias = None if exchange is None else exchange.is_first_of(self.terms.sharers)
            own = (_total(self.terms, at, loaded_terms, four, flight, adds_bias) for four in fours)
            totals = _over_devices(self.terms, at, exchange, fours, own)
            for turn, (four, added) in enumerate(zip(fours, totals, strict=True)):
                summed = [arith.addf(*pair) for pair in zip(sums[turn], added, strict=True)]
                words = [ptx.pack(*summed[:2]), ptx.pack(*summed[2:])]
                ptx.store(four.at(at["sum"], 2), words, four.exists)
                sums[turn] = rows.as_floats(words)

        thread.wait_prepared()
        sums, factor = self._scaling(thread, at["sums"], fours, sums)
        out = []
        for turn, four in enumerate(fours):
            normed = [arith.mulf(number, factor) for number in sums[turn]]
            scales = rows.as_floats(scale[turn])
            if bias:
                normed = [ptx.fma(*each) for each in zip(normed, scales, rows.as_floats(bias[turn]), strict=True)]
            else:
                normed = [arith.mulf(*pair) for pair in zip(normed, scales, strict=True)]
            words = [ptx.pack(*normed[:2]), ptx.pack(*normed[2:])]
            ptx.store(four.at(at["normed"], 2), words, four.exists)
            out.append((four, words))
        return out

    def _scaling(
        self, thread: rows.RowThread, mailbox: Value, fours: list[rows.Float4], sums: list[list[Value]]
    ) -> tuple[list[list[Value]], Value]:
        """The numbers, minus their mean if wanted, and the factor that normalises them."""
        share = ptx.float32(1 / thread.layout.width)
        if self.center:
            of_turns = [ptx.tree_sum(numbers) for numbers in sums]
            mean = ptx.rounded_product(rows.row_sum(thread, 0, of_turns, mailbox), share)
            sums = [
                [ptx.where(four.exists, arith.subf(number, mean)) for number in numbers]
                for four, numbers in zip(fours, sums, strict=True)
            ]
        second = ptx.add(mailbox, 4 * _padded(thread.layout))
        squares = rows.row_sum(thread, 1, [_sum_of_squares(numbers) for numbers in sums], second)
        variance = ptx.fma(squares, share, ptx.float32(self.epsilon))
        (factor,) = ptx.asm("rsqrt.approx.f32 $0, $1;", [ptx.f32()], [variance])
        return sums, factor


def _over_devices(
    terms: PartialSum,
    at: Mapping[str, Value],
    exchange: Exchange | None,
    fours: list[rows.Float4],
    own: Iterator[list[Value]],
) -> Iterator[list[Value]]:
    """The sums over devices of each turn's numbers, of which `own` are this device's."""
    if exchange is None:
        yield from own
        return
    bias = []  # of a plain sum: the same on all devices, and added once
    if terms.is_plain and terms.bias_EO is not None:
        dtype, zero = terms.bias_EO.dtype, ptx.const(0)
        bias = [rows.load_float4(four.at(at["term_bias"], dtype.itemsize, zero), dtype, four.exists) for four in fours]
    sent = list(own)
    for four, numbers in zip(fours, sent, strict=True):
        exchange.send(four, numbers)
    for turn, (four, numbers) in enumerate(zip(fours, sent, strict=True)):
        added = exchange.received(four, numbers)
        yield [arith.addf(*pair) for pair in zip(added, rows.as_floats(bias[turn]), strict=True)] if bias else added


def _sum_of_squares(numbers: list[Value]) -> Value:
    total = ptx.rounded_product(numbers[0], numbers[0])
    for number in numbers[1:]:
        total = ptx.fma(number, number, total)
    return total


def _load_indices(terms: PartialSum, at: Mapping[str, Value], row: Value) -> list[tuple[Value, Value, Value | None]]:
    """Begins to load, for each of a token's terms, its row, its row of the bias, and its weight."""
    X = terms.num_terms

    def load(name: str, x: int, missing: Value) -> Value:
        if name not in at:
            return missing
        dtype = jnp.float32 if name == "term_weights" else jnp.int32
        return rows.load_number(ptx.offset(at[name], row, 4 * X), dtype, ptx.always(), shift=4 * x)

    return [
        (load("term_rows", x, row), load("term_bias_rows", x, ptx.const(0)), load("term_weights", x, None))
        for x in range(X)
    ]


@dataclasses.dataclass(frozen=True)
class _Term:
    """One of a token's terms."""

    row: Value
    bias_row: Value
    weight: Value | None
    exists: Condition  # whether it adds anything

    @classmethod
    def of(cls, terms: PartialSum, row: Value, bias_row: Value, weight: Value | None) -> "_Term":
        """From what `_load_indices` loaded."""
        if terms.bias_EO is not None and terms.bias_rows_TX is not None:
            left = arith.subi(ptx.const(terms.bias_EO.shape[0] - 1), bias_row)
            # One register for both: all its bits are set if the bias has no such row.
            row = arith.ori(row, arith.shrsi(arith.ori(bias_row, left), ptx.const(31)))
        return cls(row, bias_row, weight, ptx.NotNegative(row))


def _total(
    terms: PartialSum,
    at: Mapping[str, Value],
    loaded: list[_Term],
    four: rows.Float4,
    flight: int,
    adds_bias: Value | None,
) -> list[Value]:
    """Four numbers of `terms.total()`, with up to `flight` loads in flight; `adds_bias`: None if always."""
    J, A, _ = terms.parts_JAO.shape

    def begin(term: _Term, piece: int) -> list[Value]:
        """Loads a piece of a term: its bias, or one of its parts. 0 if the term adds nothing."""
        condition = ptx.both(four.exists, term.exists)
        if piece < J:
            piece_at = four.at(at["term_parts"], 4, ptx.add(term.row, piece * A))
            return rows.load_float4(piece_at, jnp.float32, condition)
        condition = condition if adds_bias is None else ptx.both(condition, adds_bias)
        return rows.load_float4(four.at(at["term_bias"], dtype.itemsize, term.bias_row), dtype, condition)

    dtype = jnp.dtype(jnp.float32) if terms.bias_EO is None else terms.bias_EO.dtype
    has_bias = terms.bias_EO is not None and not (terms.over and terms.is_plain)  # see `_over_devices`
    pieces = J + 1 if has_bias else J
    jobs = [(term, piece) for term in loaded for piece in range(pieces)]
    added: list[Value] = []
    summed: list[Value] = []
    for start in range(0, len(jobs), flight):
        batch = jobs[start : start + flight]
        begun = [begin(*job) for job in batch]
        ptx.sync_warp()
        for (term, piece), words in zip(batch, begun, strict=True):
            numbers = rows.as_floats(words)
            summed = numbers if piece == 0 else [arith.addf(*pair) for pair in zip(summed, numbers, strict=True)]
            if piece < pieces - 1:
                continue
            if term.weight is not None:
                # A term that adds nothing may have any weight, even NaN.
                weight = ptx.where(term.exists, term.weight)
                summed = [ptx.rounded_product(number, weight) for number in summed]
            added = summed if not added else [arith.addf(*pair) for pair in zip(added, summed, strict=True)]
    return added
