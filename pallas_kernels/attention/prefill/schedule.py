"""What the programs of prefill attention read, and in which order.

Two more axis letters than `gptjax.axes` has: J, the tiles of a row's queries, and I, the blocks of its places.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

QUERIES = 64  # of a warpgroup: the rows of a wgmma
PROGRAMS = 132  # one a multiprocessor of an H200
STAGES = 4  # blocks of keys and of values in shared memory: of two that are multiplied, of the next and of one to come
UNUSED = (1 << 31) - 1  # the position of a place that no query of the row sees


def schedule(
    q_positions_BT: jax.Array, k_positions_BS: jax.Array, *, window: int, tile: int, places: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What each tile of queries reads. J are the tiles of a row, I the blocks of `places`.

    Returns:
      The positions, uint32, padded to whole tiles and blocks: those of keys are UNUSED where no query of the row sees
      them. spans_BJ4, int32: a tile's first block, the first and the end of a run of blocks that all of its queries see
      all of, and the end of its blocks, of which it has at least one. unclean_BI, int32: 1 for blocks with UNUSED.
    """
    B, T = q_positions_BT.shape
    S = k_positions_BS.shape[1]
    # All padding is -1: of less, the kernel would subtract UNUSED and get a small number.
    q_positions_BT = jnp.maximum(q_positions_BT, -1)
    q_BJt = jnp.pad(q_positions_BT, ((0, 0), (0, -T % tile)), constant_values=-1).reshape(B, -1, tile)
    k_BIp = jnp.pad(k_positions_BS, ((0, 0), (0, -S % places)), constant_values=-1).reshape(B, -1, places)
    least_BJ, last_BJ = q_BJt.min(axis=2), q_BJt.max(axis=2)
    first_BJ = jnp.where(q_BJt < 0, UNUSED, q_BJt).min(axis=2)  # without padding
    first_B11, last_B11 = first_BJ.min(axis=1)[:, None, None], last_BJ.max(axis=1)[:, None, None]
    used_BIp = (k_BIp >= 0) & (k_BIp <= last_B11) & (k_BIp > first_B11 - window)
    k_BIp = jnp.where(used_BIp, k_BIp, UNUSED)
    least_B1I, last_B1I = k_BIp.min(axis=2)[:, None], jnp.where(used_BIp, k_BIp, -1).max(axis=2)[:, None]
    unclean_BI = ~used_BIp.all(axis=2)
    visited_BJI = (least_B1I <= last_BJ[:, :, None]) & (last_B1I > first_BJ[:, :, None] - window)
    plain_BJI = (last_B1I <= least_BJ[:, :, None]) & (least_B1I > last_BJ[:, :, None] - window)
    plain_BJI &= visited_BJI & ~unclean_BI[:, None]
    block_I = jnp.arange(k_BIp.shape[1], dtype=jnp.int32)

    def end_of(which_BJI: jax.Array) -> jax.Array:
        return jnp.where(which_BJI, block_I + 1, 0).max(axis=2)

    first_block_BJ = jnp.where(visited_BJI, block_I, len(block_I) - 1).min(axis=2)
    end_BJ = jnp.maximum(end_of(visited_BJI), first_block_BJ + 1)
    plain_end_BJ = end_of(plain_BJI)
    plain_first_BJ = end_of(~plain_BJI & (block_I < plain_end_BJ[:, :, None]))
    spans_BJ4 = jnp.stack((first_block_BJ, plain_first_BJ, plain_end_BJ, end_BJ), axis=2)
    q_BT, k_BS = (lax.bitcast_convert_type(x.reshape(B, -1), jnp.uint32) for x in (q_BJt, k_BIp))
    return q_BT, k_BS, spans_BJ4, unclean_BI.astype(jnp.int32)


class Items(NamedTuple):
    """What the programs do: each item is a tile of queries of a row, of as many heads as its blocks are shared by."""

    rows: int
    tiles: int  # of a row
    heads: int  # of a row
    shared: int  # heads of an item
    tile: int  # queries of an item

    @property
    def programs(self) -> int:
        """How many programs there are."""
        return min(self._total, PROGRAMS)

    @property
    def _total(self) -> int:
        return self.rows * self.tiles * self.heads // self.shared

    def turns(self) -> jax.Array:
        """How many items this program has."""
        whole, left = divmod(self._total, self.programs)
        return whole + (self._of_turn(whole) < left).astype(jnp.int32)

    def find(self, turn: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The row, the tile and the first head of this program's item. The last tiles, which see most, come first."""
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
        # There and back, so that the items of a program are as much together as those of another.
        program = lax.axis_index("program")
        return jnp.where(turn % 2 == 0, program, self.programs - 1 - program)


class Span(NamedTuple):
    """The blocks of an item, as `schedule` has them."""

    done: jax.Array  # blocks of the program's items before
    first: jax.Array
    plain_first: jax.Array
    plain_end: jax.Array
    end: jax.Array

    def slot(self, block: jax.Array) -> jax.Array:
        """Where in shared memory a block lies."""
        return lax.rem(self.done + block - self.first, jnp.int32(STAGES))

    def is_plain(self, block: jax.Array) -> jax.Array:
        """Whether all queries see all of a block."""
        return (block >= self.plain_first) & (block < self.plain_end)

    def done_after(self) -> jax.Array:
        """Blocks of the program's items up to and with this one."""
        return self.done + self.end - self.first
