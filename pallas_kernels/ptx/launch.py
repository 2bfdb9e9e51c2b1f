"""The launcher of kernels that are written as one thread's work."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ptx.memory import global_address, shared_address


def launch(
    thread: Callable[..., None],
    operands: Mapping[str, Any],
    results: Mapping[str, jax.ShapeDtypeStruct],
    grid: Mapping[str, int],
    shared: Mapping[str, Any] | None = None,
    *,
    cluster: int = 1,
    warpgroups: int | None = None,
    needs_refs: bool = False,
) -> dict[str, jax.Array]:
    """Runs a kernel that is written as the work of one thread.

    `thread` inlines that work. It is called with the addresses of operands, results and shared memory, and with the
    block's indices in the grid, all by name. The kernel is named after it.

    Args:
      operands: arrays, or references for those that are written to.
      results: shapes and dtypes.
      grid: sizes by name. The blocks of a cluster have the same indices.
      shared: what to allocate in shared memory.
      cluster: blocks per cluster.
      warpgroups: per block; None for a single one. (Given a number, even 1, Mosaic begins with a barrier.)
      needs_refs: also pass `thread` what `TileCopies` takes: Mosaic's `context`, and `refs`, the arrays by name.

    Returns:
      The results by name.
    """
    shared = shared or {}
    names = [*operands, *results, *shared]

    def body(*refs: Any) -> None:
        indices = [jax.lax.axis_index(name) for name in grid]
        scalars = [plgpu.Layout.WG_SPLAT(())] * len(indices)

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(refs), *scalars))
        def inline(context: Any, *args: Any) -> tuple[()]:
            arrays = dict(zip(names, args[: len(refs)], strict=True))
            addresses = {
                name: shared_address(ref) if name in shared else global_address(ref) for name, ref in arrays.items()
            }
            numbers = (index.registers.item() for index in args[len(refs) :])
            more = {"context": context, "refs": arrays} if needs_refs else {}
            thread(**addresses, **dict(zip(grid, numbers, strict=True)), **more)
            return ()

        inline(*refs, *indices)

    body.__name__ = getattr(thread, "func", thread).__name__
    more: dict[str, Any] = {"cluster": (cluster,), "cluster_names": ("block",)} if cluster > 1 else {}
    more |= {"num_threads": warpgroups, "thread_name": "warpgroup"} if warpgroups is not None else {}
    launched = plgpu.kernel(
        body,
        out_type=tuple(results.values()),
        scratch_types=list(shared.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        **more,
    )
    return dict(zip(results, launched(*operands.values()), strict=True))
