"""One layer's share of the key/value cache: what its attention writes to and reads."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import pages
from pallas_kernels.append import append_heads, takes_heads, write_rows, write_tiles
from pallas_kernels.attention import (
    append_and_attend,
    attention_over_pages,
    packed_attention_over_pages,
    takes_product,
)
from pallas_kernels.fp8_pages import Pages
from pallas_kernels.pages import Tiles
from pallas_kernels.partial_sum import PartialSum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """A layer's pools of keys and values, and the tables of B rows. See `layers.cache.KVCache`, which it is a part of.

    It does not say which layer it is of, so layers of the same kind are the same to JAX: see `models.decoder`.
    """

    k_YKSH: Pages
    v_YKSH: Pages
    table_BZ: jax.Array  # int32: the page of each block of positions
    tiles: Tiles | None  # of a call whose tokens, [1, T], are of several rows or end in padding
    window: int | None = dataclasses.field(metadata={"static": True})  # None: sees all
    chunk: int | None = dataclasses.field(metadata={"static": True})  # the most tokens of a row in a call; None: any

    def attend(
        self,
        q_BTNH: jax.Array,
        positions_BT: jax.Array,
        sinks_N: jax.Array | None,
        *,
        scale: float,
        implementation: str,
    ) -> jax.Array:
        """What queries at these positions get, [B, T, N, H]; their own keys and values must be there."""
        pools = self.k_YKSH, self.v_YKSH, self.table_BZ
        how: dict[str, Any] = {"scale": scale, "window": self.window, "implementation": implementation}
        if self.tiles is not None:
            return packed_attention_over_pages(q_BTNH, *pools, self.tiles, sinks_N, **how)
        if positions_BT.shape[1] == 1:
            return attention_over_pages(q_BTNH, *pools, positions_BT, sinks_N, **how)
        order_BT, positions_BT = _padding_last(positions_BT)
        out_BTNH = attention_over_pages(_taken(q_BTNH, order_BT), *pools, positions_BT, sinks_N, **how)
        return _taken(out_BTNH, order_BT.argsort(axis=1))

    def update(self, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array) -> "LayerCache":
        """Adds new keys and values at their positions; padding, at negative positions, is not written.

        Raises:
          ValueError: more tokens than the cache was created for.
        """
        B, T, K, H = k_BTKH.shape
        self._check(T)
        tiles = self.tiles
        if tiles is None and T > 1:
            order_BT, positions_BT = _padding_last(positions_BT)
            k_BTKH, v_BTKH = _taken(k_BTKH, order_BT), _taken(v_BTKH, order_BT)
            tiles = Tiles.of(positions_BT)

        def written(pool_YKSH: Pages, new_BTKH: jax.Array) -> Pages:
            if tiles is None:
                return write_rows(pool_YKSH, new_BTKH[:, 0], self.table_BZ, positions_BT[:, 0])
            return write_tiles(pool_YKSH, new_BTKH.reshape(B * T, K, H), self.table_BZ, tiles)

        return self.with_pages(written(self.k_YKSH, k_BTKH), written(self.v_YKSH, v_BTKH))

    def _check(self, T: int) -> None:
        if self.chunk is not None and self.chunk < T:
            raise ValueError(
                f"a call of {T} tokens a row, but the cache was created for calls of at most {self.chunk}: create it "
                "with a larger chunk"
            )

    def takes_heads(self, qkv: PartialSum, dtype: DTypeLike, implementation: str) -> bool:
        """Whether `append_heads` takes a call's product, and makes queries of this dtype of it."""
        return self.tiles is not None and takes_heads(qkv, self.k_YKSH, dtype=dtype, implementation=implementation)

    def append_heads(
        self, qkv: PartialSum, angles: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, "LayerCache"]:
        """Like `update`, in one kernel with the steps from the product to it: for packed calls.

        Args:
          qkv, angles: as in `append_and_attend`.

        Returns:
          The queries [1, T, N, H], and the cache.
        """
        assert self.tiles is not None
        tokens = qkv.parts_JAO.shape[1]
        self._check(tokens)
        slots_T = pages.slots_of_tiles(self.table_BZ, self.tiles, tokens)
        rotation = None if angles is None else (angles[0].reshape(tokens, -1), angles[1].reshape(tokens, -1))
        q_TNH, k_YKSH, v_YKSH = append_heads(qkv, rotation, slots_T, self.k_YKSH, self.v_YKSH)
        return q_TNH[None], self.with_pages(k_YKSH, v_YKSH)

    def takes_product(self, T: int, dtype: DTypeLike, implementation: str) -> bool:
        """Whether `append_and_attend` takes calls of T tokens a row, with queries of this dtype."""
        return self.tiles is None and takes_product(T, self.k_YKSH, dtype=dtype, implementation=implementation)

    def append_and_attend(
        self,
        qkv: PartialSum,
        angles: tuple[jax.Array, jax.Array] | None,
        positions_BT: jax.Array,
        sinks_N: jax.Array | None,
        scales: tuple[jax.Array, jax.Array] | None,
        epsilon: float,
        *,
        scale: float,
    ) -> tuple[jax.Array, "LayerCache"]:
        """Like `update` and then `attend`, in one kernel with the steps from the product to them.

        Args:
          qkv: the product that queries, keys and values come from.
          angles: cos and sin [B, 1, 1, H/2] to rotate queries and keys by; None to rotate nothing.
          positions_BT: of one token per row.
          sinks_N: as in `attend`.
          scales, epsilon: of the norms of query heads and of key heads, [H] each; None to norm nothing.
          scale: as in `attend`.

        Returns:
          What the queries get [B, 1, N, H], and the cache.
        """
        B = positions_BT.shape[0]
        rotation = None if angles is None else (angles[0].reshape(B, -1), angles[1].reshape(B, -1))
        pools = self.k_YKSH, self.v_YKSH, self.table_BZ
        norms: dict[str, Any] = {"scales": scales, "epsilon": epsilon}
        out_BNH, k_YKSH, v_YKSH = append_and_attend(
            qkv, rotation, positions_BT[:, 0], *pools, sinks_N, scale=scale, window=self.window, **norms
        )
        return out_BNH[:, None], self.with_pages(k_YKSH, v_YKSH)

    def with_pages(self, k_YKSH: Pages, v_YKSH: Pages) -> "LayerCache":
        """The cache with other pages of keys and values."""
        return dataclasses.replace(self, k_YKSH=k_YKSH, v_YKSH=v_YKSH)


def _padding_last(positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The order that brings a row's tokens together before its padding, and the positions in this order."""
    order_BT = (positions_BT < 0).argsort(axis=1)  # stable
    return order_BT, jnp.take_along_axis(positions_BT, order_BT, axis=1)


def _taken(x_BTNH: jax.Array, order_BT: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BTNH, order_BT[:, :, None, None], axis=1)
