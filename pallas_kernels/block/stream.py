"""What the operation takes and gives."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

PANEL = 64  # columns of which moments are kept
_UNWRITTEN = 0xFFFFFFFF  # which no number is that was computed: of NaN there is one form


class NormWeights(NamedTuple):
    """A LayerNorm's weights."""

    scale_D: jax.Array
    bias_D: jax.Array


class LinearWeights(NamedTuple):
    """A product's weights."""

    kernel: jax.Array  # [in, out]
    bias: jax.Array  # [out]


class Weights(NamedTuple):
    """A block's weights."""

    attention_norm: NormWeights
    qkv: LinearWeights  # queries, keys and values, in this order, of N heads each
    out: LinearWeights
    mlp_norm: NormWeights
    up: LinearWeights
    down: LinearWeights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """A residual stream of a few rows, on its way through the blocks of a step."""

    x_TD: jax.Array
    moments_TN2: jax.Array  # float32: of each 64 columns the mean, and the sum of squares of what is left without it
    # What clusters tell each other, uint32. All bits of one are set, the other is as the block before has left it.
    cleared_W: jax.Array
    used_W: jax.Array

    @classmethod
    def of(cls, x_TD: jax.Array, mlp_width: int) -> "Stream":
        """A stream that begins."""
        T, D = x_TD.shape
        words = Workspace(T, D, mlp_width).words
        cleared_W, used_W = (jnp.full((words,), _UNWRITTEN, jnp.uint32) for _ in range(2))
        return cls(x_TD, moments(x_TD), cleared_W, used_W)


def moments(x_TD: jax.Array) -> jax.Array:
    """See `Stream.moments_TN2`."""
    x_TNH = x_TD.astype(jnp.float32).reshape(x_TD.shape[0], -1, PANEL)
    mean_TN1 = x_TNH.mean(axis=-1, keepdims=True)
    return jnp.stack((mean_TN1[..., 0], jnp.square(x_TNH - mean_TN1).sum(axis=-1)), axis=-1)


class Workspace(NamedTuple):
    """Where in a workspace what lies: numbers of its words."""

    rows: int  # T
    width: int  # D
    mlp_width: int  # F

    @property
    def x(self) -> int:
        """The stream between attention and MLP, bfloat16 [T, D], after attention's heads, of the same shape."""
        return self.rows * self.width // 2

    @property
    def hidden(self) -> int:
        """The MLP's activations, bfloat16 [T, F]."""
        return 2 * self.x

    @property
    def moments(self) -> int:
        """Of x: float32 [T, N, 2]."""
        return self.hidden + self.rows * self.mlp_width // 2

    @property
    def words(self) -> int:
        """Of all."""
        return self.moments + self.rows * self.width // PANEL * 2
