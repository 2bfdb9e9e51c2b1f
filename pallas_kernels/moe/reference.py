"""The mixture of experts in jnp, which XLA compiles: on every device, from one token to many."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.formats.fragments import MXFP4Fragments
from pallas_kernels.formats.mxfp4 import MXFP4
from pallas_kernels.moe import routing
from pallas_kernels.moe.routing import Groups
from pallas_kernels.partial_sum import PartialSum

LARGEST_GROUP = 128  # tokens of one expert that are computed together, at most
# Groups whose weights are unpacked and multiplied at a time. With 1, a token of gpt-oss-tales takes 19 to 21 ms on two
# busy CPU cores, with 2, 4 and 8 it takes 5 to 9; of gpt-oss-20b on an H200 it is 11.3 ms with 1, 9.8 with 2, 9.0 with
# 4 and 8.9 with 8.
TOGETHER = 4


def grouped(
    x_TD: jax.Array,
    experts_TX: jax.Array,
    weights_TX: jax.Array,
    gate_up: jax.Array | MXFP4 | MXFP4Fragments,
    gate_up_bias_E2F: jax.Array,
    down: jax.Array | MXFP4 | MXFP4Fragments,
    down_bias_ED: jax.Array,
    *,
    alpha: float,
    limit: float,
) -> PartialSum:
    """Tokens sorted by expert, in groups of one expert each, whose weights alone are unpacked. See `api.moe`."""
    E = gate_up_bias_E2F.shape[0]
    groups, places_TX = routing.sorted_groups(experts_TX, E, group_sizes(experts_TX.size, E)[0])
    expert = partial(
        _expert,
        gate_up=gate_up,
        gate_up_bias_E2F=gate_up_bias_E2F,
        down=down,
        down_bias_ED=down_bias_ED,
        alpha=alpha,
        limit=limit,
    )

    def run(experts_U: jax.Array, rows_UM: jax.Array) -> jax.Array:
        rows_UM = jnp.maximum(rows_UM, 0)  # any will do where a place is empty
        return jax.vmap(lambda expert_id, rows_M: expert(x_TD[rows_M], expert_id))(experts_U, rows_UM)

    width = x_TD.shape[1]
    y_AD = jax.lax.platform_dependent(
        groups,
        # A bound that is known at run time only costs nothing on a CPU, and elsewhere a wait of the host in each turn.
        cpu=lambda groups: _in_turn(run, groups, _num_used(groups), width=width),
        default=lambda groups: _in_turn(run, groups, groups.rows_UM.shape[0], width=width),
    )
    # Where a pair is not in any group, any place is as good, for its value is not taken.
    y_TXD = y_AD[places_TX]
    return PartialSum(jnp.sum(jnp.where((places_TX >= 0)[..., None], y_TXD * weights_TX[..., None], 0), axis=1)[None])


def _num_used(groups: Groups) -> jax.Array:
    """Groups that are not empty: these come first."""
    return jnp.sum(groups.rows_UM[:, 0] >= 0, dtype=jnp.int32)


def group_sizes(num_pairs: int, num_experts: int) -> tuple[int, int]:
    """Places of a group, and the number of groups that there can be at most.

    A group has about as many places as an expert has tokens on the average, so that few stay empty.
    """
    places = min(LARGEST_GROUP, 1 << max(num_pairs // num_experts, 1).bit_length() - 1)
    return places, min(num_pairs, num_pairs // places + num_experts)


def _in_turn(
    run: Callable[[jax.Array, jax.Array], jax.Array], groups: Groups, num_groups: jax.Array | int, *, width: int
) -> jax.Array:
    """Each place's result [A, D], all groups' slots in turn: TOGETHER groups at a time, until `num_groups` have run."""
    U, M = groups.rows_UM.shape
    together = min(TOGETHER, U)
    missing = -U % together
    experts_U = jnp.pad(groups.experts_U, (0, missing))
    rows_UM = jnp.pad(groups.rows_UM, ((0, missing), (0, 0)))

    def step(turn: jax.Array, out_UMD: jax.Array) -> jax.Array:
        start = turn * together
        part = run(*(jax.lax.dynamic_slice_in_dim(array, start, together) for array in (experts_U, rows_UM)))
        return jax.lax.dynamic_update_slice_in_dim(out_UMD, part, start, axis=0)

    # Zero, but not to the compiler: of a constant, copies for all layers are made before the first one runs, and held.
    zero = (groups.experts_U[0] < 0).astype(jnp.float32)
    out_UMD = jnp.full((U + missing, M, width), zero)
    out_UMD = jax.lax.fori_loop(0, (num_groups + together - 1) // together, step, out_UMD)
    return out_UMD.reshape(-1, width)


def _expert(
    x_MD: jax.Array,
    expert: jax.Array,
    *,
    gate_up: jax.Array | MXFP4 | MXFP4Fragments,
    gate_up_bias_E2F: jax.Array,
    down: jax.Array | MXFP4 | MXFP4Fragments,
    down_bias_ED: jax.Array,
    alpha: float,
    limit: float,
) -> jax.Array:
    """One expert's network, [M, D] -> [M, D] float32."""
    h_M2F = _product(x_MD, gate_up, expert) + gate_up_bias_E2F[expert].astype(jnp.float32)
    gate_MF, up_MF = jnp.minimum(h_M2F[:, 0::2], limit), jnp.clip(h_M2F[:, 1::2], -limit, limit)
    activation_MF = gate_MF * jax.nn.sigmoid(alpha * gate_MF) * (up_MF + 1)
    return _product(activation_MF.astype(x_MD.dtype), down, expert) + down_bias_ED[expert].astype(jnp.float32)


def _product(x: jax.Array, weight: jax.Array | MXFP4 | MXFP4Fragments, expert: jax.Array) -> jax.Array:
    one = weight[expert]
    numbers, axis = (
        (one.dequantize(x.dtype), 1) if isinstance(one, MXFP4 | MXFP4Fragments) else (one.astype(x.dtype), 0)
    )
    return jax.lax.dot_general(x, numbers, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
