"""A norm that the product after it computes."""

import dataclasses

import jax

from pallas_kernels.partial_sum import PartialSum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RowNorm:
    """The RMSNorm of the sum of a row and some terms, still to be computed; `add_norm` says what it is."""

    x: jax.Array  # [..., D]: all of its numbers are the row
    terms: PartialSum | None  # [1, D]; if None, the sum is x itself
    scale_D: jax.Array  # of any floating dtype
    epsilon: float = dataclasses.field(metadata={"static": True})

    @property
    def normed(self) -> jax.ShapeDtypeStruct:
        """The shape and the dtype of the norm, [T, D]."""
        D = self.x.shape[-1]
        return jax.ShapeDtypeStruct((self.x.size // D, D), self.x.dtype)
