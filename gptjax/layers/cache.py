"""The key/value cache: preallocated pools of pages, and the tables that say which pages a row's positions lie in.

Position p of a row lies in page `table[row, p // PAGE]` at place `p % PAGE`, in every layer. So rows of any lengths
share the pools, several rows may have a page in common, and a model's call costs what its rows hold, whichever pages
these are.

The cache is an argument and a result of the model, and all of its shapes are static. Layers are separate arrays, so
that each is updated in place if the cache is donated.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.append import append, write_rows, write_tiles
from pallas_kernels.attention import attention_over_pages, packed_attention_over_pages
from pallas_kernels.pages import PAGE as PAGE  # positions of a page
from pallas_kernels.pages import Tiles
from pallas_kernels.partial_sum import PartialSum


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
    """

    k: tuple[jax.Array, ...]  # L × [Y, K, PAGE, H]
    v: tuple[jax.Array, ...]  # L × [Y, K, PAGE, H]
    tables: tuple[jax.Array, ...]  # int32 [B, Z], of each kind of layers: the page of each block of PAGE positions
    lengths_B: jax.Array  # int32: positions in use; of no use in a packed call
    windows: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})  # of each layer; None: sees all
    chunk: int | None = dataclasses.field(metadata={"static": True})  # the most tokens of a row in a call; None: any
    # Of a call whose tokens, [1, T], are of several rows or end in padding. None: token [b, t] is row b's.
    tiles: Tiles | None = None

    @classmethod
    def create(
        cls,
        *,
        windows: Sequence[int | None],
        batch: int,
        max_length: int,
        num_kv_heads: int,
        head_width: int,
        dtype: DTypeLike,
        chunk: int | None = None,
    ) -> "KVCache":
        """An empty cache in which each row has its own pages, one after another.

        Args:
          windows: of each layer; None if it attends to all positions.
          max_length: positions of a row, rounded up to whole pages.
          chunk: the most tokens of a row in one call, which lets layers with a window take turns with a few pages.
            None allows any number, and gives them as many pages as the others.
        """
        seen = reach(windows, max_length)
        counts = [pages_of(window, max_length=max_length, chunk=chunk) for window in seen]
        # Zeros, not empty: uninitialised memory may hold NaN.
        k, v = (
            tuple(jnp.zeros((1 + batch * count, num_kv_heads, PAGE, head_width), dtype) for count in counts)
            for _ in "kv"
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
        dtype: DTypeLike,
    ) -> "KVCache":
        """A cache whose pages are given to rows as needed: all tables are 0.

        Args:
          windows: of each layer; None if it attends to all positions.
          pages: of the pools of each kind of layers, in the order of `kinds`, with page 0.
          rows: B.
          max_length: positions of a row, rounded up to whole pages.
        """
        seen = reach(windows, max_length)
        counts = dict(zip(kinds(windows, max_length), pages, strict=True))
        k, v = (
            tuple(jnp.zeros((counts[window], num_kv_heads, PAGE, head_width), dtype) for window in seen) for _ in "kv"
        )
        tables = tuple(jnp.zeros((rows, capacity_of(max_length) // PAGE), jnp.int32) for _ in counts)
        return cls(k, v, tables, jnp.zeros((rows,), jnp.int32), seen, None)

    @property
    def capacity(self) -> int:
        """S: the positions that a row has room for."""
        return self.tables[0].shape[1] * PAGE

    def table(self, layer: int) -> jax.Array:
        """The pages of a layer, int32 [B, Z]."""
        return self.tables[list(dict.fromkeys(self.windows)).index(self.windows[layer])]

    def attend(
        self,
        layer: int,
        q_BTNH: jax.Array,
        positions_BT: jax.Array,
        sinks_N: jax.Array | None,
        *,
        scale: float,
        implementation: str,
    ) -> jax.Array:
        """What queries at these positions get from a layer, [B, T, N, H]; its own keys and values must be there."""
        pools = self.k[layer], self.v[layer], self.table(layer)
        how: dict[str, Any] = {"scale": scale, "window": self.windows[layer], "implementation": implementation}
        if self.tiles is not None:
            return packed_attention_over_pages(q_BTNH, *pools, self.tiles, sinks_N, **how)
        if positions_BT.shape[1] == 1:
            return attention_over_pages(q_BTNH, *pools, positions_BT, sinks_N, **how)
        order_BT, positions_BT = _padding_last(positions_BT)
        out_BTNH = attention_over_pages(_taken(q_BTNH, order_BT), *pools, positions_BT, sinks_N, **how)
        return _taken(out_BTNH, order_BT.argsort(axis=1))

    def update(self, layer: int, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array) -> "KVCache":
        """Adds a layer's new keys and values at their positions; padding, at negative positions, is not written.

        The lengths do not change until `extended` is called, after all layers.

        Raises:
          ValueError: more tokens than the cache was created for.
        """
        if self.chunk is not None and positions_BT.shape[1] > self.chunk:
            raise ValueError(
                f"a call of {positions_BT.shape[1]} tokens a row, but the cache was created for calls of at most "
                f"{self.chunk}: create it with a larger chunk"
            )
        B, T, K, H = k_BTKH.shape
        table_BZ, tiles = self.table(layer), self.tiles
        if tiles is None and T > 1:
            order_BT, positions_BT = _padding_last(positions_BT)
            k_BTKH, v_BTKH = _taken(k_BTKH, order_BT), _taken(v_BTKH, order_BT)
            tiles = Tiles.of(positions_BT)

        def written(pool_YKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
            if tiles is None:
                return write_rows(pool_YKSH, new_BTKH[:, 0], table_BZ, positions_BT[:, 0])
            return write_tiles(pool_YKSH, new_BTKH.reshape(B * T, K, H), table_BZ, tiles)

        return self.with_layer(layer, written(self.k[layer], k_BTKH), written(self.v[layer], v_BTKH))

    def appended(
        self,
        layer: int,
        qkv: PartialSum,
        angles: tuple[jax.Array, jax.Array] | None,
        positions_BT: jax.Array,
    ) -> tuple[jax.Array, "KVCache"]:
        """Like `update`, in one kernel with the other steps from product to attention, if `append.takes` the cache.

        Args:
          qkv: the product that queries, keys and values come from.
          angles: cos and sin [B, 1, 1, H/2] to rotate queries and keys by; None to rotate nothing.
          positions_BT: of one token per row.

        Returns:
          The queries [B, 1, N, H], and the cache.
        """
        B = positions_BT.shape[0]
        rotation = None if angles is None else (angles[0].reshape(B, -1), angles[1].reshape(B, -1))
        q_BNH, k, v = append(qkv, rotation, positions_BT[:, 0], self.k[layer], self.v[layer], self.table(layer))
        return q_BNH[:, None], self.with_layer(layer, k, v)

    def with_layer(self, layer: int, k_YKSH: jax.Array, v_YKSH: jax.Array) -> "KVCache":
        """The cache with a layer's pages of keys and values replaced."""
        return dataclasses.replace(
            self,
            k=(*self.k[:layer], k_YKSH, *self.k[layer + 1 :]),
            v=(*self.v[:layer], v_YKSH, *self.v[layer + 1 :]),
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
                k, v = (_copied(x[layer], target_Z, source_Z, count) for x in (self.k, self.v))
                cache = cache.with_layer(layer, k, v)
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


def _padding_last(positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The order that brings a row's tokens together before its padding, and the positions in this order."""
    order_BT = (positions_BT < 0).argsort(axis=1)  # stable
    return order_BT, jnp.take_along_axis(positions_BT, order_BT, axis=1)


def _taken(x_BTNH: jax.Array, order_BT: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BTNH, order_BT[:, :, None, None], axis=1)


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
