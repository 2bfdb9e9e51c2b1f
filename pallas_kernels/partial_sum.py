"""A sum that a product leaves unfinished: the next operation finishes it while reading it."""

import dataclasses
from functools import reduce
from operator import add

import jax
import jax.numpy as jnp

_MANY = 256  # tokens from which on devices share the work of adding (not measured yet)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PartialSum:
    """A sum [T, O] that is still in pieces:

        total[t] = Σ_x weights[t, x] · (bias[bias_rows[t, x]] + Σ_j parts[j, rows[t, x]])

    A term adds nothing, whatever its weight, if its row is negative or its row of the bias does not exist. The rows of
    all other terms must exist.
    """

    parts_JAO: jax.Array  # float32: J pieces of each of A rows
    rows_TX: jax.Array | None = None  # int32; None: X = 1 and token t has row t
    weights_TX: jax.Array | None = None  # float32; None: 1
    bias_EO: jax.Array | None = None  # of any floating dtype; None: 0
    bias_rows_TX: jax.Array | None = None  # int32; None: row 0. Only with a bias
    # Axes of the mesh whose devices have other terms of the sum, under `shard_map`; and in which of their boxes kernels
    # exchange these (see `peers`): sums that are exchanged one after the other must take turns.
    over: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    box: int = dataclasses.field(default=0, metadata={"static": True})
    # Devices form groups of this many, by rank: all of a group have parts of the same terms, and its first device adds
    # the terms' biases. (The bias of a sum without rows is added after the devices' parts.)
    sharers: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def num_terms(self) -> int:
        """X: terms per token."""
        return 1 if self.rows_TX is None else self.rows_TX.shape[1]

    def total(self) -> jax.Array:
        """The sum [T, O], float32, of the pieces in ascending order: XLA's own may depend on the number of tokens."""
        if self.over:
            return self.gathered().total()
        if self.rows_TX is None:
            present_TX, y_TXO = jnp.ones((self.parts_JAO.shape[1], 1), bool), reduce(add, self.parts_JAO)[:, None]
        else:
            present_TX = self.rows_TX >= 0
            y_TXO = reduce(add, self.parts_JAO[:, jnp.where(present_TX, self.rows_TX, 0)])
        if self.bias_EO is not None:
            bias_rows: jax.Array | int = 0
            if self.bias_rows_TX is not None:
                present_TX &= (self.bias_rows_TX >= 0) & (self.bias_rows_TX < self.bias_EO.shape[0])
                bias_rows = jnp.where(present_TX, self.bias_rows_TX, 0)
            y_TXO += self.bias_EO[bias_rows].astype(jnp.float32)
        if self.weights_TX is not None:
            y_TXO *= self.weights_TX[..., None]
        return jnp.sum(jnp.where(present_TX[..., None], y_TXO, 0), axis=1)

    def across(self, axes: tuple[str, ...], box: int) -> "PartialSum":
        """The sum over the devices along some axes of a mesh, each of which has a part of the terms.

        The bias of a sum without rows is the same on all devices, and added once; otherwise see `sharers`.
        """
        return dataclasses.replace(self, over=axes, box=box) if axes else self

    @property
    def is_plain(self) -> bool:
        """Whether token t has row t alone, as it is."""
        return self.rows_TX is None and self.weights_TX is None and self.bias_rows_TX is None

    def _own(self) -> "PartialSum":
        """What this device adds to the sum."""
        bias_EO = self.bias_EO
        if self.sharers > 1 and bias_EO is not None:
            bias_EO = jnp.where(jax.lax.axis_index(self.over) % self.sharers == 0, bias_EO, 0)
        return dataclasses.replace(self, over=(), sharers=1, bias_EO=bias_EO)

    def gathered(self) -> "PartialSum":
        """The same sum, with nothing left on other devices.

        The devices' parts become the pieces, in the order of their ranks. So all devices get the same bits, and no
        order of NCCL's has an effect.
        """
        if not self.over:
            return self
        bias_EO = self.bias_EO if self.is_plain else None
        own_TO = reduce(add, self.parts_JAO) if self.is_plain else self._own().total()
        num_devices, T = jax.lax.axis_size(self.over), own_TO.shape[0]
        if num_devices == 2 or T < _MANY or T % num_devices:
            return PartialSum(jax.lax.all_gather(own_TO, self.over), bias_EO=bias_EO)
        # Each device adds up some of the tokens: all of them at every device would be as much traffic as devices.
        parts_JTO = jax.lax.all_to_all(own_TO.reshape(num_devices, -1, own_TO.shape[1]), self.over, 0, 0)
        total_TO = jax.lax.all_gather(reduce(add, parts_JTO), self.over, tiled=True)
        return PartialSum(total_TO[None], bias_EO=bias_EO)
