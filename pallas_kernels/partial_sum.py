"""What products leave unsummed, so that whoever reads it next sums it in passing."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PartialSum:
    """A sum [T, N] that is still in pieces:

        total[t] = Σ_x weights[t, x] · (bias[bias_rows[t, x]] + Σ_s parts[s, rows[t, x]])

    A term adds nothing, whatever its weight is, if its row is negative, or if there is no such row of the bias. The row
    of any other term must be there.
    """

    parts_SRN: jax.Array  # float32: S pieces of each of R rows
    rows_TX: jax.Array | None = None  # int32; None: X = 1 and token t has row t
    weights_TX: jax.Array | None = None  # float32; None: 1
    bias_EN: jax.Array | None = None  # of any floating dtype; None: 0
    bias_rows_TX: jax.Array | None = None  # int32; None: row 0. Only beside a bias

    @property
    def num_terms(self) -> int:
        """X: terms of a token."""
        return 1 if self.rows_TX is None else self.rows_TX.shape[1]

    def total(self) -> jax.Array:
        """The sum [T, N], float32."""
        if self.rows_TX is None:
            present_TX, y_TXN = jnp.ones((self.parts_SRN.shape[1], 1), bool), self.parts_SRN.sum(axis=0)[:, None]
        else:
            present_TX = self.rows_TX >= 0
            y_TXN = self.parts_SRN[:, jnp.where(present_TX, self.rows_TX, 0)].sum(axis=0)
        if self.bias_EN is not None:
            bias_rows: jax.Array | int = 0
            if self.bias_rows_TX is not None:
                present_TX &= (self.bias_rows_TX >= 0) & (self.bias_rows_TX < self.bias_EN.shape[0])
                bias_rows = jnp.where(present_TX, self.bias_rows_TX, 0)
            y_TXN += self.bias_EN[bias_rows].astype(jnp.float32)
        if self.weights_TX is not None:
            y_TXN *= self.weights_TX[..., None]
        return jnp.sum(jnp.where(present_TX[..., None], y_TXN, 0), axis=1)
