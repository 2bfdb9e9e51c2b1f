"""Matrix product with a weight and a bias."""

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from gptjax.layers.norm import Normed
from gptjax.layers.observe import observe_lazy
from gptjax.layers.residual import Residual
from gptjax.layers.weight import Weight, array, gated_product, normed_gated_product, normed_product, product, weight
from pallas_kernels import same_bits
from pallas_kernels.partial_sum import PartialSum


class Linear(nn.Module):
    """`x · kernel + bias`, accumulated in float32 and rounded once, to `dtype`.

    The kernel is [in, out], as Flax and GPT-2's Conv1D have it; packed it is [out, in].
    """

    features: int
    axes: tuple[str, str]  # logical axes of the kernel: in, out
    dtype: DTypeLike
    param_dtype: DTypeLike
    use_bias: bool = True
    implementation: str = "auto"

    @nn.compact
    def weights(self, inputs: int) -> tuple[Weight, jax.Array | None]:
        """The kernel and the bias, for that many inputs."""
        shape = (inputs, self.features)
        kernel = weight(self, "kernel", shape, self.axes, param_dtype=self.param_dtype)
        if not self.use_bias:
            return kernel, None
        return kernel, array(self, "bias", nn.initializers.zeros_init(), shape[1:], self.axes[1:], self.param_dtype)

    def gated(self, x: jax.Array) -> jax.Array | None:
        """silu(gate) · up, [..., out / 2], of an output that is gate and then up; None if no kernel does it at once."""
        kernel, bias = self.weights(x.shape[-1])
        return gated_product(x, kernel, self.dtype, self.implementation) if bias is None else None

    def gated_after(self, normed: Normed) -> tuple[Residual, jax.Array] | None:
        """The residual with its pending update added, and `gated` of the norm of that; None likewise."""
        row, (kernel, bias) = normed.row(), self.weights(normed.shape[-1])
        found = None if row is None or bias is not None else normed_gated_product(row, kernel, self.implementation)
        return None if found is None else (normed.residual.settled(found[0]), found[1])

    def partial_sum_after(self, normed: Normed) -> tuple[Residual, PartialSum]:
        """The residual with its pending update added, and `partial_sum` of the norm of that."""
        row, (kernel, bias) = normed.row(), self.weights(normed.shape[-1])
        found = None if row is None else normed_product(row, kernel, bias, self.implementation)
        if found is not None:
            return normed.residual.settled(found[0]), found[1]
        residual, x_BTD = normed.finished()
        return residual, self.partial_sum(x_BTD)

    def partial_sum(self, x: jax.Array) -> PartialSum:
        """[..., in] -> [T, out] with all T tokens in one axis; whoever reads it finishes the sum."""
        kernel, bias = self.weights(x.shape[-1])
        y = product(x, kernel, bias, self.dtype, self.implementation)
        observe_lazy(self, "output", lambda: self._finished(y, x))
        return y

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        return self._finished(self.partial_sum(x), x)

    def _finished(self, y: PartialSum, x: jax.Array) -> jax.Array:
        return same_bits.rounded(y.total(), self.dtype).reshape(*x.shape[:-1], self.features)
