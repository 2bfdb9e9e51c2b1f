"""Attention of one query per row in float32, in jnp, written as XLA's CPU compiler vectorises it, of all rows at once.

A row's bits depend neither on the other rows nor on their number, as every sum is written out in a fixed order.

Positions are read in blocks. A block takes a few loops, and XLA divides those over many numbers among its threads:

1. q · k, as `CHUNK` partial sums for each position. These are then added in pairs.
2. The running softmax: maximum, weights and totals. There are `LANES` totals, each of every 16th position, and as many
   copies of the maximum: how XLA approximates an exponential depends on how many there are, so they come in whole
   vectors.
3. weights · v, of `TERMS` positions at a time, so that memory is read in order. These sums are then added.

A loop ends where another would need each of its results many times: XLA fuses nothing that it would have to compute
more than 15 times. So the last sums of 1 and of 3 must have at least 16 terms. A block is gathered in `PIECES`: the
gather of a single piece, which one row would have, becomes a slice, and JAX 0.10.2 and 0.11.2 do not vectorise that.
"""

import math
from collections.abc import Callable
from functools import reduce
from operator import add

import jax
import jax.numpy as jnp

from pallas_kernels.attention import reference
from pallas_kernels.fp8_pages import Fp8Pages, Pages, expanded
from pallas_kernels.pages import PAGE

BLOCK = 64  # positions
PIECES = 2  # of a block
CHUNK = 32  # numbers of a head, at most, whose products are not added
LANES = 16  # numbers of a vector
TERMS = 4  # positions of a partial sum of values


def takes(q_BTNH: jax.Array, k_YNSH: Pages) -> bool:
    """Whether `attend` computes these, and faster than row by row.

    Where several queries share keys, there are too few numbers to read for each sum: at 32 rows of SmolLM2-135M, with
    three queries for each key, it took 9.0 ms of CPU time for three layers, and row by row 7.0 (JAX 0.12).
    """
    is_read_as_float32 = isinstance(k_YNSH, Fp8Pages) or k_YNSH.dtype == jnp.float32
    return q_BTNH.dtype == jnp.float32 and is_read_as_float32 and q_BTNH.shape[1:3] == (1, k_YNSH.shape[1])


def numbers_of_a_row(N: int, H: int, *, expands: bool = False) -> int:
    """The most intermediate numbers that `attend` holds for each row: partial sums, and scores and weights; also keys
    and values, if they are expanded from float8."""
    numbers = N * (BLOCK * (math.gcd(H, CHUNK) + 4) + (BLOCK // TERMS + 2) * H)
    return numbers + 2 * N * BLOCK * H if expands else numbers


def attend(
    q_B1NH: jax.Array,
    k_YNSH: Pages,
    v_YNSH: Pages,
    table_BZ: jax.Array,
    q_positions_B1: jax.Array,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
) -> jax.Array:
    """See `api.attention_over_pages` for the arguments. Blocks are read from the first that a row sees to the last.

    A block that a row does not see changes none of its bits: its weights are exactly 0 and its rescaling exactly 1.
    """
    B = q_B1NH.shape[0]
    q_BNH, positions_B = q_B1NH[:, 0] * scale, q_positions_B1[:, 0]
    first_B = jnp.zeros_like(positions_B) if window is None else jnp.maximum(positions_B - window + 1, 0) // BLOCK
    ends_B = jnp.maximum(positions_B, -1) // BLOCK + 1
    blocks = jnp.maximum((ends_B - first_B).max(), 0)
    ahead_PR = jnp.arange(BLOCK, dtype=jnp.int32).reshape(PIECES, -1)

    def step(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        maximum_BNW, total_BNW, out_BNH = carry  # W: `LANES`
        k_positions_BPR = ((first_B + index) * BLOCK)[:, None, None] + ahead_PR
        seen_BTS = reference.visible(q_positions_B1, k_positions_BPR.reshape(B, BLOCK), window)
        seen_BPR = seen_BTS.reshape(k_positions_BPR.shape)
        k_BPNRH, v_BPNRH = (_gathered(pool, table_BZ, k_positions_BPR[..., 0]) for pool in (k_YNSH, v_YNSH))
        scores_BPNR = jnp.where(seen_BPR[:, :, None], _scores(q_BNH, k_BPNRH), reference.MASKED)
        scores_BPNR = jax.lax.optimization_barrier(scores_BPNR)  # else two loops compute them (JAX 0.12)
        new_maximum_BNW = jnp.maximum(maximum_BNW, _largest(scores_BPNR))
        below_BPNRW = scores_BPNR.reshape(*scores_BPNR.shape[:-1], -1, LANES) - new_maximum_BNW[:, None, :, None]
        weights_BPNR = jnp.where(seen_BPR[:, :, None], jnp.exp(below_BPNRW).reshape(scores_BPNR.shape), 0)
        rescale_BNW = jnp.exp(maximum_BNW - new_maximum_BNW)
        total_BNW = total_BNW * rescale_BNW + reduce(add, _vectors(weights_BPNR))
        # A weight of 0 does not silence a NaN at a position that is not seen.
        v_BPNRH = jnp.where(seen_BPR[:, :, None, :, None], v_BPNRH, 0)
        return new_maximum_BNW, total_BNW, out_BNH * rescale_BNW[..., :1] + _weighed(weights_BPNR, v_BPNRH)

    _, total_BNW, out_BNH = jax.lax.fori_loop(0, blocks, step, _start(q_BNH, sinks_N, blocks))
    total_BN1 = _in_pairs([total_BNW[..., lane : lane + 1] for lane in range(LANES)], add)
    return (out_BNH / jnp.where(total_BN1 == 0, 1, total_BN1))[:, None]


def _start(q_BNH: jax.Array, sinks_N: jax.Array | None, blocks: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maximum, total and sum before any key: a sink's total is 1, which is exp(sink - sink)."""
    # Zero, but the compiler must not know: it would make copies of a constant for all layers, before the first runs.
    zero = (blocks < 0).astype(jnp.float32)
    shape = (*q_BNH.shape[:2], LANES)
    maximum_BNW, total_BNW = jnp.full(shape, reference.MASKED + zero), jnp.full(shape, zero)
    if sinks_N is not None:
        maximum_BNW = jnp.broadcast_to(sinks_N.astype(jnp.float32)[:, None] + zero, shape)
        total_BNW = total_BNW.at[..., 0].set(1)
    return maximum_BNW, total_BNW, jnp.full(q_BNH.shape, zero)


def _gathered(pool_YNSH: Pages, table_BZ: jax.Array, starts_BP: jax.Array) -> jax.Array:
    """The pieces that begin at these positions of each row, [B, P, N, R, H]."""
    pages_BP = jnp.take_along_axis(table_BZ, starts_BP // PAGE, axis=1, mode="clip")
    numbers = jax.lax.GatherDimensionNumbers(offset_dims=(2, 3, 4), collapsed_slice_dims=(0,), start_index_map=(0, 2))
    starts_BP2 = jnp.stack([pages_BP, starts_BP % PAGE], axis=-1)

    def taken(array_YNSH: jax.Array) -> jax.Array:
        sizes = 1, array_YNSH.shape[1], BLOCK // PIECES, array_YNSH.shape[3]
        return jax.lax.gather(array_YNSH, starts_BP2, numbers, sizes, mode="clip")

    pieces = jax.tree.map(taken, pool_YNSH)
    if not isinstance(pieces, Fp8Pages):
        return pieces
    # On its own, as the loops that read these would else be others than for numbers, and round otherwise.
    separate: jax.Array = jax.lax.optimization_barrier(expanded(pieces, jnp.float32))
    return separate


def _scores(q_BNH: jax.Array, k_BPNRH: jax.Array) -> jax.Array:
    """q · k, [B, P, N, R]."""
    H = q_BNH.shape[-1]
    chunk = math.gcd(H, CHUNK)
    q_B1N1H = q_BNH[:, None, :, None]
    parts = reduce(add, [q_B1N1H[..., at : at + chunk] * k_BPNRH[..., at : at + chunk] for at in range(0, H, chunk)])
    return _in_pairs([parts[..., lane] for lane in range(chunk)], add)


def _weighed(weights_BPNR: jax.Array, v_BPNRH: jax.Array) -> jax.Array:
    """weights · v, [B, N, H]."""
    *rows, R = weights_BPNR.shape
    weights = weights_BPNR.reshape(*rows, R // TERMS, TERMS, 1)
    values = v_BPNRH.reshape(*rows, R // TERMS, TERMS, -1)
    parts = reduce(add, [weights[..., term, :] * values[..., term, :] for term in range(TERMS)])
    return reduce(add, [parts[:, piece, :, at] for piece in range(PIECES) for at in range(R // TERMS)])


def _vectors(x_BPNR: jax.Array) -> list[jax.Array]:
    """The positions of a block, `LANES` at a time, [B, N, W]."""
    R = x_BPNR.shape[-1]
    return [x_BPNR[:, piece, :, at : at + LANES] for piece in range(PIECES) for at in range(0, R, LANES)]


def _largest(x_BPNR: jax.Array) -> jax.Array:
    """The largest of a block, [B, N, 1]."""
    x_BNW = _in_pairs(_vectors(x_BPNR), jnp.maximum)
    return _in_pairs([x_BNW[..., lane : lane + 1] for lane in range(LANES)], jnp.maximum)


def _in_pairs(terms: list[jax.Array], combine: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    while len(terms) > 1:
        pairs = [combine(*pair) for pair in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[2 * len(pairs) :]
    return terms[0]
