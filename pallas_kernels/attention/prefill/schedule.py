"""What the programs of prefill attention read, and in what order."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.pages import TILE, Tiles

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
        return whole + (_of_turn(whole, self.programs) < left).astype(jnp.int32)

    def find(self, turn: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The row, the tile and the first head of a turn's item. The last tiles, which see the most, come first."""
        pairs = self.heads // self.shared
        item = turn * self.programs + _of_turn(turn, self.programs)
        rest = lax.rem(item, jnp.int32(self.rows * pairs))
        tile = self.tiles - 1 - lax.div(item, jnp.int32(self.rows * pairs))
        return lax.div(rest, jnp.int32(pairs)), tile, lax.rem(rest, jnp.int32(pairs)) * self.shared

    def own(self, warpgroup: jax.Array | int, tile: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A warpgroup's first query and its head."""
        if self.shared == 1:
            return pl.multiple_of(tile * self.tile + warpgroup * QUERIES, QUERIES), head
        return pl.multiple_of(tile * self.tile, QUERIES), head + warpgroup


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


def tile_items(tiles: Tiles, *, tokens: int, window: int, tile: int, places: int) -> tuple[jax.Array, jax.Array]:
    """What the programs read of a call's tiles, of which `TileItem` has the fields, int32 [Q, 11]; and how many, [1].

    Tiles are cut into parts of up to `tile` queries. Those with the most to read come first, and those without any
    query, which are not counted, last.
    """
    ahead_Q = jnp.tile(jnp.arange(TILE // tile, dtype=jnp.int32) * tile, len(tiles.row_Q))
    row_Q, start_Q, count_Q, position_Q = (jnp.repeat(each.astype(jnp.int32), TILE // tile) for each in tiles)
    count_Q = jnp.clip(count_Q - ahead_Q, 0, tile)
    start_Q, position_Q = start_Q + ahead_Q, position_Q + ahead_Q
    exists_Q = count_Q > 0

    # What each query sees, and what any query of the row's.
    end_Q = jnp.where(exists_Q, position_Q + count_Q, 0)
    first_Q = jnp.where(exists_Q, jnp.maximum(position_Q - (window - 1), 0), UNUSED)
    is_same_QQ = row_Q[:, None] == row_Q
    seen_first_Q = jnp.where(is_same_QQ, first_Q, UNUSED).min(axis=1)
    seen_end_Q = jnp.where(is_same_QQ, end_Q, 0).max(axis=1)
    first_block_Q, end_block_Q = first_Q // places, (end_Q + places - 1) // places
    plain_first_Q = (jnp.maximum(end_Q - window, 0) + places - 1) // places
    plain_end_Q = (position_Q + 1) // places

    # From its last token to the next tile's first, around the end.
    ahead_QQ = start_Q - start_Q[:, None]
    ahead_QQ = jnp.where(ahead_QQ > 0, ahead_QQ, ahead_QQ + tokens)
    gap_Q = jnp.where(exists_Q, ahead_QQ, tokens).min(axis=1) - count_Q

    work_Q = jnp.where(exists_Q, end_block_Q - first_block_Q, -1)
    number_Q = jnp.arange(len(row_Q), dtype=jnp.int32)
    is_before_QQ = (work_Q > work_Q[:, None]) | ((work_Q == work_Q[:, None]) & (number_Q < number_Q[:, None]))
    place_Q = is_before_QQ.sum(axis=1, dtype=jnp.int32)
    of_place_Q = jnp.where(place_Q == number_Q[:, None], number_Q, 0).sum(axis=1, dtype=jnp.int32)
    fields = (
        row_Q,
        start_Q,
        count_Q,
        position_Q,
        first_block_Q,
        plain_first_Q,
        plain_end_Q,
        end_block_Q,
        seen_first_Q,
        seen_end_Q,
        gap_Q,
    )
    return jnp.stack(fields, axis=1)[of_place_Q], exists_Q.sum(dtype=jnp.int32)[None]


class TileItem(NamedTuple):
    """A tile of one row's queries, from `tile_items`."""

    row: jax.Array
    start: jax.Array  # number of its first token in the call
    tokens: jax.Array  # how many
    position: jax.Array  # of the first token
    first: jax.Array  # blocks, as in `Span`
    plain_first: jax.Array
    plain_end: jax.Array
    end: jax.Array
    seen_first: jax.Array  # the first position that any query of the row sees in this call
    seen_end: jax.Array  # behind the last one
    gap: jax.Array  # tokens of padding behind the tile, up to the next tile or, behind the last, to the first

    @classmethod
    def read(cls, items_Q11: Any, index: jax.Array) -> "TileItem":
        """Reads one."""
        return cls(*(items_Q11[index, field] for field in range(len(cls._fields))))

    def span(self, done: jax.Array) -> Span:
        """Its blocks, given those of the program's earlier items."""
        return Span(done, self.first, self.plain_first, self.plain_end, self.end)


class TileItems(NamedTuple):
    """The programs' work. An item is a tile of queries, in as many heads as share its blocks."""

    tiles: int  # at most
    heads: int
    shared: int  # heads per item

    @property
    def pairs(self) -> int:
        """Items per tile."""
        return self.heads // self.shared

    @property
    def programs(self) -> int:
        """How many programs there are."""
        return min(self.tiles * self.pairs, PROGRAMS)

    def turns(self, total: jax.Array) -> jax.Array:
        """The number of this program's items, if there are `total` tiles."""
        programs = jnp.int32(self.programs)
        whole, left = lax.div(total * self.pairs, programs), lax.rem(total * self.pairs, programs)
        return whole + (_of_turn(whole, self.programs) < left).astype(jnp.int32)

    def find(self, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The tile and the first head of a turn's item."""
        item = turn * self.programs + _of_turn(turn, self.programs)
        return lax.div(item, jnp.int32(self.pairs)), lax.rem(item, jnp.int32(self.pairs)) * self.shared

    def own(self, warpgroup: jax.Array | int, start: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A warpgroup's first query and its head, if the tile begins at `start`."""
        return (start + warpgroup * QUERIES, head) if self.shared == 1 else (start, head + warpgroup)


def _of_turn(turn: jax.Array | int, programs: int) -> jax.Array:
    # Back and forth, so that each program's items add up to about the same work.
    program = lax.axis_index("program")
    return jnp.where(turn % 2 == 0, program, programs - 1 - program)
