"""Pages: where the keys and values of each row lie in a pool that all rows share.

A layer's pool is two arrays [Y, K, S, H] of Y pages, S = `PAGE` places each. A row's table names its pages: position p
lies in page `table[p // PAGE]`, at place `p % PAGE`, in every layer. Entries that are not in use (beyond the row's
length, or before a window) are 0. Page 0 belongs to no row and may hold anything, even NaN.
"""

from typing import Final, NamedTuple

import jax
import jax.numpy as jnp

PAGE: Final = 128  # positions of a page
TILE: Final = 128  # tokens of a tile, at most


class Tiles(NamedTuple):
    """The tokens of a call, which may be of several rows, as tiles of up to `TILE` tokens of one row. All int32 [Q].

    A tile's tokens are adjacent, and so are their positions. No token is in two tiles, and those in none are padding.
    A row's tiles of a call hold adjacent positions too. (So the positions that a call writes have no gaps.)
    """

    row_Q: jax.Array  # of the table
    start_Q: jax.Array  # number of its first token in the call, any
    count_Q: jax.Array  # how many tokens it has, up to TILE; 0 is a tile that does not exist
    position_Q: jax.Array  # of its first token

    @classmethod
    def of(cls, positions_BT: jax.Array) -> "Tiles":
        """The tiles of a call [B, T] that is flattened to [B · T].

        Each row has adjacent positions; negative ones are padding, which may come before and after them.
        """
        B, T = positions_BT.shape
        positions_BT = positions_BT.astype(jnp.int32)
        tokens_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        first_B1 = jnp.where(positions_BT >= 0, tokens_BT, T).min(axis=1, keepdims=True)
        counts_B1 = (positions_BT >= 0).sum(axis=1, keepdims=True, dtype=jnp.int32)
        start_B1 = jnp.take_along_axis(positions_BT, jnp.minimum(first_B1, T - 1), axis=1)
        rows_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
        ahead_1Q = TILE * jnp.arange(-(-T // TILE), dtype=jnp.int32)[None]
        counts_BQ = jnp.clip(counts_B1 - ahead_1Q, 0, TILE)
        of_row = rows_B1, rows_B1 * T + first_B1 + ahead_1Q, counts_BQ, start_B1 + ahead_1Q
        return cls(*(jnp.broadcast_to(each, counts_BQ.shape).reshape(-1) for each in of_row))

    def tokens(self, T: int) -> tuple[jax.Array, jax.Array]:
        """The row and the position of each of a call's T tokens, int32 [T]; -1 for padding."""
        ahead_QT = jnp.arange(T, dtype=jnp.int32) - self.start_Q[:, None]
        is_in_QT = (ahead_QT >= 0) & (ahead_QT < self.count_Q[:, None])

        def of_its_tile(value_QT: jax.Array) -> jax.Array:
            return jnp.where(is_in_QT, value_QT, -1).max(axis=0)

        return of_its_tile(self.row_Q[:, None]), of_its_tile(self.position_Q[:, None] + ahead_QT)


def slots(table_BZ: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Where positions lie in a pool, as page · PAGE + place: int32 [B, T]; -1 for negative positions.

    Positions must be less than Z · PAGE.
    """
    pages_BT = jnp.take_along_axis(table_BZ, jnp.maximum(positions_BT, 0) // PAGE, axis=1, mode="clip")
    return jnp.where(positions_BT < 0, -1, pages_BT * PAGE + positions_BT % PAGE)


def slots_of_tiles(table_BZ: jax.Array, tiles: Tiles, tokens: int) -> jax.Array:
    """`slots` of a call's tokens: int32 [T]; -1 for padding."""
    rows_T, positions_T = tiles.tokens(tokens)
    pages_T = table_BZ[jnp.maximum(rows_T, 0), jnp.clip(positions_T // PAGE, 0, table_BZ.shape[1] - 1)]
    return jnp.where(positions_T < 0, -1, pages_T * PAGE + positions_T % PAGE)


def window(table_BZ: jax.Array, positions_B: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What rows see that are at these positions and look back over `size` positions, their own included.

    Returns:
      A table of the pages in which these positions lie; and where they begin and end, counted from the first place of
      these pages, int32 [B]. They begin within the first page. Nothing is seen from a negative position.
    """
    first_B = jnp.maximum(positions_B - size + 1, 0)
    base_B = first_B // PAGE
    blocks_BZ = base_B[:, None] + jnp.arange(-(-(size - 1) // PAGE) + 1, dtype=jnp.int32)
    window_BZ = jnp.take_along_axis(table_BZ, blocks_BZ, axis=1, mode="clip")
    return window_BZ, first_B - base_B * PAGE, jnp.maximum(positions_B + 1 - base_B * PAGE, 0)
