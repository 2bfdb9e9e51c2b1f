"""The mixture of experts in jnp, which XLA compiles: on every device, from one token to many."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mxfp4 import MXFP4

LARGEST_GROUP = 128  # tokens of one expert that are computed together, at most
# Groups whose weights are unpacked and multiplied at a time. With 1, a token of gpt-oss-tales takes 19 to 21 ms on two
# busy CPU cores, with 2, 4 and 8 it takes 5 to 9; of gpt-oss-20b on an H200 it is 11.3 ms with 1, 9.8 with 2, 9.0 with
# 4 and 8.9 with 8.
TOGETHER = 4


def grouped(
    x_TD: jax.Array,
    experts_TX: jax.Array,
    weights_TX: jax.Array,
    gate_up: jax.Array | MXFP4,
    gate_up_bias_E2F: jax.Array,
    down: jax.Array | MXFP4,
    down_bias_ED: jax.Array,
    *,
    alpha: float,
    limit: float,
) -> jax.Array:
    """Tokens sorted by expert, in groups of one expert each, whose weights alone are unpacked. See `api.moe`."""
    E = gate_up_bias_E2F.shape[0]
    experts_TX = jnp.where((experts_TX >= 0) & (experts_TX < E), experts_TX, E)
    groups = _grouping(experts_TX, E)
    X = experts_TX.shape[1]
    expert = partial(
        _expert,
        gate_up=gate_up,
        gate_up_bias_E2F=gate_up_bias_E2F,
        down=down,
        down_bias_ED=down_bias_ED,
        alpha=alpha,
        limit=limit,
    )

    def run(experts_G: jax.Array, pairs_GM: jax.Array) -> jax.Array:
        return jax.vmap(lambda expert_id, pairs_M: expert(x_TD[pairs_M // X], expert_id))(experts_G, pairs_GM)

    width = x_TD.shape[1]
    y_TXD = jax.lax.platform_dependent(
        groups,
        # A bound that is known at run time only costs nothing on a CPU, and elsewhere a wait of the host in each turn.
        cpu=lambda groups: _in_turn(run, groups, groups.num_used, width=width),
        default=lambda groups: _in_turn(run, groups, groups.pairs_GM.shape[0], width=width),
    )
    return jnp.sum(jnp.where((experts_TX < E)[..., None], y_TXD * weights_TX[..., None], 0), axis=1)


class _Groups(NamedTuple):
    """Pairs (token, one of its experts) in groups of M of the same expert. Pair p is token p // X, choice p % X."""

    experts_G: jax.Array  # of each group; any where a group is empty
    pairs_GM: jax.Array  # of each place; pair 0 where a place is empty
    place_TX: jax.Array  # of each pair in the flattened groups, 0 where it is in none
    num_used: jax.Array  # groups that are not empty: these come first


def group_sizes(num_pairs: int, num_experts: int) -> tuple[int, int]:
    """Places of a group, and the number of groups that there can be at most.

    A group has about as many places as an expert has tokens on the average, so that few stay empty.
    """
    places = min(LARGEST_GROUP, 1 << max(num_pairs // num_experts, 1).bit_length() - 1)
    return places, min(num_pairs, num_pairs // places + num_experts)


def _grouping(experts_TX: jax.Array, num_experts: int) -> _Groups:
    """As many groups as there can be at most: the pairs in full groups, and one begun for each expert."""
    T, X = experts_TX.shape
    P = T * X
    M, G = group_sizes(P, num_experts)
    experts_P = experts_TX.reshape(P)
    order_P = jnp.argsort(experts_P, stable=True).astype(jnp.int32)
    counts_E = jnp.zeros((num_experts,), jnp.int32).at[experts_P].add(1, mode="drop")
    groups_E = (counts_E + M - 1) // M
    first_pair_E, first_group_E = (jnp.cumsum(x) - x for x in (counts_E, groups_E))
    num_used = groups_E.sum()

    group_G = jnp.arange(G, dtype=jnp.int32)
    experts_G = jnp.minimum(jnp.searchsorted(jnp.cumsum(groups_E), group_G, side="right"), num_experts - 1)
    rank_GM = ((group_G - first_group_E[experts_G]) * M)[:, None] + jnp.arange(M, dtype=jnp.int32)
    filled_GM = (rank_GM < counts_E[experts_G][:, None]) & (group_G < num_used)[:, None]
    sorted_GM = jnp.where(filled_GM, first_pair_E[experts_G][:, None] + rank_GM, 0)
    pairs_GM = jnp.where(filled_GM, order_P[sorted_GM], 0)
    place_P = (
        jnp.zeros((P,), jnp.int32)
        .at[jnp.where(filled_GM, pairs_GM, P)]
        .set(jnp.arange(G * M, dtype=jnp.int32).reshape(G, M), mode="drop")
    )
    return _Groups(experts_G.astype(jnp.int32), pairs_GM, place_P.reshape(T, X), num_used)


def _in_turn(
    run: Callable[[jax.Array, jax.Array], jax.Array], groups: _Groups, num_groups: jax.Array | int, *, width: int
) -> jax.Array:
    """Each pair's result [T, X, D]: TOGETHER groups at a time, until `num_groups` have run."""
    G, M = groups.pairs_GM.shape
    together = min(TOGETHER, G)
    missing = -G % together
    experts_G = jnp.pad(groups.experts_G, (0, missing))
    pairs_GM = jnp.pad(groups.pairs_GM, ((0, missing), (0, 0)))

    def step(turn: jax.Array, out_GMD: jax.Array) -> jax.Array:
        start = turn * together
        part = run(*(jax.lax.dynamic_slice_in_dim(array, start, together) for array in (experts_G, pairs_GM)))
        return jax.lax.dynamic_update_slice_in_dim(out_GMD, part, start, axis=0)

    # Zero, but not to the compiler: of a constant, copies for all layers are made before the first one runs, and held.
    zero = (groups.num_used < 0).astype(jnp.float32)
    out_GMD = jnp.full((G + missing, M, width), zero)
    out_GMD = jax.lax.fori_loop(0, (num_groups + together - 1) // together, step, out_GMD)
    # Where a pair is not in any group, place 0 is as good as any, for its value is not taken.
    return out_GMD.reshape(-1, width)[groups.place_TX]


def _expert(
    x_MD: jax.Array,
    expert: jax.Array,
    *,
    gate_up: jax.Array | MXFP4,
    gate_up_bias_E2F: jax.Array,
    down: jax.Array | MXFP4,
    down_bias_ED: jax.Array,
    alpha: float,
    limit: float,
) -> jax.Array:
    """One expert's network, [M, D] -> [M, D] float32."""
    h_M2F = _product(x_MD, gate_up, expert) + gate_up_bias_E2F[expert].astype(jnp.float32)
    gate_MF, up_MF = jnp.minimum(h_M2F[:, 0::2], limit), jnp.clip(h_M2F[:, 1::2], -limit, limit)
    activation_MF = gate_MF * jax.nn.sigmoid(alpha * gate_MF) * (up_MF + 1)
    return _product(activation_MF.astype(x_MD.dtype), down, expert) + down_bias_ED[expert].astype(jnp.float32)


def _product(x: jax.Array, weight: jax.Array | MXFP4, expert: jax.Array) -> jax.Array:
    one = weight[expert]
    numbers, axis = (one.dequantize(x.dtype), 1) if isinstance(one, MXFP4) else (one.astype(x.dtype), 0)
    return jax.lax.dot_general(x, numbers, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
