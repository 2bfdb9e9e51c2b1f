"""Scaled dot-product attention, over keys and values of the same call or in pages."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import dispatch, pages
from pallas_kernels.attention import paged, reference
from pallas_kernels.fp8_pages import Fp8Pages, Pages
from pallas_kernels.partial_sum import PartialSum


def attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
    implementation: str = dispatch.AUTO,
) -> jax.Array:
    """Causal attention with grouped queries, sinks and sliding windows, which can be differentiated.

    Means, for a query head n that uses key/value head k = n // (N / K), float32 inside:

        seen[t, s]  = 0 <= k_positions[s] <= q_positions[t] < k_positions[s] + window
        scores[t]   = where(seen[t], q[t, n] · k[k, :] * scale, -inf)
        weights[t]  = softmax(concatenate(scores[t], sinks[n]))[:-1]       (0 where nothing is seen and no sink is)
        out[t, n]   = Σ_s weights[t, s] * v[k, s]

    Args:
      q_BTNH: queries.
      k_BKSH, v_BKSH: keys and values; N is a multiple of K. Those that no query of the call sees have no influence,
        even if they are NaN.
      q_positions_BT, k_positions_BS: int32 position of each query and key in its sequence; negative is padding, whose
        result is 0.
      sinks_N: one logit per query head that takes its share of the softmax and has no value; None for no sinks.
      scale: scores are multiplied by it.
      window: how many positions a query sees, its own included; None for all up to its own.
      implementation: "auto" or "xla".

    Returns:
      [B, T, N, H], of the queries' dtype. Products take operands in the given dtypes and accumulate in float32.

    Raises:
      ValueError: another implementation; or N is not a multiple of K.
    """
    N, K = q_BTNH.shape[2], k_BKSH.shape[1]
    if N % K:
        raise ValueError(f"{N} query heads cannot share {K} key/value heads: not a multiple")
    run = dispatch.choose("attention", implementation, {dispatch.XLA: reference.dense})
    return run(q_BTNH, k_BKSH, v_BKSH, q_positions_BT, k_positions_BS, sinks_N, scale=scale, window=window)


def attention_over_pages(
    q_BTNH: jax.Array,
    k_YKSH: Pages,
    v_YKSH: Pages,
    table_BZ: jax.Array,
    q_positions_BT: jax.Array,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
    implementation: str = dispatch.AUTO,
) -> jax.Array:
    """`attention` over keys and values in pages, which those of the call's own tokens have been written to before.

    Means `attention` over all positions of each row, of which position p lies in page `table[b, p // PAGE]`, at place
    `p % PAGE`. A query sees positions max(0, p - window + 1) … p. Neither places that no query of the call sees nor
    page 0 have any influence, even if they hold NaN.

    Args:
      q_BTNH: queries.
      k_YKSH, v_YKSH: pools of pages, S = `pages.PAGE`; N is a multiple of K. `Fp8Pages` stand for their numbers in the
        queries' dtype.
      table_BZ: int32, each row's pages. Entries that hold nothing that is seen may be any page, such as 0.
      q_positions_BT: int32, less than Z · PAGE; negative is padding, whose result is 0. With T > 1, a row's positions
        are adjacent, with padding before and after them.
      sinks_N, scale, window: as in `attention`.
      implementation: "auto", "xla", "mosaic" (queries in bfloat16, pages too or in float8), or "triton" (T = 1, no
        float8).

    Returns:
      [B, T, N, H], of the queries' dtype. A row's bits depend on its own queries, positions and the sizes of the call
      only, and not on which pages it has. With "mosaic" and T = 1, they do not depend on B and Z either.

    Raises:
      ValueError: an unknown implementation, or one that does not support these operands; N is not a multiple of K; or
        pages of another size.
    """
    _check_pages(q_BTNH, k_YKSH)
    B, T, N, H = q_BTNH.shape
    if T > 1:
        tiles = pages.Tiles.of(q_positions_BT)
        operands = q_BTNH.reshape(1, B * T, N, H), k_YKSH, v_YKSH, table_BZ, tiles, sinks_N
        out_1TNH = packed_attention_over_pages(*operands, scale=scale, window=window, implementation=implementation)
        return out_1TNH.reshape(B, T, N, H)
    available: dict[str, Callable[..., jax.Array]] = {dispatch.XLA: paged.rows}
    wanted = dispatch.wanted(implementation)
    if wanted == dispatch.TRITON and not isinstance(k_YKSH, Fp8Pages):
        from pallas_kernels.attention.decode import triton

        available[wanted] = partial(_decode_pages, triton.decode)
    elif wanted == dispatch.MOSAIC and q_BTNH.dtype == jnp.bfloat16 and _are_read(k_YKSH):
        from pallas_kernels.attention.decode import mosaic_sm90 as decode

        if H % decode.WIDTHS == 0:
            available[wanted] = partial(_decode_pages, decode.decode)
    run = dispatch.choose("attention", implementation, available)
    return run(q_BTNH, k_YKSH, v_YKSH, table_BZ, q_positions_BT, sinks_N, scale=scale, window=window)


def _are_read(k_YKSH: Pages) -> bool:
    """Whether Hopper's decode kernel reads such pages."""
    return isinstance(k_YKSH, Fp8Pages) or k_YKSH.dtype == jnp.bfloat16


def _decode_pages(
    kernel: Callable[..., jax.Array],
    q_B1NH: jax.Array,
    k_YKSH: Pages,
    v_YKSH: Pages,
    table_BZ: jax.Array,
    q_positions_B1: jax.Array,
    sinks_N: jax.Array | None,
    *,
    scale: float,
    window: int | None,
) -> jax.Array:
    counts_B, seen = _seen(table_BZ, q_positions_B1[:, 0], window)
    return kernel(q_B1NH[:, 0], k_YKSH, v_YKSH, counts_B, sinks_N, scale=scale, **seen)[:, None]


def _seen(table_BZ: jax.Array, positions_B: jax.Array, window: int | None) -> tuple[jax.Array, dict[str, Any]]:
    """How many places of which pages the kernels' rows see, and from which place on.

    It is the same in all layers of a kind, so XLA computes it once a step.
    """
    places = table_BZ.shape[1] * pages.PAGE
    if window is None or window >= places:
        return jnp.clip(positions_B + 1, 0, places), {"table_BZ": table_BZ, "starts_B": None, "window": None}
    table_BZ, starts_B, counts_B = pages.window(table_BZ, positions_B, window)
    return counts_B, {"table_BZ": table_BZ, "starts_B": starts_B, "window": window}


def takes_product(
    tokens: int, k_YKSH: Pages, *, dtype: DTypeLike = jnp.bfloat16, implementation: str = dispatch.AUTO
) -> bool:
    """Whether `append_and_attend` has a kernel here: on Hopper, one token per row, heads of 64·i numbers, queries of
    bfloat16 (their `dtype`), and pages of bfloat16 or float8."""
    if tokens != 1 or dispatch.wanted(implementation) != dispatch.MOSAIC:
        return False
    if dtype != jnp.bfloat16 or not _are_read(k_YKSH):
        return False
    from pallas_kernels.attention.decode import mosaic_sm90

    return k_YKSH.shape[-1] % mosaic_sm90.WIDTHS == 0


def append_and_attend(
    qkv: PartialSum,
    rotation: tuple[jax.Array, jax.Array] | None,
    positions_B: jax.Array,
    k_YKSH: Pages,
    v_YKSH: Pages,
    table_BZ: jax.Array,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
    scales: tuple[jax.Array, jax.Array] | None = None,
    epsilon: float = 0.0,
) -> tuple[jax.Array, Pages, Pages]:
    """From the qkv product of one token per row to its attention, in one kernel, which also writes to the pages.

    Means, in float32, with q, k and v rounded to bfloat16 before the rotation and after it, and then k and v to float8
    if the pages are in it:

        q, k, v     = split(qkv.total()) into N, K and K heads
        q, k        = each head / sqrt(mean(head²) + epsilon) * its scale, rounded again, if there are scales
        first, last = halves of each head of q and k
        rotated     = (first * cos - last * sin, last * cos + first * sin)
        pages[table[b, positions[b] // PAGE], :, positions[b] % PAGE] = rotated k, v
        out         = attention_over_pages(rotated q, …)

    Args:
      qkv: [B, (N + 2·K) · H], without rows or weights of its own.
      rotation: cos and sin, float32 [B, H/2]; None to rotate nothing.
      positions_B: int32, less than Z · PAGE; nothing is written for negative ones, whose result is 0.
      k_YKSH, v_YKSH: pools for which `takes_product` is true; updated in place if donated. No row sees a place that
        another one writes to.
      table_BZ: int32, each row's pages.
      sinks_N, scale, window: as in `attention`.
      scales, epsilon: of norms of each query head and of each key head, [H] of one floating dtype, bfloat16 or float32.

    Returns:
      [B, N, H], and the pools. A row's bits do not depend on B and Z, either.
    """
    from pallas_kernels.attention.decode import mosaic_sm90

    slots_B = pages.slots(table_BZ, positions_B[:, None])[:, 0]
    tokens = mosaic_sm90.NewTokens(qkv, rotation, slots_B, scales, epsilon)
    counts_B, seen = _seen(table_BZ, positions_B, window)
    return mosaic_sm90.decode_newest(tokens, k_YKSH, v_YKSH, counts_B, sinks_N, scale=scale, **seen)


def packed_attention_over_pages(
    q_1TNH: jax.Array,
    k_YKSH: Pages,
    v_YKSH: Pages,
    table_BZ: jax.Array,
    tiles: pages.Tiles,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
    implementation: str = dispatch.AUTO,
) -> jax.Array:
    """`attention_over_pages` for a call whose tokens are of several rows, one after the other.

    Args:
      q_1TNH: queries.
      k_YKSH, v_YKSH, table_BZ: as in `attention_over_pages`.
      tiles: which rows the tokens are of, and their positions.
      sinks_N, scale, window: as in `attention`.
      implementation: "auto", "xla" or "mosaic" (queries in bfloat16, pages too or in float8).

    Returns:
      [1, T, N, H], of the queries' dtype; 0 for tokens in no tile.

    Raises:
      ValueError: as `attention_over_pages`.
    """
    _check_pages(q_1TNH, k_YKSH)
    available: dict[str, Callable[..., jax.Array]] = {dispatch.XLA: paged.packed}
    if dispatch.wanted(implementation) == dispatch.MOSAIC:
        from pallas_kernels.attention.prefill import mosaic_sm90 as prefill

        if prefill.refused(q_1TNH[0], k_YKSH, v_YKSH, sinks_N, scale=scale) is None:
            available[dispatch.MOSAIC] = prefill.prefill
    run = dispatch.choose("attention", implementation, available)
    return run(q_1TNH[0], k_YKSH, v_YKSH, table_BZ, tiles, sinks_N, scale=scale, window=window)[None]


def _check_pages(q_BTNH: jax.Array, k_YKSH: Pages) -> None:
    N, (K, S) = q_BTNH.shape[2], k_YKSH.shape[1:3]
    if N % K:
        raise ValueError(f"{N} query heads cannot share {K} key/value heads: not a multiple")
    if S != pages.PAGE:
        raise ValueError(f"a page has {pages.PAGE} positions, found {S}")
