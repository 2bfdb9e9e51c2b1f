"""Declares weights, and multiplies by them, as numbers or packed."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.formats import is_packed
from pallas_kernels.formats.ggml.weight import Quantized, Rows
from pallas_kernels.formats.mxfp4 import MXFP4
from pallas_kernels.matvec import FEW, matvec
from pallas_kernels.partial_sum import PartialSum

Embedding = jax.Array | MXFP4 | Quantized
Weight = Embedding | Rows  # experts may also be MXFP4Fragments
STANDARD_DEVIATION = 0.02


def array(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    param_dtype: DTypeLike,
) -> jax.Array:
    """Declares an array of the module, with the logical axes that its sharding follows from."""
    value: jax.Array = module.param(name, nn.with_logical_partitioning(init, axes), shape, param_dtype)
    return value


def weight(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], *, param_dtype: DTypeLike
) -> Any:
    """Declares a matrix of the module, or several, as numbers. In the parameters it may be packed: any `Weight`.

    Args:
      shape, axes: of the numbers: [..., in, out] of a product, [V, D] of an embedding. Packed, the axis that a product
        sums over is the last one, so a kernel is [..., out, in]. Which weights are packed: `gptjax.models.packing`.
    """
    if not module.is_initializing():
        found: Any = module.get_variable("params", name)
        if is_packed(found):
            return found
    return array(module, name, nn.initializers.normal(STANDARD_DEVIATION), shape, axes, param_dtype)


def numbers(weight: Weight, dtype: DTypeLike) -> jax.Array:
    """A weight's numbers, unpacked if need be, in its own order of axes."""
    return weight.astype(dtype) if isinstance(weight, jax.Array) else weight.dequantize(dtype)


def product(
    x: jax.Array, kernel: Weight, bias: jax.Array | None, dtype: DTypeLike, implementation: str = "auto"
) -> PartialSum:
    """[..., in] · [in, out], or packed [out, in], plus a bias: [T, out] float32, with all T tokens in one axis.

    Operands are of `dtype`.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    if isinstance(kernel, jax.Array) and rows.shape[0] <= FEW:
        return matvec(rows, kernel.astype(dtype), bias, implementation=implementation)
    contract = (((1,), (0 if isinstance(kernel, jax.Array) else 1,)), ((), ()))
    parts = kernel.parts if isinstance(kernel, Rows) else (kernel,)
    products = [
        jax.lax.dot_general(rows, numbers(part, dtype), contract, preferred_element_type=jnp.float32) for part in parts
    ]
    y = products[0] if len(products) == 1 else jnp.concatenate(products, axis=1)
    return PartialSum(y[None], bias_EO=None if bias is None else bias[None])


def embed(embedding_VD: Embedding, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rows of an embedding, [...] -> [..., D]."""
    return numbers(embedding_VD[ids], dtype)


def unembed(hidden: jax.Array, embedding_VD: Embedding, dtype: DTypeLike) -> jax.Array:
    """Logits, [..., D] -> [..., V] float32."""
    embedding = numbers(embedding_VD, dtype)
    return jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)
