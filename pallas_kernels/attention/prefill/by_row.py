"""Attention of a call's tokens over pages in float8, by a kernel for pages of numbers: one row after the other.

The pages of a row are expanded, computed with, and forgotten, so that no more memory is needed than for the longest
row. A query's bits are those that the kernel gives over pages of the same numbers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.fp8_pages import Fp8Pages, expanded
from pallas_kernels.pages import PAGE, Tiles


def attend(
    kernel: Callable[..., jax.Array],
    q_TNH: jax.Array,
    k_YKSH: Fp8Pages,
    v_YKSH: Fp8Pages,
    table_BZ: jax.Array,
    tiles: Tiles,
    *,
    window: int | None,
) -> jax.Array:
    """See `api.packed_attention_over_pages`.

    Args:
      kernel: takes queries, keys, values, a table and tiles, and gives 0 for tokens in no tile.
    """
    q_TNH, table_BZ, tiles = jax.tree.map(jnp.asarray, (q_TNH, table_BZ, tiles))
    rows_T, _ = tiles.tokens(len(q_TNH))

    def one(row: jax.Array) -> jax.Array:
        return _one_row(kernel, q_TNH, k_YKSH, v_YKSH, table_BZ, tiles, row, window=window)

    if len(table_BZ) == 1:
        return one(jnp.int32(0))
    # Rows by their first tile; those without any come last.
    number_Q = jnp.arange(len(tiles.row_Q), dtype=jnp.int32)
    exists_Q = tiles.count_Q > 0
    is_same_QQ = (tiles.row_Q[:, None] == tiles.row_Q) & exists_Q
    is_first_Q = exists_Q & (jnp.where(is_same_QQ, number_Q, len(number_Q)).min(axis=1) == number_Q)
    first_Q = jnp.argsort(~is_first_Q, stable=True)

    def step(index: jax.Array, out_TNH: jax.Array) -> jax.Array:
        row = tiles.row_Q[first_Q[index]]
        return jnp.where((rows_T == row)[:, None, None], one(row), out_TNH)

    return jax.lax.fori_loop(0, is_first_Q.sum(dtype=jnp.int32), step, jnp.zeros_like(q_TNH))


def _one_row(
    kernel: Callable[..., jax.Array],
    q_TNH: jax.Array,
    k_YKSH: Fp8Pages,
    v_YKSH: Fp8Pages,
    table_BZ: jax.Array,
    tiles: Tiles,
    row: jax.Array,
    *,
    window: int | None,
) -> jax.Array:
    """A row's results, among zeros for all other tokens."""
    count_Q = jnp.where(tiles.row_Q == row, tiles.count_Q, 0)
    Z, base = table_BZ.shape[1], jnp.int32(0)
    if window is not None:  # only the pages that are seen
        first = jnp.where(count_Q > 0, tiles.position_Q, Z * PAGE).min()
        base = jnp.maximum(first - window + 1, 0) // PAGE
        Z = min(Z, (len(q_TNH) + window - 2) // PAGE + 2)
    pages_Z = jnp.take(table_BZ[row], base + jnp.arange(Z, dtype=jnp.int32), mode="clip")

    def taken(pool_YKSH: jax.Array) -> jax.Array:
        return jnp.take(pool_YKSH, pages_Z, axis=0, mode="clip")

    k_ZKSH, v_ZKSH = (expanded(jax.tree.map(taken, pool), q_TNH.dtype) for pool in (k_YKSH, v_YKSH))
    here = Tiles(jnp.zeros_like(tiles.row_Q), tiles.start_Q, count_Q, tiles.position_Q - base * PAGE)
    return kernel(q_TNH, k_ZKSH, v_ZKSH, jnp.arange(Z, dtype=jnp.int32)[None], here)
