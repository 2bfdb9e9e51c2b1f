"""The products of the chosen experts."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.bench.cases.case import Case, float64, normal
from pallas_kernels import dispatch
from pallas_kernels.formats.fragments import MXFP4Fragments
from pallas_kernels.formats.mxfp4 import BLOCK, MXFP4
from pallas_kernels.moe import moe

# The layout of packed weights that an implementation wants; others take the checkpoint's.
LAYOUTS: Final[Mapping[str, Callable[[MXFP4], Any]]] = dict.fromkeys(
    (dispatch.MOSAIC, dispatch.TRITON), MXFP4Fragments.of
)

_TOKENS: Final = 2  # tokens of a result that are compared
_SCALES: Final = (118, 123)  # range of random blocks' scales, the end excluded: 2^-9 to 2^-5


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
    balanced: bool = True  # all experts equally likely; otherwise each e^(-1/4) times as likely as the one before

    @property
    def shape(self) -> str:
        """Experts and their sizes."""
        sizes = f"{self.width}→2·{self.mlp_width}→{self.width}"
        notes = [", MXFP4"] * self.packed + [", unbalanced"] * (not self.balanced)
        return f"{self.chosen} of {self.num_experts}: {sizes}{''.join(notes)}"

    @property
    def _experts_TX(self) -> np.ndarray:
        rng = np.random.default_rng(self.rows)
        if self.balanced:
            order_TE = np.stack([rng.permutation(self.num_experts) for _ in range(self.rows)])
        else:  # Gumbel top-k: the largest log-probabilities plus noise are a draw without replacement
            noise_TE = rng.gumbel(size=(self.rows, self.num_experts))
            order_TE = np.argsort(np.arange(self.num_experts) / 4 - noise_TE, axis=1)
        return order_TE[:, : self.chosen].astype(np.int32)

    @property
    def bytes(self) -> int:
        """The weights of each expert that any row chooses."""
        numbers = len(np.unique(self._experts_TX)) * 3 * self.width * self.mlp_width
        # An MXFP4 block has 16 bytes of codes and one of scale.
        return numbers * 17 // BLOCK if self.packed else numbers * int(jnp.dtype(self.dtype).itemsize)

    @property
    def flops(self) -> int:
        """Two per weight, row and chosen expert."""
        return 2 * self.rows * self.chosen * 3 * self.width * self.mlp_width

    def x(self, count: int) -> jax.Array:
        """[T, D]."""
        del count
        return normal(0, (self.rows, self.width), self.dtype)

    def copies(self, count: int, implementation: str) -> list[Any]:
        """The same weights, but other chosen experts, equally many."""
        E, D, F = self.num_experts, self.width, self.mlp_width
        if self.packed:
            layout = LAYOUTS.get(implementation, lambda packed: packed)
            up, down = layout(_mxfp4(1, (E, 2 * F, D))), layout(_mxfp4(2, (E, D, F)))
        else:
            up, down = normal(1, (E, D, 2 * F), self.dtype, 0.02), normal(2, (E, F, D), self.dtype, 0.02)
        biases = normal(3, (E, 2 * F), self.dtype, 0.1), normal(4, (E, D), self.dtype, 0.1)
        weights_TX = jax.nn.softmax(normal(5, (self.rows, self.chosen), "float32"), axis=-1)
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
                    weight * self._expert(float64(x[token]), *(part[expert] for part in (up, up_bias, down, down_bias)))
                    for expert, weight in zip(experts_TX[token].tolist(), weights_TX[token].tolist(), strict=True)
                )
                for token in self._tokens
            ]
        )

    def _expert(self, x_D: np.ndarray, up: Any, up_bias: Any, down: Any, down_bias: Any) -> np.ndarray:
        # float32 represents MXFP4 values exactly.
        up, down = (float64(part.dequantize() if self.packed else part.T) for part in (up, down))
        hidden = up @ x_D + float64(up_bias)
        gate, linear = np.minimum(hidden[::2], self.limit), np.clip(hidden[1::2], -self.limit, self.limit)
        product: np.ndarray = down @ (gate / (1 + np.exp(-self.alpha * gate)) * (linear + 1)) + float64(down_bias)
        return product


@partial(jax.jit, static_argnums=1)
def _mxfp4(seed: int, shape: tuple[int, ...]) -> MXFP4:
    *lead, last = shape
    keys = jax.random.split(jax.random.key(seed))
    blocks = jax.random.bits(keys[0], (*lead, last // BLOCK, BLOCK // 2), jnp.uint8)
    return MXFP4(blocks, jax.random.randint(keys[1], (*lead, last // BLOCK), *_SCALES, jnp.uint8))
