"""What the programs of prefill attention read, and in what order."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.pages import TILE, Tiles

QUERIES = 64  # per warpgroup: the rows of a wgmma
PROGRAMS = 132  # one per multiprocessor of an H200
STAGES = 4  # blocks of keys and of values in shared memory: two being multiplied, the next, and the one after
UNLIMITED = (1 << 31) - 1  # a window that reaches back to the first position: more than any position


class Span(NamedTuple):
    """The blocks of an item."""

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
    first_Q = jnp.where(exists_Q, jnp.maximum(position_Q - (window - 1), 0), UNLIMITED)
    is_same_QQ = row_Q[:, None] == row_Q
    seen_first_Q = jnp.where(is_same_QQ, first_Q, UNLIMITED).min(axis=1)
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
