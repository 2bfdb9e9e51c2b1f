"""A residual's sum and its norm for a few rows in one kernel, on Hopper: Pallas Mosaic GPU, JAX 0.11 and newer."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx, rows
from pallas_kernels.parts import Parts
from pallas_kernels.ptx import Value

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
    out = launch(x_TD, terms, scale_D, bias_D, epsilon=epsilon, center=center)
    return out["sum"], out["normed"]


@partial(jax.jit, static_argnames=("epsilon", "center", "blocks"))
def launch(
    x_TD: jax.Array,
    terms: Parts | None,
    scale_D: jax.Array,
    bias_D: jax.Array | None = None,
    *,
    epsilon: float,
    center: bool,
    blocks: int | None = None,
) -> dict[str, jax.Array]:
    """As `add_norm`, with `blocks` a row: "sum" and "normed"."""
    T, D = x_TD.shape
    spread = rows.Spread.of(T, D, blocks=blocks)
    operands = {"x": x_TD, "scale": scale_D, "bias": bias_D}
    results = {name: jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype) for name in ("sum", "normed")}
    if terms is None:
        del results["sum"]
    else:
        operands |= {
            "term_parts": terms.parts_SRN,
            "term_rows": terms.rows_TX,
            "term_weights": terms.weights_TX,
            "term_bias": terms.bias_EN,
            "term_bias_rows": terms.bias_rows_TX,
        }
    flight = min(_FLIGHT, _LOADS // spread.threads - _OTHERS)
    # Numbers that a block gets: of the sums for mean and variance.
    counts = [spread.sums, spread.sums]
    padded = -(-spread.sums // 4) * 4
    scratch = rows.scratch(len(counts)) | {"sums": rows.shared(2 * padded)}
    present = {name: operand for name, operand in operands.items() if operand is not None}

    def run(refs: Mapping[str, Value], row: Value) -> None:
        place = rows.Place.here(spread, refs["meetings"], counts)
        fours = [place.four(row, turn) for turn in range(spread.turns)]
        sizes = {name: operand.dtype.itemsize for name, operand in present.items()}

        def load(name: str, four: rows.Four, row: Value) -> list[Value]:
            return rows.load_four(four.at(refs[name], sizes[name], row), present[name].dtype, four.present)

        # First all loading begins that waits for nothing, then that of terms, which waits for the numbers of rows.
        indices = None if terms is None else _load_indices(terms, refs, row)
        zero = ptx.const(0)
        x = [load("x", four, row) for four in fours]
        scale = [load("scale", four, zero) for four in fours]
        bias = [] if bias_D is None else [load("bias", four, zero) for four in fours]

        rows.issue()

        sums = [rows.four(words) for words in x]
        if terms is not None and indices is not None:
            for turn, four in enumerate(fours):
                added = _terms(terms, refs, indices, four, flight)
                summed = [arith.addf(*pair) for pair in zip(sums[turn], added, strict=True)]
                words = [ptx.pack(*summed[:2]), ptx.pack(*summed[2:])]
                rows.store_four(four.at(refs["sum"], 2), words, four.present)
                sums[turn] = rows.four(words)

        place.met()
        scratch_at = ptx.shared_address(refs["sums"])
        share = ptx.const(1 / D, ptx.f32())
        if center:
            of_thread = ptx.total([number for numbers in sums for number in numbers])
            mean = arith.mulf(rows.row_sum(place, 0, of_thread, scratch_at), share)
            sums = [
                [rows.where(four.present, arith.subf(number, mean)) for number in numbers]
                for four, numbers in zip(fours, sums, strict=True)
            ]
        squares = ptx.total([arith.mulf(number, number) for numbers in sums for number in numbers])
        squares = rows.row_sum(place, 1, squares, ptx.add(scratch_at, 4 * padded))
        variance = arith.addf(arith.mulf(squares, share), ptx.const(epsilon, ptx.f32()))
        (factor,) = ptx.asm("rsqrt.approx.f32 $0, $1;", [ptx.f32()], [variance])

        for turn, four in enumerate(fours):
            normed = [arith.mulf(number, factor) for number in sums[turn]]
            normed = [arith.mulf(*pair) for pair in zip(normed, rows.four(scale[turn]), strict=True)]
            if bias_D is not None:
                normed = [arith.addf(*pair) for pair in zip(normed, rows.four(bias[turn]), strict=True)]
            words = [ptx.pack(*normed[:2]), ptx.pack(*normed[2:])]
            rows.store_four(four.at(refs["normed"], 2), words, four.present)

    out = rows.kernel("add_norm", run, spread, T, present, results, scratch)
    return out if terms is not None else {"sum": x_TD, **out}


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
