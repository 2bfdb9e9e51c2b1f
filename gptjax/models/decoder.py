"""What GPT-2, GPT-OSS and Llama have in common: an embedding, blocks, a norm, and a head."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptjax.axes import VOCAB, WIDTH
from gptjax.config import ModelConfig
from gptjax.layers.cache import KVCache
from gptjax.layers.layer_cache import LayerCache
from gptjax.layers.observe import is_observed, observe
from gptjax.layers.residual import Residual
from gptjax.layers.weight import embed, unembed, weight
from gptjax.sharding.share import Share


class Decoder(nn.Module):
    """A decoder-only transformer. Used as pure functions:

        hidden_BTD, cache = model.apply({"params": params}, tokens_BT, positions_BT, cache)
        logits = model.apply({"params": params}, hidden, method="head")        # on the rows that need logits

    It computes in `dtype`, except for norms, rotations, softmax and logits, which are always float32 inside.
    Subclasses say what a block and the final norm are.

    With a share, this is the program of one device of a mesh, on its part of weights and cache: see
    `gptjax.models.shards`.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    implementation: str = "auto"
    share: Share | None = None  # None: all of the model
    cache_dtype: str | None = None  # "fp8": see `pallas_kernels.fp8_pages`; None: `dtype`

    @property
    def own(self) -> Share:
        """What this device has of the model."""
        return Share.whole(self.config) if self.share is None else self.share

    def block(self, layer: int) -> Any:
        """The module of a layer: `(residual, positions_BT, layer_cache) -> (residual, layer_cache)`."""
        raise NotImplementedError

    def norm(self) -> Any:
        """The module of the final norm: `residual -> Normed`."""
        raise NotImplementedError

    def setup(self) -> None:
        """Declares the weights."""
        self.token_embedding = self._embedding("token_embedding")
        self.blocks = [self.block(layer) for layer in range(self.config.num_layers)]
        self.final_norm = self.norm()
        if not self.config.tied_head:
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
        x_BTD = observe(self, "embedding", self.embed(tokens_BT, positions_BT))
        residual = Residual(x_BTD, peers=None if cache is None else cache.peers)
        residual, cache = self.through_blocks(residual, positions_BT, cache)
        _, hidden_BTD = self.final_norm(residual).finished()
        return hidden_BTD, None if cache is None else cache.extended(positions_BT)

    def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """The embeddings [B, T, D] of `dtype`."""
        # Padding takes row 0: it is never attended to, and only has to be in bounds.
        tokens_BT, over = jnp.where(positions_BT < 0, 0, tokens_BT), self.own.axes("V")
        if not over:
            return embed(self.token_embedding, tokens_BT, self.dtype)
        tokens_BT -= jax.lax.axis_index(over) * self.own.vocab_size
        here_BT = (tokens_BT >= 0) & (tokens_BT < self.own.vocab_size)
        x_BTD = embed(self.token_embedding, jnp.where(here_BT, tokens_BT, 0), self.dtype)
        return jax.lax.psum(jnp.where(here_BT[..., None], x_BTD, 0), over)  # all but one are 0: nothing is rounded

    def through_blocks(
        self, residual: Residual, positions_BT: jax.Array, cache: KVCache | None
    ) -> tuple[Residual, KVCache | None]:
        """The residual after all blocks, and the cache with their keys and values."""
        return self.each_block(residual, positions_BT, cache)

    def each_block(
        self, stream: Any, positions: jax.Array, cache: KVCache | None, method: str = "__call__"
    ) -> tuple[Any, KVCache | None]:
        """What goes through all blocks, by one of their methods, and the cache with their keys and values.

        JAX traces and lowers each kind of block once: to it, blocks that differ only in their names are the same.
        """
        in_place = self.is_initializing() or is_observed(self)  # then blocks change collections of the model's own
        for layer, block in enumerate(self.blocks):
            written = None if cache is None else cache.layer(layer)
            if in_place:
                stream, written = getattr(block, method)(stream, positions, written)
            else:
                nameless = block.clone(parent=None, name=None)
                with jax.named_scope(block.name):
                    stream, written = _traced_once(nameless, block.variables, stream, positions, written, method)
            cache = None if cache is None else cache.with_layer(layer, written)
        return stream, cache

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits of hidden states, [..., D] -> [..., V] float32."""
        embedding_VD = self.token_embedding if self.config.tied_head else self.head_embedding
        logits = unembed(hidden, embedding_VD, self.dtype, self.implementation)
        if not (over := self.own.axes("V")):
            return logits
        logits = jax.lax.all_gather(logits, over, axis=logits.ndim - 1, tiled=True)
        return logits[..., : self.config.vocab_size]  # without what the last devices' shares were filled up with

    def _embedding(self, name: str) -> Any:
        shape = (self.own.vocab_size, self.config.width)
        return weight(self, name, shape, (VOCAB, WIDTH), param_dtype=self.param_dtype)


@partial(jax.jit, static_argnames=("block", "method"))
def _traced_once(
    block: nn.Module, variables: Any, stream: Any, positions: jax.Array, cache: LayerCache | None, method: str
) -> Any:
    """A block's result. XLA inlines this where it is called, so the compiled code is the same as without it."""
    return block.apply(variables, stream, positions, cache, method=method)
