"""Normalisation of the residual stream, and of single heads, computed in float32."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptjax.axes import HEAD_WIDTH, WIDTH
from gptjax.layers.observe import is_observed, observe
from gptjax.layers.residual import Residual
from gptjax.layers.weight import array
from pallas_kernels import same_bits
from pallas_kernels.add_norm import add_norm
from pallas_kernels.matvec import RowNorm


class _Norm(nn.Module):
    """What both norms have in common."""

    epsilon: float
    dtype: DTypeLike
    param_dtype: DTypeLike
    implementation: str = "auto"

    def vector(self, name: str, init: nn.initializers.Initializer, width: int) -> jax.Array:
        """Declares a vector [D]."""
        return array(self, name, init, (width,), (WIDTH,), self.param_dtype)

    def __call__(self, residual: Residual) -> "Normed":
        """The norm of the residual with its pending update added, for the layer that reads it."""
        return Normed(self, residual)

    def finished(self, residual: Residual) -> tuple[Residual, jax.Array]:
        """The residual with its pending update added, and the norm of that, [B, T, D] of `dtype`."""
        raise NotImplementedError

    def add_and_norm(
        self, residual: Residual, scale_D: jax.Array, bias_D: jax.Array | None = None
    ) -> tuple[Residual, jax.Array]:
        """Adds the pending update, and norms the sum: LayerNorm with a bias, RMSNorm without."""
        shape = residual.x_BTD.shape
        sum_TD, normed_TD = add_norm(
            residual.x_BTD.reshape(-1, shape[-1]).astype(self.dtype),
            residual.pending,
            scale_D,
            bias_D,
            peers=residual.peers,
            epsilon=self.epsilon,
            center=bias_D is not None,
            implementation=self.implementation,
        )
        return residual.settled(sum_TD.reshape(shape)), observe(self, "output", normed_TD.reshape(shape))


@dataclasses.dataclass(frozen=True, eq=False)
class Normed:
    """The norm of a residual, not computed yet: the product that reads it may do so in its own kernel."""

    norm: _Norm
    residual: Residual

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the norm, [B, T, D]."""
        return self.residual.x_BTD.shape

    def finished(self) -> tuple[Residual, jax.Array]:
        """The residual with its pending update added, and the norm of that, [B, T, D] of the norm's `dtype`."""
        return self.norm.finished(self.residual)

    def row(self) -> RowNorm | None:
        """What a product's kernel needs to compute it; None unless it is RMSNorm of a single row, and not observed."""
        norm, x_BTD = self.norm, self.residual.x_BTD
        if not isinstance(norm, RMSNorm) or x_BTD.size != x_BTD.shape[-1] or x_BTD.dtype != norm.dtype:
            return None
        if is_observed(norm):
            return None
        return RowNorm(x_BTD, self.residual.pending, norm.scale(x_BTD.shape[-1]), norm.epsilon)


class LayerNorm(_Norm):
    """`(x - mean) / sqrt(variance + epsilon) * scale + bias`, with the biased variance, over the last axis."""

    @nn.compact
    def finished(self, residual: Residual) -> tuple[Residual, jax.Array]:
        """See `_Norm`."""
        width = residual.x_BTD.shape[-1]
        scale_D = self.vector("scale", nn.initializers.ones_init(), width)
        bias_D = self.vector("bias", nn.initializers.zeros_init(), width)
        return self.add_and_norm(residual, scale_D, bias_D)


class RMSNorm(_Norm):
    """`x / sqrt(mean(x²) + epsilon) * scale`, over the last axis; multiplied before it is rounded to `dtype`.

    So does GPT-OSS. Llama's published code rounds before it multiplies, and again after: in half precision it differs
    from this by at most one rounding.
    """

    @nn.compact
    def scale(self, width: int) -> jax.Array:
        """The learned scale [D]."""
        return self.vector("scale", nn.initializers.ones_init(), width)

    def finished(self, residual: Residual) -> tuple[Residual, jax.Array]:
        """See `_Norm`."""
        return self.add_and_norm(residual, self.scale(residual.x_BTD.shape[-1]))


class HeadNorm(nn.Module):
    """`RMSNorm` of each head by itself, with one scale for all."""

    epsilon: float
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def scale(self, width: int) -> jax.Array:
        """The learned scale [H]."""
        return array(self, "scale", nn.initializers.ones_init(), (width,), (HEAD_WIDTH,), self.param_dtype)

    def __call__(self, x_BTNH: jax.Array) -> jax.Array:
        """[B, T, N, H] -> the same, of `dtype`."""
        scale_H = self.scale(x_BTNH.shape[-1])
        y_BTNH = x_BTNH.astype(jnp.float32)
        y_BTNH *= same_bits.rsqrt(same_bits.mean(jnp.square(y_BTNH)) + self.epsilon)
        return observe(self, "output", (y_BTNH * scale_H.astype(jnp.float32)).astype(self.dtype))
