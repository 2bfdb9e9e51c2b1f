"""The choice of experts for many tokens, one kernel after the router's product, for Hopper.

A token's bits are those of its logits alone: a warp has a token, and tokens share nothing.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith

from pallas_kernels import dispatch, ptx
from pallas_kernels.add_norm.reference import add_norm
from pallas_kernels.matmul import matmul
from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.ptx import Value, rows
from pallas_kernels.route.choice_sm90 import MOST_EXPERTS, chosen, lane_experts

TILE = 64  # `matmul` wants outputs, and inputs, in multiples of it
_WARPS = 4  # of a block


def supports(x_TD: jax.Array, router_bias_E: jax.Array, positions_T: jax.Array, *, top: int) -> bool:
    """Whether `norm_route` takes these operands."""
    return (
        x_TD.dtype == jnp.bfloat16
        and x_TD.shape[1] % TILE == 0
        and router_bias_E.dtype in (jnp.bfloat16, jnp.float32)
        and positions_T.dtype == jnp.int32
        and 1 <= top <= router_bias_E.shape[0] <= MOST_EXPERTS
    )


def norm_route(
    x_TD: jax.Array,
    terms: PartialSum | None,
    scale_D: jax.Array,
    router_DE: jax.Array,
    router_bias_E: jax.Array,
    positions_T: jax.Array,
    *,
    epsilon: float,
    top: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See `api.norm_route`. `supports` must hold for the operands."""
    sum_TD, normed_TD = add_norm(x_TD, terms, scale_D, epsilon=epsilon, center=False)
    # `matmul` would pad the router as well, and then cut the logits to size, which would be a kernel.
    router_DP = jnp.pad(router_DE.astype(x_TD.dtype), ((0, 0), (0, -router_DE.shape[1] % TILE)))
    logits_TP = matmul(normed_TD, router_DP, implementation=dispatch.MOSAIC)
    return sum_TD, normed_TD, *choose(logits_TP, router_bias_E, positions_T, top=top)


@partial(jax.jit, static_argnames=("top",))
def choose(logits_TP: jax.Array, bias_E: jax.Array, positions_T: jax.Array, *, top: int) -> tuple[jax.Array, jax.Array]:
    """The experts and their weights, [T, top]: see `reference.choose`, with bfloat16. A warp has a token.

    Args:
      logits_TP: float32, without the bias; columns beyond E are not read.
      bias_E, positions_T: as in `api.norm_route`.
    """
    T, pitch = logits_TP.shape
    E = bias_E.shape[0]

    def route_choose(*, block: Value, **at: Value) -> None:
        thread = utils.thread_idx()
        lane, warp = arith.andi(thread, ptx.const(31)), arith.shrui(thread, ptx.const(5))
        token = ptx.add(ptx.mul(block, _WARPS), warp)
        row = ptx.offset(at["logits"], token, 4 * pitch)
        exists = ptx.NotNegative(arith.subi(ptx.const(T - 1), token))
        numbers, biases = [], []
        for expert in lane_experts(lane, E):
            is_one = ptx.NotNegative(arith.subi(ptx.const(E - 1), expert))
            numbers.append(rows.load_number(ptx.offset(row, expert, 4), jnp.float32, ptx.both(exists, is_one)))
            size = bias_E.dtype.itemsize
            biases.append(rows.load_number(ptx.offset(at["bias"], expert, size), bias_E.dtype, is_one))
        position = rows.load_number(ptx.offset(at["positions"], token, 4), jnp.int32, exists)
        ptx.sync_warp()
        logits = [ptx.rounded_sum(*pair) for pair in zip(numbers, biases, strict=True)]
        experts, weights = chosen(logits, lane, experts=E, top=top)
        padding = arith.shrsi(position, ptx.const(31))  # all bits, or none
        first = ptx.both(exists, ptx.NotNegative(arith.subi(ptx.const(0), lane)))
        for name, values in (("experts", [arith.ori(expert, padding) for expert in experts]), ("weights", weights)):
            target = ptx.offset(at[name], token, 4 * top)
            for i, value in enumerate(values):
                ptx.store(target, [value], first, shift=4 * i)

    out = ptx.launch(
        route_choose,
        {"logits": logits_TP, "bias": bias_E, "positions": positions_T},
        {
            "experts": jax.ShapeDtypeStruct((T, top), jnp.int32),
            "weights": jax.ShapeDtypeStruct((T, top), jnp.float32),
        },
        {"block": -(-T // _WARPS)},
    )
    return out["experts"], out["weights"]
