"""Self-attention over the call's own tokens, or over a cache that their keys and values are first written to."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptjax.axes import HEADS, QKV_HEADS, QUERY_HEADS, WIDTH
from gptjax.config.rope import Rope
from gptjax.layers.layer_cache import LayerCache
from gptjax.layers.linear import Linear
from gptjax.layers.norm import HeadNorm, Normed
from gptjax.layers.observe import observe
from gptjax.layers.residual import Residual
from gptjax.layers.rope import rotate, rotation
from gptjax.layers.weight import array
from pallas_kernels.attention import attention
from pallas_kernels.fp8_pages import as_read
from pallas_kernels.partial_sum import PartialSum


class Attention(nn.Module):
    """Multi-head or grouped-query attention with one fused projection for q, k and v (in that order)."""

    num_heads: int  # N
    num_kv_heads: int  # K
    head_width: int  # H
    scale: float  # scores are multiplied by it
    dtype: DTypeLike
    param_dtype: DTypeLike
    implementation: str
    cache_dtype: str | None = None  # "fp8": keys and values are rounded as its pages are, with or without a cache
    qkv_bias: bool = True
    out_bias: bool = True
    qk_norm_epsilon: float | None = None  # of a norm of each query and key head, before the rotation; None is no norm
    rope: Rope | None = None  # None if positions are not rotary
    window: int | None = None  # positions that a query sees, its own included; None is all
    use_sinks: bool = False  # a learned logit per head, which takes a share of the softmax but has no value
    over: tuple[str, ...] = ()  # axes of the mesh that the heads are divided over: these are one device's

    @nn.compact
    def __call__(
        self, normed: Normed, positions_BT: jax.Array, cache: LayerCache | None
    ) -> tuple[Residual, PartialSum, LayerCache | None]:
        """The residual with its pending update added, attention's update to it [B · T, D], and the cache.

        The cache has the new keys and values; None stays None.
        """
        B, T, D = normed.shape
        N, K, H = self.num_heads, self.num_kv_heads, self.head_width
        linear = partial(
            Linear,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            implementation=self.implementation,
        )
        qkv_heads = linear((N + 2 * K) * H, (WIDTH, QKV_HEADS), use_bias=self.qkv_bias, name="qkv")
        residual, qkv = qkv_heads.partial_sum_after(normed)
        angles = None if self.rope is None else rotation(self.rope, H, positions_BT)
        sinks_N = None
        if self.use_sinks:
            sinks_N = array(self, "sinks", nn.initializers.normal(1.0), (N,), (QUERY_HEADS,), self.param_dtype)
        if cache is None:
            out_BTNH = self._among_themselves(*self._heads(qkv, angles, B, T), positions_BT, sinks_N)
        elif cache.takes_product(T, self.dtype, self.implementation):
            norms, epsilon = self._norms(), self.qk_norm_epsilon or 0.0
            scales = None if norms is None else (norms[0].scale(H), norms[1].scale(H))
            operands = qkv, angles, positions_BT, sinks_N, scales, epsilon
            out_BTNH, cache = cache.append_and_attend(*operands, scale=self.scale)
        else:
            if self.qk_norm_epsilon is None and cache.takes_heads(qkv, self.dtype, self.implementation):
                q_BTNH, cache = cache.append_heads(qkv, angles)
            else:
                q_BTNH, k_BTKH, v_BTKH = self._heads(qkv, angles, B, T)
                cache = cache.update(k_BTKH, v_BTKH, positions_BT)
            out_BTNH = cache.attend(q_BTNH, positions_BT, sinks_N, scale=self.scale, implementation=self.implementation)
        observe(self, "heads", out_BTNH)
        out = linear(D, (HEADS, WIDTH), use_bias=self.out_bias, name="out")
        return residual, out.partial_sum(out_BTNH.reshape(B, T, N * H)).across(self.over, box=0), cache

    def _among_themselves(
        self,
        q_BTNH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        positions_BT: jax.Array,
        sinks_N: jax.Array | None,
    ) -> jax.Array:
        """What a call's queries get from its own keys and values alone, [B, T, N, H]: as from a cache."""
        if self.cache_dtype is not None:
            k_BTKH, v_BTKH = as_read(k_BTKH), as_read(v_BTKH)
        return attention(
            q_BTNH,
            k_BTKH.transpose(0, 2, 1, 3),
            v_BTKH.transpose(0, 2, 1, 3),
            positions_BT,
            positions_BT,
            sinks_N,
            scale=self.scale,
            window=self.window,
            implementation=self.implementation,
        )

    def _norms(self) -> tuple[HeadNorm, HeadNorm] | None:
        """Those of query heads and of key heads, if they are normed."""
        if self.qk_norm_epsilon is None:
            return None
        norm = partial(HeadNorm, self.qk_norm_epsilon, self.dtype, self.param_dtype)
        return norm(name="q_norm"), norm(name="k_norm")

    def _heads(
        self, qkv: PartialSum, angles: tuple[jax.Array, jax.Array] | None, B: int, T: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, the first two normed and rotated: [B, T, N, H] and twice [B, T, K, H]."""
        N, K, H = self.num_heads, self.num_kv_heads, self.head_width
        heads_BTRH = qkv.total().astype(self.dtype).reshape(B, T, N + 2 * K, H)
        q_BTNH, k_BTKH, v_BTKH = jnp.split(heads_BTRH, (N, N + K), axis=2)
        for name, value in (("q", q_BTNH), ("k", k_BTKH), ("v", v_BTKH)):
            observe(self, name, value)
        if (norms := self._norms()) is not None:
            q_BTNH, k_BTKH = norms[0](q_BTNH), norms[1](k_BTKH)
        if angles is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, *angles), rotate(k_BTKH, *angles)
        return q_BTNH, k_BTKH, v_BTKH
