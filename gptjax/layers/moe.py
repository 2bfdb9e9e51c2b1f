"""Mixture of experts: a router, and experts of which each token sees a few."""

from functools import partial

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from gptjax.axes import EXPERTS, MLP, WIDTH
from gptjax.layers.norm import RMSNorm
from gptjax.layers.observe import observe_made
from gptjax.layers.weight import STANDARD_DEVIATION, product, weight
from pallas_kernels.moe import moe
from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.route import norm_route


class Router(nn.Module):
    """The experts of each token, and the softmax over their logits, in one operation with the norm before."""

    num_experts: int  # E
    experts_per_token: int  # X
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, added: PartialSum | None, positions_BT: jax.Array, norm: RMSNorm
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """`x += added`, and where the norm of that goes.

        Returns:
          x and the norm [B, T, D], int32 experts [B · T, X], -1 at padding, and float32 weights [B · T, X].
        """
        axes, shape = (WIDTH, EXPERTS), (x_BTD.shape[-1], self.num_experts)
        kernel_init = nn.with_logical_partitioning(nn.initializers.normal(STANDARD_DEVIATION), axes)
        kernel_DE = self.param("kernel", kernel_init, shape, self.param_dtype)
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), (EXPERTS,))
        bias_E = self.param("bias", bias_init, (self.num_experts,), self.param_dtype)
        operation = partial(
            norm_route,
            router_DE=kernel_DE,
            router_bias_E=bias_E,
            positions_T=positions_BT.reshape(-1),
            top=self.experts_per_token,
        )
        x_BTD, normed_BTD, experts_TX, weights_TX = norm(x_BTD, added, operation)

        def logits() -> jax.Array:
            logits_TE = product(normed_BTD, kernel_DE, bias_E, self.dtype).total().astype(self.dtype)
            return logits_TE.reshape(*x_BTD.shape[:-1], self.num_experts)

        observe_made(self, "output", logits)
        return x_BTD, normed_BTD, experts_TX, weights_TX


class MoE(nn.Module):
    """`Σ softmax(top-k of router(y)) · expert(y)` of a norm y, with clamped SwiGLU experts.

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
    def __call__(
        self, x_BTD: jax.Array, added: PartialSum | None, positions_BT: jax.Array, norm: RMSNorm
    ) -> tuple[jax.Array, PartialSum]:
        """`x += added`, and what the experts make of the norm of that.

        Returns:
          x [B, T, D], and [B · T, D], last sums left. Padding, at negative positions, has no expert and gives 0.
        """
        E, F, D = self.num_experts, self.mlp_width, x_BTD.shape[-1]
        router = Router(E, self.experts_per_token, self.dtype, self.param_dtype, name="router")
        x_BTD, normed_BTD, experts_TX, weights_TX = router(x_BTD, added, positions_BT, norm)

        def bias(name: str, size: int, axis: str) -> jax.Array:
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), (EXPERTS, axis))
            value: jax.Array = self.param(name, init, (E, size), self.param_dtype)
            return value

        kernel = partial(weight, self, param_dtype=self.param_dtype, mxfp4=self.mxfp4)
        out = moe(
            normed_BTD.reshape(-1, D),
            experts_TX,
            weights_TX,
            kernel("gate_up_kernel", (E, D, 2 * F), (EXPERTS, WIDTH, MLP)),
            bias("gate_up_bias", 2 * F, MLP),
            kernel("down_kernel", (E, F, D), (EXPERTS, MLP, WIDTH)),
            bias("down_bias", D, WIDTH),
            alpha=self.swiglu_alpha,
            limit=self.swiglu_limit,
            implementation=self.implementation,
        )
        observe_made(self, "output", lambda: out.total().reshape(x_BTD.shape).astype(self.dtype))
        return x_BTD, out
