"""GPT-2: learned positions, pre-norm blocks, LayerNorm, GELU, tied head.

Source: openai/gpt-2 `src/model.py`; transformers `models/gpt2/modeling_gpt2.py`.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptjax.axes import POSITION, VOCAB, WIDTH
from gptjax.cache import KVCache
from gptjax.config.gpt2 import GPT2Config
from gptjax.config.quantization import packs
from gptjax.layers.attention import Attention
from gptjax.layers.mlp import MLP
from gptjax.layers.norm import LayerNorm, add
from gptjax.layers.observe import observe, observe_made
from gptjax.layers.weight import Weight, embed, unembed, weight
from pallas_kernels.parts import Parts


class Block(nn.Module):
    """`x += attention(norm(x)); x += mlp(norm(x))`."""

    config: GPT2Config
    layer: int
    dtype: DTypeLike
    param_dtype: DTypeLike
    implementation: str

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, added: Parts | None, positions_BT: jax.Array, cache: KVCache | None
    ) -> tuple[jax.Array, Parts, KVCache | None]:
        """[B, T, D] -> [B, T, D], and the cache with this layer's new keys and values.

        What a block adds last is passed on as `added`: the next norm reads the stream anyway, and adds it.
        """
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(LayerNorm, config.norm_epsilon, implementation=self.implementation, **dtypes)
        scale = 1 / math.sqrt(config.head_width) if config.scale_attention else 1.0
        if config.scale_attention_by_layer:
            scale /= self.layer + 1
        attention = Attention(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_width=config.head_width,
            scale=scale,
            layer=self.layer,
            mxfp4=packs(config.mxfp4, "linear"),
            implementation=self.implementation,
            name="attention",
            **dtypes,
        )
        mlp = MLP(
            config.mlp_width,
            config.activation,
            packs(config.mxfp4, "linear"),
            implementation=self.implementation,
            name="mlp",
            **dtypes,
        )

        x_BTD, normed_BTD = norm(name="attention_norm")(x_BTD, added)
        added, cache = attention(normed_BTD, positions_BT, cache)
        x_BTD, normed_BTD = norm(name="mlp_norm")(x_BTD, added)
        observe(self, "attention_residual", x_BTD)
        added = mlp(normed_BTD)
        observe_made(self, "mlp_residual", lambda: add(x_BTD, added))
        return x_BTD, added, cache


class GPT2(nn.Module):
    """A GPT-2 of any size. Used as pure functions:

        hidden_BTD, cache = model.apply({"params": params}, tokens_BT, positions_BT, cache)
        logits = model.apply({"params": params}, hidden, method="head")        # on the rows that need logits

    `dtype` is what is computed in; LayerNorm, softmax and logits are float32 inside whatever it is.
    """

    config: GPT2Config
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    implementation: str = "auto"

    def setup(self) -> None:
        """Declares the weights."""
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.token_embedding = self._embedding("token_embedding")
        self.position_embedding = self.param(
            "position_embedding",
            nn.with_logical_partitioning(nn.initializers.normal(0.02), (POSITION, WIDTH)),
            (config.context_length, config.width),
            self.param_dtype,
        )
        self.blocks = [
            Block(config, layer, implementation=self.implementation, name=f"block_{layer}", **dtypes)
            for layer in range(config.num_layers)
        ]
        self.final_norm = LayerNorm(config.norm_epsilon, implementation=self.implementation, **dtypes)
        if not config.tied_head:
            self.head_embedding = self._embedding("head_embedding")

    def __call__(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """Final hidden states, after the last norm.

        Args:
          tokens_BT: int32 token ids; what stands at padding does not matter.
          positions_BT: int32 position of each token in its sequence, ascending in a row and below the context length
            (beyond it the last position's embedding would be taken, silently); negative is padding.
          cache: earlier keys and values, to which these tokens' are added; None to attend to these tokens alone.

        Returns:
          [B, T, D] of `dtype`, and the cache.
        """
        # Padding reads row 0, whatever stands there: it is not attended to, and must only be in bounds.
        tokens_BTD = embed(self.token_embedding, jnp.where(positions_BT < 0, 0, tokens_BT), self.dtype)
        positions_BTD = self.position_embedding[jnp.maximum(positions_BT, 0)]
        x_BTD = tokens_BTD + positions_BTD.astype(self.dtype)
        observe(self, "embedding", x_BTD)
        added = None
        for block in self.blocks:
            x_BTD, added, cache = block(x_BTD, added, positions_BT, cache)
        _, hidden_BTD = self.final_norm(x_BTD, added)
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
