"""The key/value cache: preallocated, of static shape, an argument and a result of the model."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.append import append
from pallas_kernels.attention import reference
from pallas_kernels.partial_sum import PartialSum

SLOT_MULTIPLE = reference.BLOCK  # a cache's capacity is a multiple of this, as blocked attention wants


def capacity_of(max_length: int) -> int:
    """The positions of a slot that has room for `max_length`."""
    return -(-max_length // SLOT_MULTIPLE) * SLOT_MULTIPLE


def places_of(windows: Sequence[int | None], capacity: int) -> list[int]:
    """How many positions each layer keeps: all, or a ring if it has a window."""
    return [capacity if window is None else min(window, capacity) for window in windows]


class Attended(NamedTuple):
    """The keys and values that a call's queries attend to, and their positions."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    positions_BS: jax.Array  # negative: not attended to

    @classmethod
    def of(cls, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array) -> "Attended":
        """A call's own keys and values alone."""
        return cls(k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3), positions_BT)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers for `B` slots, each of one sequence.

    A layer has S places per slot: the `capacity`, or the layer's window if that is less. Position p is stored at index
    p mod S, so a sliding layer keeps a ring of the last S positions. Anything beyond a slot's length is undefined and
    never attended to.

    Layers are separate arrays, so that each is updated in place if the cache is donated.
    """

    k: tuple[jax.Array, ...]  # L × [B, K, S, H]
    v: tuple[jax.Array, ...]  # L × [B, K, S, H]
    lengths_B: jax.Array  # int32: positions in use
    capacity: int = dataclasses.field(metadata={"static": True})  # positions that a slot has room for

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
    ) -> "KVCache":
        """An empty cache of at least `max_length` positions per slot (rounded up to SLOT_MULTIPLE).

        Args:
          windows: of each layer; None if it attends to all positions.
        """
        capacity = capacity_of(max_length)
        places = places_of(windows, capacity)
        # Zeros, not empty: uninitialised memory may hold NaN.
        k, v = (tuple(jnp.zeros((batch, num_kv_heads, S, head_width), dtype) for S in places) for _ in "kv")
        return cls(k=k, v=v, lengths_B=jnp.zeros((batch,), jnp.int32), capacity=capacity)

    def update(
        self, layer: int, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array
    ) -> tuple[Attended, "KVCache"]:
        """Adds a layer's new keys and values at their positions; padding, at negative positions, is not written.

        The lengths do not change until `extended` is called, after all layers.

        Returns:
          What queries at these positions attend to, and the cache. Several tokens at once overwrite places of a ring
          that the first of them can still see, so they attend to the ring as it was before, and to themselves.
        """
        old_k_BKSH, old_v_BKSH = self.k[layer], self.v[layer]
        S, T = old_k_BKSH.shape[2], positions_BT.shape[1]
        last_B1 = positions_BT.max(axis=1, keepdims=True)
        kept_BT = jnp.where(positions_BT > last_B1 - S, positions_BT, -1)  # each place of a ring is written once
        k_BKSH, v_BKSH = _write(old_k_BKSH, k_BTKH, kept_BT), _write(old_v_BKSH, v_BTKH, kept_BT)
        cache = self.with_layer(layer, k_BKSH, v_BKSH)
        if self.capacity == S or T == 1:
            lengths_B = jnp.maximum(self.lengths_B, last_B1[:, 0] + 1)
            return Attended(k_BKSH, v_BKSH, _positions(lengths_B, S)), cache
        new_k_BKTH, new_v_BKTH = (x.transpose(0, 2, 1, 3).astype(k_BKSH.dtype) for x in (k_BTKH, v_BTKH))
        attended = Attended(
            jnp.concatenate((old_k_BKSH, new_k_BKTH), axis=2),
            jnp.concatenate((old_v_BKSH, new_v_BKTH), axis=2),
            jnp.concatenate((_positions(self.lengths_B, S), positions_BT), axis=1),
        )
        return attended, cache

    def appended(
        self,
        layer: int,
        qkv: PartialSum,
        angles: tuple[jax.Array, jax.Array] | None,
        positions_BT: jax.Array,
    ) -> tuple[jax.Array, Attended, "KVCache"]:
        """Like `update`, in one kernel with the other steps from product to attention, if `append.takes` the cache.

        Args:
          qkv: the product that queries, keys and values come from.
          angles: cos and sin [B, 1, 1, H/2] to rotate queries and keys by; None to rotate nothing.
          positions_BT: of one token per row.

        Returns:
          The queries [B, 1, N, H], what they attend to, and the cache.
        """
        k_BKSH, v_BKSH = self.k[layer], self.v[layer]
        B = positions_BT.shape[0]
        rotation = None if angles is None else (angles[0].reshape(B, -1), angles[1].reshape(B, -1))
        q_BNH, k_BKSH, v_BKSH = append(qkv, rotation, positions_BT[:, 0], k_BKSH, v_BKSH)
        lengths_B = jnp.maximum(self.lengths_B, positions_BT[:, 0] + 1)
        attended = Attended(k_BKSH, v_BKSH, _positions(lengths_B, k_BKSH.shape[2]))
        return q_BNH[:, None], attended, self.with_layer(layer, k_BKSH, v_BKSH)

    def with_layer(self, layer: int, k_BKSH: jax.Array, v_BKSH: jax.Array) -> "KVCache":
        """The cache with a layer's keys and values replaced."""
        return dataclasses.replace(
            self,
            k=(*self.k[:layer], k_BKSH, *self.k[layer + 1 :]),
            v=(*self.v[:layer], v_BKSH, *self.v[layer + 1 :]),
        )

    def extended(self, positions_BT: jax.Array) -> "KVCache":
        """The cache with its lengths grown to hold the given positions (negative ones are padding)."""
        return dataclasses.replace(self, lengths_B=jnp.maximum(self.lengths_B, positions_BT.max(axis=1) + 1))

    def with_row(self, slot: jax.Array, row: "KVCache") -> "KVCache":
        """The cache with a slot replaced by a cache of one row, of the same capacity."""
        return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, slot, axis=0), self, row)


def _positions(lengths_B: jax.Array, places: int) -> jax.Array:
    """The position stored at each place of a ring [B, S]: the last one in use that belongs there, -1 for none."""
    last_B1 = lengths_B[:, None] - 1
    position_BS = last_B1 - (last_B1 - jnp.arange(places, dtype=jnp.int32)) % places
    return jnp.where(position_BS < 0, -1, position_BS)


def _write(array_BKSH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    new_BTKH = new_BTKH.astype(array_BKSH.dtype)
    places = array_BKSH.shape[2]
    # Index S is out of bounds, and such updates are dropped; -1 would wrap around to the last one.
    place_BT = jnp.where(positions_BT < 0, places, positions_BT % places)
    if positions_BT.shape[1] > 1:
        return _scatter(array_BKSH, new_BTKH, place_BT)
    # On a CPU, XLA's scatter converts the whole of a half-precision cache to float32 and back. (In bfloat16,
    # for which XLA has no arithmetic there, only the conversions of each step are left.)
    written: jax.Array = jax.lax.platform_dependent(
        array_BKSH, new_BTKH, place_BT, cpu=_write_row_by_row, default=_scatter
    )
    return written


def _scatter(array_BKSH: jax.Array, new_BTKH: jax.Array, place_BT: jax.Array) -> jax.Array:
    row_B1 = jnp.arange(array_BKSH.shape[0])[:, None]
    return array_BKSH.at[row_B1, :, place_BT].set(new_BTKH, mode="drop")


def _write_row_by_row(array_BKSH: jax.Array, new_B1KH: jax.Array, place_B1: jax.Array) -> jax.Array:
    """`_scatter` for one token per row."""
    _, K, S, H = array_BKSH.shape
    new_BK1H = new_B1KH.transpose(0, 2, 1, 3)

    def write(row: jax.Array, array_BKSH: jax.Array) -> jax.Array:
        place = place_B1[row, 0]
        start = (row, 0, place, 0)  # clamped if it is out of bounds
        old_1K1H = jax.lax.dynamic_slice(array_BKSH, start, (1, K, 1, H))
        new_1K1H = jax.lax.dynamic_slice_in_dim(new_BK1H, row, 1)
        return jax.lax.dynamic_update_slice(array_BKSH, jnp.where(place >= S, old_1K1H, new_1K1H), start)

    return jax.lax.fori_loop(0, array_BKSH.shape[0], write, array_BKSH)
