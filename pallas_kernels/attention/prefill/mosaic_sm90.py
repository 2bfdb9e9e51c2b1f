"""Attention over a cache with many query tokens per row, for Hopper: Pallas Mosaic GPU, JAX 0.11 and newer.

Flash attention. A program has two warpgroups that compute, each for 64 queries of one head, and one that loads. The two
share blocks of keys and values: they take two heads of a group or, if a group has an odd number of heads, the two
halves of 128 queries. There are as many programs as multiprocessors; they take items of two times 64 queries in turn,
those with the most to read first.
"""

from collections import namedtuple
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.attention.decode import split
from pallas_kernels.attention.prefill import schedule
from pallas_kernels.attention.prefill.schedule import QUERIES, STAGES, UNUSED

plgpu: Any = mosaic_gpu  # JAX 0.10 has another interface: there, this module can only be imported
WIDTHS = (64, 80, 96, 128)
EIGHT = 8  # T and S must be multiples of this, the rows of a tile in shared memory
WARPGROUPS = 2  # those that compute
REGISTERS, LOADER_REGISTERS = 232, 40  # per thread
# How values lie on threads: matrices as a wgmma leaves them, and one number for each of their rows or columns.
MATRIX = plgpu.Layout.WGMMA
ROWS, COLUMNS = MATRIX.reduce(1), MATRIX.reduce(0)


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


def _places(H: int, window: int) -> int:
    """Places per block. With 128, each place takes less time, if threads have the registers and the window is long."""
    return 128 if H <= 80 and window >= 512 else 64


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
    places = _places(H, window)
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

    swizzle = plgpu.find_swizzle(H * dtype.itemsize * 8)
    swizzled = (plgpu.TilingTransform((EIGHT, swizzle // dtype.itemsize)), plgpu.SwizzleTransform(swizzle))
    scratch = _Shared(
        q=plgpu.SMEM((WARPGROUPS, QUERIES, H), dtype, transforms=swizzled),
        k=plgpu.SMEM((STAGES, places, H), dtype, transforms=swizzled),
        v=plgpu.SMEM((STAGES, places, H), dtype, transforms=swizzled),
        positions=plgpu.SMEM((STAGES, places), jnp.uint32),
        out=plgpu.SMEM((WARPGROUPS, QUERIES, H), dtype, transforms=swizzled),
        q_loaded=plgpu.Barrier(num_barriers=WARPGROUPS),
        q_freed=plgpu.Barrier(num_barriers=WARPGROUPS),
        k_loaded=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),  # keys and positions
        v_loaded=plgpu.Barrier(num_barriers=STAGES),
        freed=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
        cleaned=plgpu.Barrier(num_arrivals=WARPGROUPS),
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
    scale: float,
    window: int,
    interpret: bool,
) -> jax.Array:
    """A warpgroup's part of an item: float32 [QUERIES, H]."""
    q_positions_t = plgpu.load(refs.q_positions.at[row, queries], layout=ROWS, optimized=False)
    q_smem, k_smem = shared.q.at[warpgroup], shared.k.at[span.slot(span.first)]
    places, H = k_smem.shape

    def await_values(block: jax.Array) -> Any:
        slot = span.slot(block)
        plgpu.barrier_wait(shared.v_loaded.at[slot])

        @pl.when(jnp.logical_not(span.is_plain(block)))
        def _() -> None:
            pl.when(refs.unclean[row, block] != 0)(partial(_clean, warpgroup, slot, shared))

        return shared.v.at[slot]

    def weigh(block: jax.Array, sums: _Sums, scores_ts: jax.Array) -> _Sums:
        pl.when(block + 1 == span.end)(partial(plgpu.barrier_arrive, shared.q_freed.at[warpgroup]))
        mask = partial(_mask, q_positions_t, shared.positions.at[span.slot(block)], window)
        scores_ts = lax.cond(span.is_plain(block), lambda scores_ts: scores_ts, mask, scores_ts)
        sums = sums.weigh(scores_ts, scale * split.LOG2_E)
        # Wait for the next keys here, and not just before their use: ptxas moves the wait for the product with values
        # up to the last branch, so without this branch that product would not overlap with the code above.
        k_loaded = shared.k_loaded.at[span.slot(block + 1)]
        pl.when(block + 1 < span.end)(partial(plgpu.barrier_wait, k_loaded))
        return sums

    def step(block: jax.Array, sums: _Sums) -> _Sums:
        v_smem, k_smem = await_values(block - 1), shared.k.at[span.slot(block)]
        between = partial(weigh, block, sums)
        new, product_tH = _products(q_smem, k_smem, sums.weights_ts, v_smem, between, interpret=interpret)
        plgpu.barrier_arrive(shared.freed.at[span.slot(block - 1)])
        return new._replace(out_tH=sums.with_product(product_tH))

    sums = _Sums.start(None if refs.sinks is None else refs.sinks[head], places, H)
    plgpu.barrier_wait(shared.q_loaded.at[warpgroup])
    plgpu.barrier_wait(shared.k_loaded.at[span.slot(span.first)])
    scores_ts = _product(q_smem, k_smem.transpose((1, 0)), places, interpret=interpret)
    sums = lax.fori_loop(span.first + 1, span.end, step, weigh(span.first, sums, scores_ts))
    product_tH = _product(sums.weights_ts, await_values(span.end - 1), H, interpret=interpret)
    plgpu.barrier_arrive(shared.freed.at[span.slot(span.end - 1)])
    return sums._replace(out_tH=sums.with_product(product_tH)).mean()


class _Sums(NamedTuple):
    """A running softmax, to base 2, and the sums of the values that it weighs, without those of the last block."""

    maximum_t: jax.Array
    total_t: jax.Array
    rescale_t: jax.Array  # the factor for earlier sums, because the last block may have raised the maximum
    weights_ts: jax.Array  # of the last block, bfloat16
    out_tH: jax.Array

    @classmethod
    def start(cls, sink: jax.Array | None, places: int, H: int) -> "_Sums":
        """A softmax that has seen no key yet, only the sink if there is one."""

        def full(value: jax.Array | float, shape: tuple[int, ...], layout: Any) -> jax.Array:
            return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

        maximum_t = full(split.FLOOR, (QUERIES,), ROWS)
        total_t = full(0, (QUERIES,), ROWS)
        if sink is not None:
            sink_t = full(sink.astype(jnp.float32) * split.LOG2_E, (QUERIES,), ROWS)
            maximum_t = jnp.maximum(maximum_t, sink_t)
            total_t = jnp.exp2(sink_t - maximum_t)
        weights_ts = full(0, (QUERIES, places), MATRIX).astype(jnp.bfloat16)
        return cls(maximum_t, total_t, full(1, (QUERIES,), ROWS), weights_ts, full(0, (QUERIES, H), MATRIX))

    def weigh(self, scores_ts: jax.Array, factor: float) -> "_Sums":
        """Takes up another block's scores, which are still to be multiplied by `factor`."""
        maximum_t = jnp.maximum(self.maximum_t, scores_ts.max(axis=1) * factor)
        weights_ts = jnp.exp2(scores_ts * factor - _broadcast(maximum_t, scores_ts.shape, 0))
        rescale_t = jnp.exp2(self.maximum_t - maximum_t)
        total_t = self.total_t * rescale_t + weights_ts.sum(axis=1)
        return _Sums(maximum_t, total_t, rescale_t, weights_ts.astype(self.weights_ts.dtype), self.out_tH)

    def with_product(self, product_tH: jax.Array) -> jax.Array:
        """The sums of values, including the last block's."""
        return self.out_tH * _broadcast(self.rescale_t, product_tH.shape, 0) + product_tH

    def mean(self) -> jax.Array:
        """The sums divided by the total; 0 for queries that see nothing."""
        share_t = 1 / jnp.where(self.total_t == 0, 1.0, self.total_t)
        return self.out_tH * _broadcast(share_t, self.out_tH.shape, 0)


def _mask(q_positions_t: jax.Array, positions_smem: Any, window: int, scores_ts: jax.Array) -> jax.Array:
    k_positions_s = plgpu.load(positions_smem, layout=COLUMNS, optimized=False)
    # Unsigned, so the difference is huge for a later key, an unused place or padding.
    distance_ts = _broadcast(q_positions_t, scores_ts.shape, 0) - _broadcast(k_positions_s, scores_ts.shape, 1)
    return jnp.where(distance_ts < jnp.uint32(window), scores_ts, -jnp.inf)


def _clean(warpgroup: jax.Array, slot: jax.Array, shared: _Shared) -> None:
    """Zeroes the values that no query sees: a weight of 0 does not silence a NaN."""

    @pl.when(warpgroup == 0)
    def _() -> None:
        count, H = shared.v.shape[1:]
        for start in range(0, count, QUERIES):
            places = pl.ds(start, QUERIES)
            positions_s = plgpu.load(shared.positions.at[slot, places], layout=ROWS, optimized=False)
            v_sH = plgpu.load(shared.v.at[slot, places], layout=MATRIX)
            used_sH = _broadcast(positions_s, (QUERIES, H), 0) != jnp.uint32(UNUSED)
            shared.v[slot, places] = jnp.where(used_sH, v_sH, jnp.zeros_like(v_sH))
        plgpu.commit_smem()

    plgpu.barrier_arrive(shared.cleaned)
    plgpu.barrier_wait(shared.cleaned)


def _broadcast(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [axis])


def _products(
    q_smem: Any,
    k_smem: Any,
    weights_ts: jax.Array,
    v_smem: Any,
    between: Callable[[jax.Array], Any],
    *,
    interpret: bool,
) -> tuple[Any, jax.Array]:
    """between(q · kᵀ) and weights · v, float32; the second product runs while `between` works."""
    if interpret:
        scores_ts = _product(q_smem, k_smem.transpose((1, 0)), k_smem.shape[0], interpret=True)
        return between(scores_ts), _product(weights_ts, v_smem, v_smem.shape[1], interpret=True)

    def multiply(scores_ref: Any, out_ref: Any) -> tuple[Any, jax.Array]:
        plgpu.wgmma(scores_ref, q_smem, k_smem.transpose((1, 0)))
        plgpu.wgmma(out_ref, weights_ts, v_smem)
        result = between(plgpu.wgmma_accumulator_load(scores_ref, wait_n=1))
        return result, out_ref[...]

    run: Callable[..., tuple[Any, jax.Array]] = pl.run_scoped
    accumulators = (plgpu.ACC((QUERIES, width), jnp.float32) for width in (k_smem.shape[0], v_smem.shape[1]))
    return run(multiply, *accumulators)


def _product(a: Any, b_smem: Any, width: int, *, interpret: bool) -> jax.Array:
    """a · b, float32, with a in shared memory or registers, and b in shared memory."""
    if interpret:  # the interpreter has no products from registers
        return jnp.dot(a[...], b_smem[...], preferred_element_type=jnp.float32)

    def multiply(out_ref: Any) -> jax.Array:
        plgpu.wgmma(out_ref, a, b_smem)
        return out_ref[...]

    run: Callable[..., jax.Array] = pl.run_scoped
    return run(multiply, plgpu.ACC((QUERIES, width), jnp.float32))
