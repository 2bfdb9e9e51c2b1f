"""Attention with many queries per row."""

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.bench.cases.attention import Carried
from gptjax.bench.cases.case import Case, float64, normal, pool, shuffled_table, together
from pallas_kernels.attention import packed_attention_over_pages
from pallas_kernels.fp8_pages import vector_bytes
from pallas_kernels.pages import PAGE, Tiles

_TOKENS: Final = 3  # of the first prompt, its last ones, that are compared


@dataclasses.dataclass(frozen=True)
class Prefill(Case):
    """`attention` of packed prompts of one length, their keys and values in pages behind `prior` other positions."""

    operation = "prefill"
    num_heads: int  # N
    num_kv_heads: int  # K
    head_width: int  # H
    tokens: int  # T: of each row
    prior: int
    window: int | None
    sinks: bool
    cache_dtype: str | None = None  # of keys and values: "fp8"; None: `dtype`

    @property
    def shape(self) -> str:
        """Heads and positions."""
        more = f" after {self.prior}" if self.prior else ""
        more += f", window {self.window}" if self.window is not None else ""
        more += f" in {self.cache_dtype}" if self.cache_dtype is not None else ""
        return f"{self.num_heads} heads on {self.num_kv_heads}·{self.head_width}, {self.tokens}{more}"

    @property
    def positions(self) -> int:
        """S."""
        return self.prior + self.tokens

    @property
    def bytes(self) -> int:
        """Keys and values that are seen."""
        seen = min(self.positions, self.tokens - 1 + (self.window or self.positions))
        return 2 * self.rows * self.num_kv_heads * seen * vector_bytes(self.head_width, self.cache_dtype or self.dtype)

    @property
    def flops(self) -> int:
        """Scores and weighted values that are not masked."""
        seen = np.minimum(np.arange(self.prior, self.positions) + 1, self.window or self.positions)
        return 4 * self.rows * self.num_heads * int(seen.sum()) * self.head_width

    def x(self, count: int) -> Carried:
        """Queries [B, T, N, H], and the positions of one call."""
        del count
        shape = (self.rows, self.tokens, self.num_heads, self.head_width)
        positions_BT = np.broadcast_to(np.arange(self.prior, self.positions), (self.rows, self.tokens))
        q_BTNH, table_BZ = normal(0, shape, self.dtype), shuffled_table(self.rows, self.positions)
        return Carried(q_BTNH, jnp.asarray(positions_BT, jnp.int32), table_BZ)

    def copies(self, count: int, implementation: str) -> list[Any]:
        """Caches and sinks."""
        del implementation
        sinks_N = normal(1, (self.num_heads,), self.dtype) if self.sinks else None
        shape = (1 + self.rows * -(-self.positions // PAGE), self.num_kv_heads, PAGE, self.head_width)
        return [
            (*(pool(2 + 2 * copy + which, shape, self.dtype, self.cache_dtype) for which in (0, 1)), sinks_N)
            for copy in range(count)
        ]

    def call(self, x: Carried, operands: Any, implementation: str) -> jax.Array:
        """[B, T, N, H]."""
        k, v, sinks_N = operands
        out_1TNH = packed_attention_over_pages(
            x.q_BTNH.reshape(1, -1, self.num_heads, self.head_width),
            k,
            v,
            x.table_BZ,
            Tiles.of(x.q_positions_BT),
            sinks_N,
            scale=self.head_width**-0.5,
            window=self.window,
            implementation=implementation,
        )
        return out_1TNH.reshape(x.q_BTNH.shape)

    def sample(self, out: jax.Array) -> jax.Array:
        """The last tokens of the first prompt, [T, N, H]."""
        return out[0, -_TOKENS:]

    def expected(self, x: Carried, operands: Any) -> np.ndarray:
        """The same."""
        k_KSH, v_KSH = (together(each, x.table_BZ[:1])[0, :, : self.positions] for each in operands[:2])
        q_TKGH = float64(self.sample(x.q_BTNH)).reshape(_TOKENS, self.num_kv_heads, -1, self.head_width)
        scores = np.einsum("tkgh,ksh->tkgs", q_TKGH, k_KSH) * self.head_width**-0.5
        ahead_TS = np.arange(self.positions - _TOKENS, self.positions)[:, None] - np.arange(self.positions)
        seen_TS = (ahead_TS >= 0) & (ahead_TS < (self.window or self.positions))
        scores = np.where(seen_TS[:, None, None], scores, -np.inf)
        sinks = np.full(self.num_heads, -np.inf) if operands[2] is None else float64(operands[2])
        sinks_KG1 = sinks.reshape(self.num_kv_heads, -1, 1)
        largest = np.maximum(scores.max(axis=-1, keepdims=True), sinks_KG1)
        weights = np.exp(scores - largest)
        total = weights.sum(axis=-1, keepdims=True) + np.exp(sinks_KG1 - largest)
        return np.einsum("tkgs,ksh->tkgh", weights / total, v_KSH).reshape(_TOKENS, self.num_heads, self.head_width)

    def following(self, x: Carried, out: jax.Array) -> Carried:
        """The result: it serves as the next queries at no cost."""
        return dataclasses.replace(x, q_BTNH=out)
