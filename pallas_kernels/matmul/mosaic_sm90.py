"""Products of many rows with a bfloat16 matrix [I, O], for Hopper: Pallas Mosaic GPU. See RECORD.md.

An output is one chain of products of 16 inputs, in ascending order, whatever the tiles: they only decide which block
computes what.
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

plgpu: Any = mosaic_gpu  # JAX 0.10 has another interface: there, this module can only be imported
TILE = 64  # inputs of a step, rows of a warpgroup; outputs are a multiple of it
_EIGHT = 8
_WARPGROUPS = 2  # of a block, that multiply
_WIDTHS = (256, 192, 128, 64)  # outputs of a block
_MULTIPROCESSORS = 132  # of an H200, with one block each
_ROOM = 220 * 1024  # bytes of shared memory of a block
_STAGES = 9  # steps in flight, at most
_STARTUP = 48  # what a block costs beside its outputs' products, as if it had so many outputs more


@dataclasses.dataclass(frozen=True)
class _MatmulPlan:
    """Everything that is known when the kernel is built."""

    rows: int  # T, of x
    outputs: int  # O
    steps: int  # of 64 inputs
    width: int  # outputs of a block

    @classmethod
    def of(cls, rows: int, inputs: int, outputs: int) -> "_MatmulPlan":
        """With the width of which all blocks take least."""
        plans = [cls(rows, outputs, inputs // TILE, width) for width in _WIDTHS]
        return min(plans, key=lambda plan: plan.waves * (plan.width + _STARTUP))

    @property
    def blocks(self) -> tuple[int, int]:
        """Of rows, and of outputs."""
        return -(-self.rows // (_WARPGROUPS * TILE)), -(-self.outputs // self.width)

    @property
    def waves(self) -> int:
        """How often a multiprocessor computes a block."""
        return -(-self.blocks[0] * self.blocks[1] // _MULTIPROCESSORS)

    @property
    def stages(self) -> int:
        """Steps in shared memory."""
        return min(self.steps, _STAGES, _ROOM // (2 * TILE * (_WARPGROUPS * TILE + self.width)))


class _Shared(NamedTuple):
    """Shared memory, and the barriers of its slots; a slot holds what one step multiplies."""

    x: Any
    matrix: Any
    full: Any
    empty: Any


def product(x_TI: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """See `api.matmul`."""
    return _product(x_TI, kernel_IO, plan=_MatmulPlan.of(x_TI.shape[0], *kernel_IO.shape))


@partial(jax.jit, static_argnames=("plan",))
def _product(x_TI: jax.Array, kernel_IO: jax.Array, *, plan: _MatmulPlan) -> jax.Array:
    x_TI = jnp.pad(x_TI, ((0, -plan.rows % _EIGHT), (0, 0)))
    swizzled = (plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(2 * TILE))
    result: jax.Array = plgpu.kernel(
        partial(matmul, plan),
        out_type=jax.ShapeDtypeStruct((plan.rows, plan.outputs), jnp.float32),
        scratch_types={
            "x": plgpu.SMEM((plan.stages, _WARPGROUPS, TILE, TILE), jnp.bfloat16, transforms=swizzled),
            "matrix": plgpu.SMEM((plan.stages, TILE, plan.width), jnp.bfloat16, transforms=swizzled),
            "full": plgpu.Barrier(num_arrivals=1 + _WARPGROUPS, num_barriers=plan.stages),
            "empty": plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=plan.stages),
        },
        grid=plan.blocks[::-1],  # those of rows are neighbours, so the matrix is read from memory once
        grid_names=("outputs", "rows"),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="matmul",
    )(x_TI, kernel_IO)
    return result


def matmul(plan: _MatmulPlan, x_ref: Any, kernel_ref: Any, out_ref: Any, **scratch: Any) -> None:
    """One warpgroup of a block."""
    rows, outputs, warpgroup = (lax.axis_index(name) for name in ("rows", "outputs", "warpgroup"))
    first_row, first_output = rows * (_WARPGROUPS * TILE), outputs * plan.width
    shared = _Shared(**scratch)

    @pl.when(warpgroup == _WARPGROUPS)
    def _() -> None:
        _copy(plan, x_ref, kernel_ref, shared, first_row, first_output)

    @pl.when(warpgroup < _WARPGROUPS)
    def _() -> None:
        sums = _multiply(plan, warpgroup, shared)
        _write(plan, sums, out_ref, first_row + warpgroup * TILE, first_output)


def _copy(
    plan: _MatmulPlan, x_ref: Any, kernel_ref: Any, shared: _Shared, first_row: jax.Array, first_output: jax.Array
) -> None:
    """Copies the inputs of all steps to shared memory. Rows and outputs beyond the last are zeros."""

    def step(index: jax.Array, _: None) -> None:
        slot = lax.rem(index, jnp.int32(plan.stages))
        pl.when(index >= plan.stages)(lambda: plgpu.barrier_wait(shared.empty.at[slot]))
        inputs, full = pl.ds(index * TILE, TILE), shared.full.at[slot]
        plgpu.copy_gmem_to_smem(kernel_ref.at[inputs, pl.ds(first_output, plan.width)], shared.matrix.at[slot], full)
        for warpgroup in range(_WARPGROUPS):
            x = x_ref.at[pl.ds(first_row + warpgroup * TILE, TILE), inputs]
            plgpu.copy_gmem_to_smem(x, shared.x.at[slot, warpgroup], full)

    lax.fori_loop(0, plan.steps, step, None)


def _multiply(plan: _MatmulPlan, warpgroup: jax.Array, shared: _Shared) -> jax.Array:
    """The warpgroup's sums, [64, width]."""

    def products(acc: Any) -> jax.Array:
        def step(index: jax.Array, _: None) -> None:
            slot = lax.rem(index, jnp.int32(plan.stages))
            plgpu.barrier_wait(shared.full.at[slot])
            plgpu.wgmma(acc, shared.x.at[slot, warpgroup], shared.matrix.at[slot])
            plgpu.wgmma_wait(1)  # the previous step is complete
            done = shared.empty.at[lax.rem(index - 1, jnp.int32(plan.stages))]
            pl.when(index > 0)(partial(plgpu.barrier_arrive, done))

        lax.fori_loop(0, plan.steps, step, None)
        sums: jax.Array = acc[...]  # this waits for all of them
        return sums

    result: jax.Array = pl.run_scoped(products, plgpu.ACC((TILE, plan.width), jnp.float32))
    return result


def _write(plan: _MatmulPlan, sums: jax.Array, out_ref: Any, first_row: jax.Array, first_output: jax.Array) -> None:
    """Four threads write 32 bytes of a row."""
    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), scalar, scalar))
    def inline(_: object, array: Any, out: Any, first_row: Any, first_output: Any) -> None:
        warp, g, q = ptx.fragment_lane()
        row = ptx.add(first_row.registers.item(), ptx.mul(warp, 16), g)
        output = ptx.add(first_output.registers.item(), ptx.mul(q, 2))
        at = ptx.offset(ptx.offset(ptx.global_address(out), row, 4 * plan.outputs), output, 4)
        for half in range(2):
            row_exists = ptx.less(ptx.add(row, _EIGHT * half), plan.rows)
            for first in range(0, plan.width, TILE):  # there are outputs for all of these, or for none
                exists = row_exists
                if plan.outputs % plan.width:
                    exists = ptx.both(exists, ptx.less(ptx.add(output, first), plan.outputs))
                for column in range(first // _EIGHT, (first + TILE) // _EIGHT):
                    (register,) = array.registers[0, column, ..., half, :, :, :, :].flat
                    pair = [vector.extract(register, [], [i]) for i in range(2)]
                    ptx.store(ptx.shifted(at, 4 * (_EIGHT * plan.outputs * half + _EIGHT * column)), pair, exists)

    inline(sums, out_ref, first_row, first_output)
