"""A model's weights over the devices of a mesh: how each is divided, and how they get there.

The array of a divided weight is its devices' parts one after another, which is not always the checkpoint's matrix:
each device has its own query, key and value heads together (and key and value heads that devices share are there
several times), its own gates and ups together, and zeros where the last parts are filled up.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.axes import GATE_UP, QKV_HEADS
from gptjax.checkpoints.weights import flatten, owned
from gptjax.config import ModelConfig
from gptjax.layers.cache import KVCache
from gptjax.models.packing import is_kernel
from gptjax.models.params import Params, abstract_params, random_leaf
from gptjax.models.registry import Model, build
from gptjax.sharding.share import Share
from pallas_kernels import dispatch, matvec, moe
from pallas_kernels.formats import is_packed
from pallas_kernels.formats.mxfp4 import MXFP4
from pallas_kernels.peers import Mailboxes, can_exchange

Path = tuple[str, ...]
# The letter of `sharding.share.RULES` that an axis of a weight goes by. (A product of axes goes by its first factor.)
_LETTERS = {"NH": "N", "RH": "N", "2F": "F"}


def divided(model: Model, share: Share) -> Model:
    """The model as one device of the share's mesh runs it."""
    return model.clone(share=share)


def apply(
    model: Model, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array, cache: KVCache | None = None
) -> tuple[jax.Array, KVCache | None]:
    """`model.apply` on all devices of the model's mesh; see `Decoder.__call__`. B must be a multiple of `data`."""
    share = _share(model)
    rows = share.by_row
    specs = None if cache is None else share.cache_specs(cache)

    def run(params: Params, tokens_BT: jax.Array, positions_BT: jax.Array, cache: KVCache | None) -> Any:
        return model.apply({"params": params}, tokens_BT, positions_BT, cache)

    in_specs = (weight_specs(model, params), rows, rows, specs)
    found: tuple[jax.Array, KVCache | None] = share.run(run, in_specs, (rows, specs))(
        params, tokens_BT, positions_BT, cache
    )
    return found


def head(model: Model, params: Params, hidden: jax.Array) -> jax.Array:
    """The model's method `head` on all devices of its mesh, on rows [B, ..., D] as `apply` returns them."""
    share = _share(model)
    rows = share.by_row

    def run(params: Params, hidden: jax.Array) -> Any:
        return model.apply({"params": params}, hidden, method="head")

    logits: jax.Array = share.run(run, (weight_specs(model, params), rows), rows)(params, hidden)
    return logits


def mailboxes(model: Model) -> Mailboxes | None:
    """The mailboxes through which kernels add up rows over the devices of the model's mesh; None if XLA does it."""
    share, width = model.own, model.config.width
    axes, of_experts = share.axes("N"), share.axes("E") if share.num_experts else ()
    # Both sums of a layer must go over the same devices, or one of these could be ahead by two.
    if axes != of_experts + share.axes("F") or not isinstance(share.mesh, Mesh):
        return None
    if model.dtype != jnp.bfloat16 or dispatch.wanted(model.implementation) != dispatch.MOSAIC:
        return None
    return Mailboxes(share.mesh, axes, width) if can_exchange(share.mesh, axes, width) else None


def alike(model: Model) -> Model:
    """The model for calls whose rows are not divided: all devices along the axis `data` compute the same."""
    share = model.share
    return model if share is None else divided(model, dataclasses.replace(share, divides_rows=False))


def _share(model: Model) -> Share:
    if model.share is None or model.share.mesh is None:
        raise ValueError("this model is for one device: use model.apply")
    return model.share


def weight_specs(model: Model, params: Params) -> Params:
    """How each array of the weights, in any layout, is divided among the devices."""
    share, logical = _share(model), logical_axes(model.config)

    def spec(path: Any, leaf: Any) -> Any:
        names = _axes_of(logical, tuple(key.key for key in path), leaf)
        found = P(*(share.axes(_LETTERS.get(name, name)) or None for name in names))
        return jax.tree.map(lambda _: found, leaf)

    return jax.tree_util.tree_map_with_path(spec, params, is_leaf=is_packed)


def _axes_of(logical: dict[Path, tuple[str, ...]], path: Path, leaf: Any) -> tuple[str, ...]:
    """The logical axes of a weight. Packed kernels have the axis last that products sum over."""
    names = logical[_of_first_block(path)]
    return (*names[:-2], names[-1], names[-2]) if is_packed(leaf) and is_kernel(path) else names


def _of_first_block(path: Path) -> Path:
    return ("block_0", *path[1:]) if path[0].startswith("block_") else path


@lru_cache(maxsize=16)
def logical_axes(config: ModelConfig) -> dict[Path, tuple[str, ...]]:
    """The axes of each weight as its module declares them, of the first block for all."""
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    single = build(config.with_one_layer())
    boxed = jax.eval_shape(lambda: single.init(jax.random.key(0), tokens_BT, tokens_BT))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata))
    return {tuple(key.key for key in path): leaf.names for path, leaf in leaves}


def putter(model: Model, undivided: Model) -> Callable[[Path, np.ndarray], jax.Array]:
    """Puts a weight's array onto the devices, each of which gets its part only.

    Args:
      undivided: the same model for one device.

    Returns:
      A function of an array's path, as of `checkpoints.weights.flatten`, and the whole array.
    """
    whole = abstract_params(undivided)
    own, specs = flatten(abstract_params(model)), flatten(weight_specs(model, whole))
    share, names = _share(model), _names_of_axes(model, whole)

    def put(path: Path, array: np.ndarray) -> jax.Array:
        spec, part, axes = specs[path], own[path].shape, names[path]
        parts = [_parts(share, entry) for entry in (*spec, *[None] * (array.ndim - len(spec)))]
        shape = tuple(size * count for size, count in zip(part, parts, strict=True))

        def of_device(index: Any) -> np.ndarray:
            found = array
            for axis, (each, size) in enumerate(zip(index, part, strict=True)):
                if parts[axis] > 1:
                    rank, own_range = (each.start or 0) // size, (array.shape[axis], size)
                    ranges = list(_ranges(model.config, share, axes[axis], *own_range, rank))
                    found = _taken(found, axis, ranges)
            return found

        assert share.mesh is not None
        return owned(jax.make_array_from_callback(shape, NamedSharding(share.mesh, spec), of_device))

    return put


def gathered(model: Model, undivided: Model, params: Params) -> Iterator[tuple[Path, np.ndarray]]:
    """The other way round: whole arrays, by their paths, on the host, one at a time. So they can be saved.

    Args:
      undivided: the same model for one device.
      params: as `putter` placed them, not repacked, on devices of this process.
    """
    whole = abstract_params(undivided)
    share, names, shapes, own = _share(model), _names_of_axes(model, whole), flatten(whole), abstract_params(model)
    parts = flatten(own)
    for path, leaf in flatten(params).items():
        array = np.asarray(leaf)
        for axis, (size, part) in enumerate(zip(shapes[path].shape, parts[path].shape, strict=True)):
            count = leaf.shape[axis] // part
            if count > 1:
                name = names[path][axis]
                ranges = [_ranges(model.config, share, name, size, part, rank) for rank in range(count)]
                array = _joined(array, axis, size, ranges)
        yield path, array


def _names_of_axes(model: Model, whole: Params) -> dict[Path, tuple[str, ...]]:
    """The logical axes of each array by its path, as of `checkpoints.weights.flatten`."""
    logical, found = logical_axes(model.config), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(whole, is_leaf=is_packed):
        names = tuple(key.key for key in path)
        arrays = [(*names, *each) for each in flatten(leaf)] if is_packed(leaf) else [names]
        found.update(dict.fromkeys(arrays, _axes_of(logical, names, leaf)))
    return found


def _named(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of the mesh in an entry of a partition."""
    return (entry,) if isinstance(entry, str) else entry or ()


def _parts(share: Share, entry: str | tuple[str, ...] | None) -> int:
    return 1 if share.mesh is None else math.prod(share.mesh.shape[name] for name in _named(entry))


def _ranges(
    config: ModelConfig, share: Share, axis: str, whole: int, own: int, rank: int
) -> Iterator[tuple[int, int, int]]:
    """The start, the end and the filled length of each range of an axis that a device has."""
    if axis == QKV_HEADS:
        heads, kv_heads, n, k = config.num_heads, config.num_kv_heads, share.num_heads, share.num_kv_heads
        H, first_kv = whole // (heads + 2 * kv_heads), rank * n * kv_heads // heads
        for start, count in ((rank * n, n), (heads + first_kv, k), (heads + kv_heads + first_kv, k)):
            yield start * H, (start + count) * H, count * H
        return
    pieces = 2 if axis == GATE_UP else 1
    size, length = whole // pieces, own // pieces
    for piece in range(pieces):
        start, end = (min(at * length, size) for at in (rank, rank + 1))
        yield piece * size + start, piece * size + end, length


def _taken(array: np.ndarray, axis: int, ranges: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Ranges of an axis one after another, each filled with zeros to its length."""
    found = []
    for start, end, length in ranges:
        part = array[(slice(None),) * axis + (slice(start, end),)]
        missing = [(0, length - (end - start) if each == axis else 0) for each in range(array.ndim)]
        found.append(np.pad(part, missing) if end - start < length else part)
    return found[0] if len(found) == 1 else np.concatenate(found, axis)


def _joined(array: np.ndarray, axis: int, size: int, ranges: Iterable[Iterable[tuple[int, int, int]]]) -> np.ndarray:
    """An axis as it was before each rank took its ranges of it. Of what several have, the last one's is taken."""
    array, offset = np.moveaxis(array, axis, 0), 0
    found = np.empty((size, *array.shape[1:]), array.dtype)
    for start, end, length in itertools.chain.from_iterable(ranges):
        found[start:end] = array[offset : offset + end - start]
        offset += length
    return np.moveaxis(found, 0, axis)


def random_params(model: Model, seed: int = 0) -> Params:
    """Like `params.random_params`, each device making its own parts. They are not those of one device's model."""
    share, shapes = _share(model), abstract_params(model)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=is_packed)
    specs: list[Any] = jax.tree.leaves(weight_specs(model, shapes), is_leaf=is_packed)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    makers: dict[Any, Callable[[jax.Array], Any]] = {}  # compiled once for all layers
    found = []
    for key, (path, leaf), spec in zip(keys, leaves, specs, strict=True):
        name, one = path[-1].key, _first(spec)
        kind = name, one, jax.tree.structure(leaf), *((each.shape, each.dtype) for each in jax.tree.leaves(leaf))
        if kind not in makers:
            over = tuple(axis for entry in one for axis in _named(entry))
            makers[kind] = jax.jit(share.run(partial(_random_part, name=name, leaf=leaf, over=over), P(), spec))
        found.append(makers[kind](key))
    return jax.tree.unflatten(tree, found)


def _random_part(key: jax.Array, *, name: str, leaf: Any, over: tuple[str, ...]) -> Any:
    return random_leaf(jax.random.fold_in(key, jax.lax.axis_index(over)) if over else key, name, leaf)


def _first(spec: Any) -> P:
    """How a weight is divided: a packed one's arrays are all divided so."""
    first: P = jax.tree.leaves(spec, is_leaf=lambda leaf: isinstance(leaf, P))[0]
    return first


def repacked(model: Model, params: Params) -> Params:
    """Like `params.repacked`, of each device's parts."""
    if jnp.dtype(model.dtype) != jnp.bfloat16:
        return params
    share, own = _share(model), abstract_params(model)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)
    shapes, specs = (jax.tree.leaves(each, is_leaf=is_packed) for each in (own, weight_specs(model, params)))
    packers: dict[Any, Callable[[Any], Any]] = {}  # compiled once for all layers
    found = []
    for (path, leaf), shape, spec in zip(leaves, shapes, specs, strict=True):
        pack = None
        if isinstance(leaf, MXFP4) and path[-1].key != "token_embedding":
            pack = (moe if leaf.ndim == 3 else matvec).repacking(leaf, shape.shape, model.implementation)
        if pack is not None:
            one = _first(spec)
            if (pack, one) not in packers:
                packers[pack, one] = jax.jit(share.run(pack, (spec,), one))
            fitting = jax.block_until_ready(packers[pack, one](leaf))
            jax.tree.map(lambda array: array.delete(), leaf)
            leaf = fitting
        found.append(leaf)
    return jax.tree.unflatten(tree, found)
