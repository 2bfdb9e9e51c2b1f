"""Writing to pages in jnp."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.reference import BLOCK


def write(
    k_YKSH: jax.Array,
    v_YKSH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    table_BZ: jax.Array,
    positions_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """See `api.write`."""

    def cpu(pool_YKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        whole = _by_token if positions_BT.shape[1] == 1 else _by_page
        return whole(pool_YKSH, new_BTKH, table_BZ, positions_BT)

    def default(pool_YKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        return _scatter(pool_YKSH, new_BTKH, table_BZ, positions_BT)

    def one(pool_YKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        written: jax.Array = jax.lax.platform_dependent(
            pool_YKSH, new_BTKH.astype(pool_YKSH.dtype), cpu=cpu, default=default
        )
        return written

    return one(k_YKSH, k_BTKH), one(v_YKSH, v_BTKH)


def _scatter(pool_YKSH: jax.Array, new_BTKH: jax.Array, table_BZ: jax.Array, positions_BT: jax.Array) -> jax.Array:
    page_BT = jnp.take_along_axis(table_BZ, jnp.maximum(positions_BT, 0) // BLOCK, axis=1)
    # Updates out of bounds are dropped; -1 would wrap around to the last page.
    page_BT = jnp.where(positions_BT < 0, pool_YKSH.shape[0], page_BT)
    return pool_YKSH.at[page_BT, :, positions_BT % BLOCK].set(new_BTKH, mode="drop")


def _by_token(pool_YKSH: jax.Array, new_B1KH: jax.Array, table_BZ: jax.Array, positions_B1: jax.Array) -> jax.Array:
    """One token a row."""
    B, _, K, H = new_B1KH.shape
    new_BK1H = new_B1KH.transpose(0, 2, 1, 3)
    position_B = jnp.maximum(positions_B1[:, 0], 0)
    page_B = jnp.take_along_axis(table_BZ, position_B[:, None] // BLOCK, axis=1)[:, 0]
    page_B = jnp.where(positions_B1[:, 0] < 0, 0, page_B)

    def step(row: jax.Array, pool_YKSH: jax.Array) -> jax.Array:
        new_1K1H = jax.lax.dynamic_slice_in_dim(new_BK1H, row, 1)
        return jax.lax.dynamic_update_slice(pool_YKSH, new_1K1H, (page_B[row], 0, position_B[row] % BLOCK, 0))

    return jax.lax.fori_loop(0, B, step, pool_YKSH)


def _by_page(pool_YKSH: jax.Array, new_BTKH: jax.Array, table_BZ: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Reads, changes and writes each page that a row's tokens fall into."""
    B, T, K, H = new_BTKH.shape
    Z = table_BZ.shape[1]
    pages = min(Z, -(-(T - 1) // BLOCK) + 1)
    valid_BT = positions_BT >= 0
    first_B = jnp.min(jnp.where(valid_BT, positions_BT, Z * BLOCK), axis=1) // BLOCK
    last_B = jnp.max(positions_BT, axis=1) // BLOCK
    place_BT = jnp.where(valid_BT, positions_BT - first_B[:, None] * BLOCK, pages * BLOCK)
    token_BS = jnp.full((B, pages * BLOCK), -1, jnp.int32)
    token_BS = token_BS.at[jnp.arange(B)[:, None], place_BT].set(jnp.arange(T, dtype=jnp.int32), mode="drop")

    def step(index: jax.Array, pool_YKSH: jax.Array) -> jax.Array:
        row, offset = index // pages, index % pages
        block = first_B[row] + offset
        page = jnp.where(block <= last_B[row], table_BZ[row, jnp.minimum(block, Z - 1)], 0)
        token_s = jax.lax.dynamic_slice(token_BS, (row, offset * BLOCK), (1, BLOCK))[0]
        new_TKH = jax.lax.dynamic_index_in_dim(new_BTKH, row, keepdims=False)
        new_KsH = new_TKH[jnp.maximum(token_s, 0)].transpose(1, 0, 2)
        old_1KSH = jax.lax.dynamic_slice_in_dim(pool_YKSH, page, 1)
        page_1KSH = jnp.where((token_s >= 0)[None, None, :, None], new_KsH[None], old_1KSH)
        return jax.lax.dynamic_update_slice(pool_YKSH, page_1KSH, (page, 0, 0, 0))

    return jax.lax.fori_loop(0, B * pages, step, pool_YKSH)
