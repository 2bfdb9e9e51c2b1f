"""GPT-2's block, for one token of each of a few rows, in one kernel for Hopper: Pallas Mosaic GPU, JAX 0.11 and newer.

A cluster has one head (its queries, keys and values are three panels of the first product), one panel of the residual
stream, and four panels of the MLP's hidden units. All clusters wait for each other three times: for the heads, for the
stream between attention and MLP, and for the hidden units. Meanwhile the next weights are being loaded.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.block import products_sm90, workspace_sm90
from pallas_kernels.block.attention_sm90 import Head
from pallas_kernels.block.plan_sm90 import EXCHANGES, HIDDEN, QKV, RESIDUAL_SLOT, THREADS, BlockPlan
from pallas_kernels.block.products_sm90 import Thread
from pallas_kernels.block.residual_sm90 import Norm, Residual
from pallas_kernels.block.stream import PANEL, Stream, Weights, Workspace
from pallas_kernels.ptx import Value

_OF_QKV, _OF_HEADS, _OF_OUT, _OF_UP, _OF_DOWN = range(EXCHANGES)


@partial(jax.jit, static_argnames=("epsilon", "scale", "blocks"))
def block(
    stream: Stream,
    weights: Weights,
    positions_T: jax.Array,
    k_YNSH: jax.Array,
    v_YNSH: jax.Array,
    table_TZ: jax.Array,
    *,
    epsilon: float,
    scale: float,
    blocks: int,
) -> tuple[Stream, jax.Array, jax.Array]:
    """See `api.block`. `blocks` is the number per cluster."""
    T, D = stream.x_TD.shape
    N, Z = k_YNSH.shape[1], table_TZ.shape[1]
    plan = BlockPlan(rows=T, panels=N, blocks=blocks, pages=Z, scale=scale, epsilon=epsilon)
    cleared_ref, used_ref, k_ref, v_ref = map(jax.new_ref, (stream.cleared_W, stream.used_W, k_YNSH, v_YNSH))
    operands = {
        "x": stream.x_TD,
        "moments": stream.moments_TN2,
        "positions": positions_T,
        "table": table_TZ,
        "k": k_ref,
        "v": v_ref,
        "workspace": cleared_ref,
        "other_workspace": used_ref,
    }
    for name, part in weights._asdict().items():
        operands |= {f"{name}.{each}": array for each, array in zip(("weight", "bias"), part, strict=True)}
    shared = plan.shared()

    def gpt2_block(*, panel: Value, context: Any, refs: dict[str, Value], **at: Value) -> None:
        thread = Thread.of(plan, panel, {name: at[name] for name in shared})
        copies = ptx.TileCopies(context, refs["ring"], refs["filled"], plan.stages, PANEL)
        _run(thread, products_sm90.Ring(thread, copies, _jobs(thread, refs)), at)

    results = ptx.launch(
        gpt2_block,
        operands,
        {
            "out": jax.ShapeDtypeStruct((T, D), jnp.bfloat16),
            "out_moments": jax.ShapeDtypeStruct((T, N, 2), jnp.float32),
        },
        {"panel": N},
        shared,
        cluster=blocks,
        warpgroups=THREADS // 128,
        needs_refs=True,
    )
    stream = Stream(results["out"], results["out_moments"], jax.freeze(used_ref), jax.freeze(cleared_ref))
    return stream, jax.freeze(k_ref), jax.freeze(v_ref)


def _run(thread: Thread, ring: products_sm90.Ring, at: dict[str, Value]) -> None:
    """The work of one thread. `at`: addresses by name."""
    plan, share, hidden_share = thread.plan, thread.plan.share, thread.plan.hidden_share
    workspace = Workspace(plan.rows, plan.width, HIDDEN * plan.width)
    heads, x, hidden, moments = (
        ptx.shifted(at["workspace"], 4 * word) for word in (0, workspace.x, workspace.hidden, workspace.moments)
    )
    thread.prepare(_counts(plan))

    # Small operands are loaded first: behind the weights, they would have to wait for them.
    norm = Norm(thread, at["attention_norm.weight"], at["attention_norm.bias"])
    finish_norm = norm.read(at["x"], at["moments"], workspace_sm90.load_all)
    head = Head.of(thread, at)
    mlp_norm = Norm(thread, at["mlp_norm.weight"], at["mlp_norm.bias"])
    biases = _Biases(thread, at)
    residual = Residual.of(thread, at["x"])
    ring.begin(min(plan.stages, QKV * share))
    finish_norm()
    first = head.load_first()
    ring.begin(plan.stages)
    thread.cluster.wait_prepared()
    sums = ring.multiply(0, QKV * share, QKV, thread.shared["factor"])
    for slot, of_panel in enumerate(products_sm90.block_sums(thread, sums)):
        products_sm90.send_sums(thread, _OF_QKV, of_panel, slot, range(plan.blocks))
    head.sum_up(first, _OF_QKV)
    head.attend(first, _OF_HEADS)
    products_sm90.block_does(thread, 1, lambda: head.finish(_OF_HEADS, heads))
    products_sm90.clear(thread, at["other_workspace"], workspace.words)
    products_sm90.gather(thread, heads, plan.width, share)
    sums = ring.multiply(QKV * share, share, 1, thread.shared["second"])
    products_sm90.send_sums(thread, _OF_OUT, products_sm90.block_sums(thread, sums)[0], RESIDUAL_SLOT, [0])
    products_sm90.block_does(thread, 1, lambda: residual.add(_OF_OUT, biases.out, x, moments))

    mlp_norm.read(x, moments, workspace_sm90.await_all)()
    sums = ring.multiply((QKV + 1) * share, HIDDEN * share, HIDDEN, thread.shared["factor"])
    for rank, of_panel in enumerate(products_sm90.block_sums(thread, sums)):
        products_sm90.send_sums(thread, _OF_UP, of_panel, 0, [rank])
    products_sm90.block_does(thread, HIDDEN, lambda: _activate(thread, biases.up, hidden))
    products_sm90.gather(thread, hidden, HIDDEN * plan.width, hidden_share)
    sums = ring.multiply((QKV + 1 + HIDDEN) * share, hidden_share, 1, thread.shared["second"])
    products_sm90.send_sums(thread, _OF_DOWN, products_sm90.block_sums(thread, sums)[0], RESIDUAL_SLOT, [0])

    def finish() -> None:
        Residual.of(thread, x).add(_OF_DOWN, biases.down, at["out"], at["out_moments"])

    products_sm90.block_does(thread, 1, finish)


def _counts(plan: BlockPlan) -> list[int]:
    """Numbers received in each exchange: by the first block for heads, out and down; by the first four for up."""
    return [QKV * plan.mailbox, plan.blocks * plan.rows * (PANEL + 2), *[plan.mailbox] * 3]


def _jobs(thread: Thread, matrices: dict[str, Value]) -> list[tuple[Value, Value, Value]]:
    """For each tile, in the order of use, its matrix, and its first row and column."""
    plan = thread.plan
    rows, hidden = thread.tile_rows(plan.share), thread.tile_rows(plan.hidden_share)
    panel = ptx.mul(thread.panel, PANEL)
    of_qkv = [ptx.add(panel, part * plan.width) for part in range(QKV)]
    of_up = [ptx.add(ptx.mul(panel, HIDDEN), part * PANEL) for part in range(HIDDEN)]
    jobs = [(matrices["qkv.weight"], row, column) for row in rows for column in of_qkv]
    jobs += [(matrices["out.weight"], row, panel) for row in rows]
    jobs += [(matrices["up.weight"], row, column) for row in rows for column in of_up]
    return jobs + [(matrices["down.weight"], row, panel) for row in hidden]


class _Biases:
    """The biases of the two columns that a lane sums, as words."""

    def __init__(self, thread: Thread, at: dict[str, Value]):
        column = ptx.add(ptx.mul(thread.panel, PANEL // 2), thread.cluster.lane)
        # The cluster's i-th panel of hidden units belongs to its i-th block.
        is_hidden = ptx.less(thread.rank, HIDDEN)
        of_up = ptx.add(ptx.mul(ptx.add(ptx.mul(thread.panel, HIDDEN), thread.rank), PANEL // 2), thread.cluster.lane)
        (self.out,), (self.up,), (self.down,) = (
            workspace_sm90.load(ptx.offset(at[f"{name}.bias"], place, 4), 1, condition)
            for name, place, condition in (
                ("out", column, ptx.always()),
                ("up", of_up, is_hidden),
                ("down", column, ptx.always()),
            )
        )


def _activate(thread: Thread, bias: Value, hidden: Value) -> None:
    """Computes the hidden units of the cluster's i-th panel, in its block i."""
    plan, lane = thread.plan, thread.cluster.lane
    row, is_row = thread.own_row()
    thread.cluster.receive(_OF_UP)
    sums = products_sm90.mailbox_pair(thread, 0, row, lane)
    added = ptx.pack(*(arith.addf(*pair) for pair in zip(sums, ptx.halves(bias), strict=True)))
    word = ptx.pack(*map(_gelu, ptx.halves(added)))
    column = ptx.add(ptx.mul(ptx.add(ptx.mul(thread.panel, HIDDEN), thread.rank), PANEL // 2), lane)
    place = ptx.add(ptx.mul(row, HIDDEN * plan.width // 2), column)
    workspace_sm90.store(ptx.offset(hidden, place, 4), word, is_row)


def _gelu(x: Value) -> Value:
    """x / (1 + exp(-2 · inner)), which is x / 2 · (1 + tanh(inner)) with inner = sqrt(2 / π) · (x + 0.044715 · x³)."""
    inner = arith.mulf(x, ptx.fma(arith.mulf(x, x), ptx.float32(0.044715), ptx.float32(1.0)))
    share = ptx.exp2(arith.mulf(inner, ptx.float32(-2 * math.sqrt(2 / math.pi) * math.log2(math.e))))
    return ptx.divide(x, arith.addf(share, ptx.float32(1.0)))
