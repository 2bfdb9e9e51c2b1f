"""Self-attention over the call's own tokens, or over a cache that they are first written to."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptjax.axes import HEADS, QKV_HEADS, WIDTH
from gptjax.cache import KVCache
from gptjax.layers.linear import Linear
from gptjax.layers.observe import observe
from pallas_kernels.attention import attention


class Attention(nn.Module):
    """Multi-head or grouped-query attention with one fused projection for q, k and v (in that order)."""

    num_heads: int  # N
    num_kv_heads: int  # K
    head_width: int  # H
    scale: float  # what scores are multiplied with
    layer: int  # whose cache this is
    dtype: DTypeLike
    param_dtype: DTypeLike
    implementation: str

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache | None]:
        """[B, T, D] -> [B, T, D], and the cache with this layer's new keys and values (None stays None)."""
        N, K, H = self.num_heads, self.num_kv_heads, self.head_width
        linear = partial(Linear, dtype=self.dtype, param_dtype=self.param_dtype)
        qkv = linear((N + 2 * K) * H, (WIDTH, QKV_HEADS), name="qkv")
        heads_BTRH = qkv(x_BTD).reshape(*x_BTD.shape[:2], N + 2 * K, H)
        q_BTNH, k_BTKH, v_BTKH = jnp.split(heads_BTRH, (N, N + K), axis=2)
        for name, value in (("q", q_BTNH), ("k", k_BTKH), ("v", v_BTKH)):
            observe(self, name, value)
        if cache is None:
            k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (k_BTKH, v_BTKH))
            k_positions_BS = positions_BT
        else:
            cache = cache.written(self.layer, k_BTKH, v_BTKH, positions_BT)
            k_BKSH, v_BKSH, k_positions_BS = cache.k[self.layer], cache.v[self.layer], cache.positions_BS()
        out_BTNH = attention(
            q_BTNH,
            k_BKSH,
            v_BKSH,
            positions_BT,
            k_positions_BS,
            scale=self.scale,
            cached=cache is not None,
            implementation=self.implementation,
        )
        observe(self, "heads", out_BTNH)
        out_BTD = linear(x_BTD.shape[-1], (HEADS, WIDTH), name="out")(out_BTNH.reshape(*x_BTD.shape[:2], N * H))
        return out_BTD, cache
