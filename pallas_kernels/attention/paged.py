"""Attention over pages in jnp: the meaning, and what XLA compiles. See `pallas_kernels.pages`."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.attention import reference
from pallas_kernels.attention.decode import lanes
from pallas_kernels.fp8_pages import Pages, expanded
from pallas_kernels.pages import PAGE, TILE, Tiles


def by_page(
    q_BTNH: jax.Array,
    k_YKSH: Pages,
    v_YKSH: Pages,
    table_BZ: jax.Array,
    q_positions_BT: jax.Array,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
) -> jax.Array:
    """A running softmax, with a page of each row as a block. See `api.attention_over_pages` for the arguments.

    Reads from the first page that a row's queries see to the last. The order of a query's sum is that of positions.
    """
    first_B = jnp.where(q_positions_BT < 0, q_positions_BT.max(), q_positions_BT).min(axis=1)
    first_B = jnp.zeros_like(first_B) if window is None else jnp.maximum(first_B - window + 1, 0) // PAGE
    ends_B = jnp.maximum(q_positions_BT.max(axis=1), -1) // PAGE + 1

    def read(index: jax.Array) -> reference.Block:
        block_B1 = (first_B + index)[:, None]
        k_positions_BS = block_B1 * PAGE + jnp.arange(PAGE, dtype=jnp.int32)
        pages_B = jnp.take_along_axis(table_BZ, block_B1, axis=1, mode="clip")[:, 0]
        seen_BTS = reference.visible(q_positions_BT, k_positions_BS, window)
        k_BKSH, v_BKSH = (_gathered(pool, pages_B, q_BTNH.dtype) for pool in (k_YKSH, v_YKSH))
        return reference.Block(k_BKSH, v_BKSH, seen_BTS)

    blocks = jnp.maximum((ends_B - first_B).max(), 0)
    return reference.running(q_BTNH, read, blocks, sinks_N, num_kv_heads=k_YKSH.shape[1], scale=scale)


def _gathered(pool_YKSH: Pages, pages_B: jax.Array, dtype: DTypeLike) -> jax.Array:
    """A page per row, [B, K, S, H], of the pool's dtype or of the given one if it is of float8."""

    def taken(array_YKSH: jax.Array) -> jax.Array:
        if len(pages_B) == 1:  # a slice, not a copy
            return jax.lax.dynamic_slice_in_dim(array_YKSH, pages_B[0], 1)
        return jnp.take(array_YKSH, pages_B, axis=0, mode="clip")

    return expanded(jax.tree.map(taken, pool_YKSH), dtype)


def row_by_row(
    q_BTNH: jax.Array,
    k_YKSH: Pages,
    v_YKSH: Pages,
    table_BZ: jax.Array,
    q_positions_BT: jax.Array,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
) -> jax.Array:
    """`by_page`, one row after the other: no page is copied, and each row reads no more pages than it sees.

    Runs on one core. `decode.lanes` uses all, and is faster for some operands.
    """

    def step(row: jax.Array, out_BTNH: jax.Array) -> jax.Array:
        q_1TNH, table_1Z, positions_1T = (
            jax.lax.dynamic_slice_in_dim(x, row, 1) for x in (q_BTNH, table_BZ, q_positions_BT)
        )
        out_1TNH = by_page(q_1TNH, k_YKSH, v_YKSH, table_1Z, positions_1T, sinks_N, scale=scale, window=window)
        return jax.lax.dynamic_update_slice_in_dim(out_BTNH, out_1TNH, row, axis=0)

    return jax.lax.fori_loop(0, q_BTNH.shape[0], step, jnp.zeros_like(q_BTNH))


def at_once(
    q_BTNH: jax.Array,
    k_YKSH: Pages,
    v_YKSH: Pages,
    table_BZ: jax.Array,
    q_positions_BT: jax.Array,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
) -> jax.Array:
    """`reference.dense` over all pages of the table."""
    B, Z = table_BZ.shape

    def taken(array_YKSH: jax.Array) -> jax.Array:
        taken_BZKSH = jnp.take(array_YKSH, table_BZ, axis=0, mode="clip")
        return taken_BZKSH.transpose(0, 2, 1, 3, 4).reshape(B, array_YKSH.shape[1], Z * PAGE, array_YKSH.shape[3])

    k_BKSH, v_BKSH = (expanded(jax.tree.map(taken, pool), q_BTNH.dtype) for pool in (k_YKSH, v_YKSH))
    k_positions_BS = jnp.broadcast_to(jnp.arange(Z * PAGE, dtype=jnp.int32), (B, Z * PAGE))
    operands = q_BTNH, k_BKSH, v_BKSH, q_positions_BT, k_positions_BS, sinks_N
    return reference.dense(*operands, scale=scale, window=window)


def rows(
    q_BTNH: jax.Array,
    k_YKSH: Pages,
    v_YKSH: Pages,
    table_BZ: jax.Array,
    q_positions_BT: jax.Array,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
) -> jax.Array:
    """`lanes.attend`, `row_by_row`, `by_page` or `at_once`. The choice depends on platform, dtypes and sizes only.

    On a CPU it is best to read less, and a row's bits depend on neither the other rows nor their number. On an
    accelerator it is best to launch few kernels, and a loop of unknown length makes the host wait at each turn: GPT-2
    124M in bfloat16, one row of 512 positions, without pages, decoded 307 tokens/s on an H200 (JAX 0.11.2) block by
    block, and 824 and 1140 (two runs) with `reference.dense`.
    """
    (B, T, N), Z = q_BTNH.shape[:3], table_BZ.shape[1]
    operands = [q_BTNH, k_YKSH, v_YKSH, table_BZ, q_positions_BT, *([] if sinks_N is None else [sinks_N])]
    few = B * T * N * Z * PAGE <= reference.DENSE_SCORES
    return jax.lax.platform_dependent(
        *operands,
        cpu=partial(lanes.attend if lanes.takes(q_BTNH, k_YKSH) else row_by_row, scale=scale, window=window),
        default=partial(at_once if few else by_page, scale=scale, window=window),
    )


def packed(
    q_TNH: jax.Array,
    k_YKSH: Pages,
    v_YKSH: Pages,
    table_BZ: jax.Array,
    tiles: Tiles,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
) -> jax.Array:
    """Many queries per row. See `api.packed_attention_over_pages`.

    On a CPU, one tile after the other, so that each reads no more pages than it sees; a tile that is not full is
    computed as if it were, so that the bits of its queries do not depend on their number. On an accelerator, all tiles
    as rows of one call.
    """
    operands = [q_TNH, k_YKSH, v_YKSH, table_BZ, tiles, *([] if sinks_N is None else [sinks_N])]
    return jax.lax.platform_dependent(
        *operands,
        cpu=partial(_tile_by_tile, scale=scale, window=window),
        default=partial(_all_tiles, scale=scale, window=window),
    )


def _tile_by_tile(
    q_TNH: jax.Array,
    k_YKSH: Pages,
    v_YKSH: Pages,
    table_BZ: jax.Array,
    tiles: Tiles,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    window: int | None,
) -> jax.Array:
    T = q_TNH.shape[0]
    # Tiles may begin less than `TILE` before the end.
    q_TNH = jnp.pad(q_TNH, ((0, TILE), (0, 0), (0, 0)))
    ahead_t = jnp.arange(TILE, dtype=jnp.int32)

    def tile(index: jax.Array, out_TNH: jax.Array) -> jax.Array:
        row, start, count, position = (each[index] for each in tiles)
        q_1tNH = jax.lax.dynamic_slice_in_dim(q_TNH, start, TILE)[None]
        positions_1t = jnp.where(ahead_t < count, position + ahead_t, -1)[None]
        table_1Z = jax.lax.dynamic_slice_in_dim(table_BZ, row, 1)
        operands = q_1tNH, k_YKSH, v_YKSH, table_1Z, positions_1t, sinks_N
        new_tNH = by_page(*operands, scale=scale, window=window)[0]
        old_tNH = jax.lax.dynamic_slice_in_dim(out_TNH, start, TILE)
        new_tNH = jnp.where((ahead_t < count)[:, None, None], new_tNH, old_tNH)
        return jax.lax.dynamic_update_slice_in_dim(out_TNH, new_tNH, start, axis=0)

    return jax.lax.fori_loop(0, len(tiles.row_Q), tile, jnp.zeros_like(q_TNH))[:T]


def _all_tiles(
    q_TNH: jax.Array,
    k_YKSH: Pages,
    v_YKSH: Pages,
    table_BZ: jax.Array,
    tiles: Tiles,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    window: int | None,
) -> jax.Array:
    (T, N, H), Q = q_TNH.shape, len(tiles.row_Q)
    size = min(T, TILE)
    ahead_t = jnp.arange(size, dtype=jnp.int32)
    is_token_Qt = ahead_t < tiles.count_Q[:, None]
    tokens_Qt = tiles.start_Q[:, None] + ahead_t
    positions_Qt = jnp.where(is_token_Qt, tiles.position_Q[:, None] + ahead_t, -1)
    operands = (
        jnp.take(q_TNH, tokens_Qt, axis=0, mode="clip"),
        k_YKSH,
        v_YKSH,
        jnp.take(table_BZ, tiles.row_Q, axis=0, mode="clip"),
        positions_Qt,
        sinks_N,
    )
    out_QtNH = rows(*operands, scale=scale, window=window)
    places_T = (
        jnp.full((T,), Q * size)
        .at[jnp.where(is_token_Qt, tokens_Qt, T).reshape(-1)]
        .set(jnp.arange(Q * size), mode="drop")
    )
    return jnp.take(out_QtNH.reshape(Q * size, N, H), places_T, axis=0, mode="fill", fill_value=0)
