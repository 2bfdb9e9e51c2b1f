"""GPT-2's block with one token per row."""

import dataclasses
import itertools
import math
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.bench.cases.case import Case, float64, normal, shuffled_table, together
from pallas_kernels.block import LinearWeights, NormWeights, Stream, Weights, block
from pallas_kernels.fp8_pages import Pages
from pallas_kernels.pages import PAGE

_SEEDS: Final = 1000  # between the seeds of two copies: more than there are weights, and caches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Carried:
    """What a call takes from the previous one, as a layer does in a step.

    This includes the caches, which are updated in place; without donation they would be copied first. And the positions
    and the table, so that what is computed from them is shared by all calls.
    """

    stream: Stream
    caches: tuple[tuple[Pages, Pages], ...]  # keys and values of each copy, [Y, N, S, H]
    positions_T: jax.Array
    table_TZ: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Operands:
    """A call's other arguments."""

    weights: Weights
    copy: int = dataclasses.field(metadata={"static": True})  # whose caches


@dataclasses.dataclass(frozen=True)
class Block(Case):
    """`block` at the last of some positions, the same in each call. The pages of the caches lie in any order.

    The stream passes from call to call, as it does from layer to layer; creating it is not timed.
    """

    operation = "block"
    num_heads: int  # N
    head_width: int  # H
    mlp_width: int  # F
    positions: int
    epsilon: float

    @property
    def shape(self) -> str:
        """Heads, sizes and positions."""
        sizes = f"{self.width}→{self.mlp_width}→{self.width}"
        return f"{self.num_heads} heads of {self.head_width}, {sizes}, {self.positions}"

    @property
    def width(self) -> int:
        """D."""
        return self.num_heads * self.head_width

    @property
    def _weights(self) -> int:
        return 4 * self.width**2 + 2 * self.width * self.mlp_width

    @property
    def _scale(self) -> float:
        return self.head_width**-0.5

    @property
    def bytes(self) -> int:
        """The four matrices, and keys and values."""
        numbers = self._weights + 2 * self.rows * self.positions * self.width
        return numbers * int(jnp.dtype(self.dtype).itemsize)

    @property
    def flops(self) -> int:
        """Two per weight and row; and scores and weighted values."""
        return 2 * self.rows * self._weights + 4 * self.rows * self.positions * self.width

    def x(self, count: int) -> Carried:
        """The initial stream [T, D], and caches for `count` copies."""
        table_TZ = shuffled_table(self.rows, self.positions)
        shape = (1 + table_TZ.size, self.num_heads, PAGE, self.head_width)
        caches = (
            (normal(1 + 2 * copy, shape, self.dtype), normal(2 + 2 * copy, shape, self.dtype)) for copy in range(count)
        )
        stream = Stream.of(normal(0, (self.rows, self.width), self.dtype), self.mlp_width)
        return Carried(stream, tuple(caches), jnp.full((self.rows,), self.positions - 1, jnp.int32), table_TZ)

    def copies(self, count: int, implementation: str) -> list[Any]:
        """Weights."""
        del implementation
        return [Operands(self._random(_SEEDS * (1 + copy)), copy) for copy in range(count)]

    def _random(self, seed: int) -> Weights:
        seeds, D, F = itertools.count(seed), self.width, self.mlp_width

        def norm() -> NormWeights:
            return NormWeights(*(normal(next(seeds), (D,), self.dtype, deviation) for deviation in (1.0, 0.1)))

        def linear(inputs: int, outputs: int) -> LinearWeights:
            kernel = normal(next(seeds), (inputs, outputs), self.dtype, 1 / math.sqrt(inputs))
            return LinearWeights(kernel, normal(next(seeds), (outputs,), self.dtype, 0.1))

        return Weights(norm(), linear(D, 3 * D), linear(D, D), norm(), linear(D, F), linear(F, D))

    def call(self, x: Carried, operands: Operands, implementation: str) -> Carried:
        """The stream after the block, and the caches."""
        caches = list(x.caches)
        stream, k_YNSH, v_YNSH = block(
            x.stream,
            operands.weights,
            x.positions_T,
            *caches[operands.copy],
            x.table_TZ,
            epsilon=self.epsilon,
            scale=self._scale,
            implementation=implementation,
        )
        caches[operands.copy] = (k_YNSH, v_YNSH)
        return dataclasses.replace(x, stream=stream, caches=tuple(caches))

    def sample(self, out: Carried) -> jax.Array:
        """The rows, [T, D]."""
        return out.stream.x_TD

    def following(self, x: Carried, out: Carried) -> Carried:
        """The result, as the next layer would take it."""
        del x
        return out

    def expected(self, x: Carried, operands: Operands) -> np.ndarray:
        """[T, D]."""
        weights: Weights = jax.tree.map(float64, operands.weights)
        x_TD = float64(x.stream.x_TD)
        qkv_TO = _product(self._normed(x_TD, weights.attention_norm), weights.qkv)
        caches = (together(pool, x.table_TZ)[:, :, : self.positions] for pool in x.caches[operands.copy])
        heads_TD = self._attended(qkv_TO, *caches)
        x_TD = x_TD + _product(heads_TD, weights.out)
        hidden_TF = _gelu(_product(self._normed(x_TD, weights.mlp_norm), weights.up))
        return x_TD + _product(hidden_TF, weights.down)

    def _normed(self, x_TD: np.ndarray, norm: Any) -> np.ndarray:
        centered_TD = x_TD - x_TD.mean(axis=-1, keepdims=True)
        variance_T1 = np.square(centered_TD).mean(axis=-1, keepdims=True)
        normed_TD: np.ndarray = centered_TD / np.sqrt(variance_T1 + self.epsilon) * norm.scale_D + norm.bias_D
        return normed_TD

    def _attended(self, qkv_TO: np.ndarray, k_TNSH: np.ndarray, v_TNSH: np.ndarray) -> np.ndarray:
        # The new keys and values are in the last place.
        q_TNH, k_TNH, v_TNH = np.moveaxis(qkv_TO.reshape(self.rows, 3, self.num_heads, self.head_width), 1, 0)
        k_TNSH, v_TNSH = (
            np.concatenate((old[:, :, :-1], new[:, :, None]), axis=2) for old, new in ((k_TNSH, k_TNH), (v_TNSH, v_TNH))
        )
        scores_TNS = (k_TNSH @ q_TNH[..., None])[..., 0] * self._scale
        weights_TNS = np.exp(scores_TNS - scores_TNS.max(axis=-1, keepdims=True))
        weights_TNS /= weights_TNS.sum(axis=-1, keepdims=True)
        return (weights_TNS[:, :, None] @ v_TNSH).reshape(self.rows, self.width)


def _product(x: np.ndarray, linear: Any) -> np.ndarray:
    product: np.ndarray = x @ linear.kernel + linear.bias
    return product


def _gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
