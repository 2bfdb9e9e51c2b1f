"""The key/value cache: preallocated pools of pages, and the tables that say which pages a row's positions lie in.

Position p of a row lies in page `table[row, p // PAGE]` at place `p % PAGE`, in every layer. So rows of any lengths
share the pools, several rows may have a page in common, and a model's call costs what its rows hold, whichever pages
these are.

The cache is an argument and a result of the model, and all of its shapes are static. Layers are separate arrays, so
that each is updated in place if the cache is donated.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptjax.layers.layer_cache import LayerCache
from pallas_kernels.fp8_pages import Pages, zeros
from pallas_kernels.pages import PAGE as PAGE  # positions of a page
from pallas_kernels.pages import Tiles
from pallas_kernels.peers import Peers


def pages_of(window: int | None, *, max_length: int, chunk: int | None) -> int:
    """How many pages of a layer a row needs for `max_length` positions, of which a call adds at most `chunk`.

    A layer with a window takes turns with as many pages as its window and the chunk can reach: the page of a block of
    positions is used again as soon as no token of a call sees the block any more.
    """
    blocks = capacity_of(max_length) // PAGE
    if window is None or chunk is None:
        return blocks
    return min(blocks, _touched(window + chunk - 1))


def tail_pages(window: int) -> int:
    """How many pages the tokens before some position lie in that a token at this position sees."""
    return _touched(max(window - 1, 1))


def reach(windows: Sequence[int | None], max_length: int) -> tuple[int | None, ...]:
    """The layers' windows among `max_length` positions, rounded up to pages; None if a layer sees them all."""
    capacity = capacity_of(max_length)
    return tuple(None if window is None or window >= capacity else window for window in windows)


def kinds(windows: Sequence[int | None], max_length: int) -> tuple[int | None, ...]:
    """The kinds of layers that there are: their windows, each once."""
    return tuple(dict.fromkeys(reach(windows, max_length)))


def capacity_of(max_length: int) -> int:
    """The positions of a row that has room for `max_length`."""
    return -(-max_length // PAGE) * PAGE


def _touched(positions: int) -> int:
    """The most pages that so many consecutive positions, at least one, can lie in."""
    return -(-(positions - 1) // PAGE) + 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Pools of keys and values, and the tables and lengths of B rows, each of one sequence.

    Layers with the same window are of one kind: they share a table, and their pools have the same number of pages.
    Page 0 of every pool belongs to no row. Tables have it where a row has no page.

    Anything in a page beyond a row's length, or before a window, is undefined and never attended to.

    In float8, a pool is two arrays: see `pallas_kernels.fp8_pages`.
    """

    k: tuple[Pages, ...]  # L × [Y, K, PAGE, H]
    v: tuple[Pages, ...]  # L × [Y, K, PAGE, H]
    tables: tuple[jax.Array, ...]  # int32 [B, Z], of each kind of layers: the page of each block of PAGE positions
    lengths_B: jax.Array  # int32: positions in use; of no use in a packed call
    windows: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})  # of each layer; None: sees all
    chunk: int | None = dataclasses.field(metadata={"static": True})  # the most tokens of a row in a call; None: any
    # Of a call whose tokens, [1, T], are of several rows or end in padding. None: token [b, t] is row b's.
    tiles: Tiles | None = None
    peers: Peers | None = None  # on a mesh: how kernels add up what its devices have; None: XLA does

    @classmethod
    def create(
        cls,
        *,
        windows: Sequence[int | None],
        batch: int,
        max_length: int,
        num_kv_heads: int,
        head_width: int,
        dtype: DTypeLike | str,
        chunk: int | None = None,
    ) -> "KVCache":
        """An empty cache in which each row has its own pages, one after another.

        Args:
          windows: of each layer; None if it attends to all positions.
          max_length: positions of a row, rounded up to whole pages.
          dtype: of keys and values; "fp8" for float8_e4m3fn with scales.
          chunk: the most tokens of a row in one call, which lets layers with a window take turns with a few pages.
            None allows any number, and gives them as many pages as the others.
        """
        seen = reach(windows, max_length)
        counts = [pages_of(window, max_length=max_length, chunk=chunk) for window in seen]
        k, v = (
            tuple(zeros((1 + batch * count, num_kv_heads, PAGE, head_width), dtype) for count in counts) for _ in "kv"
        )
        block_Z = jnp.arange(capacity_of(max_length) // PAGE, dtype=jnp.int32)
        first_B1 = jnp.arange(batch, dtype=jnp.int32)[:, None]
        tables = {window: 1 + first_B1 * count + block_Z % count for window, count in zip(seen, counts, strict=True)}
        return cls(k, v, tuple(tables.values()), jnp.zeros((batch,), jnp.int32), seen, chunk)

    @classmethod
    def pooled(
        cls,
        *,
        windows: Sequence[int | None],
        pages: Sequence[int],
        rows: int,
        max_length: int,
        num_kv_heads: int,
        head_width: int,
        dtype: DTypeLike | str,
    ) -> "KVCache":
        """A cache whose pages are given to rows as needed: all tables are 0.

        Args:
          windows: of each layer; None if it attends to all positions.
          pages: of the pools of each kind of layers, in the order of `kinds`, with page 0.
          rows: B.
          max_length: positions of a row, rounded up to whole pages.
          dtype: as in `create`.
        """
        seen = reach(windows, max_length)
        counts = dict(zip(kinds(windows, max_length), pages, strict=True))
        k, v = (tuple(zeros((counts[window], num_kv_heads, PAGE, head_width), dtype) for window in seen) for _ in "kv")
        tables = tuple(jnp.zeros((rows, capacity_of(max_length) // PAGE), jnp.int32) for _ in counts)
        return cls(k, v, tables, jnp.zeros((rows,), jnp.int32), seen, None)

    @property
    def capacity(self) -> int:
        """S: the positions that a row has room for."""
        return self.tables[0].shape[1] * PAGE

    def table(self, layer: int) -> jax.Array:
        """The pages of a layer, int32 [B, Z]."""
        return self.tables[list(dict.fromkeys(self.windows)).index(self.windows[layer])]

    def layer(self, layer: int) -> LayerCache:
        """What a layer's attention reads and writes."""
        pools, how = (self.k[layer], self.v[layer]), (self.windows[layer], self.chunk)
        return LayerCache(*pools, self.table(layer), self.tiles, *how)

    def with_layer(self, layer: int, written: LayerCache) -> "KVCache":
        """The cache with a layer's pages of keys and values replaced by those of `written`."""
        return dataclasses.replace(
            self,
            k=(*self.k[:layer], written.k_YKSH, *self.k[layer + 1 :]),
            v=(*self.v[:layer], written.v_YKSH, *self.v[layer + 1 :]),
        )

    def extended(self, positions_BT: jax.Array) -> "KVCache":
        """The cache with its lengths grown to hold the given positions (negative ones are padding)."""
        if self.tiles is None:
            return dataclasses.replace(self, lengths_B=jnp.maximum(self.lengths_B, positions_BT.max(axis=1) + 1))
        end_Q = jnp.where(self.tiles.count_Q > 0, self.tiles.position_Q + self.tiles.count_Q, 0)
        return dataclasses.replace(self, lengths_B=self.lengths_B.at[self.tiles.row_Q].max(end_Q))

    def packed(self, tiles: Tiles) -> "KVCache":
        """The cache for a packed call [1, T], whose tiles have rows of this cache and say which positions they hold."""
        return dataclasses.replace(self, tiles=tiles)

    def unpacked(self) -> "KVCache":
        """The cache after a packed call."""
        return dataclasses.replace(self, tiles=None)

    def copied(self, kind: int, source_Z: jax.Array, target_Z: jax.Array, count: jax.Array) -> "KVCache":
        """The cache with the first `count` of some pages copied to others, in all layers of a kind."""
        cache, window = self, list(dict.fromkeys(self.windows))[kind]
        for layer, each in enumerate(self.windows):
            if each == window:
                k, v = (
                    jax.tree.map(lambda pool: _copied(pool, target_Z, source_Z, count), x[layer])
                    for x in (self.k, self.v)
                )
                cache = cache.with_layer(layer, cache.layer(layer).with_pages(k, v))
        return cache

    def rows(self, rows_B: jax.Array) -> "KVCache":
        """The same pools with the tables and lengths of some rows; -1 gives a row without pages or length."""
        found_B1 = rows_B[:, None] >= 0
        return dataclasses.replace(
            self,
            tables=tuple(jnp.where(found_B1, table_BZ[rows_B], 0) for table_BZ in self.tables),
            lengths_B=jnp.where(rows_B >= 0, self.lengths_B[rows_B], 0),
        )

    def joined(self, rows_B: jax.Array, called: "KVCache") -> "KVCache":
        """This cache after a call with `rows(rows_B)`, which returned `called`."""
        row_B = jnp.where(rows_B < 0, self.lengths_B.shape[0], rows_B)  # updates out of bounds are dropped
        lengths_B = self.lengths_B.at[row_B].set(called.lengths_B, mode="drop")
        return dataclasses.replace(self, k=called.k, v=called.v, lengths_B=lengths_B)


def _copied(pool_YKSH: jax.Array, to_Z: jax.Array, from_Z: jax.Array, count: jax.Array) -> jax.Array:
    """The pool with the first `count` of some pages copied to others."""

    def one_by_one(pool_YKSH: jax.Array, to_Z: jax.Array, from_Z: jax.Array, count: jax.Array) -> jax.Array:
        def copy(index: jax.Array, pool_YKSH: jax.Array) -> jax.Array:
            page_1KSH = jax.lax.dynamic_slice_in_dim(pool_YKSH, from_Z[index], 1)
            return jax.lax.dynamic_update_slice_in_dim(pool_YKSH, page_1KSH, to_Z[index], axis=0)

        return jax.lax.fori_loop(0, count, copy, pool_YKSH)

    def at_once(pool_YKSH: jax.Array, to_Z: jax.Array, from_Z: jax.Array, count: jax.Array) -> jax.Array:
        to_Z = jnp.where(jnp.arange(len(to_Z)) < count, to_Z, 0)  # the others to the page that is nobody's
        return pool_YKSH.at[to_Z].set(pool_YKSH[from_Z])

    copied: jax.Array = jax.lax.platform_dependent(pool_YKSH, to_Z, from_Z, count, cpu=one_by_one, default=at_once)
    return copied
