"""Mixture of experts: a router, and experts of which each token sees a few."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptjax.axes import EXPERTS, MLP, WIDTH
from gptjax.layers.linear import Linear
from gptjax.layers.observe import observe
from gptjax.layers.weight import weight
from pallas_kernels.moe import moe


class MoE(nn.Module):
    """`Σ softmax(top-k of router(x)) · expert(x)`, with clamped SwiGLU experts.

    Source: openai/gpt-oss `gpt_oss/torch/model.py`, `MLPBlock`.
    """

    num_experts: int  # E
    experts_per_token: int  # X
    mlp_width: int  # F
    swiglu_alpha: float
    swiglu_limit: float
    mxfp4: bool  # the experts' weights are packed
    dtype: DTypeLike
    param_dtype: DTypeLike
    implementation: str

    @nn.compact
    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]. Padding, at negative positions, is routed to no expert and gives 0."""
        E, F, D = self.num_experts, self.mlp_width, x_BTD.shape[-1]
        router = Linear(E, (WIDTH, EXPERTS), dtype=self.dtype, param_dtype=self.param_dtype, name="router")
        chosen_BTX, experts_BTX = jax.lax.top_k(router(x_BTD).astype(jnp.float32), self.experts_per_token)
        weights_BTX = jax.nn.softmax(chosen_BTX, axis=-1)
        experts_BTX = jnp.where(positions_BT[..., None] < 0, E, experts_BTX)

        def bias(name: str, size: int, axis: str) -> jax.Array:
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), (EXPERTS, axis))
            value: jax.Array = self.param(name, init, (E, size), self.param_dtype)
            return value

        kernel = partial(weight, self, param_dtype=self.param_dtype, mxfp4=self.mxfp4)
        out_TD = moe(
            x_BTD.reshape(-1, D).astype(self.dtype),
            experts_BTX.reshape(-1, self.experts_per_token),
            weights_BTX.reshape(-1, self.experts_per_token),
            kernel("gate_up_kernel", (E, D, 2 * F), (EXPERTS, WIDTH, MLP)),
            bias("gate_up_bias", 2 * F, MLP),
            kernel("down_kernel", (E, F, D), (EXPERTS, MLP, WIDTH)),
            bias("down_bias", D, WIDTH),
            alpha=self.swiglu_alpha,
            limit=self.swiglu_limit,
            implementation=self.implementation,
        )
        return observe(self, "output", out_TD.reshape(x_BTD.shape).astype(self.dtype))
