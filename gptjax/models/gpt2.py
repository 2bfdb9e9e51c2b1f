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
from gptjax.layers.norm import LayerNorm, add
from gptjax.layers.observe import is_observed, observe, observe_made
from gptjax.layers.weight import Weight, embed, unembed, weight
from pallas_kernels import block as fused
from pallas_kernels.partial_sum import PartialSum


class Block(nn.Module):
    """`x += attention(norm(x)); x += mlp(norm(x))`."""

    config: GPT2Config
    layer: int
    dtype: DTypeLike
    param_dtype: DTypeLike
    implementation: str

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, added: PartialSum | None, positions_BT: jax.Array, cache: KVCache | None
    ) -> tuple[jax.Array, PartialSum, KVCache | None]:
        """[B, T, D] -> [B, T, D], and the cache with this layer's new keys and values.

        What a block adds last is passed on as `added`: the next norm reads the stream anyway, and adds it.
        """
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(LayerNorm, config.norm_epsilon, implementation=self.implementation, **dtypes)
        attention = Attention(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_width=config.head_width,
            scale=self.scale,
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

    @property
    def scale(self) -> float:
        """What attention's scores are multiplied with."""
        scale = 1 / math.sqrt(self.config.head_width) if self.config.scale_attention else 1.0
        return scale / (self.layer + 1) if self.config.scale_attention_by_layer else scale

    def step(self, stream: fused.Stream, positions_B: jax.Array, cache: KVCache) -> tuple[fused.Stream, KVCache]:
        """The same for one token a row, in one kernel, where `fused.takes` such a block."""
        tree = self.variables["params"]
        attention, mlp = tree["attention"], tree["mlp"]
        norms = (fused.NormWeights(tree[name]["scale"], tree[name]["bias"]) for name in ("attention_norm", "mlp_norm"))
        linears = (attention["qkv"], attention["out"], mlp["up"], mlp["down"])
        qkv, out, up, down = (fused.LinearWeights(each["kernel"], each["bias"]) for each in linears)
        attention_norm, mlp_norm = norms
        stream, k_BKSH, v_BKSH = fused.block(
            stream,
            fused.Weights(attention_norm, qkv, out, mlp_norm, up, down),
            positions_B,
            cache.k[self.layer],
            cache.v[self.layer],
            epsilon=self.config.norm_epsilon,
            scale=self.scale,
            implementation=self.implementation,
        )
        return stream, cache.with_layer(self.layer, k_BKSH, v_BKSH)


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
        if cache is not None and self._has_steps(positions_BT, cache):
            stream = fused.Stream.of(x_BTD[:, 0], self.config.mlp_width)
            for block in self.blocks:
                stream, cache = block.step(stream, positions_BT[:, 0], cache)
            x_BTD = stream.x_TD[:, None]
        else:
            for block in self.blocks:
                x_BTD, added, cache = block(x_BTD, added, positions_BT, cache)
        _, hidden_BTD = self.final_norm(x_BTD, added)
        return hidden_BTD, None if cache is None else cache.extended(positions_BT)

    def _has_steps(self, positions_BT: jax.Array, cache: KVCache) -> bool:
        """Whether the blocks have a kernel for this call, in which nothing can be observed."""
        config = self.config
        dtypes = {jnp.dtype(dtype) for dtype in (self.dtype, self.param_dtype, cache.k[0].dtype)}
        return (
            positions_BT.shape[1] == 1
            and len(dtypes) == 1
            and config.activation == "gelu_tanh"
            and not packs(config.mxfp4, "linear")
            and not is_observed(self)
            and fused.takes(
                rows=positions_BT.shape[0],
                heads=config.num_heads,
                kv_heads=config.num_kv_heads,
                head_width=config.head_width,
                width=config.width,
                mlp_width=config.mlp_width,
                dtype=cache.k[0].dtype,
                implementation=self.implementation,
            )
        )

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
