"""Normalisation, computed in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptjax.axes import WIDTH
from gptjax.layers.observe import observe


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(variance + epsilon) * scale + bias`, with the biased variance, over the last axis."""

    epsilon: float
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D] of `dtype`."""

        def weight(name: str, init: nn.initializers.Initializer) -> jax.Array:
            init = nn.with_logical_partitioning(init, (WIDTH,))
            value: jax.Array = self.param(name, init, (x.shape[-1],), self.param_dtype)
            return value.astype(jnp.float32)

        x = x.astype(jnp.float32)
        # The variance of differences from the mean: E[x²] - E[x]² loses all digits where the mean is large.
        centred = x - x.mean(axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + self.epsilon)
        scaled = normed * weight("scale", nn.initializers.ones_init()) + weight("bias", nn.initializers.zeros_init())
        return observe(self, "output", scaled.astype(self.dtype))


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + epsilon) * scale`, over the last axis; multiplied before it is rounded to `dtype`."""

    epsilon: float
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D] of `dtype`."""
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), (WIDTH,))
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype).astype(jnp.float32)
        x = x.astype(jnp.float32)
        normed = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.epsilon)
        return observe(self, "output", (normed * scale).astype(self.dtype))
