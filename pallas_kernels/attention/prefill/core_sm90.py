"""Prefill attention for Hopper: a warpgroup's softmax over blocks of keys and values that arrive one by one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.attention.decode import split
from pallas_kernels.attention.prefill.schedule import QUERIES, STAGES, Span

plgpu: Any = mosaic_gpu  # JAX 0.10 has another interface: there, this module can only be imported
WIDTHS = (64, 80, 96, 128)
EIGHT = 8  # rows of a tile in shared memory
WARPGROUPS = 2  # those that compute
REGISTERS, LOADER_REGISTERS = 232, 40  # per thread
# How values lie on threads: matrices as a wgmma leaves them, and one number for each of their rows or columns.
MATRIX = plgpu.Layout.WGMMA
ROWS, COLUMNS = MATRIX.reduce(1), MATRIX.reduce(0)


def places_of(H: int, window: int) -> int:
    """Places per block. With 128, each place takes less time, if threads have the registers and the window is long."""
    return 128 if H <= 80 and window >= 512 else 64


def swizzled(H: int, dtype: Any) -> tuple[Any, ...]:
    """How tiles of rows of H numbers lie in shared memory."""
    swizzle = plgpu.find_swizzle(H * dtype.itemsize * 8)
    return plgpu.TilingTransform((EIGHT, swizzle // dtype.itemsize)), plgpu.SwizzleTransform(swizzle)


def barriers(*, of_queries: int) -> dict[str, Any]:
    """The barriers of a program, one per warpgroup for queries, and STAGES for what is loaded block by block.

    `of_queries` is the number of copies that bring a warpgroup's queries.
    """
    return {
        "q_loaded": plgpu.Barrier(num_arrivals=of_queries, num_barriers=WARPGROUPS),
        "q_freed": plgpu.Barrier(num_barriers=WARPGROUPS),
        "k_loaded": plgpu.Barrier(num_barriers=STAGES),
        "v_loaded": plgpu.Barrier(num_barriers=STAGES),
        "freed": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
        "cleaned": plgpu.Barrier(num_arrivals=WARPGROUPS),
    }


def attend(
    warpgroup: jax.Array,
    span: Span,
    q_smem: Any,
    shared: Any,
    sink: jax.Array | None,
    mask: Callable[[jax.Array, jax.Array], jax.Array],
    clean: Callable[[jax.Array, jax.Array], None],
    *,
    scale: float,
    interpret: bool,
) -> jax.Array:
    """A warpgroup's part of an item: float32 [QUERIES, H].

    Args:
      span: the item's blocks.
      q_smem: the warpgroup's queries in shared memory.
      shared: shared memory for blocks of keys and of values, `k` and `v`, and the `barriers`.
      sink: the head's, if there is one.
      mask: from a block and its scores, the scores, with -infinity where a query does not see a place.
      clean: given a block that not all queries see entirely, and its slot, zeroes values that nobody sees.
    """
    places, H = shared.k.shape[1:]

    def await_values(block: jax.Array) -> Any:
        slot = span.slot(block)
        plgpu.barrier_wait(shared.v_loaded.at[slot])
        pl.when(jnp.logical_not(span.is_plain(block)))(lambda: clean(block, slot))
        return shared.v.at[slot]

    def weigh(block: jax.Array, sums: Sums, scores_ts: jax.Array) -> Sums:
        pl.when(block + 1 == span.end)(lambda: plgpu.barrier_arrive(shared.q_freed.at[warpgroup]))
        masked = lambda scores_ts: mask(block, scores_ts)  # noqa: E731
        scores_ts = lax.cond(span.is_plain(block), lambda scores_ts: scores_ts, masked, scores_ts)
        sums = sums.weigh(scores_ts, scale * split.LOG2_E)
        # Wait for the next keys here, and not just before their use: ptxas moves the wait for the product with values
        # up to the last branch, so without this branch that product would not overlap with the code above.
        k_loaded = shared.k_loaded.at[span.slot(block + 1)]
        pl.when(block + 1 < span.end)(lambda: plgpu.barrier_wait(k_loaded))
        return sums

    def step(block: jax.Array, sums: Sums) -> Sums:
        v_smem, k_smem = await_values(block - 1), shared.k.at[span.slot(block)]

        def between(scores_ts: jax.Array) -> Sums:
            return weigh(block, sums, scores_ts)

        new, product_tH = _products(q_smem, k_smem, sums.weights_ts, v_smem, between, interpret=interpret)
        plgpu.barrier_arrive(shared.freed.at[span.slot(block - 1)])
        return new._replace(out_tH=sums.with_product(product_tH))

    sums = Sums.start(sink, places, H)
    plgpu.barrier_wait(shared.q_loaded.at[warpgroup])
    plgpu.barrier_wait(shared.k_loaded.at[span.slot(span.first)])
    k_smem = shared.k.at[span.slot(span.first)]
    scores_ts = _product(q_smem, k_smem.transpose((1, 0)), places, interpret=interpret)
    sums = lax.fori_loop(span.first + 1, span.end, step, weigh(span.first, sums, scores_ts))
    product_tH = _product(sums.weights_ts, await_values(span.end - 1), H, interpret=interpret)
    plgpu.barrier_arrive(shared.freed.at[span.slot(span.end - 1)])
    return sums._replace(out_tH=sums.with_product(product_tH)).mean()


class Sums(NamedTuple):
    """A running softmax, to base 2, and the sums of the values that it weighs, without those of the last block."""

    maximum_t: jax.Array
    total_t: jax.Array
    rescale_t: jax.Array  # the factor for earlier sums, because the last block may have raised the maximum
    weights_ts: jax.Array  # of the last block, bfloat16
    out_tH: jax.Array

    @classmethod
    def start(cls, sink: jax.Array | None, places: int, H: int) -> "Sums":
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

    def weigh(self, scores_ts: jax.Array, factor: float) -> "Sums":
        """Takes up another block's scores, which are still to be multiplied by `factor`."""
        maximum_t = jnp.maximum(self.maximum_t, scores_ts.max(axis=1) * factor)
        weights_ts = jnp.exp2(scores_ts * factor - broadcast(maximum_t, scores_ts.shape, 0))
        rescale_t = jnp.exp2(self.maximum_t - maximum_t)
        total_t = self.total_t * rescale_t + weights_ts.sum(axis=1)
        return Sums(maximum_t, total_t, rescale_t, weights_ts.astype(self.weights_ts.dtype), self.out_tH)

    def with_product(self, product_tH: jax.Array) -> jax.Array:
        """The sums of values, including the last block's."""
        return self.out_tH * broadcast(self.rescale_t, product_tH.shape, 0) + product_tH

    def mean(self) -> jax.Array:
        """The sums divided by the total; 0 for queries that see nothing."""
        share_t = 1 / jnp.where(self.total_t == 0, 1.0, self.total_t)
        return self.out_tH * broadcast(share_t, self.out_tH.shape, 0)


def zero_values(warpgroup: jax.Array, slot: jax.Array, shared: Any, is_used: Callable[[Any], jax.Array]) -> None:
    """Zeroes the values of a block that no query sees: a weight of 0 does not silence a NaN.

    `is_used` says of a slice of QUERIES of the block's places which may be seen, in the layout ROWS. Both warpgroups
    wait until the first has done it.
    """

    @pl.when(warpgroup == 0)
    def _() -> None:
        count, H = shared.v.shape[1:]
        for start in range(0, count, QUERIES):
            places = pl.ds(start, QUERIES)
            used_sH = broadcast(is_used(places), (QUERIES, H), 0)
            v_sH = plgpu.load(shared.v.at[slot, places], layout=MATRIX)
            shared.v[slot, places] = jnp.where(used_sH, v_sH, jnp.zeros_like(v_sH))
        plgpu.commit_smem()

    plgpu.barrier_arrive(shared.cleaned)
    plgpu.barrier_wait(shared.cleaned)


def broadcast(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Repeats a row's or a column's numbers, whose axis this is."""
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
