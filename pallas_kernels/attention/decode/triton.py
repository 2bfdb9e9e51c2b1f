"""Attention over pages with one query token per row, for Ampere and Ada: Pallas Triton."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.attention.decode import split
from pallas_kernels.pages import PAGE

ROWS = 16  # the fewest rows that a product takes
TILES = (16, 32, 64, 128)  # places multiplied at a time: parts of a page
TILE = 64
WARPS = 4
STAGES = 3  # of Triton's software pipeline: tiles in flight
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


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
    tile: int = TILE,
    warps: int = WARPS,
    stages: int = STAGES,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention of each row's one query over the first `counts` places of its pages.

    Scores, softmax and sums are float32; the weights are rounded to the values' dtype for their product. Nothing beyond
    a row's count is read. The bits of a row depend neither on other rows nor, for given splits, on the number of pages,
    nor on where these lie.

    Args:
      q_BNH: bfloat16, float16 or float32 (whose products are not rounded); query n uses key/value head n // (N / K).
      k_YKSH, v_YKSH: of the queries' dtype, in pages, S = `pages.PAGE`.
      counts_B: int32, 0 to Z · S: places in use.
      sinks_N: one logit per query head that takes its share of the softmax and has no value.
      scale: scores are multiplied by it.
      table_BZ: int32, each row's pages.
      starts_B: int32, each row's first place that is seen, less than a page; None for 0.
      window: how many places a row sees at most, with `starts_B`; it changes nothing here.
      splits: programs that share a row's pages; by default from B, K and Z.
      tile: places multiplied at a time: 16, 32, 64 or 128.
      warps, stages: per program.
      interpret: run on a CPU.

    Returns:
      [B, N, H] of the queries' dtype; 0 for a row whose count is 0.

    Raises:
      ValueError: dtypes, head counts or tiles that the kernel does not support.
    """
    del window
    B, N, _ = q_BNH.shape
    K = k_YKSH.shape[1]
    if q_BNH.dtype not in DTYPES or not q_BNH.dtype == k_YKSH.dtype == v_YKSH.dtype:
        raise ValueError(
            "triton decode attention takes queries, keys and values of one dtype, bfloat16, float16 or float32, found "
            f"{q_BNH.dtype}, {k_YKSH.dtype} and {v_YKSH.dtype}"
        )
    if N % K:
        raise ValueError(f"{N} query heads cannot share {K} key/value heads: not a multiple")
    if tile not in TILES:
        raise ValueError(f"a tile has 16, 32, 64 or 128 places, found {tile}")
    splits = split.choose(B * K, PAGE * table_BZ.shape[1], tile) if splits is None else splits
    return _decode(
        q_BNH,
        k_YKSH,
        v_YKSH,
        counts_B,
        sinks_N,
        table_BZ,
        starts_B,
        scale=scale,
        splits=splits,
        tile=tile,
        warps=warps,
        stages=stages,
        interpret=interpret,
    )


@partial(jax.jit, static_argnames=("scale", "splits", "tile", "warps", "stages", "interpret"))
def _decode(
    q_BNH: jax.Array,
    k_YKSH: jax.Array,
    v_YKSH: jax.Array,
    counts_B: jax.Array,
    sinks_N: jax.Array | None,
    table_BZ: jax.Array,
    starts_B: jax.Array | None,
    *,
    scale: float,
    splits: int,
    tile: int,
    warps: int,
    stages: int,
    interpret: bool,
) -> jax.Array:
    B, N, H = q_BNH.shape
    K = k_YKSH.shape[1]
    G = N // K
    M, width = max(ROWS, pl.next_power_of_2(G)), max(ROWS, pl.next_power_of_2(H))  # sizes in kernels: powers of two
    dtype, f32 = q_BNH.dtype, jnp.float32
    whole = splits == 1  # each program computes its rows' whole softmax, with the sinks
    given = {"sinks": sinks_N if whole else None, "table": table_BZ, "starts": starts_B}
    given = {name: array for name, array in given.items() if array is not None}
    # By default float32 operands would be rounded to TensorFloat-32.
    multiply = partial(pltriton.dot, precision=jax.lax.Precision.HIGHEST if dtype == f32 else None)

    def body(q_ref: Any, k_ref: Any, v_ref: Any, counts_ref: Any, *refs: Any) -> None:
        *given_refs, out_ref, lse_ref = refs
        ref_of = dict(zip(given, given_refs, strict=True))
        row, head, part = (pl.program_id(axis) for axis in range(3))
        count = counts_ref[row]
        least = ref_of["starts"][row] if "starts" in ref_of else 0
        first, tiles = split.run(count, part, tile=tile, splits=splits)

        @pl.when(tiles >= (0 if whole else 1))
        def _() -> None:
            query_M, column_1H = jnp.arange(M), jnp.arange(width)[None]
            queries_M1 = head * G + query_M[:, None]
            mask_MH = (query_M[:, None] < G) & (column_1H < H)
            q_MH = pltriton.load(q_ref.at[row, queries_M1, column_1H], mask=mask_MH, other=0)

            def step(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                maximum_M, total_M, out_MH = carry
                place_s = (first + index) * tile + jnp.arange(tile)
                used_s = place_s < count
                if "starts" in ref_of:
                    used_s &= place_s >= least
                used_sH = used_s[:, None] & (column_1H < H)
                page = ref_of["table"][row, jax.lax.div((first + index) * tile, jnp.int32(PAGE))]
                inside_s = jax.lax.rem(place_s, jnp.full_like(place_s, PAGE))  # a tile lies within a page
                k_sH, v_sH = (
                    pltriton.load(ref.at[page, head, inside_s[:, None], column_1H], mask=used_sH, other=0)
                    for ref in (k_ref, v_ref)
                )
                scores_Ms = multiply(q_MH, k_sH, trans_b=True) * (scale * split.LOG2_E)
                scores_Ms = jnp.where(used_s[None], scores_Ms, -jnp.inf)
                new_maximum_M = jnp.maximum(maximum_M, scores_Ms.max(axis=1))
                rescale_M = jnp.exp2(maximum_M - new_maximum_M)
                p_Ms = jnp.exp2(scores_Ms - new_maximum_M[:, None])
                total_M = total_M * rescale_M + p_Ms.sum(axis=1)
                out_MH = out_MH * rescale_M[:, None] + multiply(p_Ms.astype(dtype), v_sH)
                return new_maximum_M, total_M, out_MH

            # With a window, a tile may have nothing that is seen: then the maximum must be finite.
            least_score = split.FLOOR if "starts" in ref_of else -jnp.inf
            start = jnp.full((M,), least_score, f32), jnp.zeros((M,), f32), jnp.zeros((M, width), f32)
            maximum_M, total_M, out_MH = jax.lax.fori_loop(0, tiles, step, start)
            if "sinks" in ref_of:
                sinks_M = pltriton.load(ref_of["sinks"].at[head * G + query_M], mask=query_M < G, other=0)
                sinks_M = jnp.maximum(sinks_M.astype(f32) * split.LOG2_E, split.FLOOR)
                new_maximum_M = jnp.maximum(maximum_M, sinks_M)
                rescale_M = jnp.exp2(maximum_M - new_maximum_M)
                total_M = total_M * rescale_M + jnp.exp2(sinks_M - new_maximum_M)
                out_MH = out_MH * rescale_M[:, None]
            elif whole or "starts" in ref_of:
                total_M = jnp.where(total_M == 0, 1, total_M)  # nothing is seen
            out_MH = (out_MH / total_M[:, None]).astype(out_ref.dtype)
            pltriton.store(out_ref.at[row, head, part, query_M[:, None], column_1H], out_MH, mask=mask_MH)
            if not whole:
                pltriton.store(lse_ref.at[row, head, part, query_M], maximum_M + jnp.log2(total_M))

    out_BKJGH, lse_BKJM = pl.pallas_call(
        body,
        out_shape=(
            jax.ShapeDtypeStruct((B, K, splits, G, H), dtype if whole else f32),
            jax.ShapeDtypeStruct((B, K, splits, M), f32),
        ),
        grid=(B, K, splits),
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=stages),
        name="decode_attention",
        interpret=interpret,
    )(q_BNH, k_YKSH, v_YKSH, counts_B, *given.values())
    if whole:
        return out_BKJGH.reshape(B, N, H)
    return split.combine(out_BKJGH, lse_BKJM, counts_B, sinks_N, tile=tile, dtype=dtype)
