"""The choice of experts in jnp, which XLA compiles."""

import jax
import jax.numpy as jnp


def route(x_TD: jax.Array, router_DE: jax.Array, bias_E: jax.Array, *, top: int) -> tuple[jax.Array, jax.Array]:
    """See `api.route`."""
    contract = (((1,), (0,)), ((), ()))
    logits_TE = jax.lax.dot_general(x_TD, router_DE.astype(x_TD.dtype), contract, preferred_element_type=jnp.float32)
    logits_TE = (logits_TE + bias_E.astype(jnp.float32)).astype(x_TD.dtype)
    chosen_TX, experts_TX = jax.lax.top_k(logits_TE.astype(jnp.float32), top)
    return experts_TX, jax.nn.softmax(chosen_TX, axis=-1)
