"""Feed-forward networks and their activations."""

from collections.abc import Callable
from functools import partial
from typing import Final

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptjax.axes import GATE_UP, WIDTH
from gptjax.axes import MLP as MLP_AXIS
from gptjax.layers.linear import Linear
from gptjax.layers.norm import Normed
from gptjax.layers.observe import is_observed, observe
from gptjax.layers.residual import Residual
from pallas_kernels.partial_sum import PartialSum

ACTIVATIONS: Final[dict[str, Callable[[jax.Array], jax.Array]]] = {
    "gelu_erf": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


class MLP(nn.Module):
    """`down(activation(up(x)))`."""

    mlp_width: int
    activation: str  # a key of ACTIVATIONS
    dtype: DTypeLike
    param_dtype: DTypeLike
    implementation: str
    over: tuple[str, ...] = ()  # axes of the mesh that F is divided over: this is one device's part

    @nn.compact
    def __call__(self, normed: Normed) -> tuple[Residual, PartialSum]:
        """The residual with its pending update added, and the network's update to it, [B · T, D]."""
        linear = partial(
            Linear,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            implementation=self.implementation,
        )
        residual, x_BTD = normed.finished()
        h_BTF = linear(self.mlp_width, (WIDTH, MLP_AXIS), name="up")(x_BTD)
        h_BTF = ACTIVATIONS[self.activation](h_BTF.astype(jnp.float32)).astype(self.dtype)
        observe(self, "activation", h_BTF)
        down = linear(x_BTD.shape[-1], (MLP_AXIS, WIDTH), name="down")
        return residual, down.partial_sum(h_BTF).across(self.over, box=1)


class GatedMLP(nn.Module):
    """SwiGLU, `down(silu(gate(x)) · up(x))`, with one fused projection for gate and up (in that order).

    Source: Shazeer 2020 (arXiv:2002.05202).
    """

    mlp_width: int
    use_bias: bool
    dtype: DTypeLike
    param_dtype: DTypeLike
    implementation: str
    over: tuple[str, ...] = ()  # axes of the mesh that F is divided over: this is one device's part

    @nn.compact
    def __call__(self, normed: Normed) -> tuple[Residual, PartialSum]:
        """The residual with its pending update added, and the network's update to it, [B · T, D]."""
        linear = partial(
            Linear,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            use_bias=self.use_bias,
            implementation=self.implementation,
        )
        gate_up = linear(2 * self.mlp_width, (WIDTH, GATE_UP), name="gate_up")
        residual, h_BTF = self._activated(gate_up, normed)
        observe(self, "activation", h_BTF)
        down = linear(normed.shape[-1], (MLP_AXIS, WIDTH), name="down")
        return residual, down.partial_sum(h_BTF).across(self.over, box=1)

    def _activated(self, gate_up: Linear, normed: Normed) -> tuple[Residual, jax.Array]:
        """The residual, and silu(gate) · up [B, T, F]; in one kernel, with or without the norm, if there is one."""
        if (done := None if is_observed(self) else gate_up.gated_after(normed)) is not None:
            return done
        residual, x_BTD = normed.finished()
        h_BTF = None if is_observed(self) else gate_up.gated(x_BTD)
        if h_BTF is None:
            gate_BTF, up_BTF = jnp.split(gate_up(x_BTD), 2, axis=-1)
            observe(self, "gate", gate_BTF)
            observe(self, "up", up_BTF)
            h_BTF = (jax.nn.silu(gate_BTF.astype(jnp.float32)) * up_BTF.astype(jnp.float32)).astype(self.dtype)
        return residual, h_BTF
