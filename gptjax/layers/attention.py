"""Self-attention over the call's own tokens, or over a cache that they are first written to."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptjax.axes import HEADS, QKV_HEADS, QUERY_HEADS, WIDTH
from gptjax.config.rope import Rope
from gptjax.layers.cache import KVCache
from gptjax.layers.linear import Linear
from gptjax.layers.observe import observe
from gptjax.layers.rope import rotate, rotation
from pallas_kernels.attention import attention
from pallas_kernels.partial_sum import PartialSum


class Attention(nn.Module):
    """Multi-head or grouped-query attention with one fused projection for q, k and v (in that order)."""

    num_heads: int  # N
    num_kv_heads: int  # K
    head_width: int  # H
    scale: float  # what scores are multiplied with
    layer: int  # whose cache this is
    mxfp4: bool  # the kernels are packed
    dtype: DTypeLike
    param_dtype: DTypeLike
    implementation: str
    use_bias: bool = True
    rope: Rope | None = None  # None where positions are not rotary
    window: int | None = None  # positions that a query sees, itself included; None is all
    use_sinks: bool = False  # a learned logit a head, which takes its share of the softmax and has no value

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, cache: KVCache | None
    ) -> tuple[PartialSum, KVCache | None]:
        """[B, T, D] -> [B · T, D], last sums left, and the cache with the new keys and values (None stays None)."""
        N, K, H = self.num_heads, self.num_kv_heads, self.head_width
        linear = partial(
            Linear,
            use_bias=self.use_bias,
            mxfp4=self.mxfp4,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            implementation=self.implementation,
        )
        qkv = linear((N + 2 * K) * H, (WIDTH, QKV_HEADS), name="qkv").parts(x_BTD)
        angles = None if self.rope is None else rotation(self.rope, H, positions_BT)
        appended = None if cache is None else cache.appended(self.layer, qkv, angles, positions_BT, self.implementation)
        if appended is not None:
            q_BTNH, (k_BKSH, v_BKSH, k_positions_BS), cache = appended
        else:
            heads_BTRH = qkv.total().astype(self.dtype).reshape(*x_BTD.shape[:2], N + 2 * K, H)
            q_BTNH, k_BTKH, v_BTKH = jnp.split(heads_BTRH, (N, N + K), axis=2)
            for name, value in (("q", q_BTNH), ("k", k_BTKH), ("v", v_BTKH)):
                observe(self, name, value)
            if angles is not None:
                q_BTNH, k_BTKH = rotate(q_BTNH, *angles), rotate(k_BTKH, *angles)
            if cache is None:
                k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (k_BTKH, v_BTKH))
                k_positions_BS = positions_BT
            else:
                (k_BKSH, v_BKSH, k_positions_BS), cache = cache.update(self.layer, k_BTKH, v_BTKH, positions_BT)
        sinks_N = None
        if self.use_sinks:
            init = nn.with_logical_partitioning(nn.initializers.normal(1.0), (QUERY_HEADS,))
            sinks_N = self.param("sinks", init, (N,), self.param_dtype)
        out_BTNH = attention(
            q_BTNH,
            k_BKSH,
            v_BKSH,
            positions_BT,
            k_positions_BS,
            sinks_N,
            scale=self.scale,
            window=self.window,
            cached=cache is not None,
            implementation=self.implementation,
        )
        observe(self, "heads", out_BTNH)
        out = linear(x_BTD.shape[-1], (HEADS, WIDTH), name="out")
        return out.parts(out_BTNH.reshape(*x_BTD.shape[:2], N * H)), cache
