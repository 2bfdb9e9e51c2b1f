"""GPT-2's block for one token of a few rows in one kernel, on Hopper: Pallas Mosaic GPU, JAX 0.11 and newer.

A cluster has a head, of which queries, keys and values are three strips of the first product, a strip of the residual
stream, and four strips of the MLP's hidden units. Three times all clusters wait for each other: for the heads, for the
stream between attention and MLP, and for the hidden units. Meanwhile the weights that come next are on their way.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.block import memory_sm90, tiles_sm90
from pallas_kernels.block.attention_sm90 import Head
from pallas_kernels.block.plan_sm90 import EXCHANGES, HIDDEN, QKV, RESIDUAL_SLOT, THREADS, Plan
from pallas_kernels.block.residual_sm90 import Norm, Residual
from pallas_kernels.block.stream import STRIP, Relay, Stream, Weights
from pallas_kernels.block.tiles_sm90 import Here
from pallas_kernels.ptx import Value

_OF_QKV, _OF_HEADS, _OF_OUT, _OF_UP, _OF_DOWN = range(EXCHANGES)


@partial(jax.jit, static_argnames=("epsilon", "scale", "blocks"))
def block(
    stream: Stream,
    weights: Weights,
    positions_T: jax.Array,
    k_TNSH: jax.Array,
    v_TNSH: jax.Array,
    *,
    epsilon: float,
    scale: float,
    blocks: int,
) -> tuple[Stream, jax.Array, jax.Array]:
    """See `api.block`; `blocks` are of a cluster."""
    T, D = stream.x_TD.shape
    N, S = k_TNSH.shape[1:3]
    plan = Plan(rows=T, strips=N, blocks=blocks, places=S, scale=scale, epsilon=epsilon)
    cleared_ref, used_ref, k_ref, v_ref = map(jax.new_ref, (stream.cleared_W, stream.used_W, k_TNSH, v_TNSH))
    operands = {
        "x": stream.x_TD,
        "moments": stream.moments_TN2,
        "positions": positions_T,
        "k": k_ref,
        "v": v_ref,
        "relay": cleared_ref,
        "other_relay": used_ref,
    }
    for name, part in weights._asdict().items():
        operands |= {f"{name}.{each}": array for each, array in zip(("weight", "bias"), part, strict=True)}
    scratch = plan.scratch()

    def gpt2_block(context: Any, *refs: Value, strip: Value) -> None:
        named = dict(zip([*operands, "out", "out_moments", *scratch], refs, strict=True))
        shared = {name: named.pop(name) for name in scratch}
        _run(Here.of(plan, strip, shared), context, named, shared)

    x_TD, moments_TN2 = ptx.kernel(
        gpt2_block,
        tuple(operands.values()),
        (jax.ShapeDtypeStruct((T, D), jnp.bfloat16), jax.ShapeDtypeStruct((T, N, 2), jnp.float32)),
        {"strip": N},
        list(scratch.values()),
        raw=True,
        blocks=blocks,
        warpgroups=THREADS // 128,
    )
    stream = Stream(x_TD, moments_TN2, jax.freeze(used_ref), jax.freeze(cleared_ref))
    return stream, jax.freeze(k_ref), jax.freeze(v_ref)


def _run(here: Here, context: Any, arrays: dict[str, Value], shared: dict[str, Value]) -> None:
    """One thread."""
    plan, share, hidden_share = here.plan, here.plan.share, here.plan.hidden_share
    at = {name: ptx.address(each) for name, each in arrays.items()}
    relay = Relay(plan.rows, plan.width, HIDDEN * plan.width)
    heads, x, hidden, moments = (
        arith.addi(at["relay"], ptx.const(4 * word, ptx.i64())) for word in (0, relay.x, relay.hidden, relay.moments)
    )
    here.prepare(_counts(plan))

    # What is small is begun to be loaded first: behind the weights it would wait for them.
    norm = Norm(here, at["attention_norm.weight"], at["attention_norm.bias"])
    finish_norm = norm.read(at["x"], at["moments"], memory_sm90.load_all)
    head = Head.of(here, at)
    mlp_norm = Norm(here, at["mlp_norm.weight"], at["mlp_norm.bias"])
    biases = _Biases(here, at)
    residual = Residual.of(here, at["x"])
    ring = tiles_sm90.Ring(here, context, shared, _jobs(here, arrays))
    ring.begin(min(plan.stages, QKV * share))
    finish_norm()
    first = head.load(ptx.const(0))
    ring.begin(plan.stages)
    here.place.met()
    sums = ring.multiply(0, QKV * share, QKV, here.shared["factor"])
    for slot, of_strip in enumerate(tiles_sm90.block_sums(here, sums)):
        tiles_sm90.send_sums(here, _OF_QKV, of_strip, slot, range(plan.blocks))
    head.sum_up(_OF_QKV)
    head.attend(first, _OF_HEADS)
    tiles_sm90.block_does(here, 1, lambda: head.finish(_OF_HEADS, heads))
    tiles_sm90.clear(here, at["other_relay"], relay.words)
    tiles_sm90.gather(here, heads, plan.width, share)
    sums = ring.multiply(QKV * share, share, 1, here.shared["second"])
    tiles_sm90.send_sums(here, _OF_OUT, tiles_sm90.block_sums(here, sums)[0], RESIDUAL_SLOT, [0])
    tiles_sm90.block_does(here, 1, lambda: residual.add(_OF_OUT, biases.out, x, moments))

    mlp_norm.read(x, moments, memory_sm90.await_all)()
    sums = ring.multiply((QKV + 1) * share, HIDDEN * share, HIDDEN, here.shared["factor"])
    for rank, of_strip in enumerate(tiles_sm90.block_sums(here, sums)):
        tiles_sm90.send_sums(here, _OF_UP, of_strip, 0, [rank])
    tiles_sm90.block_does(here, HIDDEN, lambda: _activate(here, biases.up, hidden))
    tiles_sm90.gather(here, hidden, HIDDEN * plan.width, hidden_share)
    sums = ring.multiply((QKV + 1 + HIDDEN) * share, hidden_share, 1, here.shared["second"])
    tiles_sm90.send_sums(here, _OF_DOWN, tiles_sm90.block_sums(here, sums)[0], RESIDUAL_SLOT, [0])

    def finish() -> None:
        Residual.of(here, x).add(_OF_DOWN, biases.down, at["out"], at["out_moments"])

    tiles_sm90.block_does(here, 1, finish)


def _counts(plan: Plan) -> list[int]:
    """Numbers that a block gets in each exchange: of heads, out and down the first, of up the first four."""
    return [QKV * plan.inbox, plan.blocks * plan.rows * (STRIP + 2), *[plan.inbox] * 3]


def _jobs(here: Here, arrays: dict[str, Value]) -> list[tuple[Value, Value, Value]]:
    """Of all boxes, in the order in which they are taken, the matrix, and the first row and column."""
    plan = here.plan
    own, hidden = here.box_rows(plan.share), here.box_rows(plan.hidden_share)
    strip = ptx.mul(here.strip, STRIP)
    of_qkv = [ptx.add(strip, part * plan.width) for part in range(QKV)]
    of_up = [ptx.add(ptx.mul(strip, HIDDEN), part * STRIP) for part in range(HIDDEN)]
    jobs = [(arrays["qkv.weight"], row, column) for row in own for column in of_qkv]
    jobs += [(arrays["out.weight"], row, strip) for row in own]
    jobs += [(arrays["up.weight"], row, column) for row in own for column in of_up]
    return jobs + [(arrays["down.weight"], row, strip) for row in hidden]


class _Biases:
    """Of the two columns that a lane sums in a cluster's block, as words."""

    def __init__(self, here: Here, at: dict[str, Value]):
        column = ptx.add(ptx.mul(here.strip, STRIP // 2), here.place.lane)
        # The cluster's i-th strip of hidden units is its i-th block's.
        is_hidden = ptx.less(here.rank, HIDDEN)
        of_up = ptx.add(ptx.mul(ptx.add(ptx.mul(here.strip, HIDDEN), here.rank), STRIP // 2), here.place.lane)
        (self.out,), (self.up,), (self.down,) = (
            memory_sm90.load(ptx.offset(at[f"{name}.bias"], place, 4), 1, where)
            for name, place, where in (
                ("out", column, ptx.const(1)),
                ("up", of_up, is_hidden),
                ("down", column, ptx.const(1)),
            )
        )


def _activate(here: Here, bias: Value, hidden: Value) -> None:
    """In the cluster's block i, what comes of its i-th strip."""
    plan, lane = here.plan, here.place.lane
    row, is_row = here.own_row()
    here.place.receive(_OF_UP)
    sums = tiles_sm90.inbox_pair(here, 0, row, lane)
    added = ptx.pack(*(arith.addf(*pair) for pair in zip(sums, ptx.halves(bias), strict=True)))
    word = ptx.pack(*map(_gelu, ptx.halves(added)))
    column = ptx.add(ptx.mul(ptx.add(ptx.mul(here.strip, HIDDEN), here.rank), STRIP // 2), lane)
    place = ptx.add(ptx.mul(row, HIDDEN * plan.width // 2), column)
    memory_sm90.store(ptx.offset(hidden, place, 4), word, is_row)


def _gelu(x: Value) -> Value:
    """x / (1 + exp(-2 · inner)), which is x / 2 · (1 + tanh(inner)) with inner = sqrt(2 / π) · (x + 0.044715 · x³)."""
    number = memory_sm90.number
    inner = arith.mulf(x, memory_sm90.fma(arith.mulf(x, x), number(0.044715), number(1.0)))
    share = memory_sm90.power(arith.mulf(inner, number(-2 * math.sqrt(2 / math.pi) * math.log2(math.e))))
    return ptx.asm("div.full.f32 $0, $1, $2;", [ptx.f32()], [x, arith.addf(share, number(1.0))])[0]
