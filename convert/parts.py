"""The weights of a source as they will be written: unchanged, cast or rounded to MXFP4."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert import filling, matching, mxfp4
from gptjax.checkpoints import weights
from gptjax.checkpoints.checkpoint import TensorSource
from gptjax.checkpoints.manifest import Manifest
from gptjax.checkpoints.saving import Part
from gptjax.config.quantization import Types
from gptjax.gguf.types import expand
from gptjax.models.packing import is_kernel
from pallas_kernels.formats.ggml import PACKED
from pallas_kernels.formats.mxfp4 import MXFP4


@dataclasses.dataclass(frozen=True)
class Weight:
    """One of the arrays that a source has for a model, not read yet."""

    path: weights.Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray]
    slices: Callable[[], Iterator[np.ndarray]]  # the same, in consecutive parts along its first axis


def of_plan(plan: matching.Plan, source: TensorSource) -> Iterator[Weight]:
    """The weights of a source. Raises `CheckpointError` if a copy differs from its original."""
    for fill, (path, read) in zip(plan.fills, filling.readers(plan, source), strict=True):
        yield Weight(
            path, fill.shape, filling.dtype(fill, source), read, functools.partial(filling.parts, fill, source)
        )


def of_manifest(directory: FilePath, manifest: Manifest) -> Iterator[Weight]:
    """The weights of a converted directory. Raises `CheckpointError` if a piece is missing or damaged."""
    leaves = {leaf.path: leaf for leaf in manifest.leaves}
    for path, read in weights.readers(directory, manifest):
        leaf = leaves[path]
        yield Weight(path, leaf.shape, np.dtype(leaf.dtype), read, functools.partial(_whole, read))


def expanded(weights: Iterable[Weight], types: Types) -> Iterator[Weight]:
    """The weights with those in a GGUF file's types as float32 numbers, exactly those that the blocks mean.

    Args:
      types: the configuration's; see `gptjax.config.quantization`.
    """
    found = {weight.path: weight for weight in weights}
    for name, kinds in types:
        path = tuple(name.split("/"))
        ends = [("blocks",)] if len(kinds) == 1 else [("parts", str(index), "blocks") for index in range(len(kinds))]
        blocks = [found.pop((*path, *end)) for end in ends]
        yield _numbers(path, blocks, kinds)
    yield from found.values()


def _numbers(path: weights.Path, blocks: Sequence[Weight], kinds: Sequence[str]) -> Weight:
    rows = sum(each.shape[0] for each in blocks)
    shape = (rows, blocks[0].shape[1] * PACKED[kinds[0]].size)
    turned = is_kernel(path)
    read = functools.partial(_expand, blocks, kinds, shape, turned)
    return Weight(path, shape[::-1] if turned else shape, np.dtype(np.float32), read, functools.partial(_whole, read))


def _expand(blocks: Sequence[Weight], kinds: Sequence[str], shape: tuple[int, int], turned: bool) -> np.ndarray:
    numbers, done = np.empty(shape, np.float32), 0
    for each, kind in zip(blocks, kinds, strict=True):
        rows = each.shape[0]
        expand(kind, each.read().reshape(-1, PACKED[kind].nbytes), numbers[done : done + rows].reshape(-1))
        done += rows
    return numbers.T if turned else numbers


def part(weight: Weight, dtype: np.dtype[Any] | None, chosen: Mapping[weights.Path, MXFP4]) -> Part:
    """A weight to write.

    Args:
      weight: as the source has it.
      dtype: the dtype that floating-point weights are cast to; None keeps their own.
      chosen: the weights to round to MXFP4 instead, with their MXFP4 shapes; see `convert.mxfp4.chosen`.
    """
    if weight.path in chosen:
        packed = chosen[weight.path]
        arrays = {"blocks": packed.blocks, "scales": packed.scales}
        shapes = {(*weight.path, name): jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
        return Part(shapes, functools.partial(_rounded, weight, packed.shape))
    if dtype is None or not jnp.issubdtype(weight.dtype, jnp.floating):
        dtype = weight.dtype
    shapes = {weight.path: jax.ShapeDtypeStruct(weight.shape, dtype)}
    return Part(shapes, functools.partial(_cast, weight, dtype))


def _rounded(weight: Weight, shape: tuple[int, ...]) -> dict[weights.Path, np.ndarray]:
    slices = weight.slices() if mxfp4.is_cut(weight.path, shape) else iter([weight.read()])
    blocks, scales = mxfp4.rounded(weight.path, slices, shape)
    return {(*weight.path, "blocks"): blocks, (*weight.path, "scales"): scales}


def _cast(weight: Weight, dtype: np.dtype[Any]) -> dict[weights.Path, np.ndarray]:
    array = weight.read()
    return {weight.path: array if array.dtype == dtype else weights.cast(array, dtype, "/".join(weight.path))}


def _whole(read: Callable[[], np.ndarray]) -> Iterator[np.ndarray]:
    yield read()
