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
from gptjax.config.gpt2 import GPT2Config
from gptjax.config.quantization import packs
from gptjax.layers.attention import Attention
from gptjax.layers.cache import KVCache
from gptjax.layers.mlp import MLP
from gptjax.layers.norm import LayerNorm
from gptjax.layers.observe import is_observed, observe, observe_lazy
from gptjax.layers.residual import Residual
from gptjax.layers.weight import STANDARD_DEVIATION, Weight, array, embed, unembed, weight
from pallas_kernels import block as fused_block


class Block(nn.Module):
    """`x += attention(norm(x)); x += mlp(norm(x))`."""

    config: GPT2Config
    layer: int
    dtype: DTypeLike
    param_dtype: DTypeLike
    implementation: str

    def setup(self) -> None:
        """Declares the layers."""
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(LayerNorm, config.norm_epsilon, implementation=self.implementation, **dtypes)
        self.attention_norm = norm()
        self.attention = Attention(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_width=config.head_width,
            scale=self.scale,
            layer=self.layer,
            mxfp4=packs(config.mxfp4, "linear"),
            implementation=self.implementation,
            **dtypes,
        )
        self.mlp_norm = norm()
        self.mlp = MLP(
            config.mlp_width,
            config.activation,
            packs(config.mxfp4, "linear"),
            implementation=self.implementation,
            **dtypes,
        )

    def __call__(
        self, residual: Residual, positions_BT: jax.Array, cache: KVCache | None
    ) -> tuple[Residual, KVCache | None]:
        """The residual with both updates, the second pending, and the cache with this layer's keys and values."""
        residual, normed_BTD = self.attention_norm(residual)
        update, cache = self.attention(normed_BTD, positions_BT, cache)
        residual, normed_BTD = self.mlp_norm(residual.plus(update))
        observe(self, "attention_residual", residual.x_BTD)
        residual = residual.plus(self.mlp(normed_BTD))
        observe_lazy(self, "mlp_residual", residual.total)
        return residual, cache

    def fused(
        self, stream: fused_block.Stream, positions_B: jax.Array, cache: KVCache
    ) -> tuple[fused_block.Stream, KVCache]:
        """The same in one kernel, if `fused_block.takes` such blocks."""
        stream, k_BKSH, v_BKSH = fused_block.block(
            stream,
            self.weights(),
            positions_B,
            cache.k[self.layer],
            cache.v[self.layer],
            epsilon=self.config.norm_epsilon,
            scale=self.scale,
            implementation=self.implementation,
        )
        return stream, cache.with_layer(self.layer, k_BKSH, v_BKSH)

    def weights(self) -> fused_block.Weights:
        """The block's weights, as the kernel takes them."""
        tree = self.variables["params"]

        def norm(name: str) -> fused_block.NormWeights:
            return fused_block.NormWeights(tree[name]["scale"], tree[name]["bias"])

        def linear(layer: str, name: str) -> fused_block.LinearWeights:
            return fused_block.LinearWeights(tree[layer][name]["kernel"], tree[layer][name]["bias"])

        return fused_block.Weights(
            attention_norm=norm("attention_norm"),
            qkv=linear("attention", "qkv"),
            out=linear("attention", "out"),
            mlp_norm=norm("mlp_norm"),
            up=linear("mlp", "up"),
            down=linear("mlp", "down"),
        )

    @property
    def scale(self) -> float:
        """What attention's scores are multiplied by."""
        scale = 1 / math.sqrt(self.config.head_width) if self.config.scale_attention else 1.0
        return scale / (self.layer + 1) if self.config.scale_attention_by_layer else scale


class GPT2(nn.Module):
    """A GPT-2 of any size. Used as pure functions:

        hidden_BTD, cache = model.apply({"params": params}, tokens_BT, positions_BT, cache)
        logits = model.apply({"params": params}, hidden, method="head")        # on the rows that need logits

    It computes in `dtype`, except for LayerNorm, softmax and logits, which are always float32 inside.
    """

    config: GPT2Config
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    implementation: str = "auto"

    def setup(self) -> None:
        """Declares the weights."""
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.token_embedding = self._embedding("token_embedding")
        self.position_embedding = array(
            self,
            "position_embedding",
            nn.initializers.normal(STANDARD_DEVIATION),
            (config.context_length, config.width),
            (POSITION, WIDTH),
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
          tokens_BT: int32 token ids; any at padding.
          positions_BT: int32 position of each token in its sequence, ascending in a row and below the context length
            (beyond it, the last position's embedding is silently used); negative is padding.
          cache: the keys and values of earlier tokens, which these tokens' are added to; None: attend to these alone.

        Returns:
          [B, T, D] of `dtype`, and the cache.
        """
        # Padding takes row 0 of the embedding: it is never attended to, and only has to be in bounds.
        tokens_BTD = embed(self.token_embedding, jnp.where(positions_BT < 0, 0, tokens_BT), self.dtype)
        positions_BTD = self.position_embedding[jnp.maximum(positions_BT, 0)]
        x_BTD = tokens_BTD + positions_BTD.astype(self.dtype)
        observe(self, "embedding", x_BTD)
        if cache is not None and self._has_kernel(x_BTD, cache):
            residual, cache = self._fused(x_BTD, positions_BT, cache)
        else:
            residual = Residual(x_BTD)
            for block in self.blocks:
                residual, cache = block(residual, positions_BT, cache)
        _, hidden_BTD = self.final_norm(residual)
        return hidden_BTD, None if cache is None else cache.extended(positions_BT)

    def _has_kernel(self, x_BTD: jax.Array, cache: KVCache) -> bool:
        """Whether each block is one kernel in this call. Nothing inside a kernel can be observed."""
        return not is_observed(self) and fused_block.takes(
            x_BTD,
            self.blocks[0].weights(),
            cache.k[0],
            cache.v[0],
            activation=self.config.activation,
            implementation=self.implementation,
        )

    def _fused(self, x_BTD: jax.Array, positions_BT: jax.Array, cache: KVCache) -> tuple[Residual, KVCache]:
        """All blocks, each in one kernel."""
        stream = fused_block.Stream.of(x_BTD[:, 0], self.config.mlp_width)
        for block in self.blocks:
            stream, cache = block.fused(stream, positions_BT[:, 0], cache)
        return Residual(stream.x_TD[:, None]), cache

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
