"""Weights derived from a model's own declarations: shapes, random values, and the device's layout."""

import functools
import math
import operator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptjax.config import ModelConfig
from gptjax.errors import CheckpointError
from gptjax.layers.weight import STANDARD_DEVIATION
from gptjax.models.packing import is_kernel, overlaid, random_packed
from gptjax.models.registry import Model, build
from gptjax.sharding.share import Share
from pallas_kernels import matvec, moe
from pallas_kernels.formats import is_packed
from pallas_kernels.formats.ggml.weight import Quantized, Rows
from pallas_kernels.formats.mxfp4 import MXFP4

Params = dict[str, Any]  # nested; the leaves are arrays
_CHECKED = 1 << 22  # numbers at a time, to need little memory


def init_params(model: Model, key: jax.Array) -> Params:
    """Random weights, none of them packed."""
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    return nn.meta.unbox(model.init(key, tokens_BT, tokens_BT))["params"]


def random_params(model: Model, seed: int = 0) -> Params:
    """Random weights of the real shapes, made on the device one leaf at a time, for measuring without a checkpoint.

    The norms' scales are 1, as they roughly are in any model: if they were as small as the rest, biases would drown the
    differences between tokens, and all tokens would choose the same few experts, which is faster than a real model.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_params(model), is_leaf=is_packed)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        tree, [random_leaf(key, path[-1].key, leaf) for key, (path, leaf) in zip(keys, leaves, strict=True)]
    )


def random_leaf(key: jax.Array, name: str, leaf: Any) -> Any:
    """A weight of a leaf's shape and name: see `random_params`."""
    if is_packed(leaf):
        return random_packed(key, leaf)
    if name == "scale":
        return jnp.ones(leaf.shape, leaf.dtype)
    return _normal(key, leaf.shape, leaf.dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return STANDARD_DEVIATION * jax.random.normal(key, shape, dtype)


def abstract_params(model: Model) -> Params:
    """Shapes and dtypes of all weights, or of a device's share, as `jax.ShapeDtypeStruct`. Allocates nothing."""

    def typed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, model.param_dtype if floating else leaf.dtype)

    return jax.tree.map(typed, _float32_params(model.config, model.own.alone()))


@functools.lru_cache(maxsize=16)
def _float32_params(config: ModelConfig, share: Share) -> Params:
    """Traces a single block, since all are alike and tracing 24 takes most of a second."""
    single = build(config.with_one_layer(), share=share)
    params = jax.eval_shape(lambda: init_params(single, jax.random.key(0)))
    block = params.pop("block_0")
    return overlaid(config, params | {f"block_{layer}": block for layer in range(config.num_layers)})


def repacked(model: Model, params: Params) -> Params:
    """The weights in the layout that the device's kernels want. Deletes the originals of repacked weights.

    Only affects models in bfloat16, since only they have kernels for packed weights.
    """
    if jnp.dtype(model.dtype) != jnp.bfloat16:
        return params
    leaves, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)
    found = []
    for path, leaf in leaves:
        # Rows of an embedding that is not the head's matrix too are only looked up.
        looked_up = path[-1].key == "token_embedding" and (isinstance(leaf, MXFP4) or not model.config.tied_head)
        fitting = _repacked(leaf, model.implementation) if is_packed(leaf) and not looked_up else leaf
        if fitting is not leaf:
            jax.block_until_ready(fitting)
            jax.tree.map(lambda array: array.delete(), leaf)
        found.append(fitting)
    return jax.tree.unflatten(tree, found)


def _repacked(leaf: Any, implementation: str) -> Any:
    if isinstance(leaf, MXFP4) and leaf.ndim == 3:
        return moe.repacked(leaf, implementation)
    if not isinstance(leaf, Rows):
        return matvec.repacked(leaf, implementation)
    parts = [matvec.repacked(part, implementation) for part in leaf.parts]
    return leaf if any(map(operator.is_, parts, leaf.parts)) else Rows(tuple(parts))


def expanded(params: Params, dtype: DTypeLike) -> Params:
    """The weights with those in a GGUF file's types as numbers. Deletes the originals of these."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)
    found = []
    for path, leaf in leaves:
        if isinstance(leaf, Quantized | Rows):
            numbers = _expanded(leaf, dtype=jnp.dtype(dtype), turned=is_kernel(tuple(key.key for key in path)))
            jax.block_until_ready(numbers)
            jax.tree.map(lambda array: array.delete(), leaf)
            leaf = numbers
        found.append(leaf)
    return jax.tree.unflatten(tree, found)


@functools.partial(jax.jit, static_argnames=("dtype", "turned"))
def _expanded(weight: Quantized | Rows[Quantized], *, dtype: jnp.dtype, turned: bool) -> jax.Array:
    numbers = weight.dequantize(dtype)
    return numbers.T if turned else numbers


def check_float16(params: Params) -> None:
    """Raises `CheckpointError` if a packed weight has a number that float16 cannot hold.

    Its scales may all be finite: they are multiplied with codes, in float32. Other weights: `checkpoints.weights.cast`.
    """
    for path, leaf in weights_by_path(params).items():
        for part in leaf.parts if isinstance(leaf, Rows) else [leaf] if is_packed(leaf) else []:
            step = max(1, _CHECKED * part.shape[0] // part.size)
            for start in range(0, part.shape[0], step):
                if not _is_finite_in_float16(part[start : start + step]):
                    raise CheckpointError(
                        f"{'/'.join(path)} has values beyond float16's 65504; use bfloat16 or float32"
                    )


@jax.jit
def _is_finite_in_float16(packed: MXFP4 | Quantized) -> jax.Array:
    return jnp.isfinite(packed.dequantize(jnp.float16)).all()


def weights_by_path(params: Params) -> dict[tuple[str, ...], Any]:
    """Every weight by path; a packed weight is a single entry, though it may be several arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_packed)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def num_params(model: Model) -> int:
    """The number of the model's parameters, packed or not, on all devices."""
    return sum(
        math.prod(leaf.shape)
        for leaf in weights_by_path(_float32_params(model.config, Share.whole(model.config))).values()
    )
