"""Matrix product with a weight and a bias."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptjax.layers.observe import observe
from gptjax.layers.weight import product, weight


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

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        shape = (x.shape[-1], self.features)
        kernel = weight(self, "kernel", shape, self.axes, param_dtype=self.param_dtype, mxfp4=self.mxfp4)
        y = product(x, kernel, self.dtype)
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[1:])
            y = y + self.param("bias", bias_init, (self.features,), self.param_dtype).astype(jnp.float32)
        return observe(self, "output", y.astype(self.dtype))
