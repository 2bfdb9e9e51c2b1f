"""A prompt's heads from their product to the cache, by a kernel where there is one."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import dispatch
from pallas_kernels.fp8_pages import Pages
from pallas_kernels.partial_sum import PartialSum


def takes_heads(
    qkv: PartialSum, k_YKSH: Pages, *, dtype: DTypeLike = jnp.bfloat16, implementation: str = dispatch.AUTO
) -> bool:
    """Whether `append_heads` has a kernel here: on Hopper, with pages of bfloat16 or float8, heads of 64 or 128 numbers
    and queries of bfloat16 (their `dtype`)."""
    if dispatch.wanted(implementation) != dispatch.MOSAIC or dtype != jnp.bfloat16:
        return False
    from pallas_kernels.append import heads_sm90

    return heads_sm90.supports(qkv, k_YKSH)


def append_heads(
    qkv: PartialSum,
    rotation: tuple[jax.Array, jax.Array] | None,
    slots_T: jax.Array,
    k_YKSH: Pages,
    v_YKSH: Pages,
) -> tuple[jax.Array, Pages, Pages]:
    """From the product of a call's tokens to their queries, and to their keys and values in the pages.

    Means, in float32, with q, k and v rounded to bfloat16 before the rotation and after it, and then k and v to float8
    if the pages are in it:

        q, k, v     = split(qkv.total()) into N, K and K heads
        first, last = halves of each head of q and k
        rotated     = (first * cos - last * sin, last * cos + first * sin)
        pages[slots[t] // PAGE, :, slots[t] % PAGE] = rotated k, v

    Args:
      qkv: [T, (N + 2·K) · H], without rows or weights of its own, for which `takes_heads` is true.
      rotation: cos and sin, float32 [T, H/2]; None to rotate nothing.
      slots_T: see `pages.slots`; nothing is written for negative ones.
      k_YKSH, v_YKSH: pools, updated in place if donated.

    Returns:
      The rotated queries [T, N, H], and the pools. A token's bits depend on itself alone.
    """
    from pallas_kernels.append import heads_sm90

    return heads_sm90.append_heads(qkv, rotation, slots_T, k_YKSH, v_YKSH)
