"""Attention over pages with one query token per row, for Hopper: Pallas Mosaic GPU. See ../RECORD.md.

A warp streams its tiles of one key/value head from memory to registers (`warp_sm90`). Nothing waits until the end, when
the warps of a block, and then the blocks of a cluster, merge their results (`gather_sm90`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.attention.decode import combine_sm90, gather_sm90, split, warp_sm90
from pallas_kernels.attention.decode.gather_sm90 import QUERIES, Block
from pallas_kernels.attention.decode.warp_sm90 import DecodePlan
from pallas_kernels.pages import PAGE
from pallas_kernels.ptx import Value

plgpu: Any = mosaic_gpu  # JAX 0.10 has another interface: there, this module can only be imported
WIDTHS = 64  # head widths are multiples of this
_TILES = (16, 32, 64, 128)  # places that a warp computes at a time: parts of a page
_WARP_TILES = {64: 32}  # by width; RECORD.md has others
_WARP_TILE = 16
_MULTIPROCESSORS = 132  # of an H200: more blocks in clusters would only wait for each other
_FEW_WARPS, _MANY_WARPS = 4, 8  # of a block
_IN_CLUSTER = 4096  # places that one cluster shares by default, so that nothing is left to combine


def decode(
    q_BNH: jax.Array,
    k_YKSH: jax.Array,
    v_YKSH: jax.Array,
    counts_B: jax.Array,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    table_BZ: jax.Array,
    starts_B: jax.Array | None = None,
    window: int | None = None,
    splits: int | None = None,
    blocks: int | None = None,
    warps: int | None = None,
    warp_tile: int | None = None,
) -> jax.Array:
    """Softmax attention of each row's one query over the first `counts` places of its pages.

    Scores, softmax and sums are float32; the weights are rounded to bfloat16 for their product with the values. Places
    beyond a row's count have no influence, even if they hold NaN. The bits of a row depend neither on other rows nor,
    for given splits, blocks and warps, on the number of pages, nor on where these lie.

    Args:
      q_BNH: bfloat16; query n uses key/value head n // (N / K).
      k_YKSH, v_YKSH: bfloat16, in pages, S = `pages.PAGE`; H a multiple of 64.
      counts_B: int32, 0 to Z · S: places in use.
      sinks_N: bfloat16 or float32, one logit per query head that takes its share of the softmax and has no value.
      scale: scores are multiplied by it.
      table_BZ: int32, each row's pages.
      starts_B: int32, each row's first place that is seen, less than a page; None for 0.
      window: how many places a row sees at most, with `starts_B`.
      splits: clusters that share a row's pages; by default from B, K and Z.
      blocks: per cluster: 1, 2, 4 or 8; by default from B, K and Z.
      warps: per block: 4 or 8; by default from B, K and the window.
      warp_tile: places that a warp computes at a time: 16, 32, 64 or 128; by default from H.

    Returns:
      [B, N, H] bfloat16; 0 for a row whose count is 0.

    Raises:
      ValueError: dtypes, widths or settings that the kernel does not support.
    """
    B, N, H = q_BNH.shape
    K, Z = k_YKSH.shape[1], table_BZ.shape[1]
    is_folded = starts_B is not None and window is not None and window <= PAGE
    places = PAGE if is_folded else PAGE * Z
    dtypes = {x.dtype for x in (q_BNH, k_YKSH, v_YKSH)}
    if dtypes != {jnp.dtype(jnp.bfloat16)}:
        raise ValueError(f"mosaic decode attention takes bfloat16, found {', '.join(sorted(map(str, dtypes)))}")
    if sinks_N is not None and sinks_N.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"mosaic decode attention takes sinks of bfloat16 or float32, found {sinks_N.dtype}")
    if H % WIDTHS:
        raise ValueError(f"mosaic decode attention takes head widths that are multiples of {WIDTHS}, found {H}")
    if N % K:
        raise ValueError(f"{N} query heads cannot share {K} key/value heads: not a multiple")
    warp_tile = _WARP_TILES.get(H, _WARP_TILE) if warp_tile is None else warp_tile
    if warp_tile not in _TILES:
        raise ValueError(f"a warp's tile has 16, 32, 64 or 128 places, found {warp_tile}")
    if blocks not in (None, 1, 2, 4, 8):
        raise ValueError(f"a cluster has 1, 2, 4 or 8 blocks, found {blocks}")
    if warps not in (None, _FEW_WARPS, _MANY_WARPS):
        raise ValueError(f"a block has {_FEW_WARPS} or {_MANY_WARPS} warps, found {warps}")
    if splits is None or blocks is None:
        default_splits, default_blocks, default_warps = _deal(B * K, places, warp_tile, is_folded)
        splits = default_splits if splits is None else splits
        blocks = default_blocks if blocks is None else blocks
        warps = default_warps if warps is None else warps
    warps = _FEW_WARPS if warps is None else warps
    return _decode(
        q_BNH,
        k_YKSH,
        v_YKSH,
        counts_B,
        sinks_N,
        table_BZ,
        starts_B,
        plan=DecodePlan(
            keys=K,
            group=N // K,
            width=H,
            places=places,
            splits=splits,
            blocks=blocks,
            warps=warps,
            warp_tile=warp_tile,
            scale=scale,
            sinks=None if sinks_N is None else sinks_N.dtype.name,
            pages=Z,
            windowed=starts_B is not None,
            folded=is_folded,
        ),
    )


def _deal(rows: int, places: int, warp_tile: int, is_folded: bool) -> tuple[int, int, int]:
    """How to deal a row's `places`, if there are `rows` (B · K) of them: splits, their blocks, and a block's warps.

    Few places lower the first two, but never below one tile per block. So among numbers of places up to `_IN_CLUSTER`,
    and among those beyond it, the number changes no bit.
    """
    wanted = split.choose(rows, places, _FEW_WARPS * warp_tile)
    if wanted > ptx.MOST_BLOCKS and places > _IN_CLUSTER:
        return wanted, 1, _FEW_WARPS
    room = max(1, _MULTIPROCESSORS // rows)
    # If no multiprocessor has a second block, more warps have more loads in flight, and take fewer turns.
    warps = _MANY_WARPS if rows <= _MULTIPROCESSORS and not is_folded else _FEW_WARPS
    needed = -(-places // (warps * warp_tile))
    return 1, min(ptx.MOST_BLOCKS, 1 << (room.bit_length() - 1), 1 << (needed - 1).bit_length()), warps


@partial(jax.jit, static_argnames="plan")
def _decode(
    q_BNH: jax.Array,
    k_YKSH: jax.Array,
    v_YKSH: jax.Array,
    counts_B: jax.Array,
    sinks_N: jax.Array | None,
    table_BZ: jax.Array,
    starts_B: jax.Array | None,
    *,
    plan: DecodePlan,
) -> jax.Array:
    B, N, H = q_BNH.shape
    K, G, J = plan.keys, plan.group, plan.splits
    # What is missing is not read, but something has to be passed for it.
    sinks, starts = (counts_B if array is None else array for array in (sinks_N, starts_B))
    results = ptx.launch(
        partial(decode_attention, plan),
        {
            "q": q_BNH,
            "k": k_YKSH,
            "v": v_YKSH,
            "counts": counts_B,
            "sinks": sinks,
            "table": table_BZ,
            "starts": starts,
        },
        {
            "out": jax.ShapeDtypeStruct((B, K, J, G, H), q_BNH.dtype if J == 1 else jnp.float32),
            "lse": jax.ShapeDtypeStruct((B, K, J, G), jnp.float32),
        },
        {"row": B, "head": K, "queries": -(-G // QUERIES), "part": J},
        {
            "memory": plgpu.SMEM((plan.warps * plan.warp_bytes // 4,), jnp.float32),
            "mailbox": plgpu.SMEM((6 * plan.float4s if plan.blocks > 1 else 4,), jnp.float32),
            "mbarrier": plgpu.SMEM((4,), jnp.float32),
        },
        cluster=plan.blocks,
        warpgroups=None if plan.warps == _FEW_WARPS else plan.warps // 4,
    )
    out_BKJGH, lse_BKJG = results["out"], results["lse"]
    if J == 1:
        return out_BKJGH.reshape(B, N, H)
    if plan.folded:
        counts_B = jnp.minimum(counts_B, plan.places)
    return combine_sm90.combine(out_BKJGH, lse_BKJG, counts_B, sinks_N, tile=plan.tile)


def decode_attention(
    plan: DecodePlan,
    *,
    q: Value,
    k: Value,
    v: Value,
    counts: Value,
    sinks: Value,
    table: Value,
    starts: Value,
    out: Value,
    lse: Value,
    memory: Value,
    mailbox: Value,
    mbarrier: Value,
    row: Value,
    head: Value,
    queries: Value,
    part: Value,
) -> None:
    """One thread of a block: up to 16 queries of a group, and the cluster's part of the places.

    All first loads begin before anything waits but for the table's first entries; with a single split, they do not even
    wait for the count.
    """
    block = Block(row, head, ptx.mul(queries, QUERIES), part, ptx.cluster_rank(plan.blocks))
    thread = utils.thread_idx()
    at = warp_sm90.Thread(block, arith.shrui(thread, ptx.const(5)), arith.andi(thread, ptx.const(31)))
    stream = warp_sm90.CacheStream(plan, k, v, table, at, warp_sm90.run(plan, counts, starts, at))
    a = warp_sm90.load_queries(plan, q, at)
    loaded = warp_sm90.Loaded.of(stream)
    fours = gather_sm90.float4s(plan, sinks, block)
    gather_sm90.prepare(plan, mbarrier)  # while the loads are under way
    ptx.sync_warp()  # keeps ptxas from delaying these loads
    softmax = warp_sm90.attend(stream, a, loaded)
    gather_sm90.keep(plan, ptx.shared_offset(memory, at.warp, plan.warp_bytes), at.lane, *softmax)
    for four, each in zip(fours, gather_sm90.gather(plan, memory, mailbox, mbarrier, block, fours), strict=True):
        gather_sm90.write(plan, out, lse, block, four, *each)
