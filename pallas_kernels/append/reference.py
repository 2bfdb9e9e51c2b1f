"""Writing keys and values to pages in jnp, in place if the pool is donated. See `pallas_kernels.pages`.

On a CPU, XLA's scatter converts the whole of a half-precision pool to float32 and back, so there these are loops.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import fp8_pages, pages
from pallas_kernels.fp8_pages import Fp8Pages, Pages
from pallas_kernels.pages import PAGE, Tiles

_FEW_TOKENS = 16  # a CPU writes up to so many one by one, and more of them page by page


def write_rows(pool_YKSH: Pages, new_BKH: jax.Array, table_BZ: jax.Array, positions_B: jax.Array) -> Pages:
    """The pool with one token per row written at its position; none for negative positions.

    Args:
      pool_YKSH: keys or values.
      new_BKH: of any floating dtype; converted to the pool's, or rounded to float8 with scales if it is `Fp8Pages`.
      table_BZ, positions_B: int32; positions are less than Z · PAGE.
    """
    slots_B = pages.slots(table_BZ, positions_B[:, None])[:, 0]
    return _written(partial(_write, slots_T=slots_B), pool_YKSH, new_BKH)


def write_tiles(pool_YKSH: Pages, new_TKH: jax.Array, table_BZ: jax.Array, tiles: Tiles) -> Pages:
    """The pool with a call's tokens written at their positions; see `write_rows`."""
    T = new_TKH.shape[0]
    slots_T = pages.slots_of_tiles(table_BZ, tiles, T)
    if T <= _FEW_TOKENS:
        return _written(partial(_write, slots_T=slots_T), pool_YKSH, new_TKH)

    def write(pool_YKSH: jax.Array, new_TKH: jax.Array) -> jax.Array:
        written: jax.Array = jax.lax.platform_dependent(
            pool_YKSH,
            new_TKH,
            slots_T,
            table_BZ,
            tiles,
            cpu=_page_by_page,
            default=lambda pool_YKSH, new_TKH, slots_T, *_: _scatter(pool_YKSH, new_TKH, slots_T),
        )
        return written

    return _written(write, pool_YKSH, new_TKH)


def _written(write: Callable[[jax.Array, jax.Array], jax.Array], pool_YKSH: Pages, new_TKH: jax.Array) -> Pages:
    """A pool after each of its arrays has been written to."""
    if isinstance(pool_YKSH, Fp8Pages):
        both: Fp8Pages = jax.tree.map(write, pool_YKSH, fp8_pages.rounded(new_TKH))
        return both
    return write(pool_YKSH, new_TKH.astype(pool_YKSH.dtype))


def _write(pool_YKSH: jax.Array, new_TKH: jax.Array, slots_T: jax.Array) -> jax.Array:
    written: jax.Array = jax.lax.platform_dependent(pool_YKSH, new_TKH, slots_T, cpu=_token_by_token, default=_scatter)
    return written


def _scatter(pool_YKSH: jax.Array, new_TKH: jax.Array, slots_T: jax.Array) -> jax.Array:
    # Index Y is out of bounds, and such updates are dropped; -1 would wrap around to the last one.
    pages_T = jnp.where(slots_T < 0, pool_YKSH.shape[0], slots_T // PAGE)
    return pool_YKSH.at[pages_T, :, slots_T % PAGE].set(new_TKH, mode="drop")


def _token_by_token(pool_YKSH: jax.Array, new_TKH: jax.Array, slots_T: jax.Array) -> jax.Array:
    K, H = new_TKH.shape[1:]

    def write(token: jax.Array, pool_YKSH: jax.Array) -> jax.Array:
        slot = slots_T[token]
        start = (jnp.maximum(slot, 0) // PAGE, 0, slot % PAGE, 0)
        old_1K1H = jax.lax.dynamic_slice(pool_YKSH, start, (1, K, 1, H))
        new_1K1H = jax.lax.dynamic_slice_in_dim(new_TKH, token, 1).reshape(1, K, 1, H)
        return jax.lax.dynamic_update_slice(pool_YKSH, jnp.where(slot < 0, old_1K1H, new_1K1H), start)

    return jax.lax.fori_loop(0, new_TKH.shape[0], write, pool_YKSH)


def _page_by_page(
    pool_YKSH: jax.Array, new_TKH: jax.Array, slots_T: jax.Array, table_BZ: jax.Array, tiles: Tiles
) -> jax.Array:
    del slots_T
    new_KTH = jnp.pad(new_TKH, ((PAGE, PAGE), (0, 0), (0, 0))).transpose(1, 0, 2)
    place_S = jnp.arange(PAGE, dtype=jnp.int32)

    def write(index: jax.Array, pool_YKSH: jax.Array) -> jax.Array:
        row, start, count, position = (each[index // 2] for each in tiles)  # a tile has places in up to two pages
        block = position // PAGE + index % 2
        ahead = block * PAGE - position  # tokens from the tile's first to the page's first place
        is_new_S = (ahead + place_S >= 0) & (ahead + place_S < count)
        page = table_BZ[row, jnp.minimum(block, table_BZ.shape[1] - 1)]
        old_1KSH = jax.lax.dynamic_slice_in_dim(pool_YKSH, page, 1)
        new_1KSH = jax.lax.dynamic_slice_in_dim(new_KTH, PAGE + start + ahead, PAGE, axis=1)[None]
        new_1KSH = jnp.where(is_new_S[:, None], new_1KSH, old_1KSH)
        return jax.lax.dynamic_update_slice_in_dim(pool_YKSH, new_1KSH, page, axis=0)

    return jax.lax.fori_loop(0, 2 * len(tiles.row_Q), write, pool_YKSH)
