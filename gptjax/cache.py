"""The key/value cache: preallocated, of static shape, an argument and a result of the model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import reference

SLOT_MULTIPLE = reference.BLOCK  # a cache's length is a multiple of this, as blocked attention wants


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, `B` slots of `S` positions. A slot holds one sequence; position p lies at index p.

    Layers are separate arrays, so that each is updated in place where the cache is donated. What lies at or beyond a
    slot's length is undefined and never attended to.
    """

    k: tuple[jax.Array, ...]  # L × [B, K, S, H]
    v: tuple[jax.Array, ...]  # L × [B, K, S, H]
    lengths_B: jax.Array  # int32: positions in use

    @classmethod
    def create(
        cls, *, num_layers: int, batch: int, max_length: int, num_kv_heads: int, head_width: int, dtype: Any
    ) -> "KVCache":
        """An empty cache of at least `max_length` positions a slot (rounded up to SLOT_MULTIPLE)."""
        slots = -(-max_length // SLOT_MULTIPLE) * SLOT_MULTIPLE
        shape = (batch, num_kv_heads, slots, head_width)
        # Zeros, not empty: uninitialised memory may hold NaN.
        arrays = [tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)) for _ in "kv"]
        return cls(k=arrays[0], v=arrays[1], lengths_B=jnp.zeros((batch,), jnp.int32))

    @property
    def capacity(self) -> int:
        """S: the positions a slot has room for."""
        return self.k[0].shape[2]

    def extended(self, positions_BT: jax.Array) -> "KVCache":
        """The cache with its lengths grown to hold the given positions (negative ones are padding)."""
        return dataclasses.replace(self, lengths_B=jnp.maximum(self.lengths_B, positions_BT.max(axis=1) + 1))

    def written(self, layer: int, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array) -> "KVCache":
        """The cache with a layer's new keys and values at their positions. Padding is not written."""

        def write(arrays: tuple[jax.Array, ...], new_BTKH: jax.Array) -> tuple[jax.Array, ...]:
            array_BKSH, new_BTKH = arrays[layer], new_BTKH.astype(arrays[layer].dtype)
            if positions_BT.shape[1] == 1:
                # On a CPU, XLA's scatter converts the whole of a half-precision cache to float32 and back. (What is
                # left in bfloat16, which XLA has no arithmetic for there, are the conversions of each step.)
                array_BKSH = jax.lax.platform_dependent(
                    array_BKSH, new_BTKH, positions_BT, cpu=_write_row_by_row, default=_scatter
                )
            else:
                array_BKSH = _scatter(array_BKSH, new_BTKH, positions_BT)
            return (*arrays[:layer], array_BKSH, *arrays[layer + 1 :])

        return dataclasses.replace(self, k=write(self.k, k_BTKH), v=write(self.v, v_BTKH))

    def positions_BS(self) -> jax.Array:
        """The position of the token at each index of each slot; -1 where there is none."""
        index_S = jnp.arange(self.capacity, dtype=jnp.int32)
        return jnp.where(index_S < self.lengths_B[:, None], index_S, -1)

    def with_row(self, slot: jax.Array, row: "KVCache") -> "KVCache":
        """The cache with a slot replaced by a cache of one row, of the same capacity."""
        return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, slot, axis=0), self, row)


def _scatter(array_BKSH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    # Index S is out of bounds, and such updates are dropped; -1 would wrap around to the last one.
    slot_BT = jnp.where(positions_BT < 0, array_BKSH.shape[2], positions_BT)
    row_B1 = jnp.arange(array_BKSH.shape[0])[:, None]
    return array_BKSH.at[row_B1, :, slot_BT].set(new_BTKH, mode="drop")


def _write_row_by_row(array_BKSH: jax.Array, new_B1KH: jax.Array, positions_B1: jax.Array) -> jax.Array:
    """`_scatter` for one position a row."""
    _, K, _, H = array_BKSH.shape
    new_BK1H = new_B1KH.transpose(0, 2, 1, 3)

    def write(row: jax.Array, array_BKSH: jax.Array) -> jax.Array:
        position = positions_B1[row, 0]
        start = (row, 0, jnp.maximum(position, 0), 0)
        old_1K1H = jax.lax.dynamic_slice(array_BKSH, start, (1, K, 1, H))
        new_1K1H = jax.lax.dynamic_slice_in_dim(new_BK1H, row, 1)
        return jax.lax.dynamic_update_slice(array_BKSH, jnp.where(position < 0, old_1K1H, new_1K1H), start)

    return jax.lax.fori_loop(0, array_BKSH.shape[0], write, array_BKSH)
