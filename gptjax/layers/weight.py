"""Declares weights, and multiplies by them, as numbers or packed."""

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeGuard

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import dispatch, same_bits
from pallas_kernels.formats import is_packed
from pallas_kernels.formats.ggml.fragments import QuantizedFragments
from pallas_kernels.formats.ggml.weight import Quantized, Rows
from pallas_kernels.formats.mxfp4 import MXFP4
from pallas_kernels.matmul import matmul
from pallas_kernels.matvec import (
    FEW,
    PACKED_FEW,
    Fragments,
    RowNorm,
    matvec,
    normed_gated,
    normed_matvec,
    packed_gated,
    packed_matvec,
    takes_gated,
    takes_normed,
    takes_normed_gated,
)
from pallas_kernels.partial_sum import PartialSum

Matrix = MXFP4 | Quantized | Fragments  # packed
Embedding = jax.Array | MXFP4 | Quantized | QuantizedFragments  # or MXFP4Fragments, of a head alone
Weight = jax.Array | Matrix | Rows[Quantized] | Rows[QuantizedFragments]
STANDARD_DEVIATION = 0.02
AT_ONCE = 1 << 18  # numbers of a packed weight that a CPU unpacks at a time


def array(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    param_dtype: DTypeLike,
) -> jax.Array:
    """Declares an array of the module, with the logical axes that its sharding follows from."""
    if not module.is_initializing():
        found: Any = module.get_variable("params", name)
        if getattr(found, "shape", None) == shape:
            return found  # Flax would trace the initialiser, only to compare the shapes
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
    if isinstance(kernel, jax.Array):
        # There is no Triton kernel for many rows: XLA's is as good.
        how = dispatch.AUTO if implementation == dispatch.TRITON else implementation
        y = matmul(rows, kernel.astype(dtype), implementation=how)
    else:
        parts: Sequence[Matrix] = kernel.parts if isinstance(kernel, Rows) else (kernel,)
        if _is_fragments(parts) and rows.shape[0] <= PACKED_FEW:
            return packed_matvec(rows, parts, bias, implementation=implementation)
        products = [_packed_product(rows, part, dtype) for part in parts]
        y = products[0] if len(products) == 1 else jnp.concatenate(products, axis=1)
    return PartialSum(y[None], bias_EO=None if bias is None else bias[None])


def gated_product(x: jax.Array, kernel: Weight, dtype: DTypeLike, implementation: str = "auto") -> jax.Array | None:
    """silu(x · gate) · (x · up), [..., out / 2] of `dtype`, for a kernel of gate and then up, packed and without bias.

    Both products are rounded to `dtype` first. None if no kernel does it at once.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    parts = _fragments(kernel)
    if not parts or not takes_gated(rows, parts, implementation=implementation):
        return None
    return packed_gated(rows, parts).reshape(*x.shape[:-1], -1)


def normed_product(
    norm: RowNorm, kernel: Weight, bias: jax.Array | None, implementation: str = "auto"
) -> tuple[jax.Array, PartialSum] | None:
    """The sum that a norm is of, and `product` of the norm; None if no kernel does both."""
    parts = _fragments(kernel)
    if not parts or not takes_normed(norm, parts, implementation=implementation):
        return None
    return normed_matvec(norm, parts, bias)


def normed_gated_product(
    norm: RowNorm, kernel: Weight, implementation: str = "auto"
) -> tuple[jax.Array, jax.Array] | None:
    """The sum that a norm is of, and `gated_product` of the norm; None if no kernel does it all."""
    parts = _fragments(kernel)
    if not parts or not takes_normed_gated(norm, parts, implementation=implementation):
        return None
    x, h = normed_gated(norm, parts)
    return x, h.reshape(*x.shape[:-1], -1)


def _fragments(kernel: Weight) -> Sequence[Fragments]:
    """A kernel's parts, if all of them are repacked."""
    if isinstance(kernel, jax.Array):
        return ()
    parts: Sequence[Matrix] = kernel.parts if isinstance(kernel, Rows) else (kernel,)
    return parts if _is_fragments(parts) else ()


def _is_fragments(parts: Sequence[Matrix]) -> TypeGuard[Sequence[Fragments]]:
    return all(isinstance(part, Fragments) for part in parts)


def _packed_product(rows: jax.Array, packed: Matrix, dtype: DTypeLike) -> jax.Array:
    """[T, in] · packed [out, in]: [T, out] float32."""
    if isinstance(packed, Fragments):
        return _as_a_whole(rows, packed, dtype=dtype)
    how = partial(_in_parts, dtype=dtype), partial(_as_a_whole, dtype=dtype)
    y: jax.Array = jax.lax.platform_dependent(rows, packed, cpu=how[0], default=how[1])
    return y


def _as_a_whole(rows: jax.Array, packed: Matrix, *, dtype: DTypeLike) -> jax.Array:
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(rows, packed.dequantize(dtype), contract, preferred_element_type=jnp.float32)


def _in_parts(rows: jax.Array, packed: MXFP4 | Quantized, *, dtype: DTypeLike) -> jax.Array:
    """Unpacks some outputs at a time. The last ones may be computed twice.

    Unpacking depends on nothing, so XLA's scheduler for CPUs would begin with that of all layers, and have all numbers
    of a model in memory at once. It takes nothing out of a loop. Small parts also stay in the cache: a step of
    SmolLM2 takes less than half as long.
    """
    count = packed.shape[0]
    step = min(count, max(1, AT_ONCE // packed.shape[-1]))

    def multiply(index: jax.Array, y: jax.Array) -> jax.Array:
        start = jnp.minimum(index * step, count - step)
        part = jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, start, step), packed)
        part_TO = same_bits.product_of_rows_on_cpu(rows, part.dequantize(dtype))
        return jax.lax.dynamic_update_slice_in_dim(y, part_TO, start, axis=1)

    # All of it is overwritten; zeros would depend on nothing, and be there for all layers at once, too.
    y = jnp.broadcast_to(rows[:, :1].astype(jnp.float32), (len(rows), count))
    y = jax.lax.fori_loop(0, -(-count // step), multiply, y)
    return y


def embed(embedding_VD: Embedding, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rows of an embedding, [...] -> [..., D]."""
    if isinstance(embedding_VD, QuantizedFragments):
        return embedding_VD.rows(ids, dtype)
    return numbers(embedding_VD[ids], dtype)


def unembed(hidden: jax.Array, embedding_VD: Embedding, dtype: DTypeLike, implementation: str = "auto") -> jax.Array:
    """Logits, [..., D] -> [..., V] float32."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    # Not every head fits its kernel, and there is no Triton kernel.
    how = implementation if implementation == dispatch.XLA else dispatch.AUTO
    if isinstance(embedding_VD, jax.Array):
        embedding = embedding_VD.astype(dtype)
        logits = (
            matvec(rows, embedding, transposed=True, implementation=how).total()
            if len(rows) <= FEW
            else same_bits.head(rows, embedding)
        )
    elif isinstance(embedding_VD, Fragments) and len(rows) <= PACKED_FEW:
        logits = packed_matvec(rows.astype(dtype), [embedding_VD], implementation=how).total()
    else:
        logits = _packed_product(rows, embedding_VD, dtype)
    return logits.reshape(*hidden.shape[:-1], -1)
