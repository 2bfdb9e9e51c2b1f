"""Products with experts that have many tokens each, from MXFP4 fragments, for Hopper: Pallas Mosaic GPU.

A block multiplies 256 rows of one expert by up to 128 of its tokens, with `wgmma`. One warpgroup copies tiles of
weights and of x to shared memory. The two others unpack weights to registers, which serve as operands directly, each
while the tensor cores work for the other.

In a call of as few tokens as a decode step has, the sums have the order of `mosaic_sm90`; in others, each is one chain.
"""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels import ptx
from pallas_kernels.formats.fragments import TILE, MXFP4Fragments
from pallas_kernels.formats.mxfp4_sm90 import MISSING, decoded
from pallas_kernels.moe import gather_sm90, groups_sm90, mosaic_sm90
from pallas_kernels.moe.activation import SwiGLU
from pallas_kernels.moe.routing import BY_EXPERT, Groups, Routing, sorted_groups
from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.ptx import Value

plgpu: Any = mosaic_gpu  # JAX 0.10 has another interface: there, this module can only be imported
TOKENS = 128  # per block, at most
_TOKENS_IN_RUNS = 64  # at most, if the product down has runs: their total takes as many registers as a run's sums
_TOKENS_STEP = 32  # a block multiplies as many tokens as its group has, rounded up to a multiple of this
TILES = 4  # of 64 rows, per block
_STAGES = 6  # steps of 64 columns in flight
_WARPGROUPS = 2  # those that multiply, two tiles each
_REGISTERS = 232, 40  # per thread that multiplies, and per thread that copies
_PITCH = 2 * TILE + 16  # bytes between tokens in the buffer where results are put in order


@dataclasses.dataclass(frozen=True)
class _GroupedPlan:
    """Everything that is known when the kernel is built."""

    tokens: int  # slots per group
    tiles: int  # per expert
    steps: int
    runs: int  # that the steps are divided into
    activation: SwiGLU | None

    @property
    def blocks(self) -> int:
        """Blocks that share an expert's rows."""
        return -(-self.tiles // TILES)

    @property
    def sizes(self) -> list[int]:
        """Numbers of tokens that there is code for, in ascending order."""
        return [*range(_TOKENS_STEP, self.tokens, _TOKENS_STEP), self.tokens]


class _Work(NamedTuple):
    """What a warpgroup works on."""

    group: jax.Array
    block: jax.Array  # of the expert's rows
    expert: jax.Array
    warpgroup: jax.Array


class _Shared(NamedTuple):
    """Shared memory, and the barriers of its slots; a slot holds what one step multiplies."""

    x: Any  # tokens
    words: Any  # weights
    scales: Any
    ordered: Any  # results
    full: Any
    empty: Any


def routed(
    x_TD: jax.Array,
    experts_TX: jax.Array,
    weights_TX: jax.Array,
    gate_up: MXFP4Fragments,
    gate_up_bias_E2F: jax.Array,
    down: MXFP4Fragments,
    down_bias_ED: jax.Array,
    *,
    alpha: float,
    limit: float,
) -> PartialSum:
    """See `api.moe`."""
    E, in_runs = down_bias_ED.shape[0], x_TD.shape[0] <= BY_EXPERT
    largest = _TOKENS_IN_RUNS if in_runs else TOKENS
    slots = min(largest, group_size(experts_TX.size, E))
    (groups, places_TX), used_U = _grouped(experts_TX, E, slots)
    x_AD = gather_sm90.gathered(x_TD, groups.rows_UM)
    up_bias_E2F = gate_up_bias_E2F.astype(jnp.bfloat16)
    h_AF = product(x_AD, groups, used_U, gate_up, up_bias_E2F, activation=SwiGLU(alpha, limit))
    y_AD = product(h_AF, groups, used_U, down, runs=mosaic_sm90.runs_of(down) if in_runs else 1)
    return PartialSum(y_AD[None], places_TX, weights_TX, down_bias_ED, experts_TX)


def _grouped(experts_TX: jax.Array, num_experts: int, slots: int) -> tuple[Routing, jax.Array]:
    """The tokens in groups, and how many slots of each are used."""
    if groups_sm90.supports(experts_TX, num_experts, slots):
        return groups_sm90.sorted_groups(experts_TX, num_experts, slots)
    routing = sorted_groups(experts_TX, num_experts, slots)
    return routing, jnp.sum(routing.groups.rows_UM >= 0, axis=1, dtype=jnp.int32)


def group_size(num_pairs: int, num_experts: int) -> int:
    """Slots per group: about as many as an expert has tokens, so that few stay empty."""
    return min(TOKENS, max(16, 1 << (num_pairs // num_experts).bit_length()))


@partial(jax.jit, static_argnames=("activation", "runs"))
def product(
    x_AI: jax.Array,
    groups: Groups,
    used_U: jax.Array,
    weight: MXFP4Fragments,
    bias_EO: jax.Array | None = None,
    *,
    activation: SwiGLU | None = None,
    runs: int = 1,
) -> jax.Array:
    """Each group's tokens times its expert's weight.

    Args:
      x_AI: bfloat16, one row per slot, columns in order as by `gathered`.
      used_U: int32; how many of a group's slots are used.
      weight: [E, O, I].
      bias_EO: for the activation.
      runs: see `mosaic_sm90.product`. With more than one, a group has at most `_TOKENS_IN_RUNS` slots.

    Returns:
      float32 [A, O]; with an activation, bfloat16 [A, O / 2], columns in order for the next product. Slots
      without a token may hold anything.
    """
    U, M = groups.rows_UM.shape
    E, tiles, steps = weight.words.shape[:3]
    plan = _GroupedPlan(M, tiles, steps, runs, activation)
    words = weight.words.reshape(E, tiles, steps, 2, 256)
    if activation is None:
        bias_EO = groups.experts_U  # something has to be passed; it is not read
        out = jax.ShapeDtypeStruct((U * M, tiles * TILE), jnp.float32)
    else:
        out = jax.ShapeDtypeStruct((U * M, tiles * TILE // 2), jnp.bfloat16)
    swizzled = (plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(2 * TILE))
    result: jax.Array = plgpu.kernel(
        partial(moe_grouped, plan),
        out_type=out,
        scratch_types={
            "x": plgpu.SMEM((_STAGES, M, TILE), jnp.bfloat16, transforms=swizzled),
            "words": plgpu.SMEM((_STAGES, TILES, 2, 256), jnp.uint32),
            "scales": plgpu.SMEM((_STAGES, TILES, TILE), jnp.uint16),
            "ordered": plgpu.SMEM((_WARPGROUPS, M, _PITCH // 4), jnp.uint32),
            "full": plgpu.Barrier(num_arrivals=3, num_barriers=_STAGES),
            "empty": plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_STAGES),
        },
        grid=(U, plan.blocks),
        grid_names=("group", "block"),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="moe_grouped",
    )(x_AI, used_U, groups.experts_U, words, weight.scales, bias_EO)
    return result


def moe_grouped(
    plan: _GroupedPlan,
    x_ref: Any,
    used_ref: Any,
    experts_ref: Any,
    words_ref: Any,
    scales_ref: Any,
    bias_ref: Any,
    out_ref: Any,
    **scratch: Any,
) -> None:
    """One warpgroup of a block. The blocks of an empty group return at once."""
    group, block, warpgroup = (lax.axis_index(name) for name in ("group", "block", "warpgroup"))
    used = used_ref[group]
    work, shared = _Work(group, block, experts_ref[group], warpgroup), _Shared(**scratch)

    def for_size(body: Callable[[int], None]) -> None:
        """Calls `body` with the smallest size that the group's tokens fit in."""
        for below, size in itertools.pairwise([0, *plan.sizes]):
            pl.when((used > below) & (used <= size))(partial(body, size))

    @pl.when((used > 0) & (warpgroup == _WARPGROUPS))
    def _() -> None:
        plgpu.set_max_registers(_REGISTERS[1], action="decrease")
        for_size(partial(_copy, plan, work, x_ref, words_ref, scales_ref, shared))

    @pl.when((used > 0) & (warpgroup < _WARPGROUPS))
    def _() -> None:
        plgpu.set_max_registers(_REGISTERS[0], action="increase")
        for_size(partial(_multiply, plan, work, bias_ref, out_ref, shared))


def _copy(
    plan: _GroupedPlan, work: _Work, x_ref: Any, words_ref: Any, scales_ref: Any, shared: _Shared, size: int
) -> None:
    """Copies the weights of all steps, and `size` tokens, to shared memory."""
    tokens, tiles = pl.ds(work.group * plan.tokens, size), pl.ds(work.block * TILES, TILES)  # zeros beyond the last

    def step(index: jax.Array, _: None) -> None:
        slot = lax.rem(index, jnp.int32(_STAGES))
        pl.when(index >= _STAGES)(lambda: plgpu.barrier_wait(shared.empty.at[slot]))
        full = shared.full.at[slot]
        plgpu.copy_gmem_to_smem(x_ref.at[tokens, pl.ds(index * TILE, TILE)], shared.x.at[slot, pl.ds(0, size)], full)
        plgpu.copy_gmem_to_smem(words_ref.at[work.expert, tiles, index], shared.words.at[slot], full)
        plgpu.copy_gmem_to_smem(scales_ref.at[work.expert, tiles, index], shared.scales.at[slot], full)

    lax.fori_loop(0, plan.steps, step, None)


def _multiply(plan: _GroupedPlan, work: _Work, bias_ref: Any, out_ref: Any, shared: _Shared, size: int) -> None:
    """Multiplies a warpgroup's tiles by `size` tokens, and writes the results."""
    own = TILES // _WARPGROUPS
    first = work.block * TILES + work.warpgroup * own

    def products(run: int, *accs: Any) -> list[jax.Array]:
        def step(index: jax.Array, _: None) -> None:
            slot = lax.rem(index, jnp.int32(_STAGES))
            plgpu.barrier_wait(shared.full.at[slot])
            x_im = shared.x.at[slot, pl.ds(0, size)].transpose((1, 0))
            for i, acc in enumerate(accs):
                tile = work.warpgroup * own + i
                plgpu.wgmma(acc, _unpacked(shared.words.at[slot, tile], shared.scales.at[slot, tile]), x_im)
                plgpu.wgmma_wait(1)  # one product is always under way while the next tile is unpacked
                if i == 0:  # the previous step is complete
                    done = shared.empty.at[lax.rem(index - 1, jnp.int32(_STAGES))]
                    pl.when(index > 0)(partial(plgpu.barrier_arrive, done))

        steps = plan.steps // plan.runs
        lax.fori_loop(run * steps, (run + 1) * steps, step, None)
        return [acc[...] for acc in accs]  # this waits for all of them

    sums: list[jax.Array] = []
    for run in range(plan.runs):
        parts = pl.run_scoped(partial(products, run), *[plgpu.ACC((TILE, size), jnp.float32)] * own)
        parts = [part * MISSING for part in parts]
        sums = [total + part for total, part in zip(sums, parts, strict=True)] if sums else parts
    write = _write_activation if plan.activation is not None else _write_sums
    ordered = shared.ordered.at[work.warpgroup]
    pl.when(first < plan.tiles)(lambda: write(plan, sums, bias_ref, out_ref, ordered, work.group, work.expert, first))


def _unpacked(words_ref: Any, scales_ref: Any) -> jax.Array:
    """A tile of weights [64, 64] bfloat16, without the factor `MISSING`, as an operand of `wgmma`."""
    returned = plgpu.ShapeDtypeStruct((TILE, TILE), jnp.bfloat16, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()), return_type=returned)
    def inline(_: object, words: Value, scales: Value) -> Any:
        at = ptx.shared_offset(ptx.shared_address(words), ptx.thread(), 16)
        four = ptx.asm("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", [ptx.i32()] * 4, [at], volatile=True)
        at = ptx.shared_offset(ptx.shared_address(scales), arith.shrui(ptx.thread(), ptx.const(1)), 2)
        (codes,) = ptx.asm("ld.shared.u16 $0, [$1];", [ptx.i32()], [at], volatile=True)
        planes = decoded(four, codes)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        layout = fragmented_array.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape((TILE, TILE)), dtype=object)
        for place in np.ndindex(registers.shape):
            column, half = place[1], place[4]  # of eight columns, and of eight rows
            registers[place] = utils.bitcast(planes[2 * (column % 2) + half][column // 2], pair)
        return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    result: jax.Array = inline(words_ref, scales_ref)
    return result


def _numbers(sums: Any) -> list[tuple[int, Value, Value]]:
    """A thread's sums of a tile: the token, minus 2·q, with the sums of the even and the odd row."""
    registers = sums.registers

    def number(column: int, half: int, token: int) -> Value:
        (register,) = registers[0, column, ..., half, :, :, :, :].flat
        return vector.extract(register, [], [token])

    return [
        (8 * column + token, number(column, 0, token), number(column, 1, token))
        for column in range(registers.shape[1])
        for token in range(2)
    ]


def _inline(sums: list[jax.Array], refs: list[Any], indices: list[jax.Array], write: Any) -> None:
    scalars = [plgpu.Layout.WG_SPLAT(())] * len(indices)

    @plgpu.inline_mgpu(arg_types=(*[plgpu.Layout.WGMMA] * len(sums), *[plgpu.RefType()] * len(refs), *scalars))
    def inline(_: object, *args: Any) -> None:
        arrays, given = args[: len(sums)], args[len(sums) :]
        write(arrays, *given[: len(refs)], *(index.registers.item() for index in given[len(refs) :]))

    inline(*sums, *refs, *indices)


def _write_sums(
    plan: _GroupedPlan,
    sums: list[jax.Array],
    bias_ref: Any,
    out_ref: Any,
    ordered_smem: Any,
    group: jax.Array,
    expert: jax.Array,
    first: jax.Array,
) -> None:
    """Writes the sums: adjacent rows of a token are adjacent in the result."""
    del bias_ref, ordered_smem, expert

    def write(arrays: Any, out: Value, group: Value, first: Value) -> None:
        warp, g, q = ptx.fragment_lane()
        for i, array in enumerate(arrays):
            tile = ptx.add(first, i)
            row = ptx.add(ptx.mul(tile, TILE), ptx.mul(warp, 16), ptx.mul(g, 2))
            place = ptx.add(ptx.mul(group, plan.tokens), ptx.mul(q, 2))
            at = ptx.offset(ptx.offset(ptx.global_address(out), place, 4 * TILE * plan.tiles), row, 4)
            exists = ptx.less(tile, plan.tiles)
            for token, even, odd in _numbers(array):
                to = ptx.shifted(at, 4 * TILE * plan.tiles * token)
                text = "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.v2.f32 [$0], {$1, $2}; }"
                ptx.asm(text, [], [to, even, odd, exists])

    _inline(sums, [out_ref], [group, first], write)


def _write_activation(
    plan: _GroupedPlan,
    sums: list[jax.Array],
    bias_ref: Any,
    out_ref: Any,
    ordered_smem: Any,
    group: jax.Array,
    expert: jax.Array,
    first: jax.Array,
) -> None:
    """A warpgroup has 64 units, 128 bytes, of each token: it puts them in order in shared memory, then writes them."""

    activation = plan.activation
    assert activation is not None

    def write(arrays: Any, bias: Value, out: Value, ordered: Value, group: Value, expert: Value, first: Value) -> None:
        ordered = ptx.shared_address(ordered)
        warp, g, q = ptx.fragment_lane()
        row = ptx.add(ptx.mul(first, TILE), ptx.mul(warp, 16), ptx.mul(g, 2))
        bias_at = ptx.offset(ptx.offset(ptx.global_address(bias), expert, 2 * TILE * plan.tiles), row, 2)
        for i, array in enumerate(arrays):
            (pair,) = ptx.asm(f"ld.global.b32 $0, [$1+{2 * TILE * i}];", [ptx.i32()], [bias_at], volatile=True)
            biases = ptx.halves(pair)
            # Unit 16·q + 4·p + 2·c + h of 64 goes to 16·p + 8·c + 2·q + h.
            unit = ptx.add(ptx.mul(warp, 8), g, 32 * i)
            bits = [
                arith.andi(arith.shrui(unit, ptx.const(n)), ptx.const(m)) for n, m in ((4, 3), (2, 3), (1, 1), (0, 1))
            ]
            column = ptx.add(*(ptx.mul(bit, size) for bit, size in zip(bits, (2, 16, 8, 1), strict=True)))
            at = ptx.add(ordered, ptx.mul(q, 2 * _PITCH), ptx.mul(column, 2))
            for token, even, odd in _numbers(array):
                value = mosaic_sm90.activated(activation, arith.addf(even, biases[0]), arith.addf(odd, biases[1]))
                text = f"{{ .reg .b16 t; cvt.rn.bf16.f32 t, $1; st.shared.b16 [$0+{_PITCH * token}], t; }}"
                ptx.asm(text, [], [at, value])
        utils.warpgroup_barrier()
        # A token's 128 bytes are written by eight threads together.
        piece, own = arith.andi(ptx.thread(), ptx.const(7)), arith.shrui(ptx.thread(), ptx.const(3))
        width = TILE * plan.tiles  # bytes of a token's units
        place = ptx.add(ptx.mul(group, plan.tokens), own)
        to = ptx.offset(ptx.offset(ptx.global_address(out), place, width), ptx.add(ptx.mul(first, 4), piece), 16)
        at = ptx.add(ordered, ptx.mul(own, _PITCH), ptx.mul(piece, 16))
        for begin in range(0, arrays[0].shape[1], 16):
            four = f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4+{_PITCH * begin}];"
            words = ptx.asm(four, [ptx.i32()] * 4, [at], volatile=True)
            ptx.asm(f"st.global.v4.b32 [$0+{width * begin}], {{$1, $2, $3, $4}};", [], [to, *words])

    _inline(sums, [bias_ref, out_ref, ordered_smem], [group, expert, first], write)
