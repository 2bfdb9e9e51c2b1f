"""GPT-OSS: RMSNorm, attention with sinks, alternating windows and YaRN, mixture of experts in MXFP4.

Source: openai/gpt-oss `gpt_oss/torch/model.py`; transformers `models/gpt_oss/modeling_gpt_oss.py`.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptjax.axes import VOCAB, WIDTH
from gptjax.config.gpt_oss import GptOssConfig
from gptjax.config.quantization import packs
from gptjax.layers.attention import Attention
from gptjax.layers.cache import KVCache
from gptjax.layers.moe import MoE
from gptjax.layers.norm import RMSNorm
from gptjax.layers.observe import observe, observe_lazy
from gptjax.layers.residual import Residual
from gptjax.layers.weight import Weight, embed, unembed, weight


class Block(nn.Module):
    """`x += attention(norm(x)); x += moe(norm(x))`."""

    config: GptOssConfig
    layer: int
    dtype: DTypeLike
    param_dtype: DTypeLike
    implementation: str

    def setup(self) -> None:
        """Declares the layers."""
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(RMSNorm, config.norm_epsilon, implementation=self.implementation, **dtypes)
        self.attention_norm = norm()
        self.attention = Attention(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_width=config.head_width,
            scale=1 / math.sqrt(config.head_width),
            layer=self.layer,
            mxfp4=packs(config.mxfp4, "linear"),
            implementation=self.implementation,
            use_bias=config.attention_bias,
            rope=config.rope,
            window=config.windows[self.layer],
            use_sinks=True,
            **dtypes,
        )
        self.moe_norm = norm()
        self.moe = MoE(
            norm=self.moe_norm,
            num_experts=config.num_experts,
            experts_per_token=config.experts_per_token,
            mlp_width=config.mlp_width,
            swiglu_alpha=config.swiglu_alpha,
            swiglu_limit=config.swiglu_limit,
            mxfp4=packs(config.mxfp4, "experts"),
            implementation=self.implementation,
            **dtypes,
        )

    def __call__(
        self, residual: Residual, positions_BT: jax.Array, cache: KVCache | None
    ) -> tuple[Residual, KVCache | None]:
        """The residual with both updates, the second pending, and the cache with this layer's keys and values."""
        residual, normed_BTD = self.attention_norm(residual)
        update, cache = self.attention(normed_BTD, positions_BT, cache)
        residual, update = self.moe(residual.plus(update), positions_BT)
        observe(self, "attention_residual", residual.x_BTD)
        residual = residual.plus(update)
        observe_lazy(self, "moe_residual", residual.total)
        return residual, cache


class GptOss(nn.Module):
    """A GPT-OSS of any size. Used as pure functions:

        hidden_BTD, cache = model.apply({"params": params}, tokens_BT, positions_BT, cache)
        logits = model.apply({"params": params}, hidden, method="head")        # on the rows that need logits

    It computes in `dtype`, except for norms, rotations, softmax and logits, which are always float32 inside. The
    router's logits are rounded to `dtype`, as in the published code.
    """

    config: GptOssConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    implementation: str = "auto"

    def setup(self) -> None:
        """Declares the weights."""
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.token_embedding = self._embedding("token_embedding")
        self.blocks = [
            Block(config, layer, implementation=self.implementation, name=f"block_{layer}", **dtypes)
            for layer in range(config.num_layers)
        ]
        self.final_norm = RMSNorm(config.norm_epsilon, implementation=self.implementation, **dtypes)
        if not config.tied_head:
            self.head_embedding = self._embedding("head_embedding")

    def __call__(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """Final hidden states, after the last norm.

        Args:
          tokens_BT: int32 token ids; any at padding.
          positions_BT: int32 position of each token in its sequence, ascending by ones in a row; negative is padding.
          cache: the keys and values of earlier tokens, which these tokens' are added to; None: attend to these alone.

        Returns:
          [B, T, D] of `dtype`, and the cache.
        """
        # Padding takes row 0 of the embedding: it is never attended to, and only has to be in bounds.
        x_BTD = embed(self.token_embedding, jnp.where(positions_BT < 0, 0, tokens_BT), self.dtype)
        observe(self, "embedding", x_BTD)
        residual = Residual(x_BTD)
        for block in self.blocks:
            residual, cache = block(residual, positions_BT, cache)
        _, hidden_BTD = self.final_norm(residual)
        return hidden_BTD, None if cache is None else cache.extended(positions_BT)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits of hidden states, [..., D] -> [..., V] float32."""
        return unembed(hidden, self.token_embedding if self.config.tied_head else self.head_embedding, self.dtype)

    def _embedding(self, name: str) -> Weight:
        config = self.config
        return weight(
            self,
            name,
            (config.vocab_size, config.width),
            (VOCAB, WIDTH),
            param_dtype=self.param_dtype,
            mxfp4=packs(config.mxfp4, "embedding"),
            summed=-1,
        )
