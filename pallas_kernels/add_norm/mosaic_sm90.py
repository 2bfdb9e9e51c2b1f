"""A residual's sum and its norm for a few rows in one kernel, on Hopper: Pallas Mosaic GPU, JAX 0.11 and newer.

`Norm` is what a kernel's threads do, so that another one can do it too: `route.mosaic_sm90` goes on with the norm.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx, rows
from pallas_kernels.parts import Parts
from pallas_kernels.ptx import Value

EXCHANGES = 2  # of `Norm`: the sums for the mean, and for the variance
_FLIGHT = 24  # loads of 16 bytes of parts that a thread has begun at a time, at most
_LOADS = 16384  # loads of 16 bytes that the registers of a block's threads have room for
_OTHERS = 14  # of these, a thread's for other things
_MOST_SUMMANDS = 64  # pieces of a number, which are unrolled
_FLOATS = (jnp.bfloat16, jnp.float32)


def supports(x_TD: jax.Array, terms: Parts | None, scale_D: jax.Array, bias_D: jax.Array | None = None) -> bool:
    """Whether `add_norm` takes these operands."""
    T, D = x_TD.shape
    return (
        x_TD.dtype == jnp.bfloat16
        and 1 <= T <= rows.MOST_ROWS
        and D % 8 == 0
        and D <= rows.LARGEST_WIDTH
        and all(each is None or each.dtype in _FLOATS for each in (scale_D, bias_D))
        and (terms is None or _supports(terms, T, D))
    )


def _supports(terms: Parts, T: int, D: int) -> bool:
    S, R, N = terms.parts_SRN.shape
    places = [terms.rows_TX, terms.weights_TX, terms.bias_rows_TX]
    return (
        terms.parts_SRN.dtype == jnp.float32
        and N == D
        and 1 <= S * terms.num_terms <= _MOST_SUMMANDS
        and (terms.rows_TX is not None or R == T)
        and all(each is None or each.shape == (T, terms.num_terms) for each in places)
        and all(each is None or each.dtype == jnp.int32 for each in (terms.rows_TX, terms.bias_rows_TX))
        and (terms.weights_TX is None or terms.weights_TX.dtype == jnp.float32)
        and (terms.bias_EN is None or terms.bias_EN.dtype in _FLOATS)
    )


@partial(jax.jit, static_argnames=("epsilon", "center"))
def add_norm(
    x_TD: jax.Array,
    terms: Parts | None,
    scale_D: jax.Array,
    bias_D: jax.Array | None = None,
    *,
    epsilon: float,
    center: bool,
) -> tuple[jax.Array, jax.Array]:
    """See `api.add_norm`. The operands must be such as `supports` says."""
    T, D = x_TD.shape
    spread = rows.Spread.of(T, D)
    norm = Norm(terms, operands(x_TD, terms, scale_D, bias_D), epsilon, center)

    def run(refs: Mapping[str, Value], row: Value) -> None:
        place = rows.Place.here(spread, refs["meetings"])
        place.prepare(counts(spread))
        norm.run(place, refs, row)

    scratch_sizes = rows.scratch(EXCHANGES) | scratch(spread)
    out = rows.kernel("add_norm", run, spread, T, norm.operands, results(x_TD, terms), scratch_sizes)
    return out.get("sum", x_TD), out["normed"]


def operands(
    x_TD: jax.Array, terms: Parts | None, scale_D: jax.Array, bias_D: jax.Array | None
) -> dict[str, jax.Array]:
    """What `Norm` reads, of that which there is."""
    named = {"x": x_TD, "scale": scale_D, "bias": bias_D}
    if terms is not None:
        named |= {
            "term_parts": terms.parts_SRN,
            "term_rows": terms.rows_TX,
            "term_weights": terms.weights_TX,
            "term_bias": terms.bias_EN,
            "term_bias_rows": terms.bias_rows_TX,
        }
    return {name: operand for name, operand in named.items() if operand is not None}


def results(x_TD: jax.Array, terms: Parts | None) -> dict[str, Any]:
    """What `Norm` writes: without terms, the sum is x."""
    names = ("normed",) if terms is None else ("sum", "normed")
    return {name: jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype) for name in names}


def counts(spread: rows.Spread) -> list[int]:
    """Numbers that a block gets in each of `Norm`'s exchanges."""
    return [spread.sums] * EXCHANGES


def scratch(spread: rows.Spread) -> dict[str, Any]:
    """Shared memory for `Norm`: what a block gets."""
    return {"sums": rows.shared(EXCHANGES * _padded(spread))}


def _padded(spread: rows.Spread) -> int:
    return -(-spread.sums // 4) * 4


@dataclasses.dataclass(frozen=True)
class Norm:
    """What a thread does to add to a row and norm it."""

    terms: Parts | None
    operands: dict[str, jax.Array]  # see `operands`
    epsilon: float
    center: bool

    def run(
        self, place: rows.Place, refs: Mapping[str, Value], row: Value, *, loaded: int = 0
    ) -> list[tuple[rows.Four, list[Value]]]:
        """Writes the sum and the norm, and returns the norm: the thread's fours, each as two words of bfloat16.

        Its exchanges are the first ones. `place.met` is called.

        Args:
          refs: arrays by the names of `operands`, `results` and `scratch`.
          loaded: loads of 16 bytes that the thread has begun before, and whose values it holds.
        """
        fours = [place.four(row, turn) for turn in range(place.spread.turns)]
        zero = ptx.const(0)

        def load(name: str, four: rows.Four, row: Value) -> list[Value]:
            dtype = self.operands[name].dtype
            return rows.load_four(four.at(refs[name], dtype.itemsize, row), dtype, four.present)

        # First all loading begins that waits for nothing, then that of terms, which waits for the numbers of rows.
        indices = None if self.terms is None else _load_indices(self.terms, refs, row)
        x = [load("x", four, row) for four in fours]
        scale = [load("scale", four, zero) for four in fours]
        bias = [load("bias", four, zero) for four in fours] if "bias" in refs else []
        rows.issue()

        sums = [rows.four(words) for words in x]
        if self.terms is not None and indices is not None:
            indices = [_marked(self.terms, *each) for each in indices]
            flight = min(_FLIGHT, _LOADS // place.spread.threads - _OTHERS - loaded)
            for turn, four in enumerate(fours):
                added = _terms(self.terms, refs, indices, four, flight)
                summed = [arith.addf(*pair) for pair in zip(sums[turn], added, strict=True)]
                words = [ptx.pack(*summed[:2]), ptx.pack(*summed[2:])]
                rows.store_four(four.at(refs["sum"], 2), words, four.present)
                sums[turn] = rows.four(words)

        place.met()
        sums, factor = self._scaling(place, refs, fours, sums)
        out = []
        for turn, four in enumerate(fours):
            normed = [arith.mulf(number, factor) for number in sums[turn]]
            normed = [arith.mulf(*pair) for pair in zip(normed, rows.four(scale[turn]), strict=True)]
            if bias:
                normed = [arith.addf(*pair) for pair in zip(normed, rows.four(bias[turn]), strict=True)]
            words = [ptx.pack(*normed[:2]), ptx.pack(*normed[2:])]
            rows.store_four(four.at(refs["normed"], 2), words, four.present)
            out.append((four, words))
        return out

    def _scaling(
        self, place: rows.Place, refs: Mapping[str, Value], fours: list[rows.Four], sums: list[list[Value]]
    ) -> tuple[list[list[Value]], Value]:
        """The numbers, less their mean where that is wanted, and what they are to be multiplied with."""
        scratch_at = ptx.shared_address(refs["sums"])
        share = ptx.const(1 / place.spread.width, ptx.f32())
        if self.center:
            of_thread = ptx.total([number for numbers in sums for number in numbers])
            mean = arith.mulf(rows.row_sum(place, 0, of_thread, scratch_at), share)
            sums = [
                [rows.where(four.present, arith.subf(number, mean)) for number in numbers]
                for four, numbers in zip(fours, sums, strict=True)
            ]
        squares = ptx.total([arith.mulf(number, number) for numbers in sums for number in numbers])
        squares = rows.row_sum(place, 1, squares, ptx.add(scratch_at, 4 * _padded(place.spread)))
        variance = arith.addf(arith.mulf(squares, share), ptx.const(self.epsilon, ptx.f32()))
        (factor,) = ptx.asm("rsqrt.approx.f32 $0, $1;", [ptx.f32()], [variance])
        return sums, factor


def _load_indices(terms: Parts, refs: Mapping[str, Value], row: Value) -> list[tuple[Value, Value, Value | None]]:
    """Begins to load of each of a token's terms: its row, the bias's row, and the weight."""
    X = terms.num_terms
    always = ptx.const(0)

    def load(name: str, x: int, missing: Value) -> Value:
        if name not in refs:
            return missing
        at = ptx.offset(ptx.address(refs[name]), row, 4 * X)
        return rows.load_one(at, jnp.float32 if name == "term_weights" else jnp.int32, always, shift=4 * x)

    return [
        (load("term_rows", x, row), load("term_bias_rows", x, always), load("term_weights", x, None)) for x in range(X)
    ]


def _marked(terms: Parts, of_parts: Value, of_bias: Value, weight: Value | None) -> tuple[Value, Value, Value | None]:
    """The same, with a negative row where the term adds nothing."""
    if terms.bias_EN is None or terms.bias_rows_TX is None:
        return of_parts, of_bias, weight
    left = arith.subi(ptx.const(terms.bias_EN.shape[0] - 1), of_bias)
    missing = arith.shrsi(arith.ori(of_bias, left), ptx.const(31))  # all bits, where either is negative
    return arith.ori(of_parts, missing), of_bias, weight


def _terms(
    terms: Parts,
    refs: Mapping[str, Value],
    indices: list[tuple[Value, Value, Value | None]],
    four: rows.Four,
    flight: int,
) -> list[Value]:
    """Four numbers of `terms.total()`, of which `flight` loads are begun at a time."""
    S, R, _ = terms.parts_SRN.shape

    def begin(x: int, piece: int) -> list[Value]:
        """Loads a piece of a term: its bias, or one of its parts. 0 where the term adds nothing."""
        of_parts, of_bias, _ = indices[x]
        # Negative if either is.
        present = arith.ori(four.present, of_parts)
        if piece < S:
            at = four.at(refs["term_parts"], 4, ptx.add(of_parts, piece * R))
            return rows.load_four(at, jnp.float32, present)
        return rows.load_four(four.at(refs["term_bias"], dtype.itemsize, of_bias), dtype, present)

    dtype = jnp.dtype(jnp.float32) if terms.bias_EN is None else terms.bias_EN.dtype
    pieces = S if terms.bias_EN is None else S + 1
    jobs = [(x, piece) for x in range(terms.num_terms) for piece in range(pieces)]
    added: list[Value] = []
    term: list[Value] = []
    for start in range(0, len(jobs), flight):
        batch = jobs[start : start + flight]
        begun = [begin(*job) for job in batch]
        rows.issue()
        for (x, piece), loaded in zip(batch, begun, strict=True):
            numbers = rows.four(loaded)
            term = numbers if piece == 0 else [arith.addf(*pair) for pair in zip(term, numbers, strict=True)]
            if piece < pieces - 1:
                continue
            weight = indices[x][2]
            if weight is not None:
                # A term that adds nothing may have any weight, even NaN.
                weight = rows.where(indices[x][0], weight)
                term = [arith.mulf(number, weight) for number in term]
            added = term if not added else [arith.addf(*pair) for pair in zip(added, term, strict=True)]
    return added
