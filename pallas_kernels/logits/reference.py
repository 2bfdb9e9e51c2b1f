"""A row's logits summed up in jnp, which XLA compiles."""

import jax
import jax.numpy as jnp

from pallas_kernels.logits.summary import Summary

_INT32 = jnp.iinfo(jnp.int32)


def summary(logits_BV: jax.Array) -> Summary:
    """See `api.summary`."""
    largest_B = logits_BV.max(axis=-1)
    token_B = jnp.minimum(first_largest(logits_BV), logits_BV.shape[-1] - 1)
    return Summary(largest_B, token_B, jnp.exp(logits_BV - largest_B[:, None]).sum(axis=-1))


def first_largest(values_BV: jax.Array) -> jax.Array:
    """The index of each row's largest value, int32, the first of several; undefined if a value is NaN.

    On a CPU, XLA's argmax is a scalar loop. Two passes that it vectorises draw 2.3 times as fast.
    """

    def in_two_passes(values_BV: jax.Array) -> jax.Array:
        is_largest_BV = values_BV == values_BV.max(axis=-1, keepdims=True)
        return jnp.where(is_largest_BV, jnp.arange(values_BV.shape[-1], dtype=jnp.int32), _INT32.max).min(axis=-1)

    def in_one(values_BV: jax.Array) -> jax.Array:
        return jax.lax.argmax(values_BV, axis=1, index_dtype=jnp.int32)

    token_B: jax.Array = jax.lax.platform_dependent(values_BV, cpu=in_two_passes, default=in_one)
    return token_B
