"""From the qkv product to attention over a cache, for one token per row: norms of heads, rotation, and appending."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, pages
from pallas_kernels.partial_sum import PartialSum


def takes(tokens: int, k_YKSH: jax.Array, *, normed: bool = False, implementation: str = dispatch.AUTO) -> bool:
    """Whether `append` has a kernel here: Hopper, one token per row, bfloat16, heads of an even width.

    If they are `normed`, they must be 64, 128 or 256 wide.
    """
    width = k_YKSH.shape[-1]
    fits = tokens == 1 and k_YKSH.dtype == jnp.bfloat16 and (width in (64, 128, 256) if normed else width % 2 == 0)
    return dispatch.wanted(implementation) == dispatch.MOSAIC and fits


def append(
    qkv: PartialSum,
    rotation: tuple[jax.Array, jax.Array] | None,
    positions_B: jax.Array,
    k_YKSH: jax.Array,
    v_YKSH: jax.Array,
    table_BZ: jax.Array,
    *,
    scales: tuple[jax.Array, jax.Array] | None = None,
    epsilon: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums, rotates, and writes keys and values to their places in the cache, which is updated in place if donated.

    Means, in float32, with q, k and v rounded to the cache's dtype before the rotation and after it:

        q, k, v     = split(qkv.total()) into N, K and K heads
        q, k        = each head / sqrt(mean(head²) + epsilon) * its scale, rounded again, if there are scales
        first, last = halves of each head of q and k
        rotated     = (first * cos - last * sin, last * cos + first * sin)
        cache[table[b, positions[b] // PAGE], :, positions[b] % PAGE] = rotated k, v

    Args:
      qkv: [B, (N + 2·K) · H], without rows or weights of its own.
      rotation: cos and sin, float32 [B, H/2]; None to rotate nothing.
      positions_B: int32; nothing is written for negative ones.
      k_YKSH, v_YKSH: a cache in pages (see `pallas_kernels.pages`) for which `takes` is true.
      table_BZ: int32, each row's pages.
      scales, epsilon: of norms of each query head and of each key head, [H] of one floating dtype, bfloat16 or float32.

    Returns:
      The queries [B, N, H], rotated, and the cache.
    """
    from pallas_kernels.append import mosaic_sm90

    slots_B = pages.slots(table_BZ, positions_B[:, None])[:, 0]
    return mosaic_sm90.append(qkv, rotation, slots_B, k_YKSH, v_YKSH, scales, epsilon)
