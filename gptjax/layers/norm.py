"""Normalisation, computed in float32, of a residual stream to which something may be added first."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from gptjax.axes import WIDTH
from gptjax.layers.observe import observe
from pallas_kernels.add_norm import add_norm
from pallas_kernels.partial_sum import PartialSum


class _Norm(nn.Module):
    """What both have in common. The sum is the result's first part, for the residual stream goes on with it."""

    epsilon: float
    dtype: DTypeLike
    param_dtype: DTypeLike
    implementation: str = "auto"

    def weight(self, name: str, init: nn.initializers.Initializer, width: int) -> jax.Array:
        """Declares a vector."""
        value: jax.Array = self.param(name, nn.with_logical_partitioning(init, (WIDTH,)), (width,), self.param_dtype)
        return value

    def run(
        self,
        operation: Callable[..., tuple[jax.Array, ...]],
        x: jax.Array,
        added: PartialSum | None,
        scale_D: jax.Array,
        bias_D: jax.Array | None,
    ) -> tuple[Any, ...]:
        """The sum and its norm, of x's shape, and what else the operation returns."""
        sum_TD, normed_TD, *rest = operation(
            x.reshape(-1, x.shape[-1]).astype(self.dtype),
            added,
            scale_D,
            bias_D,
            epsilon=self.epsilon,
            center=bias_D is not None,
            implementation=self.implementation,
        )
        return sum_TD.reshape(x.shape), observe(self, "output", normed_TD.reshape(x.shape)), *rest


class LayerNorm(_Norm):
    """`(x - mean) / sqrt(variance + epsilon) * scale + bias`, with the biased variance, over the last axis."""

    @nn.compact
    def __call__(self, x: jax.Array, added: PartialSum | None = None) -> tuple[jax.Array, jax.Array]:
        """`x += added`, and the norm of that: both [..., D] of `dtype`."""
        scale_D = self.weight("scale", nn.initializers.ones_init(), x.shape[-1])
        bias_D = self.weight("bias", nn.initializers.zeros_init(), x.shape[-1])
        return self.run(add_norm, x, added, scale_D, bias_D)


class RMSNorm(_Norm):
    """`x / sqrt(mean(x²) + epsilon) * scale`, over the last axis; multiplied before it is rounded to `dtype`."""

    @nn.compact
    def __call__(
        self, x: jax.Array, added: PartialSum | None = None, operation: Callable[..., tuple[jax.Array, ...]] = add_norm
    ) -> tuple[Any, ...]:
        """`x += added`, and the norm of that: both [..., D] of `dtype`.

        Another `operation` is one that does more in passing, and is called as `add_norm` is: what it returns beside
        these two comes after them.
        """
        scale_D = self.weight("scale", nn.initializers.ones_init(), x.shape[-1])
        return self.run(operation, x, added, scale_D, None)


def add(x: jax.Array, added: PartialSum) -> jax.Array:
    """`x + added`, as the norms do it."""
    return x + added.total().astype(x.dtype).reshape(x.shape)
