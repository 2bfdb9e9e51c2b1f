"""Attention over a cache with many query tokens per row, for Hopper: Pallas Mosaic GPU, JAX 0.11 and newer.

Flash attention. A program has two warpgroups that compute, each for 64 queries of one head, and one that loads. The two
share blocks of keys and values: they take two heads of a group or, if a group has an odd number of heads, the two
halves of 128 queries. There are as many programs as multiprocessors; they take items of two times 64 queries in turn,
those with the most to read first.
"""

from collections import namedtuple
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.attention.prefill import schedule
from pallas_kernels.attention.prefill.core_sm90 import (
    COLUMNS,
    EIGHT,
    LOADER_REGISTERS,
    REGISTERS,
    ROWS,
    WARPGROUPS,
    WIDTHS,
    attend,
    barriers,
    broadcast,
    places_of,
    swizzled,
    zero_values,
)
from pallas_kernels.attention.prefill.schedule import QUERIES, STAGES, UNUSED

plgpu: Any = mosaic_gpu  # JAX 0.10 has another interface: there, this module can only be imported


def prefill(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`api.attention` over a cache, for any number of queries per row; the full matrix of scores never exists.

    Scores, softmax and sums are float32; the weights are rounded to bfloat16 for their product with the values. A tile
    of queries reads the blocks of the cache from the first to the last in which it sees anything. Places may lie in any
    order, but least is read if neighbours in the cache are neighbours in the sequence.

    Args:
      q_BTNH: bfloat16.
      k_BKSH, v_BKSH: bfloat16.
      q_positions_BT, k_positions_BS: int32; negative is padding.
      sinks_N: bfloat16 or float32 logits of the query heads.
      scale: scores are multiplied by it; more than 0.
      window: how many positions a query sees, its own included; None for all up to its own.
      interpret: run on a CPU.

    Returns:
      [B, T, N, H] bfloat16; 0 for padding, and for queries that see nothing.

    Raises:
      ValueError: what `refused` describes: other dtypes, widths or scales, or T or S that is not a multiple of 8.
    """
    if why := refused(q_BTNH, k_BKSH, v_BKSH, sinks_N, scale=scale):
        raise ValueError(f"mosaic prefill attention takes {why}")
    operands = q_BTNH, k_BKSH, v_BKSH, q_positions_BT, k_positions_BS, sinks_N
    return _prefill(*operands, scale=scale, window=window, interpret=interpret)


def refused(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, sinks_N: jax.Array | None, *, scale: float
) -> str | None:
    """What `prefill` takes instead of these operands, for an error message; None if it takes them."""
    T, N, H = q_BTNH.shape[1:]
    K, S = k_BKSH.shape[1:3]
    dtypes = {x.dtype for x in (q_BTNH, k_BKSH, v_BKSH)}
    if dtypes != {jnp.dtype(jnp.bfloat16)}:
        return f"bfloat16, found {', '.join(sorted(map(str, dtypes)))}"
    if sinks_N is not None and sinks_N.dtype not in (jnp.bfloat16, jnp.float32):
        return f"sinks of bfloat16 or float32, found {sinks_N.dtype}"
    if H not in WIDTHS:
        return f"head widths of {', '.join(map(str, WIDTHS))}, found {H}"
    if N % K:
        return f"a multiple of the key/value heads as query heads, found {N} and {K}"
    if T % EIGHT or S % EIGHT:
        return f"queries and places in multiples of {EIGHT}, found {T} and {S}"
    if not scale > 0:
        return f"a scale of more than 0, found {scale}"
    return None


# What the kernel reads, named without axes; sinks may be missing.
_Operands = namedtuple("_Operands", "q k v q_positions k_positions spans unclean sinks", defaults=(None,))
# Shared memory and its barriers: one per warpgroup for q and out, STAGES for what is loaded block by block.
_Shared = namedtuple("_Shared", "q k v positions out q_loaded q_freed k_loaded v_loaded freed cleaned")


@partial(jax.jit, static_argnames=("scale", "window", "interpret"))
def _prefill(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    sinks_N: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    interpret: bool,
) -> jax.Array:
    B, _, N, H = q_BTNH.shape
    window = UNUSED if window is None else window
    places = places_of(H, window)
    group = N // k_BKSH.shape[1]
    heads = WARPGROUPS if group % WARPGROUPS == 0 else 1
    tile = QUERIES * WARPGROUPS // heads
    q_positions_BT, k_positions_BS, spans_BQ4, unclean_BZ = schedule.schedule(
        q_positions_BT, k_positions_BS, window=window, tile=tile, places=places
    )
    items = schedule.Items(rows=B, tiles=spans_BQ4.shape[1], heads=N, shared=heads, tile=tile)
    operands = _Operands(q_BTNH, k_BKSH, v_BKSH, q_positions_BT, k_positions_BS, spans_BQ4, unclean_BZ, sinks_N)
    return _run(items, group, operands, places, scale=scale, window=window, interpret=interpret)


def _run(
    items: schedule.Items, group: int, operands: _Operands, places: int, *, interpret: bool, **settings: Any
) -> jax.Array:
    q_BTNH = operands.q
    H, dtype = q_BTNH.shape[3], q_BTNH.dtype

    def body(*refs: Any, **scratch: Any) -> None:
        warpgroup, shared = lax.axis_index("warpgroup"), _Shared(**scratch)
        read, out_ref = _Operands(*refs[:-1]), refs[-1]

        @pl.when(warpgroup == WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
            _load(items, group, read, shared)

        @pl.when(warpgroup < WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS, action="increase")
            _compute(items, warpgroup, read, out_ref, shared, interpret=interpret, **settings)

    transforms = swizzled(H, dtype)
    scratch = _Shared(
        q=plgpu.SMEM((WARPGROUPS, QUERIES, H), dtype, transforms=transforms),
        k=plgpu.SMEM((STAGES, places, H), dtype, transforms=transforms),
        v=plgpu.SMEM((STAGES, places, H), dtype, transforms=transforms),
        positions=plgpu.SMEM((STAGES, places), jnp.uint32),
        out=plgpu.SMEM((WARPGROUPS, QUERIES, H), dtype, transforms=transforms),
        **barriers(of_queries=1, of_keys=2),  # keys and positions
    )
    run: Callable[..., jax.Array] = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q_BTNH.shape, dtype),
        scratch_types=scratch._asdict(),
        grid=(items.programs,),
        grid_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="prefill_attention",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return run(*(x for x in operands if x is not None))


def _load(items: schedule.Items, group: int, refs: _Operands, shared: _Shared) -> None:
    count = shared.k.shape[1]  # places of a block

    def item(turn: jax.Array, done: jax.Array) -> jax.Array:
        row, tile, head = items.find(turn)
        span = schedule.Span(done, *(refs.spans[row, tile, i] for i in range(4)))
        for warpgroup in range(WARPGROUPS):
            start, own_head = items.own(warpgroup, tile, head)
            pl.when(turn > 0)(partial(plgpu.barrier_wait, shared.q_freed.at[warpgroup]))
            source = refs.q.at[row, pl.ds(start, QUERIES), own_head]  # zeros beyond T, as beyond S
            plgpu.copy_gmem_to_smem(source, shared.q.at[warpgroup], shared.q_loaded.at[warpgroup])

        def load(block: jax.Array, _: None) -> None:
            slot, places = span.slot(block), pl.ds(pl.multiple_of(block * count, count), count)
            kv_head = lax.div(head, jnp.int32(group))
            used_before = done + block - span.first >= STAGES
            pl.when(used_before)(partial(plgpu.barrier_wait, shared.freed.at[slot]))
            k_loaded, v_loaded = shared.k_loaded.at[slot], shared.v_loaded.at[slot]
            plgpu.copy_gmem_to_smem(refs.k_positions.at[row, places], shared.positions.at[slot], k_loaded)
            plgpu.copy_gmem_to_smem(refs.k.at[row, kv_head, places], shared.k.at[slot], k_loaded)
            plgpu.copy_gmem_to_smem(refs.v.at[row, kv_head, places], shared.v.at[slot], v_loaded)

        lax.fori_loop(span.first, span.end, load, None)
        return span.done_after()

    done = lax.fori_loop(0, items.turns(), item, jnp.int32(0))
    for warpgroup in range(WARPGROUPS):
        plgpu.barrier_wait(shared.q_freed.at[warpgroup])
    for slot in range(STAGES):
        pl.when(slot < done)(partial(plgpu.barrier_wait, shared.freed.at[slot]))


def _compute(
    items: schedule.Items, warpgroup: jax.Array, refs: _Operands, out_ref: Any, shared: _Shared, **settings: Any
) -> None:
    def item(turn: jax.Array, done: jax.Array) -> jax.Array:
        row, tile, head = items.find(turn)
        start, head = items.own(warpgroup, tile, head)
        queries = pl.ds(start, QUERIES)
        span = schedule.Span(done, *(refs.spans[row, tile, i] for i in range(4)))
        out_tH = _attend(warpgroup, row, head, queries, span, refs, shared, **settings)
        out_smem = shared.out.at[warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous item's copy
        out_smem[...] = out_tH.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[row, queries, head])  # skips what is beyond T
        return span.done_after()

    lax.fori_loop(0, items.turns(), item, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _attend(
    warpgroup: jax.Array,
    row: jax.Array,
    head: jax.Array,
    queries: Any,
    span: schedule.Span,
    refs: _Operands,
    shared: _Shared,
    *,
    window: int,
    **settings: Any,
) -> jax.Array:
    """A warpgroup's part of an item: float32 [QUERIES, H]."""
    q_positions_t = plgpu.load(refs.q_positions.at[row, queries], layout=ROWS, optimized=False)

    def mask(block: jax.Array, scores_ts: jax.Array) -> jax.Array:
        k_positions_s = plgpu.load(shared.positions.at[span.slot(block)], layout=COLUMNS, optimized=False)
        # Unsigned, so the difference is huge for a later key, an unused place or padding.
        distance_ts = broadcast(q_positions_t, scores_ts.shape, 0) - broadcast(k_positions_s, scores_ts.shape, 1)
        return jnp.where(distance_ts < jnp.uint32(window), scores_ts, -jnp.inf)

    def clean(block: jax.Array, slot: jax.Array) -> None:
        def is_used(places: Any) -> jax.Array:
            positions_s = plgpu.load(shared.positions.at[slot, places], layout=ROWS, optimized=False)
            return positions_s != jnp.uint32(UNUSED)

        pl.when(refs.unclean[row, block] != 0)(lambda: zero_values(warpgroup, slot, shared, is_used))

    sink = None if refs.sinks is None else refs.sinks[head]
    return attend(warpgroup, span, shared.q.at[warpgroup], shared, sink, mask, clean, **settings)
