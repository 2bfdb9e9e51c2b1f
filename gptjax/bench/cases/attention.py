"""Attention with one query per row."""

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.bench.cases.case import Case, float64, normal, pool, shuffled_table, together
from pallas_kernels.attention import attention_over_pages
from pallas_kernels.fp8_pages import vector_bytes
from pallas_kernels.pages import PAGE

_ROWS: Final = 4  # rows of a result that are compared


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Carried:
    """What passes from call to call, as in a step: what is computed from the positions is shared by all layers."""

    q_BTNH: jax.Array
    q_positions_BT: jax.Array
    table_BZ: jax.Array


@dataclasses.dataclass(frozen=True)
class Attention(Case):
    """`attention_over_pages` with one query per row. The pages lie in any order."""

    operation = "attention"
    num_heads: int  # N
    num_kv_heads: int  # K
    head_width: int  # H
    positions: int  # that are seen: S
    windowed: bool  # whether they are a window, behind many others
    sinks: bool
    cache_dtype: str | None = None  # of keys and values: "fp8"; None: `dtype`

    @property
    def shape(self) -> str:
        """Heads and positions."""
        more = " of a window" if self.windowed else ""
        more += f" in {self.cache_dtype}" if self.cache_dtype is not None else ""
        return f"{self.num_heads} heads on {self.num_kv_heads}·{self.head_width}, {self.positions}{more}"

    @property
    def bytes(self) -> int:
        """Keys and values."""
        vectors = 2 * self.rows * self.num_kv_heads * self.positions
        return vectors * vector_bytes(self.head_width, self.cache_dtype or self.dtype)

    @property
    def flops(self) -> int:
        """Scores and weighted values."""
        return 4 * self.rows * self.num_heads * self.positions * self.head_width

    def x(self, count: int) -> Carried:
        """Queries [B, 1, N, H], and the positions of one step."""
        del count
        last = 10 * self.positions + self.positions // 3 if self.windowed else self.positions - 1
        q_B1NH = normal(0, (self.rows, 1, self.num_heads, self.head_width), self.dtype)
        return Carried(q_B1NH, jnp.full((self.rows, 1), last, jnp.int32), shuffled_table(self.rows, last + 1))

    def copies(self, count: int, implementation: str) -> list[Any]:
        """Caches and sinks."""
        del implementation
        sinks_N = normal(1, (self.num_heads,), self.dtype) if self.sinks else None
        shape = (1 + self.x(1).table_BZ.size, self.num_kv_heads, PAGE, self.head_width)
        return [
            (*(pool(2 + 2 * copy + which, shape, self.dtype, self.cache_dtype) for which in (0, 1)), sinks_N)
            for copy in range(count)
        ]

    def call(self, x: Carried, operands: Any, implementation: str) -> jax.Array:
        """[B, 1, N, H]."""
        k, v, sinks_N = operands
        return attention_over_pages(
            x.q_BTNH,
            k,
            v,
            x.table_BZ,
            x.q_positions_BT,
            sinks_N,
            scale=self.head_width**-0.5,
            window=self.positions if self.windowed else None,
            implementation=implementation,
        )

    def sample(self, out: jax.Array) -> jax.Array:
        """The first rows."""
        return out[:_ROWS]

    def expected(self, x: Carried, operands: Any) -> np.ndarray:
        """[rows, 1, N, H]."""
        end = int(x.q_positions_BT[0, 0]) + 1
        k, v = (together(each, x.table_BZ[:_ROWS])[:, :, end - self.positions : end] for each in operands[:2])
        q = float64(x.q_BTNH[:_ROWS])
        q_BKGH = q.reshape(len(q), self.num_kv_heads, -1, self.head_width)
        scores = q_BKGH @ k.swapaxes(2, 3) * self.head_width**-0.5
        sinks = np.full(self.num_heads, -np.inf) if operands[2] is None else float64(operands[2])
        sinks_KG1 = sinks.reshape(self.num_kv_heads, -1, 1)
        largest = np.maximum(scores.max(axis=-1, keepdims=True), sinks_KG1)
        weights = np.exp(scores - largest)
        total = weights.sum(axis=-1, keepdims=True) + np.exp(sinks_KG1 - largest)
        return (weights / total @ v).reshape(q.shape)

    def following(self, x: Carried, out: jax.Array) -> Carried:
        """The result: it serves as the next query at no cost."""
        return dataclasses.replace(x, q_BTNH=out)
