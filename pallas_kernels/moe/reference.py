"""The mixture of experts in jnp, which XLA compiles: on every device, from one token to many."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import same_bits
from pallas_kernels.formats.fragments import MXFP4Fragments
from pallas_kernels.formats.mxfp4 import MXFP4
from pallas_kernels.moe import routing
from pallas_kernels.moe.routing import Groups, most_groups
from pallas_kernels.partial_sum import PartialSum

LARGEST_GROUP = 128  # tokens of one expert computed together, at most
# Groups whose weights are unpacked and multiplied at a time. With 1, a token of gpt-oss-tales takes 19 to 21 ms on two
# busy CPU cores, and 5 to 9 ms with 2, 4 and 8; a token of gpt-oss-20b on an H200 takes 11.3 ms with 1, 9.8 with 2, 9.0
# with 4 and 8.9 with 8.
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
    """Sorts tokens into groups of one expert each, and unpacks only the experts of the groups. See `api.moe`."""
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

    width = x_TD.shape[1]

    def run(experts_U: jax.Array, rows_UM: jax.Array, weights_UM: jax.Array | None = None) -> jax.Array:
        rows_UM = jnp.maximum(rows_UM, 0)  # any row will do for an empty slot
        one = partial(expert, on_cpu=weights_UM is not None)
        y_UMD = jax.vmap(lambda expert_id, rows_M: one(x_TD[rows_M], expert_id))(experts_U, rows_UM)
        return y_UMD if weights_UM is None else y_UMD * weights_UM[..., None]

    # Below, a pair that is in no group may take any place, because its value is not used.

    def on_cpu(groups: Groups, places_TX: jax.Array, weights_TX: jax.Array) -> jax.Array:
        # What a loop returns is stored, so all weighted rows are rounded before they are added. If the weighting were
        # fused with the sums, it would depend on the number of tokens which products XLA rounds first.
        weights_UM = _in_slots(weights_TX, places_TX, groups)
        # A bound known only at run time costs nothing here; elsewhere the host would have to wait in each turn.
        y_AD = _in_turn(run, (*groups, weights_UM), _num_used(groups), width=width)
        return same_bits.total_on_cpu(jnp.where((places_TX >= 0)[..., None], y_AD[places_TX], 0), 1)

    def elsewhere(groups: Groups, places_TX: jax.Array, weights_TX: jax.Array) -> jax.Array:
        y_TXD = _in_turn(run, groups, groups.rows_UM.shape[0], width=width)[places_TX]
        return jnp.sum(jnp.where((places_TX >= 0)[..., None], y_TXD * weights_TX[..., None], 0), axis=1)

    total_TD = jax.lax.platform_dependent(groups, places_TX, weights_TX, cpu=on_cpu, default=elsewhere)
    return PartialSum(total_TD[None])


def _in_slots(of_pairs_TX: jax.Array, places_TX: jax.Array, groups: Groups) -> jax.Array:
    """Each pair's number in its slot [U, M], and 0 in empty ones."""
    U, M = groups.rows_UM.shape
    zeros_A = jnp.zeros((U * M,), of_pairs_TX.dtype)
    return zeros_A.at[jnp.where(places_TX < 0, U * M, places_TX)].set(of_pairs_TX, mode="drop").reshape(U, M)


def _num_used(groups: Groups) -> jax.Array:
    """The number of groups that are not empty; these come first."""
    return jnp.sum(groups.rows_UM[:, 0] >= 0, dtype=jnp.int32)


def group_sizes(num_pairs: int, num_experts: int) -> tuple[int, int]:
    """Slots per group, and the largest possible number of groups.

    A group has about as many slots as an expert has tokens on average, so that few stay empty.
    """
    slots = min(LARGEST_GROUP, 1 << max(num_pairs // num_experts, 1).bit_length() - 1)
    return slots, most_groups(num_pairs, num_experts, slots)


def _in_turn(
    run: Callable[..., jax.Array], of_groups: Sequence[jax.Array], num_groups: jax.Array | int, *, width: int
) -> jax.Array:
    """Each slot's result [A, D], for all groups' slots in turn: TOGETHER groups at a time, `num_groups` in all.

    Args:
      of_groups: what `run` takes of each group: `Groups`, and more of [U, M].
    """
    experts_U, (U, M) = of_groups[0], of_groups[1].shape
    together = min(TOGETHER, U)
    missing = -U % together
    padded = [jnp.pad(each, ((0, missing), *[(0, 0)] * (each.ndim - 1))) for each in of_groups]

    def step(turn: jax.Array, out_UMD: jax.Array) -> jax.Array:
        start = turn * together
        part = run(*(jax.lax.dynamic_slice_in_dim(array, start, together) for array in padded))
        return jax.lax.dynamic_update_slice_in_dim(out_UMD, part, start, axis=0)

    # Zero, but the compiler must not know: it would make copies of a constant for all layers, before the first runs.
    zero = (experts_U[0] < 0).astype(jnp.float32)
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
    on_cpu: bool,
) -> jax.Array:
    """One expert's network, [M, D] -> [M, D] float32."""
    h_M2F = _product(x_MD, gate_up, expert, on_cpu) + gate_up_bias_E2F[expert].astype(jnp.float32)
    gate_MF, up_MF = jnp.minimum(h_M2F[:, 0::2], limit), jnp.clip(h_M2F[:, 1::2], -limit, limit)
    activation_MF = gate_MF * jax.nn.sigmoid(alpha * gate_MF) * (up_MF + 1)
    return _product(activation_MF.astype(x_MD.dtype), down, expert, on_cpu) + down_bias_ED[expert].astype(jnp.float32)


def _product(x: jax.Array, weight: jax.Array | MXFP4 | MXFP4Fragments, expert: jax.Array, on_cpu: bool) -> jax.Array:
    one = weight[expert]
    if on_cpu and isinstance(one, MXFP4):
        return same_bits.product_of_rows_on_cpu(x, one.dequantize(x.dtype))
    if on_cpu and isinstance(one, jax.Array):
        return same_bits.product_on_cpu(x, one.astype(x.dtype))
    numbers, axis = (
        (one.dequantize(x.dtype), 1) if isinstance(one, MXFP4 | MXFP4Fragments) else (one.astype(x.dtype), 0)
    )
    return jax.lax.dot_general(x, numbers, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
