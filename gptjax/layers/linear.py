"""Matrix product with a weight and a bias."""

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from gptjax.layers.observe import observe_made
from gptjax.layers.weight import product, weight
from pallas_kernels.partial_sum import PartialSum


class Linear(nn.Module):
    """`x · kernel + bias`, accumulated in float32 and rounded once, to `dtype`.

    The kernel is [in, out], as Flax and GPT-2's Conv1D have it; packed in MXFP4 it is [out, in].
    """

    features: int
    axes: tuple[str, str]  # logical axes of the kernel: in, out
    dtype: DTypeLike
    param_dtype: DTypeLike
    use_bias: bool = True
    mxfp4: bool = False  # the kernel is packed
    implementation: str = "auto"

    @nn.compact
    def parts(self, x: jax.Array) -> PartialSum:
        """[..., in] -> [T, out], T tokens in a row, with the last sums left to whoever reads it."""
        shape = (x.shape[-1], self.features)
        kernel = weight(self, "kernel", shape, self.axes, param_dtype=self.param_dtype, mxfp4=self.mxfp4)
        bias = None
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[1:])
            bias = self.param("bias", bias_init, (self.features,), self.param_dtype)
        parts = product(x, kernel, bias, self.dtype, self.implementation)
        observe_made(self, "output", lambda: self._summed(parts, x))
        return parts

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        return self._summed(self.parts(x), x)

    def _summed(self, parts: PartialSum, x: jax.Array) -> jax.Array:
        return parts.total().astype(self.dtype).reshape(*x.shape[:-1], self.features)
