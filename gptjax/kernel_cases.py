"""The operations of `pallas_kernels` at the shapes that decoding has them: operands, bytes, and what is right."""

import abc
import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Final

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import GptOssConfig, ModelConfig
from gptjax.config.quantization import packs
from pallas_kernels import dispatch
from pallas_kernels import matvec as products
from pallas_kernels.attention import attention
from pallas_kernels.fragments import MXFP4Fragments
from pallas_kernels.moe import moe
from pallas_kernels.mxfp4 import BLOCK, MXFP4

# How an implementation wants packed weights; the others take them as checkpoints have them.
LAYOUTS: Final[Mapping[str, Callable[[MXFP4], Any]]] = dict.fromkeys(
    (dispatch.MOSAIC, dispatch.TRITON), MXFP4Fragments.of
)

_COLUMNS, _TOKENS, _ROWS = 512, 2, 4  # of a result that are compared: of a product, of experts, of attention
_SCALES = 118, 123  # of random blocks, from and below: 2^-9 to 2^-5
_SMALL = 2.0**-30  # so little that what it is added to stays what it was, which the compiler does not know


def matvec(x_TD: jax.Array, kernel_DN: jax.Array, *, implementation: str) -> jax.Array:
    """The product, summed: [T, N] float32."""
    return products.matvec(x_TD, kernel_DN, implementation=implementation).total()


@dataclasses.dataclass(frozen=True)
class Case(abc.ABC):
    """An operation at a shape. Everything random in it is the same each time."""

    operation: ClassVar[str]
    rows: int
    dtype: str

    @property
    @abc.abstractmethod
    def shape(self) -> str:
        """For people."""

    @property
    @abc.abstractmethod
    def bytes(self) -> int:
        """That must be read: weights, or keys and values. What goes in and out besides is left out."""

    @property
    @abc.abstractmethod
    def flops(self) -> int:
        """Two for each product of two numbers."""

    @abc.abstractmethod
    def x(self) -> jax.Array:
        """The input of a first call."""

    @abc.abstractmethod
    def copies(self, count: int, implementation: str) -> list[Any]:
        """Operands for so many calls, of which none reads what the one before did, where there is so much to read."""

    @abc.abstractmethod
    def call(self, x: jax.Array, operands: Any, implementation: str) -> jax.Array:
        """The operation."""

    @abc.abstractmethod
    def sample(self, out: jax.Array) -> jax.Array:
        """The part of a result that is compared."""

    @abc.abstractmethod
    def expected(self, x: jax.Array, operands: Any) -> np.ndarray:
        """That part in float64, by NumPy; the operands are those of "xla"."""

    def following(self, x: jax.Array, out: jax.Array) -> jax.Array:
        """The next call's input, which cannot be known before this call has ended; as good as x."""
        return link(x, out)


def link(x: jax.Array, out: jax.Array) -> jax.Array:
    """x [rows, ...] again, not to be known before the result [rows, ...] is."""
    # Without the barrier, of the result only what is used here would be computed.
    x, out = jax.lax.optimization_barrier((x, out))
    return x + (out[:, :1] * _SMALL).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Product(Case):
    """`matvec`."""

    operation = "matvec"
    inputs: int  # D
    outputs: int  # N

    @property
    def shape(self) -> str:
        """Sizes of input and output."""
        return f"{self.inputs}→{self.outputs}"

    @property
    def bytes(self) -> int:
        """Of the weight."""
        return self.inputs * self.outputs * int(jnp.dtype(self.dtype).itemsize)

    @property
    def flops(self) -> int:
        """Two a weight and row."""
        return 2 * self.rows * self.inputs * self.outputs

    def x(self) -> jax.Array:
        """[T, D]."""
        return _normal(0, (self.rows, self.inputs), self.dtype)

    def copies(self, count: int, implementation: str) -> list[Any]:
        """Weights [D, N]."""
        del implementation
        deviation = 1 / math.sqrt(self.inputs)
        return [_normal(1 + copy, (self.inputs, self.outputs), self.dtype, deviation) for copy in range(count)]

    def call(self, x: jax.Array, operands: Any, implementation: str) -> jax.Array:
        """[T, N]."""
        return matvec(x, operands, implementation=implementation)

    @property
    def _columns(self) -> np.ndarray:
        return np.unique(np.linspace(0, self.outputs - 1, _COLUMNS).astype(int))

    def sample(self, out: jax.Array) -> jax.Array:
        """Some columns."""
        return out[:, self._columns]

    def expected(self, x: jax.Array, operands: Any) -> np.ndarray:
        """[T, columns]."""
        return _float64(x) @ _float64(operands[:, self._columns])


@dataclasses.dataclass(frozen=True)
class Experts(Case):
    """`moe`: the up and down products of the chosen experts."""

    operation = "moe"
    width: int  # D
    mlp_width: int  # F
    num_experts: int  # E
    chosen: int  # X
    packed: bool  # in MXFP4
    alpha: float
    limit: float

    @property
    def shape(self) -> str:
        """Experts and their sizes."""
        sizes = f"{self.width}→2·{self.mlp_width}→{self.width}"
        return f"{self.chosen} of {self.num_experts}: {sizes}{', MXFP4' if self.packed else ''}"

    @property
    def _experts_TX(self) -> np.ndarray:
        rng = np.random.default_rng(self.rows)
        return np.stack([rng.permutation(self.num_experts)[: self.chosen] for _ in range(self.rows)]).astype(np.int32)

    @property
    def bytes(self) -> int:
        """Of the weights of each expert that is chosen by any row."""
        numbers = len(np.unique(self._experts_TX)) * 3 * self.width * self.mlp_width
        # Of MXFP4, 16 bytes of codes and one of scale a block.
        return numbers * 17 // BLOCK if self.packed else numbers * int(jnp.dtype(self.dtype).itemsize)

    @property
    def flops(self) -> int:
        """Two a weight, row and chosen expert."""
        return 2 * self.rows * self.chosen * 3 * self.width * self.mlp_width

    def x(self) -> jax.Array:
        """[T, D]."""
        return _normal(0, (self.rows, self.width), self.dtype)

    def copies(self, count: int, implementation: str) -> list[Any]:
        """The same weights, and other experts chosen, of which there are as many."""
        E, D, F = self.num_experts, self.width, self.mlp_width
        if self.packed:
            layout = LAYOUTS.get(implementation, lambda packed: packed)
            up, down = layout(_mxfp4(1, (E, 2 * F, D))), layout(_mxfp4(2, (E, D, F)))
        else:
            up, down = _normal(1, (E, D, 2 * F), self.dtype, 0.02), _normal(2, (E, F, D), self.dtype, 0.02)
        biases = _normal(3, (E, 2 * F), self.dtype, 0.1), _normal(4, (E, D), self.dtype, 0.1)
        weights_TX = jax.nn.softmax(_normal(5, (self.rows, self.chosen), "float32"), axis=-1)
        return [
            (jnp.asarray((self._experts_TX + copy * self.chosen) % E), weights_TX, up, biases[0], down, biases[1])
            for copy in range(count)
        ]

    def call(self, x: jax.Array, operands: Any, implementation: str) -> jax.Array:
        """[T, D]."""
        return moe(x, *operands, alpha=self.alpha, limit=self.limit, implementation=implementation).total()

    def sample(self, out: jax.Array) -> jax.Array:
        """The first and the last token."""
        return out[jnp.asarray(self._tokens)]

    @property
    def _tokens(self) -> list[int]:
        return np.unique(np.linspace(0, self.rows - 1, _TOKENS).astype(int)).tolist()

    def expected(self, x: jax.Array, operands: Any) -> np.ndarray:
        """[tokens, D]."""
        experts_TX, weights_TX, up, up_bias, down, down_bias = operands
        return np.stack(
            [
                sum(
                    weight
                    * self._expert(_float64(x[token]), *(part[expert] for part in (up, up_bias, down, down_bias)))
                    for expert, weight in zip(experts_TX[token].tolist(), weights_TX[token].tolist(), strict=True)
                )
                for token in self._tokens
            ]
        )

    def _expert(self, x_D: np.ndarray, up: Any, up_bias: Any, down: Any, down_bias: Any) -> np.ndarray:
        # What MXFP4 holds is exact in float32.
        up, down = (_float64(part.dequantize() if self.packed else part.T) for part in (up, down))
        hidden = up @ x_D + _float64(up_bias)
        gate, linear = np.minimum(hidden[::2], self.limit), np.clip(hidden[1::2], -self.limit, self.limit)
        product: np.ndarray = down @ (gate / (1 + np.exp(-self.alpha * gate)) * (linear + 1)) + _float64(down_bias)
        return product


@dataclasses.dataclass(frozen=True)
class Attention(Case):
    """`attention` of one query a row, over a full cache."""

    operation = "attention"
    num_heads: int  # N
    num_kv_heads: int  # K
    head_width: int  # H
    positions: int  # S
    ring: bool  # a window's, written over and over
    sinks: bool

    @property
    def shape(self) -> str:
        """Heads and positions."""
        ring = " in a ring" if self.ring else ""
        return f"{self.num_heads} heads on {self.num_kv_heads}·{self.head_width}, {self.positions}{ring}"

    @property
    def bytes(self) -> int:
        """Of keys and values."""
        numbers = 2 * self.rows * self.num_kv_heads * self.positions * self.head_width
        return numbers * int(jnp.dtype(self.dtype).itemsize)

    @property
    def flops(self) -> int:
        """Of scores and of weighted values."""
        return 4 * self.rows * self.num_heads * self.positions * self.head_width

    def x(self) -> jax.Array:
        """[B, 1, N, H]."""
        return _normal(0, (self.rows, 1, self.num_heads, self.head_width), self.dtype)

    def copies(self, count: int, implementation: str) -> list[Any]:
        """Caches, positions and sinks."""
        del implementation
        shape = (self.rows, self.num_kv_heads, self.positions, self.head_width)
        last = self.positions - 1 if not self.ring else 10 * self.positions + self.positions // 3
        places_S = np.arange(self.positions)
        k_positions = np.broadcast_to(last - (last - places_S) % self.positions, (self.rows, self.positions))
        q_positions_B1, k_positions_BS = jnp.full((self.rows, 1), last, jnp.int32), jnp.asarray(k_positions, jnp.int32)
        sinks_N = _normal(1, (self.num_heads,), self.dtype) if self.sinks else None
        return [
            (
                *(_normal(2 + 2 * copy + which, shape, self.dtype) for which in (0, 1)),
                q_positions_B1,
                k_positions_BS,
                sinks_N,
            )
            for copy in range(count)
        ]

    def call(self, x: jax.Array, operands: Any, implementation: str) -> jax.Array:
        """[B, 1, N, H]."""
        window = self.positions if self.ring else None
        scale = self.head_width**-0.5
        return attention(x, *operands, scale=scale, window=window, cached=True, implementation=implementation)

    def sample(self, out: jax.Array) -> jax.Array:
        """The first rows."""
        return out[:_ROWS]

    def expected(self, x: jax.Array, operands: Any) -> np.ndarray:
        """[rows, 1, N, H]. Every key is seen."""
        q, k, v = (_float64(part[:_ROWS]) for part in (x, *operands[:2]))
        q_BKGH = q.reshape(len(q), self.num_kv_heads, -1, self.head_width)
        scores = q_BKGH @ k.swapaxes(2, 3) * self.head_width**-0.5
        sinks = np.full(self.num_heads, -np.inf) if operands[4] is None else _float64(operands[4])
        sinks_KG1 = sinks.reshape(self.num_kv_heads, -1, 1)
        largest = np.maximum(scores.max(axis=-1, keepdims=True), sinks_KG1)
        weights = np.exp(scores - largest)
        total = weights.sum(axis=-1, keepdims=True) + np.exp(sinks_KG1 - largest)
        return (weights / total @ v).reshape(q.shape)

    def following(self, x: jax.Array, out: jax.Array) -> jax.Array:
        """The result is as good a query as any, and makes no work of its own."""
        del x
        return out


OPERATIONS: Final = (Experts.operation, Product.operation, Attention.operation)
_ROW_COUNTS: Final = {"moe": (1, 8, 32, 128), "matvec": (1, 8, 32)}
_CACHES: Final = ((1, 512), (1, 2048), (1, 32768), (8, 512), (8, 2048), (32, 512))  # rows and positions
_RINGS: Final = (1, 8, 32)  # rows


def cases(
    models: Mapping[str, ModelConfig],
    *,
    dtype: str,
    operations: Collection[str] = OPERATIONS,
    rows: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> dict[Case, list[str]]:
    """What decoding takes of the operations, with the names of the models that do, in the order of OPERATIONS.

    Args:
      rows, positions: others than the usual ones.
    """
    found: dict[Case, list[str]] = {}
    for operation in (each for each in OPERATIONS if each in operations):
        for name, config in models.items():
            counts = rows or _ROW_COUNTS.get(operation, _RINGS)
            caches = [(B, S) for B in rows or [1] for S in positions or [512]] if rows or positions else _CACHES
            for case in _of(operation, config, dtype, counts, caches):
                found.setdefault(case, []).append(name)
    return found


def _of(
    operation: str, config: ModelConfig, dtype: str, counts: Sequence[int], caches: Sequence[tuple[int, int]]
) -> list[Case]:
    D, N, K, H = config.width, config.num_heads, config.num_kv_heads, config.head_width
    has_experts = isinstance(config, GptOssConfig)
    if operation == "matvec":
        sizes = [(D, (N + 2 * K) * H), (N * H, D)]
        sizes += [] if has_experts else [(D, config.mlp_width), (config.mlp_width, D)]
        sizes += [(D, config.vocab_size)]
        return [Product(rows, dtype, *size) for size in sizes for rows in counts]
    if operation == "attention":
        full = partial(Attention, dtype=dtype, num_heads=N, num_kv_heads=K, head_width=H, sinks=has_experts)
        windows = sorted({window for window in config.windows if window is not None})
        fits = [(rows, positions) for rows, positions in caches if positions <= config.context_length]
        return [
            *(full(rows=rows, positions=positions, ring=False) for rows, positions in fits),
            *(full(rows=rows, positions=window, ring=True) for window in windows for rows in counts),
        ]
    if not isinstance(config, GptOssConfig):
        return []
    settings = config.num_experts, config.experts_per_token, packs(config.mxfp4, "experts")
    activation = config.swiglu_alpha, config.swiglu_limit
    return [Experts(rows, dtype, D, config.mlp_width, *settings, *activation) for rows in counts]


@partial(jax.jit, static_argnums=(1, 2))
def _normal(seed: int, shape: tuple[int, ...], dtype: str, deviation: float = 1.0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype) * jnp.asarray(deviation, dtype)


@partial(jax.jit, static_argnums=1)
def _mxfp4(seed: int, shape: tuple[int, ...]) -> MXFP4:
    *lead, last = shape
    keys = jax.random.split(jax.random.key(seed))
    blocks = jax.random.bits(keys[0], (*lead, last // BLOCK, BLOCK // 2), jnp.uint8)
    return MXFP4(blocks, jax.random.randint(keys[1], (*lead, last // BLOCK), *_SCALES, jnp.uint8))


def _float64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)
