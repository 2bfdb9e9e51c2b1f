"""The operation's arguments and results."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

PANEL = 64  # columns that share their moments
_UNWRITTEN = 0xFFFFFFFF  # never a computed number: arithmetic produces only one form of NaN, and not this one


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
    moments_TN2: jax.Array  # float32: for every 64 columns, their mean and the sum of squared deviations from it
    # Workspaces, uint32, in which clusters exchange numbers. All bits of the first are set; the previous block left the
    # second as it is.
    cleared_W: jax.Array
    used_W: jax.Array

    @classmethod
    def of(cls, x_TD: jax.Array, mlp_width: int) -> "Stream":
        """A stream at the start of a step."""
        T, D = x_TD.shape
        words = Workspace(T, D, mlp_width).words
        cleared_W, used_W = (jnp.full((words,), _UNWRITTEN, jnp.uint32) for _ in range(2))
        return cls(x_TD, moments(x_TD), cleared_W, used_W)


def moments(x_TD: jax.Array) -> jax.Array:
    """See `Stream.moments_TN2`. They are added up in an order of their own: XLA's may depend on T."""
    x_TNH = x_TD.astype(jnp.float32).reshape(x_TD.shape[0], -1, PANEL)
    columns = [x_TNH[..., i] for i in range(PANEL)]
    mean_TN = _sum(columns) / PANEL
    return jnp.stack((mean_TN, _sum([jnp.square(each - mean_TN) for each in columns])), axis=-1)


def _sum(terms: list[jax.Array]) -> jax.Array:
    """Of a power of two of terms, in pairs."""
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[0::2], terms[1::2], strict=True)]
    return terms[0]


class Workspace(NamedTuple):
    """The layout of a workspace: word offsets of its parts."""

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
        """The moments of `x`, float32 [T, N, 2]."""
        return self.hidden + self.rows * self.mlp_width // 2

    @property
    def words(self) -> int:
        """The size of a workspace."""
        return self.moments + self.rows * self.width // PANEL * 2
