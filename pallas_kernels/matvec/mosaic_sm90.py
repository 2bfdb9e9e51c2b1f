"""Products of up to eight rows with a bfloat16 matrix, [I, O] or [O, I], for Hopper: Pallas Mosaic GPU. See RECORD.md.

A block streams its run of a panel of 64 outputs through shared memory, in tiles of 64 × 64. Each warp has 16 of the
panel's outputs, and multiplies them by eight rows of x at a time on the tensor cores.

The order of sums: the inputs are divided into runs by the matrix's shape alone (`runs`). A run is one chain of products
of 16 inputs, in ascending order, which `many_sm90` computes with the same bits for more rows. Whoever reads the result
adds up the runs.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.matvec import many_sm90
from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.ptx import Value

EIGHT = 8  # rows of x per instruction
TILE = 64  # rows and columns of the matrix per copy; 16 outputs for each warp
_STEPS = TILE // 16  # products that sum over a tile
_BLOCKS = 240  # to aim for: 132 multiprocessors hold at least two each, of this kernel and of `many_sm90`
_STAGES = 6  # tiles in flight per block, at most: four blocks fit on a multiprocessor


@dataclasses.dataclass(frozen=True)
class _MatvecPlan:
    """Everything that is known when the kernel is built."""

    rows: int  # T, of x
    outputs: int  # O
    tiles: int  # of a run
    transposed: bool  # whether the matrix is [O, I]

    @property
    def stages(self) -> int:
        """Tiles in shared memory."""
        return min(self.tiles, _STAGES)


def takes(inputs: int, outputs: int, transposed: bool) -> bool:
    """Whether there is a kernel for a matrix of these sizes."""
    return inputs % TILE == 0 and (transposed or outputs % TILE == 0)


def product(
    x_TI: jax.Array, kernel: jax.Array, bias_O: jax.Array | None = None, *, transposed: bool = False
) -> PartialSum:
    """See `api.matvec`."""
    inputs, outputs = reversed(kernel.shape) if transposed else kernel.shape
    parts = _parts if x_TI.shape[0] <= EIGHT else many_sm90.parts
    parts_JTO = parts(x_TI, kernel, runs=runs(inputs, outputs), transposed=transposed)
    return PartialSum(parts_JTO, bias_EO=None if bias_O is None else bias_O[None])


def runs(inputs: int, outputs: int) -> int:
    """How many runs of whole tiles the inputs are divided into.

    Not a setting to be tuned: with another number, all results have other bits. RECORD.md has others' times.
    """
    count, wanted = inputs // TILE, _BLOCKS * TILE / outputs
    possible = [each for each in range(1, count + 1) if count % each == 0]
    return min(possible, key=lambda each: abs(math.log(each / wanted)))


@partial(jax.jit, static_argnames=("runs", "transposed"))
def _parts(x_TI: jax.Array, kernel: jax.Array, *, runs: int, transposed: bool) -> jax.Array:
    T, inputs = x_TI.shape
    outputs = kernel.shape[0 if transposed else 1]
    plan = _MatvecPlan(T, outputs, inputs // (TILE * runs), transposed)
    results = ptx.launch(
        partial(matvec, plan),
        {"x": x_TI, "kernel": kernel},
        {"out": jax.ShapeDtypeStruct((runs, T, outputs), jnp.float32)},
        {"panel": -(-outputs // TILE), "run": runs},
        {
            "tiles": plgpu.SMEM((plan.stages, TILE, TILE), jnp.bfloat16),
            "x_tiles": plgpu.SMEM((plan.stages, EIGHT, TILE), jnp.bfloat16),
            "mbarriers": plgpu.SMEM((2 * plan.stages,), jnp.uint32),
        },
        needs_refs=True,
    )
    return results["out"]


def matvec(
    plan: _MatvecPlan,
    *,
    x: Value,
    kernel: Value,
    out: Value,
    tiles: Value,
    x_tiles: Value,
    mbarriers: Value,
    panel: Value,
    run: Value,
    context: Any,
    refs: Mapping[str, Value],
) -> None:
    """One thread of a block."""
    del x, kernel  # copies take the arrays instead of their addresses
    arrived = ptx.MBarriers(mbarriers, plan.stages)
    arrived.init()
    ptx.sync_block()
    copies = ptx.TileCopies(context, refs["tiles"], refs["mbarriers"], plan.stages, TILE)
    x_copies = ptx.TileCopies(context, refs["x_tiles"], refs["mbarriers"], plan.stages, EIGHT)
    begin, first = ptx.mul(run, plan.tiles * TILE), ptx.mul(panel, TILE)

    def copy(tile: int) -> None:
        stage, inputs = tile % plan.stages, ptx.add(begin, TILE * tile)
        ptx.expect_bytes(arrived.at(stage), copies.bytes + x_copies.bytes, ptx.less(ptx.thread(), 1))
        row, column = (first, inputs) if plan.transposed else (inputs, first)
        copies.begin(refs["kernel"], row, column, stage, announced=True)
        x_copies.begin(refs["x"], ptx.const(0), inputs, stage, announced=True)

    for tile in range(plan.stages):
        copy(tile)
    _write(plan, _multiply(plan, arrived, tiles, x_tiles, copy), out, panel, run)


def _multiply(
    plan: _MatvecPlan, arrived: ptx.MBarriers, tiles: Value, x_tiles: Value, copy: Callable[[int], None]
) -> list[Value]:
    """The warp's sums for 16 outputs and eight rows of x, in the order of `ptx.mma`."""
    warp, _, _ = ptx.fragment_lane()
    lane = arith.andi(ptx.thread(), ptx.const(31))
    r, m = arith.andi(lane, ptx.const(7)), arith.shrui(lane, ptx.const(3))
    odd, high = arith.andi(m, ptx.const(1)), arith.shrui(m, ptx.const(1))
    # Of the matrices that a step loads, the odd ones have outputs 8 to 15, the high ones inputs 8 to 15.
    if plan.transposed:
        row = ptx.add(ptx.mul(warp, 16), ptx.mul(odd, 8), r)
        a_at = [_piece(tiles, row, ptx.add(high, 2 * step), r) for step in range(_STEPS)]
    else:
        row, piece = ptx.add(ptx.mul(high, 8), r), ptx.add(ptx.mul(warp, 2), odd)
        a_at = [_piece(tiles, ptx.add(row, 16 * step), piece, r) for step in range(_STEPS)]
    x_at = [_piece(x_tiles, r, ptx.add(m, 4 * i), r) for i in range(_STEPS // 2)]

    sums = [ptx.float32(0.0)] * 4
    for tile in range(plan.tiles):
        stage = tile % plan.stages
        arrived.wait(stage, tile // plan.stages % 2)
        b = [word for at in x_at for word in ptx.load_matrices(at, shift=2 * TILE * EIGHT * stage)]
        for step, at in enumerate(a_at):
            a = ptx.load_matrices(at, shift=2 * TILE**2 * stage, transposed=not plan.transposed)
            sums = ptx.mma(sums, a, b[2 * step : 2 * step + 2])
        if tile + plan.stages < plan.tiles:
            ptx.sync_block()
            copy(tile + plan.stages)
    return sums


def _piece(tiles: Value, row: Value, piece: Value, r: Value) -> Value:
    """The address of eight numbers of a row of the first tile, which is row r of eight."""
    return ptx.add(ptx.shared_offset(tiles, row, 2 * TILE), ptx.mul(arith.xori(piece, r), 16))


def _write(plan: _MatvecPlan, sums: list[Value], out: Value, panel: Value, run: Value) -> None:
    warp, g, q = ptx.fragment_lane()
    for i, value in enumerate(sums):
        row = ptx.add(ptx.mul(q, 2), i % 2)
        output = ptx.add(ptx.mul(panel, TILE), ptx.mul(warp, 16), g, 8 * (i // 2))
        at = ptx.offset(ptx.offset(out, ptx.add(ptx.mul(run, plan.rows), row), 4 * plan.outputs), output, 4)
        exists = ptx.less(row, plan.rows)
        if plan.outputs % TILE:
            exists = ptx.both(exists, ptx.less(output, plan.outputs))
        ptx.store(at, [value], exists)
