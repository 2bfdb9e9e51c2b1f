"""Llama and its relatives (Mistral, Qwen2, Qwen3): RMSNorm, rotary positions, grouped queries, SwiGLU.

Source: transformers `models/llama/modeling_llama.py`, and those of the other families.
"""

import math
from functools import partial

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from gptjax.config.llama import LlamaConfig
from gptjax.layers.attention import Attention
from gptjax.layers.layer_cache import LayerCache
from gptjax.layers.mlp import GatedMLP
from gptjax.layers.norm import RMSNorm
from gptjax.layers.observe import observe, observe_lazy
from gptjax.layers.residual import Residual
from gptjax.models.decoder import Decoder
from gptjax.sharding.share import Share


class Block(nn.Module):
    """`x += attention(norm(x)); x += mlp(norm(x))`."""

    config: LlamaConfig
    window: int | None
    dtype: DTypeLike
    param_dtype: DTypeLike
    implementation: str
    cache_dtype: str | None
    share: Share

    def setup(self) -> None:
        """Declares the layers."""
        config, share, dtypes = self.config, self.share, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(RMSNorm, config.norm_epsilon, implementation=self.implementation, **dtypes)
        self.attention_norm = norm()
        self.attention = Attention(
            num_heads=share.num_heads,
            num_kv_heads=share.num_kv_heads,
            head_width=config.head_width,
            scale=1 / math.sqrt(config.head_width),
            implementation=self.implementation,
            cache_dtype=self.cache_dtype,
            over=share.axes("N"),
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            qk_norm_epsilon=config.norm_epsilon if config.qk_norm else None,
            rope=config.rope,
            window=self.window,
            **dtypes,
        )
        self.mlp_norm = norm()
        self.mlp = GatedMLP(
            share.mlp_width,
            config.mlp_bias,
            implementation=self.implementation,
            over=share.axes("F"),
            **dtypes,
        )

    def __call__(
        self, residual: Residual, positions_BT: jax.Array, cache: LayerCache | None
    ) -> tuple[Residual, LayerCache | None]:
        """The residual with both updates, the second pending, and the cache with this layer's keys and values."""
        residual, update, cache = self.attention(self.attention_norm(residual), positions_BT, cache)
        residual, update = self.mlp(self.mlp_norm(residual.plus(update)))
        observe(self, "attention_residual", residual.x_BTD)
        residual = residual.plus(update)
        observe_lazy(self, "mlp_residual", residual.total)
        return residual, cache


class Llama(Decoder):
    """A Llama, or a relative of any size."""

    config: LlamaConfig

    def block(self, layer: int) -> Block:
        """A block."""
        window, dtypes = self.config.windows[layer], (self.dtype, self.param_dtype)
        how = self.implementation, self.cache_dtype
        return Block(self.config, window, *dtypes, *how, self.own, name=f"block_{layer}")

    def norm(self) -> RMSNorm:
        """The final norm."""
        return RMSNorm(self.config.norm_epsilon, self.dtype, self.param_dtype, self.implementation)
