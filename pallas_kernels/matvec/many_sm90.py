"""Products of nine rows and more with a bfloat16 matrix, [I, O] or [O, I], for Hopper: Pallas Mosaic GPU.

The matrix is the first factor of `wgmma`, 64 outputs at a time, and all rows of x are the second. A run of inputs is
one chain of products in ascending order, as in `mosaic_sm90`, and has the same bits.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir.dialects import vector

from pallas_kernels import ptx
from pallas_kernels.ptx import Value

plgpu: Any = mosaic_gpu  # JAX 0.10 has another interface: there, this module can only be imported
TILE = 64  # outputs and inputs of a product
_EIGHT = 8  # rows are a multiple of this
_ROOM = 224 * 1024  # bytes of shared memory on a multiprocessor
_MULTIPROCESSORS = 132  # of an H200
_STAGES = 6  # steps in flight, at most
# Tiles of a block: (warpgroups that multiply, tiles of each). By the most rows, how many such blocks share a
# multiprocessor, which registers decide.
_BLOCKS = {(1, 1): {32: 4, 64: 3, 128: 2}, (1, 2): {32: 3, 64: 2}, (2, 2): {128: 1}}


@dataclasses.dataclass(frozen=True)
class _ManyPlan:
    """Everything that is known when the kernel is built."""

    rows: int  # T, of x: a multiple of eight
    outputs: int  # O
    steps: int  # of 64 inputs, in a run
    transposed: bool  # whether the matrix is [O, I]
    warpgroups: int  # of a block, that multiply
    tiles: int  # of 64 outputs, per warpgroup
    resident: int  # blocks that share a multiprocessor

    @classmethod
    def of(cls, rows: int, inputs: int, outputs: int, runs: int, transposed: bool) -> "_ManyPlan":
        """The smallest blocks of which all run at once; for a large matrix the largest, so that x is read less often.

        A second wave would take as long as the first, however few blocks it has.
        """
        for (warpgroups, tiles), fitting in _BLOCKS.items():
            resident = next((count for most, count in fitting.items() if rows <= most), 0)
            plan = cls(rows, outputs, inputs // (TILE * runs), transposed, warpgroups, tiles, resident)
            if plan.blocks * runs <= _MULTIPROCESSORS * resident:
                return plan
        return plan

    @property
    def panels(self) -> int:
        """Tiles per block."""
        return self.warpgroups * self.tiles

    @property
    def blocks(self) -> int:
        """Blocks of a run."""
        return -(-self.outputs // (TILE * self.panels))

    @property
    def stages(self) -> int:
        """Steps in shared memory."""
        return min(self.steps, _STAGES, _ROOM // self.resident // (2 * TILE * (TILE * self.panels + self.rows)))

    @property
    def in_boxes(self) -> bool:
        """Whether outputs are copied row by row: TMA copies a tiled array only in whole tiles of eight rows."""
        return self.transposed and self.outputs % _EIGHT > 0


class _Shared(NamedTuple):
    """Shared memory, and the barriers of its slots; a slot holds what one step multiplies."""

    x: Any  # rows
    matrix: Any
    boxes: Any  # the matrix, as copies fill it: without tiles, if `_ManyPlan.in_boxes`, or itself
    full: Any
    empty: Any


@partial(jax.jit, static_argnames=("runs", "transposed"))
def parts(x_TI: jax.Array, kernel: jax.Array, *, runs: int, transposed: bool) -> jax.Array:
    """The sums of each run, [J, T, O] float32. `kernel`: [I, O], or [O, I] if `transposed`."""
    T, inputs = x_TI.shape
    outputs = kernel.shape[0 if transposed else 1]
    x_TI = jnp.pad(x_TI, ((0, -T % _EIGHT), (0, 0)))
    plan = _ManyPlan.of(len(x_TI), inputs, outputs, runs, transposed)
    swizzled = (plgpu.TilingTransform((_EIGHT, TILE)), plgpu.SwizzleTransform(2 * TILE))
    panels = plan.stages, plan.panels, TILE, TILE
    matrix = plgpu.SMEM(panels, jnp.bfloat16, transforms=swizzled)
    if plan.in_boxes:  # the same bytes: a row is a swizzled line of 128 bytes
        matrix = plgpu.RefUnion(matrix, plgpu.SMEM(panels, jnp.bfloat16, transforms=swizzled[1:]))
    result: jax.Array = plgpu.kernel(
        partial(matvec_many, plan, T),
        out_type=jax.ShapeDtypeStruct((runs, T, outputs), jnp.float32),
        scratch_types={
            "x": plgpu.SMEM((plan.stages, plan.rows, TILE), jnp.bfloat16, transforms=swizzled),
            "matrix": matrix,
            "full": plgpu.Barrier(num_arrivals=1 + plan.panels, num_barriers=plan.stages),
            "empty": plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.stages),
        },
        grid=(plan.blocks, runs),
        grid_names=("block", "run"),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="matvec_many",
    )(x_TI, kernel)
    return result


def matvec_many(
    plan: _ManyPlan, rows: int, x_ref: Any, kernel_ref: Any, out_ref: Any, *, matrix: Any, **scratch: Any
) -> None:
    """One warpgroup of a block. Only the first `rows` rows of x are wanted."""
    block, run, warpgroup = (lax.axis_index(name) for name in ("block", "run", "warpgroup"))
    matrix, boxes = matrix if plan.in_boxes else (matrix, matrix)
    shared = _Shared(matrix=matrix, boxes=boxes, **scratch)

    @pl.when(warpgroup == plan.warpgroups)
    def _() -> None:
        _copy(plan, block, run, x_ref, kernel_ref, shared)

    @pl.when(warpgroup < plan.warpgroups)
    def _() -> None:
        sums = _multiply(plan, warpgroup, shared)
        _write(plan, rows, sums, out_ref, run, block * plan.panels + warpgroup * plan.tiles)


def _copy(plan: _ManyPlan, block: jax.Array, run: jax.Array, x_ref: Any, kernel_ref: Any, shared: _Shared) -> None:
    """Copies the inputs of all steps to shared memory. Outputs beyond the last are zeros."""

    def step(index: jax.Array, _: None) -> None:
        slot = lax.rem(index, jnp.int32(plan.stages))
        pl.when(index >= plan.stages)(lambda: plgpu.barrier_wait(shared.empty.at[slot]))
        inputs, full = pl.ds((run * plan.steps + index) * TILE, TILE), shared.full.at[slot]
        for panel in range(plan.panels):
            outputs = pl.ds((block * plan.panels + panel) * TILE, TILE)
            tile = kernel_ref.at[outputs, inputs] if plan.transposed else kernel_ref.at[inputs, outputs]
            plgpu.copy_gmem_to_smem(tile, shared.boxes.at[slot, panel], full)
        plgpu.copy_gmem_to_smem(x_ref.at[:, inputs], shared.x.at[slot], full)

    lax.fori_loop(0, plan.steps, step, None)


def _multiply(plan: _ManyPlan, warpgroup: jax.Array, shared: _Shared) -> list[jax.Array]:
    """The warpgroup's sums: [64, T] of each of its tiles."""

    def products(*accs: Any) -> list[jax.Array]:
        def step(index: jax.Array, _: None) -> None:
            slot = lax.rem(index, jnp.int32(plan.stages))
            plgpu.barrier_wait(shared.full.at[slot])
            x_it = shared.x.at[slot].transpose((1, 0))
            for i, acc in enumerate(accs):
                tile = shared.matrix.at[slot, warpgroup * plan.tiles + i]
                plgpu.wgmma(acc, tile if plan.transposed else tile.transpose((1, 0)), x_it)
                plgpu.wgmma_wait(1)  # one product is always under way
                if i == 0:  # the previous step is complete
                    done = shared.empty.at[lax.rem(index - 1, jnp.int32(plan.stages))]
                    pl.when(index > 0)(partial(plgpu.barrier_arrive, done))

        lax.fori_loop(0, plan.steps, step, None)
        return [acc[...] for acc in accs]  # this waits for all of them

    sums: list[jax.Array] = pl.run_scoped(products, *[plgpu.ACC((TILE, plan.rows), jnp.float32)] * plan.tiles)
    return sums


def _write(plan: _ManyPlan, rows: int, sums: list[jax.Array], out_ref: Any, run: jax.Array, first: jax.Array) -> None:
    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(*[plgpu.Layout.WGMMA] * len(sums), plgpu.RefType(), scalar, scalar))
    def inline(_: object, *args: Any) -> None:
        *arrays, out, run, first = args
        run, first = run.registers.item(), first.registers.item()
        warp, g, q = ptx.fragment_lane()
        for i, array in enumerate(arrays):
            output = ptx.add(ptx.mul(ptx.add(first, i), TILE), ptx.mul(warp, 16), g)
            row = ptx.mul(q, 2)
            at = ptx.offset(ptx.global_address(out), ptx.add(ptx.mul(run, rows), row), 4 * plan.outputs)
            at = ptx.offset(at, output, 4)
            for column in range(array.registers.shape[1]):
                for token in range(2):
                    place = _EIGHT * column + token
                    for half in range(2):
                        exists = ptx.less(ptx.add(output, 8 * half), plan.outputs)
                        if rows % _EIGHT:
                            exists = ptx.both(exists, ptx.less(ptx.add(row, place), rows))
                        to = ptx.shifted(at, 4 * plan.outputs * place + 32 * half)
                        ptx.store(to, [_number(array, column, half, token)], exists)

    inline(*sums, out_ref, run, first)


def _number(array: Any, column: int, half: int, token: int) -> Value:
    """The thread's number of a tile: of row g, or g + 8, at one of eight columns' two."""
    (register,) = array.registers[0, column, ..., half, :, :, :, :].flat
    return vector.extract(register, [], [token])
