"""Tokens grouped by the expert that they go to."""

from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BY_EXPERT = 128  # up to this many tokens, each expert has one group, with room for all of them


class Groups(NamedTuple):
    """Pairs (token, one of its experts) in groups of one expert. In each group, the used slots come first."""

    experts_U: jax.Array  # int32; any for an empty group. A group whose expert does not exist is empty
    rows_UM: jax.Array  # int32: the token in each slot, -1 in an empty one


class Routing(NamedTuple):
    """The groups, and each pair's place in them."""

    groups: Groups
    places_TX: jax.Array  # int32, in the flattened slots; -1 or in an empty group if the expert does not exist


def route(experts_TX: jax.Array, num_experts: int) -> Routing:
    """Groups of the chosen experts' tokens, for up to `BY_EXPERT` tokens; experts outside [0, num_experts) have none.

    It needs no sorting, which would be many small kernels.
    """
    return _one_token(experts_TX) if experts_TX.shape[0] == 1 else _by_expert(experts_TX, num_experts)


def _existing(experts_TX: jax.Array, num_experts: int) -> jax.Array:
    """The same experts, with `num_experts` for all that do not exist."""
    return jnp.where((experts_TX >= 0) & (experts_TX < num_experts), experts_TX, num_experts).astype(jnp.int32)


def _one_token(experts_1X: jax.Array) -> Routing:
    """One group per choice. Nothing is computed, because that would be a kernel."""
    X = experts_1X.shape[1]
    # NumPy arrays are constants to XLA.
    rows_X1, places_1X = np.zeros((X, 1), np.int32), np.arange(X, dtype=np.int32)[None]
    return Routing(Groups(experts_1X.reshape(X), jnp.asarray(rows_X1)), jnp.asarray(places_1X))


def _by_expert(experts_TX: jax.Array, num_experts: int) -> Routing:
    """One group per expert, of T slots, by counting: two sums over the tokens, which are two kernels."""
    T, X = experts_TX.shape
    tokens_T = jnp.arange(T, dtype=jnp.int32)
    # Compared one choice at a time, so that there is no sum over the choices.
    same_TXT = reduce(jnp.logical_or, (experts_TX[..., None] == experts_TX[:, x] for x in range(X)))
    earlier_TXT = same_TXT & (tokens_T[:, None, None] > tokens_T)
    rank_TX = jnp.sum(earlier_TXT, axis=-1, dtype=jnp.int32)
    exists_TX = (experts_TX >= 0) & (experts_TX < num_experts)
    places_TX = jnp.where(exists_TX, experts_TX * T + rank_TX, -1)
    slots_EM = jnp.arange(num_experts * T, dtype=jnp.int32).reshape(num_experts, T)
    holds_EMT = reduce(jnp.logical_or, (slots_EM[..., None] == places_TX[:, x] for x in range(X)))
    rows_EM = jnp.sum(jnp.where(holds_EMT, tokens_T + 1, 0), axis=-1, dtype=jnp.int32) - 1
    return Routing(Groups(jnp.arange(num_experts, dtype=jnp.int32), rows_EM), places_TX)


def most_groups(num_pairs: int, num_experts: int, slots: int) -> int:
    """The groups that could be needed: all pairs in full groups, and a partial group per expert."""
    return min(num_pairs, num_pairs // slots + num_experts)


def sorted_groups(experts_TX: jax.Array, num_experts: int, largest: int) -> Routing:
    """Groups of `largest` slots, `most_groups` of them. Those that are not empty come first."""
    experts_TX = _existing(experts_TX, num_experts)
    T, X = experts_TX.shape
    M, num_pairs = largest, T * X
    U = most_groups(num_pairs, num_experts, M)
    pair_experts = experts_TX.reshape(num_pairs)
    order = jnp.argsort(pair_experts, stable=True).astype(jnp.int32)
    counts_E = jnp.zeros((num_experts,), jnp.int32).at[pair_experts].add(1, mode="drop")
    groups_E = (counts_E + M - 1) // M
    first_pair_E, first_group_E = (jnp.cumsum(x) - x for x in (counts_E, groups_E))
    group_U = jnp.arange(U, dtype=jnp.int32)
    experts_U = jnp.minimum(jnp.searchsorted(jnp.cumsum(groups_E), group_U, side="right"), num_experts - 1)
    rank_UM = ((group_U - first_group_E[experts_U]) * M)[:, None] + jnp.arange(M, dtype=jnp.int32)
    filled_UM = (rank_UM < counts_E[experts_U][:, None]) & (group_U < groups_E.sum())[:, None]
    pairs_UM = order[jnp.where(filled_UM, first_pair_E[experts_U][:, None] + rank_UM, 0)]
    places = (
        jnp.full((num_pairs,), -1, jnp.int32)
        .at[jnp.where(filled_UM, pairs_UM, num_pairs)]
        .set(jnp.arange(U * M, dtype=jnp.int32).reshape(U, M), mode="drop")
    )
    rows_UM = jnp.where(filled_UM, pairs_UM // X, -1)
    return Routing(Groups(experts_U.astype(jnp.int32), rows_UM), places.reshape(T, X))
