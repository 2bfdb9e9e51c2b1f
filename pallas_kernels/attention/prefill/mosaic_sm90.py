"""Attention over pages for the tokens of several rows, for Hopper: Pallas Mosaic GPU, JAX 0.11 and newer.

Flash attention. A program has two warpgroups that compute, each for 64 queries of one head, and one that loads. The two
share blocks of keys and values: they take two heads of a group or, if a group has an odd number of heads, the two
halves of 128 queries. There are as many programs as multiprocessors; they take items in turn, those with the most to
read first. An item is a tile of one row's queries in one or two heads, and its blocks are halves of the row's pages, or
whole ones. Positions need not be read, since a tile's are adjacent and a page's too.
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

from pallas_kernels.attention.prefill import by_row, rows_sm90, schedule
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
from pallas_kernels.attention.prefill.schedule import QUERIES, STAGES, UNLIMITED, TileItem, TileItems
from pallas_kernels.fp8_pages import Fp8Pages, Pages
from pallas_kernels.pages import PAGE, Tiles

plgpu: Any = mosaic_gpu  # JAX 0.10 has another interface: there, this module can only be imported


def prefill(
    q_TNH: jax.Array,
    k_YKSH: Pages,
    v_YKSH: Pages,
    table_BZ: jax.Array,
    tiles: Tiles,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`api.packed_attention_over_pages`; the full matrix of scores never exists.

    Scores, softmax and sums are float32; the weights are rounded to bfloat16 for their product with the values. A tile
    reads the pages from the first to the last in which it sees anything, in this order, so a query's bits depend on its
    row and its position alone.

    Args:
      q_TNH: bfloat16.
      k_YKSH, v_YKSH: bfloat16 pools of pages; or in float8, of which one row's at a time are expanded (`by_row`).
      table_BZ: int32.
      tiles: which rows the tokens are of, and their positions.
      sinks_N: bfloat16 or float32 logits of the query heads.
      scale: scores are multiplied by it; more than 0.
      window: how many positions a query sees, its own included; None for all up to its own.
      interpret: run on a CPU.

    Returns:
      [T, N, H] bfloat16; 0 for tokens in no tile, if there is any token.

    Raises:
      ValueError: what `refused` describes: other dtypes, widths or scales.
    """
    if why := refused(q_TNH, k_YKSH, v_YKSH, sinks_N, scale=scale):
        raise ValueError(f"mosaic prefill attention takes {why}")
    run = partial(_prefill, sinks_N=sinks_N, scale=scale, window=window, interpret=interpret)
    if isinstance(k_YKSH, Fp8Pages) and isinstance(v_YKSH, Fp8Pages):
        return by_row.attend(run, q_TNH, k_YKSH, v_YKSH, table_BZ, tiles, window=window)
    return run(q_TNH, k_YKSH, v_YKSH, table_BZ, tiles)


def refused(q_TNH: jax.Array, k_YKSH: Pages, v_YKSH: Pages, sinks_N: jax.Array | None, *, scale: float) -> str | None:
    """What `prefill` takes instead of these operands, for an error message; None if it takes them."""
    N, H = q_TNH.shape[1:]
    K = k_YKSH.shape[1]
    dtypes = {x.dtype for x in (q_TNH, k_YKSH, v_YKSH) if not isinstance(x, Fp8Pages)}
    if dtypes != {jnp.dtype(jnp.bfloat16)}:
        return f"bfloat16, found {', '.join(sorted(map(str, dtypes)))}"
    if sinks_N is not None and sinks_N.dtype not in (jnp.bfloat16, jnp.float32):
        return f"sinks of bfloat16 or float32, found {sinks_N.dtype}"
    if H not in WIDTHS:
        return f"head widths of {', '.join(map(str, WIDTHS))}, found {H}"
    if N % K:
        return f"a multiple of the key/value heads as query heads, found {N} and {K}"
    if not scale > 0:
        return f"a scale of more than 0, found {scale}"
    return None


# What the kernel reads, named without axes; sinks may be missing.
_Operands = namedtuple("_Operands", "q k v table items total sinks", defaults=(None,))
# Shared memory and its barriers: see `barriers`. `q` and `out` are also there as `q_boxes` and `out_boxes`: the same
# bytes as boxes that TMA copies from, or to, any row of global memory. (A copy of a tiled array begins at whole tiles.)
_Shared = namedtuple("_Shared", "q q_boxes k v out out_boxes q_loaded q_freed k_loaded v_loaded freed cleaned")


@partial(jax.jit, static_argnames=("scale", "window", "interpret"))
def _prefill(
    q_TNH: jax.Array,
    k_YKSH: jax.Array,
    v_YKSH: jax.Array,
    table_BZ: jax.Array,
    tiles: Tiles,
    sinks_N: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    interpret: bool,
) -> jax.Array:
    T, N, H = q_TNH.shape
    window = UNLIMITED if window is None else window
    places = places_of(H, window)
    group = N // k_YKSH.shape[1]
    heads = WARPGROUPS if group % WARPGROUPS == 0 else 1
    tile = QUERIES * WARPGROUPS // heads
    items_Q11, total_1 = schedule.tile_items(tiles, tokens=T, window=window, tile=tile, places=places)
    items = TileItems(tiles=items_Q11.shape[0], heads=N, shared=heads)
    operands = _Operands(q_TNH, k_YKSH, v_YKSH, table_BZ, items_Q11, total_1, sinks_N)
    return _run(items, group, operands, places, scale=scale, window=window, interpret=interpret)


def _run(
    items: TileItems, group: int, operands: _Operands, places: int, *, interpret: bool, **settings: Any
) -> jax.Array:
    q_TNH = operands.q
    H, dtype = q_TNH.shape[2], q_TNH.dtype
    transforms = swizzled(H, dtype)
    boxes = _boxes(H, transforms[0].tiling[1])

    def body(*refs: Any, **scratch: Any) -> None:
        for name in ("q", "out"):
            whole, parts = (scratch[name], scratch[name]) if interpret else scratch[name]
            scratch |= {name: whole, f"{name}_boxes": parts}
        warpgroup, shared = lax.axis_index("warpgroup"), _Shared(**scratch)
        read, out_ref = _Operands(*refs[:-1]), refs[-1]
        total = read.total[0]

        @pl.when(warpgroup == WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
            _load(items, total, group, read, shared, interpret=interpret)

        @pl.when(warpgroup < WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS, action="increase")
            _compute(items, total, warpgroup, read, out_ref, shared, interpret=interpret, **settings)

    def queries() -> Any:
        whole = plgpu.SMEM((WARPGROUPS, QUERIES, H), dtype, transforms=transforms)
        parts = plgpu.SMEM((WARPGROUPS, *boxes), dtype, transforms=transforms[1:])
        return whole if interpret else plgpu.RefUnion(whole, parts)

    scratch = {
        "q": queries(),
        "k": plgpu.SMEM((STAGES, places, H), dtype, transforms=transforms),
        "v": plgpu.SMEM((STAGES, places, H), dtype, transforms=transforms),
        "out": queries(),
        **barriers(of_queries=1 if interpret else boxes[0] * boxes[1]),
    }
    run: Callable[..., jax.Array] = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q_TNH.shape, dtype),
        scratch_types=scratch,
        grid=(items.programs,),
        grid_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="prefill_attention",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return run(*(x for x in operands if x is not None))


def _boxes(H: int, columns: int) -> tuple[int, int, int, int]:
    """A warpgroup's queries as boxes: how many along the queries and along H, and the size of each.

    `columns` is the width of a tile, of EIGHT rows. Tiles that lie one above the other, if there is nothing beside
    them, are one box.
    """
    across = H // columns
    rows = QUERIES if across == 1 else EIGHT
    return QUERIES // rows, across, rows, columns


def _copies(boxes_ref: Any, array: Any, start: jax.Array, head: jax.Array) -> list[tuple[Any, Any]]:
    """Pairs of a box in shared memory and its place in global memory, where a warpgroup's queries begin at `start`."""
    down, across, rows, columns = boxes_ref.shape
    return [
        (boxes_ref.at[i, j], array.at[pl.ds(start + rows * i, rows), head, pl.ds(columns * j, columns)])
        for i in range(down)
        for j in range(across)
    ]


def _load(
    items: TileItems,
    total: jax.Array,
    group: int,
    refs: _Operands,
    shared: _Shared,
    *,
    interpret: bool,
) -> None:
    count = shared.k.shape[1]  # places of a block
    per_page = PAGE // count

    def item(turn: jax.Array, done: jax.Array) -> jax.Array:
        index, head = items.find(turn)
        tile = TileItem.read(refs.items, index)
        span = tile.span(done)
        kv_head = lax.div(head, jnp.int32(group))
        for warpgroup in range(WARPGROUPS):
            start, own_head = items.own(warpgroup, tile.start, head)
            pl.when(turn > 0)(partial(plgpu.barrier_wait, shared.q_freed.at[warpgroup]))
            q_loaded = shared.q_loaded.at[warpgroup]
            if interpret:
                source = refs.q.at[pl.ds(start, QUERIES), own_head]
                plgpu.copy_gmem_to_smem(source, shared.q.at[warpgroup], q_loaded)
                continue
            for box, source in _copies(shared.q_boxes.at[warpgroup], refs.q, start, own_head):
                plgpu.copy_gmem_to_smem(source, box, q_loaded)  # zeros beyond T

        def page_of(block: jax.Array) -> jax.Array:
            return refs.table[tile.row, lax.div(jnp.minimum(block, span.end - 1), jnp.int32(per_page))]

        def load(block: jax.Array, page: jax.Array) -> jax.Array:
            following = page_of(block + 1)  # read before it is needed
            slot = span.slot(block)
            places = pl.ds(pl.multiple_of(lax.rem(block, jnp.int32(per_page)) * count, count), count)
            used_before = done + block - span.first >= STAGES
            pl.when(used_before)(partial(plgpu.barrier_wait, shared.freed.at[slot]))
            plgpu.copy_gmem_to_smem(refs.k.at[page, kv_head, places], shared.k.at[slot], shared.k_loaded.at[slot])
            plgpu.copy_gmem_to_smem(refs.v.at[page, kv_head, places], shared.v.at[slot], shared.v_loaded.at[slot])
            return following

        lax.fori_loop(span.first, span.end, load, page_of(span.first))
        return span.done_after()

    turns = items.turns(total)
    done = lax.fori_loop(0, turns, item, jnp.int32(0))
    for warpgroup in range(WARPGROUPS):
        pl.when(turns > 0)(partial(plgpu.barrier_wait, shared.q_freed.at[warpgroup]))
    for slot in range(STAGES):
        pl.when(slot < done)(partial(plgpu.barrier_wait, shared.freed.at[slot]))


def _compute(
    items: TileItems,
    total: jax.Array,
    warpgroup: jax.Array,
    refs: _Operands,
    out_ref: Any,
    shared: _Shared,
    *,
    interpret: bool,
    **settings: Any,
) -> None:
    def item(turn: jax.Array, done: jax.Array) -> jax.Array:
        index, head = items.find(turn)
        tile = TileItem.read(refs.items, index)
        start, head = items.own(warpgroup, tile.start, head)
        ahead = start - tile.start  # tokens of the tile before the warpgroup's
        span = tile.span(done)
        out_tH = _attend(warpgroup, head, ahead, tile, span, refs, shared, interpret=interpret, **settings)
        count = jnp.clip(tile.tokens - ahead, 0, QUERIES)
        _store(shared, warpgroup, out_tH.astype(out_ref.dtype), out_ref, start, head, count, interpret=interpret)
        is_first = True if items.shared > 1 else warpgroup == 0
        rows_sm90.zero(out_ref, tile.start + tile.tokens, head, jnp.where(is_first, tile.gap, 0), interpret=interpret)
        return span.done_after()

    lax.fori_loop(0, items.turns(total), item, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _attend(
    warpgroup: jax.Array,
    head: jax.Array,
    ahead: jax.Array,
    tile: TileItem,
    span: schedule.Span,
    refs: _Operands,
    shared: _Shared,
    *,
    window: int,
    **settings: Any,
) -> jax.Array:
    """A warpgroup's part of an item: float32 [QUERIES, H]; anything for queries beyond the tile's."""
    count = shared.k.shape[1]

    def mask(block: jax.Array, scores_ts: jax.Array) -> jax.Array:
        # Unsigned, so the difference is huge for a later key.
        first = (tile.position + ahead - block * count).astype(jnp.uint32)
        q_t = plgpu.broadcasted_iota(jnp.uint32, (QUERIES,), 0, layout=ROWS) + first
        k_s = plgpu.broadcasted_iota(jnp.uint32, (count,), 0, layout=COLUMNS)
        distance_ts = broadcast(q_t, scores_ts.shape, 0) - broadcast(k_s, scores_ts.shape, 1)
        return jnp.where(distance_ts < jnp.uint32(window), scores_ts, -jnp.inf)

    def clean(block: jax.Array, slot: jax.Array) -> None:
        first = block * count

        def is_used(places: Any) -> jax.Array:
            iota_s = plgpu.broadcasted_iota(jnp.int32, (QUERIES,), 0, layout=ROWS) + (first + places.start)
            return (iota_s >= tile.seen_first) & (iota_s < tile.seen_end)

        is_unclean = (first < tile.seen_first) | (first + count > tile.seen_end)
        pl.when(is_unclean)(lambda: zero_values(warpgroup, slot, shared, is_used))

    sink = None if refs.sinks is None else refs.sinks[head]
    return attend(warpgroup, span, shared.q.at[warpgroup], shared, sink, mask, clean, **settings)


def _store(
    shared: _Shared,
    warpgroup: jax.Array,
    out_tH: jax.Array,
    out_ref: Any,
    start: jax.Array,
    head: jax.Array,
    count: jax.Array,
    *,
    interpret: bool,
) -> None:
    """Writes the first `count` rows of a warpgroup's result."""
    if interpret:
        out_smem = shared.out.at[warpgroup]
        out_smem[...] = out_tH

        def row(i: jax.Array, _: None) -> None:
            out_ref[start + i, head] = out_smem[i]

        lax.fori_loop(0, count, row, None)
        return

    @pl.when(count == QUERIES)
    def _() -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # an earlier item's copy
        shared.out[warpgroup] = out_tH
        plgpu.commit_smem()
        for box, to in _copies(shared.out_boxes.at[warpgroup], out_ref, start, head):
            plgpu.copy_smem_to_gmem(box, to)

    @pl.when(count < QUERIES)
    def _() -> None:  # other tiles' rows follow: each thread writes its numbers of those that exist
        rows_sm90.write(out_tH, out_ref, start, head, count)
