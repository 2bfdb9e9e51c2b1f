"""How the Triton kernel splits a row's places among programs, and how the results are combined.

A row's tiles are dealt out in runs of equal length that depend on the row's own count. So a short row in a wide table
is read by as many programs as a long one, and its bits depend neither on the other rows nor, for a given number of
splits, on the table's width. (Of this, the Hopper kernel shares the numbers only.)
"""

import math
from functools import reduce

import jax
import jax.numpy as jnp

LOG2_E = math.log2(math.e)  # the kernels' softmax is of powers of two
PROGRAMS = 264  # two per multiprocessor of an H200
MAX_SPLITS = 32  # `combine` and `combine_sm90` are unrolled over them
FLOOR = -1e30  # of logits: finite, so that a row without keys gives 0 and not NaN


def choose(rows: int, places: int, tile: int) -> int:
    """How many splits to deal a row's `places` into, if there are `rows` (B · K) of them."""
    return max(1, min(PROGRAMS // rows, -(-places // tile), MAX_SPLITS))


def run(counts: jax.Array, index: jax.Array, *, tile: int, splits: int) -> tuple[jax.Array, jax.Array]:
    """The first tile of a split's run, and its number of tiles: 0 for a split without work.

    Args:
      counts: int32 places in use, of any shape.
      index: int32, which split, of the same shape.
    """

    def ceil_div(x: jax.Array, y: int) -> jax.Array:  # for nonnegative numbers; jnp's does more
        return jax.lax.div(x + (y - 1), jnp.full_like(x, y))

    tiles = ceil_div(counts, tile)
    length = ceil_div(tiles, splits)
    first = index * length
    return first, jnp.clip(tiles - first, 0, length)


def combine(
    out_BKJGH: jax.Array,
    lse_BKJM: jax.Array,
    counts_B: jax.Array,
    sinks_N: jax.Array | None,
    *,
    tile: int,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """The softmax over all splits and the sinks, from those over each split, in float32.

    Sums are unrolled, in order, so XLA makes one kernel of them, and splits without work change no bit.

    Args:
      out_BKJGH: float32, each split's normalised output; that of a split without work may be anything.
      lse_BKJM: float32, the logarithm to base 2 of each split's total; of M slots per group, the first G are used.
      counts_B: int32 places in use.
      sinks_N: logits (to base e) that take their share of the softmax and have no value.
      tile: the kernel's.
      dtype: of the result.

    Returns:
      [B, N, H]; 0 for a row with no place in use.
    """
    B, K, J, G, H = out_BKJGH.shape
    index_BJ = jnp.broadcast_to(jnp.arange(J, dtype=jnp.int32), (B, J))
    _, tiles_BJ = run(jnp.broadcast_to(counts_B[:, None], (B, J)), index_BJ, tile=tile, splits=J)
    used_B1J1 = (tiles_BJ > 0)[:, None, :, None]
    lse_BKJG = jnp.where(used_B1J1, lse_BKJM[..., :G], -jnp.inf)
    out_BKJGH = jnp.where(used_B1J1[..., None], out_BKJGH, 0)
    start = jnp.full((1, K, G), FLOOR, jnp.float32)
    if sinks_N is not None:
        start = jnp.maximum(sinks_N.astype(jnp.float32).reshape(1, K, G) * LOG2_E, FLOOR)
    maximum_BKG = reduce(jnp.maximum, [lse_BKJG[:, :, j] for j in range(J)], start)
    total_BKG = jnp.zeros_like(maximum_BKG) if sinks_N is None else jnp.exp2(start - maximum_BKG)
    sum_BKGH = jnp.zeros((B, K, G, H), jnp.float32)
    for j in range(J):
        weight_BKG = jnp.exp2(lse_BKJG[:, :, j] - maximum_BKG)
        total_BKG += weight_BKG
        sum_BKGH += weight_BKG[..., None] * out_BKJGH[:, :, j]
    mean_BKGH = sum_BKGH / jnp.where(total_BKG == 0, 1, total_BKG)[..., None]
    return mean_BKGH.astype(dtype).reshape(B, K * G, H)
