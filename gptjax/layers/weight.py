"""Declares weights, as numbers or packed in MXFP4, and multiplies by them."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.formats.mxfp4 import BLOCK, MXFP4
from pallas_kernels.matvec import FEW, matvec
from pallas_kernels.partial_sum import PartialSum

Weight = jax.Array | MXFP4
STANDARD_DEVIATION = 0.02
_SCALE = 120  # 2^-7, which gives random codes a standard deviation of 0.023


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
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    *,
    param_dtype: DTypeLike,
    mxfp4: bool,
    summed: int = -2,
) -> Weight:
    """Declares a matrix of the module, or several.

    Args:
      shape, axes: of the numbers: [..., in, out] of a product, [V, D] of an embedding.
      mxfp4: whether it is packed.
      summed: the axis that its product sums over, along which MXFP4's blocks must lie. If that is not the last axis,
        the packed weight has its last two axes swapped, [..., out, in].
    """
    if not mxfp4:
        return array(module, name, nn.initializers.normal(STANDARD_DEVIATION), shape, axes, param_dtype)
    if summed == -2:
        shape, axes = (*shape[:-2], shape[-1], shape[-2]), (*axes[:-2], axes[-1], axes[-2])
    packed: MXFP4
    if module.is_initializing():
        packed = module.param(name, partial(_boxed_mxfp4, shape=shape, axes=axes))
    else:
        packed = module.get_variable("params", name)  # `param` would check the shape, and refuse a repacked one
    return packed


def numbers(weight: Weight, dtype: DTypeLike) -> jax.Array:
    """A weight's numbers, unpacked if need be, in its own order of axes."""
    return weight.dequantize(dtype) if isinstance(weight, MXFP4) else weight.astype(dtype)


def product(
    x: jax.Array, kernel: Weight, bias: jax.Array | None, dtype: DTypeLike, implementation: str = "auto"
) -> PartialSum:
    """[..., in] · [in, out], or packed [out, in], plus a bias: [T, out] float32, with all T tokens in one axis.

    Operands are of `dtype`.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    if isinstance(kernel, jax.Array) and rows.shape[0] <= FEW:
        return matvec(rows, kernel.astype(dtype), bias, implementation=implementation)
    contract = (((1,), (1 if isinstance(kernel, MXFP4) else 0,)), ((), ()))
    y = jax.lax.dot_general(rows, numbers(kernel, dtype), contract, preferred_element_type=jnp.float32)
    return PartialSum(y[None], bias_EO=None if bias is None else bias[None])


def embed(embedding_VD: Weight, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rows of an embedding, [...] -> [..., D]."""
    return numbers(embedding_VD[ids], dtype)


def unembed(hidden: jax.Array, embedding_VD: Weight, dtype: DTypeLike) -> jax.Array:
    """Logits, [..., D] -> [..., V] float32."""
    embedding = numbers(embedding_VD, dtype)
    return jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)


@partial(jax.jit, static_argnums=1)
def random_mxfp4(key: jax.Array, shape: tuple[int, ...]) -> MXFP4:
    """Random codes, all with the same scale."""
    scales_shape = (*shape[:-1], shape[-1] // BLOCK)
    blocks = jax.random.bits(key, (*scales_shape, BLOCK // 2), jnp.uint8)
    return MXFP4(blocks, jnp.full(scales_shape, _SCALE, jnp.uint8))


def _boxed_mxfp4(key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...]) -> Any:
    packed = random_mxfp4(key, shape)
    return MXFP4(
        blocks=nn.LogicallyPartitioned(packed.blocks, names=(*axes, None)),
        scales=nn.LogicallyPartitioned(packed.scales, names=axes),
    )
