"""What the programs of prefill attention read, and in what order."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

QUERIES = 64  # per warpgroup: the rows of a wgmma
PROGRAMS = 132  # one per multiprocessor of an H200
STAGES = 4  # blocks of keys and of values in shared memory: two being multiplied, the next, and the one after
UNUSED = (1 << 31) - 1  # stands for the position of a place that no query of the row sees


def schedule(
    q_positions_BT: jax.Array, k_positions_BS: jax.Array, *, window: int, tile: int, places: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What each tile of queries reads.

    Returns:
      The positions of queries and keys, uint32, padded to whole tiles and blocks. A key's position is UNUSED if no
      query of the row sees it.
      spans_BQ4, int32: a tile's first block; the first and the end of a run of blocks that all of its queries see
      entirely; and the end of its blocks, of which it has at least one.
      unclean_BZ, int32: 1 for blocks that contain UNUSED.
    """
    B, T = q_positions_BT.shape
    S = k_positions_BS.shape[1]
    # All padding becomes -1: from less, the kernel would subtract UNUSED and get a small number.
    q_positions_BT = jnp.maximum(q_positions_BT, -1)
    q_BQt = jnp.pad(q_positions_BT, ((0, 0), (0, -T % tile)), constant_values=-1).reshape(B, -1, tile)
    k_BZs = jnp.pad(k_positions_BS, ((0, 0), (0, -S % places)), constant_values=-1).reshape(B, -1, places)
    least_BQ, last_BQ = q_BQt.min(axis=2), q_BQt.max(axis=2)
    first_BQ = jnp.where(q_BQt < 0, UNUSED, q_BQt).min(axis=2)  # without padding
    first_B11, last_B11 = first_BQ.min(axis=1)[:, None, None], last_BQ.max(axis=1)[:, None, None]
    used_BZs = (k_BZs >= 0) & (k_BZs <= last_B11) & (k_BZs > first_B11 - window)
    k_BZs = jnp.where(used_BZs, k_BZs, UNUSED)
    least_B1Z, last_B1Z = k_BZs.min(axis=2)[:, None], jnp.where(used_BZs, k_BZs, -1).max(axis=2)[:, None]
    unclean_BZ = ~used_BZs.all(axis=2)
    visited_BQZ = (least_B1Z <= last_BQ[:, :, None]) & (last_B1Z > first_BQ[:, :, None] - window)
    plain_BQZ = (last_B1Z <= least_BQ[:, :, None]) & (least_B1Z > last_BQ[:, :, None] - window)
    plain_BQZ &= visited_BQZ & ~unclean_BZ[:, None]
    block_Z = jnp.arange(k_BZs.shape[1], dtype=jnp.int32)

    def end_of(which_BQZ: jax.Array) -> jax.Array:
        return jnp.where(which_BQZ, block_Z + 1, 0).max(axis=2)

    first_block_BQ = jnp.where(visited_BQZ, block_Z, len(block_Z) - 1).min(axis=2)
    end_BQ = jnp.maximum(end_of(visited_BQZ), first_block_BQ + 1)
    plain_end_BQ = end_of(plain_BQZ)
    plain_first_BQ = end_of(~plain_BQZ & (block_Z < plain_end_BQ[:, :, None]))
    spans_BQ4 = jnp.stack((first_block_BQ, plain_first_BQ, plain_end_BQ, end_BQ), axis=2)
    q_BT, k_BS = (lax.bitcast_convert_type(x.reshape(B, -1), jnp.uint32) for x in (q_BQt, k_BZs))
    return q_BT, k_BS, spans_BQ4, unclean_BZ.astype(jnp.int32)


class Items(NamedTuple):
    """The programs' work. An item is a tile of queries of one row, in as many heads as share its blocks."""

    rows: int
    tiles: int  # per row
    heads: int  # per row
    shared: int  # heads per item
    tile: int  # queries per item

    @property
    def programs(self) -> int:
        """How many programs there are."""
        return min(self._total, PROGRAMS)

    @property
    def _total(self) -> int:
        return self.rows * self.tiles * self.heads // self.shared

    def turns(self) -> jax.Array:
        """The number of this program's items."""
        whole, left = divmod(self._total, self.programs)
        return whole + (self._of_turn(whole) < left).astype(jnp.int32)

    def find(self, turn: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The row, the tile and the first head of a turn's item. The last tiles, which see the most, come first."""
        pairs = self.heads // self.shared
        item = turn * self.programs + self._of_turn(turn)
        rest = lax.rem(item, jnp.int32(self.rows * pairs))
        tile = self.tiles - 1 - lax.div(item, jnp.int32(self.rows * pairs))
        return lax.div(rest, jnp.int32(pairs)), tile, lax.rem(rest, jnp.int32(pairs)) * self.shared

    def own(self, warpgroup: jax.Array | int, tile: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A warpgroup's first query and its head."""
        if self.shared == 1:
            return pl.multiple_of(tile * self.tile + warpgroup * QUERIES, QUERIES), head
        return pl.multiple_of(tile * self.tile, QUERIES), head + warpgroup

    def _of_turn(self, turn: jax.Array | int) -> jax.Array:
        # Back and forth, so that each program's items add up to about the same work.
        program = lax.axis_index("program")
        return jnp.where(turn % 2 == 0, program, self.programs - 1 - program)


class Span(NamedTuple):
    """The blocks of an item, from `schedule`."""

    done: jax.Array  # blocks of the program's earlier items
    first: jax.Array
    plain_first: jax.Array
    plain_end: jax.Array
    end: jax.Array

    def slot(self, block: jax.Array) -> jax.Array:
        """The slot of shared memory in which a block lies."""
        return lax.rem(self.done + block - self.first, jnp.int32(STAGES))

    def is_plain(self, block: jax.Array) -> jax.Array:
        """Whether all queries see a whole block."""
        return (block >= self.plain_first) & (block < self.plain_end)

    def done_after(self) -> jax.Array:
        """Blocks of the program's items up to and including this one."""
        return self.done + self.end - self.first
