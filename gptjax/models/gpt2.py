"""GPT-2: learned positions, pre-norm blocks, LayerNorm, GELU, tied head.

Source: openai/gpt-2 `src/model.py`; transformers `models/gpt2/modeling_gpt2.py`.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptjax.axes import POSITION, WIDTH
from gptjax.config.gpt2 import GPT2Config
from gptjax.layers.attention import Attention
from gptjax.layers.cache import KVCache
from gptjax.layers.layer_cache import LayerCache
from gptjax.layers.mlp import MLP
from gptjax.layers.norm import LayerNorm
from gptjax.layers.observe import is_observed, observe, observe_lazy
from gptjax.layers.residual import Residual
from gptjax.layers.weight import STANDARD_DEVIATION, array
from gptjax.models.decoder import Decoder
from gptjax.sharding.share import Share
from pallas_kernels import block as fused_block
from pallas_kernels import same_bits


class Block(nn.Module):
    """`x += attention(norm(x)); x += mlp(norm(x))`."""

    config: GPT2Config
    scale: float  # attention's scores are multiplied by it
    dtype: DTypeLike
    param_dtype: DTypeLike
    implementation: str
    cache_dtype: str | None
    share: Share

    def setup(self) -> None:
        """Declares the layers."""
        config, share, dtypes = self.config, self.share, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(LayerNorm, config.norm_epsilon, implementation=self.implementation, **dtypes)
        self.attention_norm = norm()
        self.attention = Attention(
            num_heads=share.num_heads,
            num_kv_heads=share.num_kv_heads,
            head_width=config.head_width,
            scale=self.scale,
            implementation=self.implementation,
            cache_dtype=self.cache_dtype,
            over=share.axes("N"),
            **dtypes,
        )
        self.mlp_norm = norm()
        self.mlp = MLP(
            share.mlp_width,
            config.activation,
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

    def fused(
        self, stream: fused_block.Stream, positions_B: jax.Array, cache: LayerCache
    ) -> tuple[fused_block.Stream, LayerCache]:
        """The same in one kernel, if `fused_block.takes` such blocks."""
        stream, k_YKSH, v_YKSH = fused_block.block(
            stream,
            self.weights(),
            positions_B,
            cache.k_YKSH,
            cache.v_YKSH,
            cache.table_BZ,
            epsilon=self.config.norm_epsilon,
            scale=self.scale,
            implementation=self.implementation,
        )
        return stream, cache.with_pages(k_YKSH, v_YKSH)

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


class GPT2(Decoder):
    """A GPT-2 of any size. Beyond the context length, the last position's embedding is silently used."""

    config: GPT2Config

    def block(self, layer: int) -> Block:
        """A block."""
        config = self.config
        scale = 1 / math.sqrt(config.head_width) if config.scale_attention else 1.0
        if config.scale_attention_by_layer:
            scale /= layer + 1
        dtypes, how = (self.dtype, self.param_dtype), (self.implementation, self.cache_dtype)
        return Block(config, scale, *dtypes, *how, self.own, name=f"block_{layer}")

    def norm(self) -> LayerNorm:
        """The final norm."""
        return LayerNorm(self.config.norm_epsilon, self.dtype, self.param_dtype, self.implementation)

    def setup(self) -> None:
        """Declares the weights."""
        super().setup()
        self.position_embedding = array(
            self,
            "position_embedding",
            nn.initializers.normal(STANDARD_DEVIATION),
            (self.config.context_length, self.config.width),
            (POSITION, WIDTH),
            self.param_dtype,
        )

    def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """The sum of the tokens' and the positions' embeddings, [B, T, D] of `dtype`."""
        tokens_BTD = super().embed(tokens_BT, positions_BT)
        positions_BTD = self.position_embedding[jnp.maximum(positions_BT, 0)].astype(self.dtype)
        return same_bits.rounded(tokens_BTD.astype(jnp.float32) + positions_BTD.astype(jnp.float32), self.dtype)

    def through_blocks(
        self, residual: Residual, positions_BT: jax.Array, cache: KVCache | None
    ) -> tuple[Residual, KVCache | None]:
        """The residual after all blocks, each one kernel if there is one for this call, and the cache."""
        if cache is None or not self._has_kernel(residual.x_BTD, cache):
            return super().through_blocks(residual, positions_BT, cache)
        stream = fused_block.Stream.of(residual.x_BTD[:, 0], self.config.mlp_width)
        stream, cache = self.each_block(stream, positions_BT[:, 0], cache, method="fused")
        return residual.settled(stream.x_TD[:, None]), cache

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
