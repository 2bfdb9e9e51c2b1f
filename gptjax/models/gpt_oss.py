"""GPT-OSS: RMSNorm, attention with sinks, alternating windows and YaRN, mixture of experts in MXFP4.

Source: openai/gpt-oss `gpt_oss/torch/model.py`; transformers `models/gpt_oss/modeling_gpt_oss.py`.
"""

import math
from functools import partial

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from gptjax.config.gpt_oss import GptOssConfig
from gptjax.layers.attention import Attention
from gptjax.layers.layer_cache import LayerCache
from gptjax.layers.moe import MoE
from gptjax.layers.norm import RMSNorm
from gptjax.layers.observe import observe, observe_lazy
from gptjax.layers.residual import Residual
from gptjax.models.decoder import Decoder
from gptjax.sharding.share import Share


class Block(nn.Module):
    """`x += attention(norm(x)); x += moe(norm(x))`."""

    config: GptOssConfig
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
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            rope=config.rope,
            window=self.window,
            use_sinks=True,
            **dtypes,
        )
        self.moe_norm = norm()
        self.moe = MoE(
            norm=self.moe_norm,
            num_experts=config.num_experts,
            experts_per_token=config.experts_per_token,
            mlp_width=share.mlp_width,
            swiglu_alpha=config.swiglu_alpha,
            swiglu_limit=config.swiglu_limit,
            implementation=self.implementation,
            own_experts=share.num_experts,
            experts_over=share.axes("E"),
            width_over=share.axes("F"),
            **dtypes,
        )

    def __call__(
        self, residual: Residual, positions_BT: jax.Array, cache: LayerCache | None
    ) -> tuple[Residual, LayerCache | None]:
        """The residual with both updates, the second pending, and the cache with this layer's keys and values."""
        residual, update, cache = self.attention(self.attention_norm(residual), positions_BT, cache)
        residual, update = self.moe(residual.plus(update), positions_BT)
        observe(self, "attention_residual", residual.x_BTD)
        residual = residual.plus(update)
        observe_lazy(self, "moe_residual", residual.total)
        return residual, cache


class GptOss(Decoder):
    """A GPT-OSS of any size. The router's logits are rounded to `dtype`, as in the published code."""

    config: GptOssConfig

    def block(self, layer: int) -> Block:
        """A block."""
        window, dtypes = self.config.windows[layer], (self.dtype, self.param_dtype)
        how = self.implementation, self.cache_dtype
        return Block(self.config, window, *dtypes, *how, self.own, name=f"block_{layer}")

    def norm(self) -> RMSNorm:
        """The final norm."""
        return RMSNorm(self.config.norm_epsilon, self.dtype, self.param_dtype, self.implementation)
