"""Mixture of experts: a router, and experts of which each token sees a few."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptjax.axes import CHOICES, EXPERTS, MLP, WIDTH
from gptjax.layers.norm import RMSNorm
from gptjax.layers.observe import observe, observe_lazy
from gptjax.layers.residual import Residual
from gptjax.layers.weight import STANDARD_DEVIATION, array, product, weight
from pallas_kernels.moe import moe
from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.route import norm_route


class Router(nn.Module):
    """The norm, then the experts with a token's largest logits and the softmax over these, in one operation."""

    norm: RMSNorm
    num_experts: int  # E
    experts_per_token: int  # X
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, residual: Residual, positions_BT: jax.Array) -> tuple[Residual, jax.Array, jax.Array, jax.Array]:
        """Routes each token.

        Returns:
          The residual with its pending update added; the norm of that, [B, T, D]; int32 experts [B · T, X], -1 at
          padding; and their float32 weights [B · T, X].
        """
        E, shape = self.num_experts, residual.x_BTD.shape
        D = shape[-1]
        kernel_init, bias_init = nn.initializers.normal(STANDARD_DEVIATION), nn.initializers.zeros_init()
        kernel_DE = array(self, "kernel", kernel_init, (D, E), (WIDTH, CHOICES), self.param_dtype)
        bias_E = array(self, "bias", bias_init, (E,), (CHOICES,), self.param_dtype)
        positions_T = positions_BT.reshape(-1)
        sum_TD, normed_TD, experts_TX, weights_TX = norm_route(
            residual.x_BTD.reshape(-1, D).astype(self.dtype),
            residual.pending,
            self.norm.scale(D),
            peers=residual.peers,
            epsilon=self.norm.epsilon,
            router_DE=kernel_DE,
            router_bias_E=bias_E,
            positions_T=positions_T,
            top=self.experts_per_token,
            implementation=self.norm.implementation,
        )
        residual = residual.settled(sum_TD.reshape(shape))
        normed_BTD = observe(self.norm, "output", normed_TD.reshape(shape))

        def logits() -> jax.Array:
            logits_TE = product(normed_BTD, kernel_DE, bias_E, self.dtype).total().astype(self.dtype)
            return logits_TE.reshape(*shape[:-1], E)

        observe_lazy(self, "output", logits)
        return residual, normed_BTD, experts_TX, weights_TX


class MoE(nn.Module):
    """`Σ softmax(top-k of router(y)) · expert(y)` with y the norm of the residual, and clamped SwiGLU experts.

    The norm is part of this layer because one kernel computes it and the routing.
    Source: openai/gpt-oss `gpt_oss/torch/model.py`, `MLPBlock`.
    """

    norm: RMSNorm
    num_experts: int  # E
    experts_per_token: int  # X
    mlp_width: int  # F
    swiglu_alpha: float
    swiglu_limit: float
    dtype: DTypeLike
    param_dtype: DTypeLike
    implementation: str
    own_experts: int | None = None  # of E, that this device has; None: all
    experts_over: tuple[str, ...] = ()  # axes of the mesh that E is divided over
    width_over: tuple[str, ...] = ()  # and F, of which `mlp_width` is then one device's part

    @nn.compact
    def __call__(self, residual: Residual, positions_BT: jax.Array) -> tuple[Residual, PartialSum]:
        """The residual with its pending update added, and the experts' update to it, [B · T, D].

        Padding, at negative positions, has no expert, and its update is 0.
        """
        E, F, D = self.own_experts or self.num_experts, self.mlp_width, residual.x_BTD.shape[-1]
        router = Router(
            self.norm, self.num_experts, self.experts_per_token, self.dtype, self.param_dtype, name="router"
        )
        residual, normed_BTD, experts_TX, weights_TX = router(residual, positions_BT)
        if self.experts_over:  # those of other devices do not exist here
            experts_TX -= jax.lax.axis_index(self.experts_over) * E
            experts_TX = jnp.where((experts_TX >= 0) & (experts_TX < E), experts_TX, -1)
        kernel = partial(weight, self, param_dtype=self.param_dtype)
        bias = partial(array, self, init=nn.initializers.zeros_init(), param_dtype=self.param_dtype)
        down_bias_ED = bias("down_bias", shape=(E, D), axes=(EXPERTS, WIDTH))
        update = moe(
            normed_BTD.reshape(-1, D),
            experts_TX,
            weights_TX,
            kernel("gate_up_kernel", (E, D, 2 * F), (EXPERTS, WIDTH, MLP)),
            bias("gate_up_bias", shape=(E, 2 * F), axes=(EXPERTS, MLP)),
            kernel("down_kernel", (E, F, D), (EXPERTS, MLP, WIDTH)),
            down_bias_ED,
            alpha=self.swiglu_alpha,
            limit=self.swiglu_limit,
            width_over=self.width_over,
            implementation=self.implementation,
        ).across(self.experts_over + self.width_over, box=1)
        observe_lazy(self, "output", lambda: update.total().reshape(normed_BTD.shape).astype(self.dtype))
        return residual, update
