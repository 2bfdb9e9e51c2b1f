"""Which of a model's weights are packed, and how, by their paths."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.config.quantization import packs
from gptjax.errors import ConfigError, RequestError
from gptjax.support.quoting import names
from pallas_kernels.formats.ggml import PACKED
from pallas_kernels.formats.ggml.weight import Quantized, Rows
from pallas_kernels.formats.mxfp4 import BLOCK, MXFP4

Path = tuple[str, ...]
Packed = MXFP4 | Quantized | Rows[Quantized]
RANDOM_SCALE = 120  # of MXFP4: 2^-7, which gives random codes a standard deviation of 0.023


def quantized(config: ModelConfig, weights: Mapping[Path, Any], type_name: str) -> ModelConfig:
    """The configuration with every matrix that a GGUF file may pack in one type, but experts.

    Args:
      weights: all shapes, by path.

    Raises:
      RequestError: rows are not whole blocks of the type.
    """
    packable = [path for path in weights if _kind(path) in ("linear", "embedding")]
    for path in packable:
        width, size = _summed_last(path, weights[path].shape)[-1], PACKED[type_name].size
        if width % size:
            raise RequestError(
                f"{type_name} packs {size} numbers at a time, and {'/'.join(path)} has rows of {width}; choose a type "
                "with smaller blocks, such as Q8_0"
            )
    return dataclasses.replace(config, types=tuple(("/".join(path), (type_name,)) for path in packable))


def overlaid(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes of parameters as a checkpoint has them: those of packed weights in place of their numbers'.

    Raises:
      ConfigError: the configuration names weights that the model does not have.
    """
    types = dict(config.types)
    found = _overlaid(config, types, params, ())
    if types:
        raise ConfigError(f"quantization_config has types of {names(sorted(types))}, which the model does not have")
    return found


def _overlaid(
    config: ModelConfig, types: dict[str, tuple[str, ...]], params: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, leaf in params.items():
        here = (*path, name)
        if isinstance(leaf, dict):
            found[name] = _overlaid(config, types, leaf, here)
        elif (kinds := types.pop("/".join(here), None)) is not None:
            found[name] = _quantized(config, here, _summed_last(here, leaf.shape), kinds)
        elif (kind := _kind(here)) is not None and packs(config.mxfp4, kind):
            make = partial(_random_mxfp4, shape=_summed_last(here, leaf.shape))
            found[name] = jax.eval_shape(make, jax.random.key(0))
        else:
            found[name] = leaf
    return found


def _quantized(
    config: ModelConfig, path: Path, shape: tuple[int, ...], kinds: tuple[str, ...]
) -> Quantized | Rows[Quantized]:
    name = "/".join(path)
    if _kind(path) not in ("linear", "embedding"):
        raise ConfigError(
            f"quantization_config has {name} in {names(list(kinds))}, and such weights are never so packed"
        )
    if unfit := [kind for kind in kinds if shape[-1] % PACKED[kind].size]:
        raise ConfigError(
            f"the checkpoint has {name} in {names(unfit)}, which does not go with its other sizes: rows of "
            f"{shape[-1]} numbers are not whole blocks; correct config.json, or download the checkpoint again"
        )
    if len(kinds) == 1:
        return Quantized.abstract(shape, kinds[0])
    rows = part_rows(config, path)
    if len(rows) != len(kinds):
        raise ConfigError(f"quantization_config has {len(kinds)} types of {'/'.join(path)}, expected {len(rows)}")
    return Rows(tuple(Quantized.abstract((count, *shape[1:]), kind) for count, kind in zip(rows, kinds, strict=True)))


def part_rows(config: ModelConfig, path: Path) -> tuple[int, ...]:
    """How many outputs of a fused matrix each of its parts has."""
    if path[-2:] == ("qkv", "kernel"):
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        return tuple(count * config.head_width for count in heads)
    return (config.mlp_width,) * 2 if path[-2:] == ("gate_up", "kernel") else ()


def summed_last(path: Path, array: Any) -> Any:
    """A view of a weight's numbers with the axis that products sum over last, as packed weights have it."""
    return array.swapaxes(-1, -2) if is_kernel(path) else array


def _summed_last(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2]) if is_kernel(path) else shape


def is_kernel(path: Path) -> bool:
    """Whether a weight is [..., in, out]; embeddings are [V, D], and sum over their last axis."""
    return path[-1].endswith("kernel")


def _kind(path: Path) -> str | None:
    """What kind of weight this is to `packs`; None if it is never packed."""
    if path[-1] in ("token_embedding", "head_embedding"):
        return "embedding"
    if not is_kernel(path) or path[-2] == "router":
        return None
    return "experts" if path[-2] == "moe" else "linear"


def random_packed(key: jax.Array, leaf: Packed) -> Packed:
    """Random codes, all with the same scale, in the format and shape of a leaf."""
    if isinstance(leaf, MXFP4):
        return _random_mxfp4(key, shape=leaf.shape)
    if isinstance(leaf, Quantized):
        return _random_quantized(key, shape=leaf.shape, type_name=leaf.type)
    keys = jax.random.split(key, len(leaf.parts))
    return Rows(
        tuple(
            _random_quantized(each, shape=part.shape, type_name=part.type)
            for each, part in zip(keys, leaf.parts, strict=True)
        )
    )


_random_quantized = jax.jit(Quantized.random, static_argnames=("shape", "type_name"))


@partial(jax.jit, static_argnames="shape")
def _random_mxfp4(key: jax.Array, *, shape: tuple[int, ...]) -> MXFP4:
    scales_shape = (*shape[:-1], shape[-1] // BLOCK)
    blocks = jax.random.bits(key, (*scales_shape, BLOCK // 2), jnp.uint8)
    return MXFP4(blocks, jnp.full(scales_shape, RANDOM_SCALE, jnp.uint8))
