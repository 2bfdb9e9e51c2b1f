"""Matrix product with a weight stored [in, out]."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptjax.layers.observe import observe


class Linear(nn.Module):
    """`x · kernel + bias`, accumulated in float32 and rounded once, to `dtype`.

    The kernel is [in, out], as Flax and GPT-2's Conv1D have it.
    """

    features: int
    axes: tuple[str, str]  # logical axes of the kernel: in, out
    dtype: DTypeLike
    param_dtype: DTypeLike
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        kernel_init = nn.with_logical_partitioning(nn.initializers.normal(0.02), self.axes)
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features), self.param_dtype)
        y = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype), preferred_element_type=jnp.float32)
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[1:])
            y = y + self.param("bias", bias_init, (self.features,), self.param_dtype).astype(jnp.float32)
        return observe(self, "output", y.astype(self.dtype))
