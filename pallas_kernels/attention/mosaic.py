"""Attention of one query token a row over a cache, on Hopper: Pallas Mosaic GPU, JAX 0.11 and newer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.attention import mosaic_combine, split

plgpu: Any = mosaic_gpu  # whose interface was another in JAX 0.10, where this module can be imported only
WIDTHS = 64  # head widths are multiples of this: what a swizzled row holds, and the rows of a wgmma
EIGHT = 8  # queries of a group are padded to multiples of this, the columns of a wgmma
TILE = 128  # places that are multiplied at a time
STAGES = 3  # tiles of a program in flight


def decode(
    q_BNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    counts_B: jax.Array,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    splits: int | None = None,
    tile: int = TILE,
    stages: int = STAGES,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention of each row's one query over the first `counts` places of its cache, in any order.

    Scores, softmax and sums are float32; the weights are rounded to bfloat16 for their product with the values. Beyond
    a row's count nothing is read but the rest of its last tile, which has no influence, not even NaN. The bits of a row
    do not depend on other rows.

    Args:
      q_BNH: bfloat16; query n uses key/value head n // (N / K).
      k_BKSH, v_BKSH: bfloat16, H a multiple of 64.
      counts_B: int32, 0 to S: places in use.
      sinks_N: a logit of each query head that takes its share of the softmax and has no value.
      scale: what scores are multiplied with.
      splits: programs that share a row's cache; by default from B, K and S.
      tile: places multiplied at a time, a multiple of 64.
      stages: tiles of a program in flight.
      interpret: run on a CPU.

    Returns:
      [B, N, H] bfloat16; 0 for a row whose count is 0.

    Raises:
      ValueError: dtypes, widths or tiles that the kernel does not have.
    """
    B, N, H = q_BNH.shape
    K, S = k_BKSH.shape[1:3]
    dtypes = {x.dtype for x in (q_BNH, k_BKSH, v_BKSH)}
    if dtypes != {jnp.dtype(jnp.bfloat16)}:
        raise ValueError(f"mosaic decode attention takes bfloat16, found {', '.join(sorted(map(str, dtypes)))}")
    if H % WIDTHS:
        raise ValueError(f"mosaic decode attention takes head widths that are multiples of {WIDTHS}, found {H}")
    if N % K:
        raise ValueError(f"{N} query heads cannot share {K} key/value heads: not a multiple")
    if tile % WIDTHS:
        raise ValueError(f"a tile is a multiple of {WIDTHS} places, found {tile}")
    splits = split.choose(B * K, S, tile) if splits is None else splits
    return _decode(
        q_BNH,
        k_BKSH,
        v_BKSH,
        counts_B,
        sinks_N,
        scale=scale,
        splits=splits,
        tile=tile,
        stages=stages,
        interpret=interpret,
    )


@partial(jax.jit, static_argnames=("scale", "splits", "tile", "stages", "interpret"))
def _decode(
    q_BNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    counts_B: jax.Array,
    sinks_N: jax.Array | None,
    *,
    scale: float,
    splits: int,
    tile: int,
    stages: int,
    interpret: bool,
) -> jax.Array:
    B, N, H = q_BNH.shape
    K = k_BKSH.shape[1]
    G = N // K
    M = -(-G // EIGHT) * EIGHT  # queries of a program; beyond G they are other groups' or zeros, and thrown away
    dtype, f32 = q_BNH.dtype, jnp.float32
    whole = splits == 1  # a program has all of its rows' softmax, with the sinks
    sinks = (sinks_N.astype(f32),) if whole and sinks_N is not None else ()
    # What lies on threads: arrays [places or H, queries] as wgmma leaves them, and one number a query.
    matrix, transposed, vector = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_TRANSPOSED, plgpu.Layout.WGMMA.reduce(0)

    def body(q_ref: Any, k_ref: Any, v_ref: Any, counts_ref: Any, *refs: Any, **scratch: Any) -> None:
        *sinks_ref, out_ref, lse_ref = refs
        row, head, part = (lax.axis_index(name) for name in ("row", "head", "part"))
        count = counts_ref[row]
        first, tiles = split.run(count, part, tile=tile, splits=splits)
        work = partial(attend, q_ref, k_ref, v_ref, sinks_ref, out_ref, lse_ref, (row, head, part), count, first, tiles)
        if whole:
            work(**scratch)
        else:
            pl.when(tiles > 0)(lambda: work(**scratch))

    def attend(
        q_ref: Any,
        k_ref: Any,
        v_ref: Any,
        sinks_ref: Any,
        out_ref: Any,
        lse_ref: Any,
        program: tuple[jax.Array, jax.Array, jax.Array],
        count: jax.Array,
        first: jax.Array,
        tiles: jax.Array,
        *,
        queries_smem: Any,
        q_smem: Any,
        k_smem: Any,
        v_smem: Any,
        p_smem: Any,
        out_smem: Any,
        q_loaded: Any,
        k_loaded: Any,
        v_loaded: Any,
    ) -> None:
        row, head, part = program

        def load(ref: Any, smem: Any, loaded: Any, step: jax.Array | int, slot: jax.Array | int) -> None:
            places = pl.ds(pl.multiple_of((first + step) * tile, tile), tile)  # beyond S they come as zeros
            plgpu.copy_gmem_to_smem(ref.at[row, head, places], smem.at[slot], loaded.at[slot])

        load_k, load_v = partial(load, k_ref, k_smem, k_loaded), partial(load, v_ref, v_smem, v_loaded)
        plgpu.copy_gmem_to_smem(q_ref.at[row, pl.ds(head * G, M)], queries_smem, q_loaded)
        for stage in range(stages):

            @pl.when(stage < tiles)
            def _(stage: int = stage) -> None:
                load_k(stage, stage)
                load_v(stage, stage)

        # A group starts at any query, a swizzled copy only at multiples of eight: so by way of plain memory.
        plgpu.barrier_wait(q_loaded)
        q_smem.transpose((1, 0))[...] = plgpu.load(queries_smem.transpose((1, 0)), layout=transposed, optimized=False)
        plgpu.commit_smem()

        def step(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            maximum_M, total_tM, out_HM = carry
            slot = lax.rem(index, jnp.int32(stages))
            left = count - (first + index) * tile
            plgpu.barrier_wait(k_loaded.at[slot])
            scores_tM = _product(k_smem.at[slot], q_smem.transpose((1, 0)), (tile, M))
            place_tM = plgpu.broadcasted_iota(jnp.int32, (tile, M), 0, layout=matrix)
            scores_tM = jnp.where(place_tM < left, scores_tM * (scale * split.LOG2_E), -jnp.inf)
            new_maximum_M = jnp.maximum(maximum_M, scores_tM.max(axis=0))

            @pl.when(index + stages < tiles)
            def _() -> None:
                load_k(index + stages, slot)

            rescale_M = jnp.exp2(maximum_M - new_maximum_M)
            p_tM = jnp.exp2(scores_tM - lax.broadcast_in_dim(new_maximum_M, (tile, M), [1]))
            # Summed over places at the very end: across warps that takes time.
            total_tM = total_tM * lax.broadcast_in_dim(rescale_M, (tile, M), [1]) + p_tM
            p_smem.transpose((1, 0))[...] = p_tM.astype(dtype)
            plgpu.barrier_wait(v_loaded.at[slot])

            @pl.when(left < tile)
            def _() -> None:  # a weight of 0 does not silence NaN
                v_tH = plgpu.load(v_smem.at[slot], layout=matrix)
                place_tH = plgpu.broadcasted_iota(jnp.int32, (tile, H), 0, layout=matrix)
                v_smem[slot] = jnp.where(place_tH < left, v_tH, jnp.zeros_like(v_tH))

            plgpu.commit_smem()
            new_HM = _product(v_smem.at[slot].transpose((1, 0)), p_smem.transpose((1, 0)), (H, M))
            out_HM = out_HM * lax.broadcast_in_dim(rescale_M, (H, M), [1]) + new_HM

            @pl.when(index + stages < tiles)
            def _() -> None:
                load_v(index + stages, slot)

            return new_maximum_M, total_tM, out_HM

        start = (
            plgpu.layout_cast(jnp.full((M,), -jnp.inf, f32), vector),
            plgpu.layout_cast(jnp.zeros((tile, M), f32), matrix),
            plgpu.layout_cast(jnp.zeros((H, M), f32), matrix),
        )
        maximum_M, total_tM, out_HM = lax.fori_loop(0, tiles, step, start)
        total_M = total_tM.sum(axis=0)
        if sinks_ref:
            query_M = plgpu.broadcasted_iota(jnp.int32, (M,), 0, layout=vector)
            sinks_M = plgpu.layout_cast(jnp.full((M,), 0, f32), vector)
            for g in range(G):
                sinks_M = jnp.where(query_M == g, sinks_ref[0][head * G + g] * split.LOG2_E, sinks_M)
            sinks_M = jnp.maximum(sinks_M, split.FLOOR)
            new_maximum_M = jnp.maximum(maximum_M, sinks_M)
            rescale_M = jnp.exp2(maximum_M - new_maximum_M)
            total_M = total_M * rescale_M + jnp.exp2(sinks_M - new_maximum_M)
            out_HM = out_HM * lax.broadcast_in_dim(rescale_M, (H, M), [1])
        elif whole:
            total_M = jnp.where(total_M == 0, 1.0, total_M)  # a row with nothing in use
        out_HM = out_HM / lax.broadcast_in_dim(total_M, (H, M), [1])
        out_smem.transpose((1, 0))[...] = plgpu.layout_cast(out_HM, transposed).astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, G)], out_ref.at[row, head, part])
        if not whole:
            lse_ref[row, head, part] = maximum_M + jnp.log2(total_M)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    swizzled = (plgpu.TilingTransform((EIGHT, WIDTHS)), plgpu.SwizzleTransform(WIDTHS * dtype.itemsize))
    out_dtype = dtype if whole else f32
    out_BKJGH, lse_BKJM = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((B, K, splits, G, H), out_dtype),
            jax.ShapeDtypeStruct((B, K, splits, M), f32),
        ),
        scratch_types={
            "queries_smem": plgpu.SMEM((M, H), dtype),
            "q_smem": plgpu.SMEM((M, H), dtype, transforms=swizzled),
            "k_smem": plgpu.SMEM((stages, tile, H), dtype, transforms=swizzled),
            "v_smem": plgpu.SMEM((stages, tile, H), dtype, transforms=swizzled),
            "p_smem": plgpu.SMEM((M, tile), dtype, transforms=swizzled),
            "out_smem": plgpu.SMEM((M, H), out_dtype),
            "q_loaded": plgpu.Barrier(),
            "k_loaded": plgpu.Barrier(num_barriers=stages),
            "v_loaded": plgpu.Barrier(num_barriers=stages),
        },
        grid=(B, K, splits),
        grid_names=("row", "head", "part"),
        compiler_params=plgpu.CompilerParams(
            # Warpgroup semantics search for layouts: minutes here, and without finding any.
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        kernel_name="decode_attention",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(q_BNH, k_BKSH, v_BKSH, counts_B, *sinks)
    if whole:
        return out_BKJGH.reshape(B, N, H)
    if interpret:
        return split.combine(out_BKJGH, lse_BKJM, counts_B, sinks_N, tile=tile, dtype=dtype)
    return mosaic_combine.combine(out_BKJGH, lse_BKJM, counts_B, sinks_N, tile=tile)


def _product(a: Any, b: Any, shape: tuple[int, int]) -> jax.Array:
    """a · b of matrices in shared memory, float32 in registers."""

    def multiply(out_ref: Any) -> jax.Array:
        plgpu.wgmma(out_ref, a, b)
        return out_ref[...]

    run: Callable[..., jax.Array] = pl.run_scoped
    return run(multiply, plgpu.ACC(shape, jnp.float32))
