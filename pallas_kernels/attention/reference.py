"""Attention in jnp: the meaning (`dense`), and a running softmax over blocks of keys and values (`running`)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

DENSE_SCORES = 1 << 26  # B·N·T·S, a quarter of a gigabyte: up to this, an accelerator computes all scores at once
MASKED = -1e30  # finite, so that a query that sees no key gives 0 and not NaN


def visible(q_positions_BT: jax.Array, k_positions_BS: jax.Array, window: int | None = None) -> jax.Array:
    """The mask [B, T, S]: a key is seen from its own position on, for `window` positions; negative is padding."""
    q_BT1, k_B1S = q_positions_BT[:, :, None], k_positions_BS[:, None, :]
    seen_BTS = (k_B1S >= 0) & (k_B1S <= q_BT1)
    return seen_BTS if window is None else seen_BTS & (k_B1S > q_BT1 - window)


def _scores(q_BTKGH: jax.Array, k_BKSH: jax.Array, scale: float, seen_BTS: jax.Array) -> jax.Array:
    scores_BKGTS = jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32) * scale
    return jnp.where(seen_BTS[:, None, None], scores_BKGTS, MASKED)


def _weigh(weights_BKGTS: jax.Array, v_BKSH: jax.Array, seen_BTS: jax.Array) -> jax.Array:
    # A weight of 0 does not silence a NaN at a position that no query sees, as 0 × NaN is NaN. So mask the values too.
    v_BKSH = jnp.where(seen_BTS.any(axis=1)[:, None, :, None], v_BKSH, 0)
    weights_BKGTS = weights_BKGTS.astype(v_BKSH.dtype)
    return jnp.einsum("BKGTS,BKSH->BKGTH", weights_BKGTS, v_BKSH, preferred_element_type=jnp.float32)


def _start(sinks_N: jax.Array | None, num_kv_heads: int) -> tuple[jax.Array, jax.Array]:
    """The maximum and the total of a softmax that has seen no key yet, [1, K, G, 1, 1]: the sink's, if there is one.

    The sink's total is 1, which is exp(sink - sink).
    """
    if sinks_N is None:
        return jnp.full((1, 1, 1, 1, 1), MASKED, jnp.float32), jnp.zeros((1, 1, 1, 1, 1), jnp.float32)
    sinks_1KG11 = sinks_N.astype(jnp.float32).reshape(1, num_kv_heads, -1, 1, 1)
    return sinks_1KG11, jnp.ones_like(sinks_1KG11)


def _grouped(q_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    return q_BTNH.reshape(B, T, num_kv_heads, N // num_kv_heads, H)


def _ungrouped(out_BKGTH: jax.Array, like_BTNH: jax.Array) -> jax.Array:
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(like_BTNH.shape).astype(like_BTNH.dtype)


def dense(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
) -> jax.Array:
    """All scores at once, differentiable. See `api.attention` for the meaning of the arguments."""
    K = k_BKSH.shape[1]
    seen_BTS = visible(q_positions_BT, k_positions_BS, window)
    scores_BKGTS = _scores(_grouped(q_BTNH, K), k_BKSH, scale, seen_BTS)
    start, total = _start(sinks_N, K)
    # The result does not depend on the maximum, so neither does its derivative.
    maximum_BKGT1 = jax.lax.stop_gradient(jnp.maximum(start, scores_BKGTS.max(axis=-1, keepdims=True)))
    weights_BKGTS = jnp.where(seen_BTS[:, None, None], jnp.exp(scores_BKGTS - maximum_BKGT1), 0)
    total_BKGT1 = total * jnp.exp(start - maximum_BKGT1) + weights_BKGTS.sum(axis=-1, keepdims=True)
    weights_BKGTS = weights_BKGTS / jnp.where(total_BKGT1 == 0, 1, total_BKGT1)
    return _ungrouped(_weigh(weights_BKGTS, v_BKSH, seen_BTS), q_BTNH)


class Block(NamedTuple):
    """Keys and values that are read together, and which of them each query sees."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    seen_BTS: jax.Array


def running(
    q_BTNH: jax.Array,
    read: Callable[[jax.Array], Block],
    blocks: jax.Array,
    sinks_N: jax.Array | None,
    *,
    num_kv_heads: int,
    scale: float,
) -> jax.Array:
    """`dense` with a running softmax over read(0), …, read(blocks - 1).

    A block that a row does not see changes none of its bits: its weights are exactly 0 and its rescaling exactly 1. Not
    differentiable in reverse, because the number of blocks is only known at run time.
    """
    B, T, N, H = q_BTNH.shape
    q_BTKGH = _grouped(q_BTNH, num_kv_heads)

    def step(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        maximum_BKGT1, total_BKGT1, out_BKGTH = carry
        k_BKSH, v_BKSH, seen_BTS = read(index)
        scores_BKGTS = _scores(q_BTKGH, k_BKSH, scale, seen_BTS)
        new_maximum_BKGT1 = jnp.maximum(maximum_BKGT1, scores_BKGTS.max(axis=-1, keepdims=True))
        weights_BKGTS = jnp.where(seen_BTS[:, None, None], jnp.exp(scores_BKGTS - new_maximum_BKGT1), 0)
        rescale_BKGT1 = jnp.exp(maximum_BKGT1 - new_maximum_BKGT1)
        total_BKGT1 = total_BKGT1 * rescale_BKGT1 + weights_BKGTS.sum(axis=-1, keepdims=True)
        out_BKGTH = out_BKGTH * rescale_BKGT1 + _weigh(weights_BKGTS, v_BKSH, seen_BTS)
        return new_maximum_BKGT1, total_BKGT1, out_BKGTH

    row = (B, num_kv_heads, N // num_kv_heads, T)
    maximum, total = (jnp.broadcast_to(x, (*row, 1)) for x in _start(sinks_N, num_kv_heads))
    # Zero, but the compiler must not know: it would make copies of a constant for all layers, before the first runs.
    zero = (blocks < 0).astype(jnp.float32)
    start = (maximum, total, jnp.full((*row, H), zero))
    _, total_BKGT1, out_BKGTH = jax.lax.fori_loop(0, blocks, step, start)
    return _ungrouped(out_BKGTH / jnp.where(total_BKGT1 == 0, 1, total_BKGT1), q_BTNH)
