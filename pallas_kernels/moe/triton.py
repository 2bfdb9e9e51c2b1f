"""Products with the chosen experts, from MXFP4 fragments, for Ampere and Ada: Pallas Triton. See RECORD.md.

A program multiplies 64 rows of one expert by up to 16 of its tokens on the tensor cores. The format is that of their
operands, and Triton recognises it, so what a thread unpacks stays in its registers. For these tokens, no weight is read
twice, and none is written anywhere.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.lax import bitcast_convert_type as bitcast

from pallas_kernels.formats.fragments import TILE, MXFP4Fragments
from pallas_kernels.moe.activation import SwiGLU
from pallas_kernels.moe.routing import BY_EXPERT, Groups, route, sorted_groups
from pallas_kernels.partial_sum import PartialSum

SLOTS = 16  # tokens per program: the fewest columns that a product takes
WARPS = 4  # the number that `fragments` is made for
STAGES = 5  # of Triton's software pipeline: tiles in flight
_SIGNS, _CODES = np.uint32(0x80008000), np.uint32(0x0E000E00)  # of two float16 numbers
_MISSING = 14  # exponents: code 0b010, which stands for 1, is 2^-14 when read as a float16


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
    interpret: bool = False,
) -> PartialSum:
    """See `api.moe`."""
    T, E = x_TD.shape[0], down_bias_ED.shape[0]
    groups, places_TX = route(experts_TX, E) if T <= BY_EXPERT else sorted_groups(experts_TX, E, SLOTS)
    run = partial(product, groups=groups, interpret=interpret)
    h_UMF = run(x_TD, weight=gate_up, bias_EO=gate_up_bias_E2F, activation=SwiGLU(alpha, limit))
    splits = 3 if T <= 8 else 1  # with few tokens, down has too few tiles of rows to fill a GPU
    y_JUMD = run(h_UMF.reshape(-1, h_UMF.shape[-1]), weight=down, sorted=True, splits=splits)
    y_JAD = y_JUMD.reshape(y_JUMD.shape[0], -1, y_JUMD.shape[-1])
    return PartialSum(y_JAD, places_TX, weights_TX, down_bias_ED, experts_TX)


@partial(jax.jit, static_argnames=("activation", "splits", "sorted", "stages", "interpret"))
def product(
    x_AI: jax.Array,
    groups: Groups,
    weight: MXFP4Fragments,
    bias_EO: jax.Array | None = None,
    *,
    activation: SwiGLU | None = None,
    splits: int = 1,
    sorted: bool = False,
    stages: int = STAGES,
    interpret: bool = False,
) -> jax.Array:
    """Each group's tokens times its expert's weight.

    Args:
      x_AI: bfloat16; one row per token, or per slot if `sorted`.
      weight: [E, O, I].
      bias_EO: for the activation.
      splits: programs that share I; lowered to a number that divides its tiles.
      stages: of each program's pipeline.
      interpret: run on a CPU.

    Returns:
      float32 [splits, U, M, O], still to be summed over the first axis; with an activation, bfloat16 [U, M, O / 2].
      Slots without a token are not written.
    """
    U, M = groups.rows_UM.shape
    tiles, steps = weight.words.shape[1:3]
    splits = math.gcd(splits, steps)
    if activation is None:
        biases, out = [], jax.ShapeDtypeStruct((splits, U, M, tiles * TILE), jnp.float32)
    else:
        biases, out = [bias_EO], jax.ShapeDtypeStruct((U, M, tiles * TILE // 2), jnp.bfloat16)
    result: jax.Array = pl.pallas_call(
        partial(_program, activation, steps // splits, sorted),
        out_shape=out,
        grid=(tiles, U * pl.cdiv(M, SLOTS), splits),
        compiler_params=pltriton.CompilerParams(num_warps=WARPS, num_stages=stages),
        name="moe_product",
        interpret=interpret,
    )(x_AI, groups.rows_UM, groups.experts_U, weight.words, weight.scales, *biases)
    return result


def _program(
    activation: SwiGLU | None,
    steps: int,
    sorted: bool,
    x_ref: Any,
    rows_ref: Any,
    experts_ref: Any,
    words_ref: Any,
    scales_ref: Any,
    *refs: Any,
) -> None:
    """64 rows of an expert times up to 16 tokens, over `steps` tiles. A program without a token ends at once."""
    *bias_ref, out_ref = refs
    tile, share, split = (pl.program_id(axis) for axis in range(3))
    M = rows_ref.shape[1]
    shares = pl.cdiv(M, SLOTS)
    group, first = share // shares, share % shares * SLOTS

    expert = experts_ref[group]

    @pl.when((rows_ref[group, first] >= 0) & (expert >= 0) & (expert < words_ref.shape[0]))
    def _() -> None:
        slot_m = first + jnp.arange(SLOTS)
        token_m = pltriton.load(rows_ref.at[group, slot_m], mask=slot_m < M, other=-1)
        used_m = token_m >= 0
        row_m = group * M + slot_m if sorted else token_m
        acc_om = _sums(x_ref, row_m, used_m, words_ref, scales_ref, expert, tile, split * steps, steps)
        if activation is None:
            row_o = tile * TILE + jnp.arange(TILE)
            place = out_ref.at[split, group, slot_m[None], row_o[:, None]]
            pltriton.store(place, _by_row(acc_om), mask=used_m[None])
            return
        unit_f = tile * (TILE // 2) + jnp.arange(TILE // 2)
        biases_f = [pltriton.load(bias_ref[0].at[expert, 2 * unit_f + half]) for half in range(2)]
        value_fm = _activate(acc_om, biases_f, activation)
        place = out_ref.at[group, slot_m[None], unit_f[:, None]]
        pltriton.store(place, value_fm.astype(out_ref.dtype), mask=used_m[None])


def _sums(
    x_ref: Any,
    row_m: jax.Array,
    used_m: jax.Array,
    words_ref: Any,
    scales_ref: Any,
    expert: jax.Array,
    tile: jax.Array,
    start: jax.Array,
    steps: int,
) -> jax.Array:
    """Products of 64 rows with 16 rows of x, over `steps` tiles from `start`, in the order of `_operand`'s rows."""
    thread, word_14, column = jnp.arange(128), jnp.arange(4)[None], _columns()

    def scales(step: jax.Array) -> jax.Array:
        return pltriton.load(scales_ref.at[expert, tile, jnp.minimum(step, start + steps - 1), thread >> 1])

    # Triton does not pipeline loads of two bytes, so scales are loaded one turn ahead here.
    def body(step: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        acc_om, scales_128 = carry
        following_128 = scales(step + 1)
        words = pltriton.load(words_ref.at[expert, tile, step, thread[:, None], word_14])
        x_mi = pltriton.load(x_ref.at[row_m[:, None], step * TILE + column[None]], mask=used_m[:, None], other=0)
        return acc_om + pltriton.dot(_operand(words, scales_128), x_mi, trans_b=True), following_128

    zeros = jnp.zeros((TILE, SLOTS), jnp.float32)
    return jax.lax.fori_loop(start, start + steps, body, (zeros, scales(start)))[0]


def _columns() -> jax.Array:
    """A tile's columns in the kernel's order: 16·q + 4·p + 2·c + h of `fragments` is number 16·p + 4·q + 2·c + h.

    So of every 16, a thread has four adjacent ones, which is what Triton wants there on Ampere and Ada (`kWidth`, for
    operands made by joining).
    """
    number = jnp.arange(TILE)
    column = number & 3 | (number & 0x30) >> 2 | (number & 0x0C) << 2
    return pl.multiple_of(pltriton.max_contiguous(column, 4), 4)  # so that copies take four: Triton does not see it


def _operand(words: jax.Array, scales_128: jax.Array) -> jax.Array:
    """A tile's weights, bfloat16 [64, 64], from words [128, 4] and scales, in the threads' order.

    Its row 16·w + 8·r + g is row 16·w + 2·g + r of the tile, and its columns are in the order of `_columns`. So thread
    32·w + 4·g + q has the numbers that the instruction wants there.
    """
    shift = 8 * (jnp.arange(4)[None] & 1).astype(jnp.uint32)  # the upper byte for odd rows
    scale = scales_128[:, None].astype(jnp.uint32) >> shift & 255
    factor = bitcast((scale + _MISSING) << 23, jnp.float32)
    planes = [_join(*(_float32(half) * factor for half in (plane, plane >> 16))) for plane in _planes(words)]
    p0, p1, p2, p3 = (plane.astype(jnp.bfloat16) for plane in planes)
    numbers = _join(_join(p0, p2), _join(p1, p3))  # [128, 4, h, upper bit of p, lower]
    numbers = numbers.reshape(4, 8, 4, 2, 2, 2, 4)  # [w, g, q, c, r, h, p]
    return numbers.transpose(0, 4, 1, 6, 2, 3, 5).reshape(TILE, TILE)


def _planes(words: jax.Array) -> list[jax.Array]:
    """Four words for each word, of two float16 numbers: 2^-14 times the values.

    In bfloat16, ±0.5 would be subnormal, which a CPU, and perhaps a GPU, treats as 0; in float16 all are right.
    """
    by_3, by_6, by_9 = words << 3, words << 6, words << 9
    last = (words >> 2 & np.uint32(0x08000800)) | (words >> 1 & np.uint32(0x06000600))
    return [
        (words & _SIGNS) | (by_3 & _CODES),
        (by_3 & _SIGNS) | (by_6 & _CODES),
        (by_6 & _SIGNS) | (by_9 & _CODES),
        (words << 1 & _SIGNS) | last,
    ]


def _float32(word: jax.Array) -> jax.Array:
    """The float16 number in a word's lower half."""
    return bitcast(word.astype(jnp.uint16), jnp.float16).astype(jnp.float32)


def _join(a: jax.Array, b: jax.Array) -> jax.Array:
    """Both along a new last axis."""
    return jnp.concatenate([a[..., None], b[..., None]], axis=-1)


def _by_row(acc_om: jax.Array) -> jax.Array:
    """The sums in the order of the tile's rows."""
    return acc_om.reshape(4, 2, 8, SLOTS).swapaxes(1, 2).reshape(TILE, SLOTS)


def _activate(acc_om: jax.Array, biases_f: list[jax.Array], activation: SwiGLU) -> jax.Array:
    """The 32 units' values."""
    shape = TILE // 2, SLOTS
    pairs = acc_om.reshape(4, 2, 8, SLOTS).transpose(0, 2, 3, 1).reshape(*shape, 2)
    gate_fm, up_fm = (
        half.reshape(shape) + bias_f[:, None].astype(jnp.float32)
        for half, bias_f in zip(jax.lax.split(pairs, (1, 1), 2), biases_f, strict=True)
    )
    gate_fm = jnp.minimum(gate_fm, activation.limit)
    up_fm = jnp.clip(up_fm, -activation.limit, activation.limit)
    return gate_fm * (up_fm + 1) / (1 + jnp.exp(-activation.alpha * gate_fm))
