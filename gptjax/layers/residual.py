"""The residual stream, which every block of a transformer reads and adds to."""

import dataclasses

import jax

from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.peers import Peers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Residual:
    """A residual stream, and an update that is still to be added to it.

    The next norm reads the stream from memory anyway and adds the update in passing, so an update costs no extra pass
    over the stream.
    """

    x_BTD: jax.Array
    pending: PartialSum | None = None  # [B · T, D]
    peers: Peers | None = None  # how kernels add up an update over the devices of a mesh; None: XLA does

    def plus(self, update: PartialSum) -> "Residual":
        """The stream with `update` pending. An update that was pending already is added first."""
        return Residual(self.total(), update, self.peers)

    def settled(self, sum_BTD: jax.Array) -> "Residual":
        """The stream with everything added, which was computed elsewhere."""
        return Residual(sum_BTD, peers=self.peers)

    def total(self) -> jax.Array:
        """The stream with everything added, [B, T, D]; half precision rounds the update before it is added."""
        if self.pending is None:
            return self.x_BTD
        return self.x_BTD + self.pending.total().astype(self.x_BTD.dtype).reshape(self.x_BTD.shape)
