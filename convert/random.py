"""Writes a checkpoint of random weights in Hugging Face's layout, for measuring without real weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import jax.numpy as jnp
import numpy as np

from convert.matching import names_of
from convert.tables import table
from gptjax.checkpoints.atomic_directory import check_room, staged
from gptjax.checkpoints.safetensors_writer import Outline, SafetensorsWriter
from gptjax.checkpoints.weights import flatten
from gptjax.config import ModelConfig
from gptjax.models.packing import RANDOM_SCALE
from gptjax.models.params import abstract_params
from gptjax.models.registry import build

SHARD_BYTES: Final = 4 << 30
_POOL_BYTES: Final = 64 << 20  # random bytes, generated once and written repeatedly


def write_random(config: ModelConfig, directory: Path, *, seed: int = 0) -> int:
    """Writes `config.json`, an index and shards, tensor by tensor in bounded memory. Returns the bytes of the weights.

    Floating-point weights are bfloat16 with standard deviation 0.02. No tokenizer is written.

    Raises:
      CheckpointError: the directory exists or cannot be written, or the disk is too full.
    """
    tensors = _tensors(config)
    total = sum(tensor.nbytes for tensor in tensors.values())
    rng = np.random.default_rng(seed)
    floats = (0.02 * rng.standard_normal(_POOL_BYTES // 2, np.float32)).astype(jnp.bfloat16).tobytes()
    codes, scales = rng.bytes(_POOL_BYTES), bytes([RANDOM_SCALE]) * _POOL_BYTES
    with staged(directory, overwrite=False, ours=lambda _: False) as partial:
        check_room(directory, partial, total)
        writer = SafetensorsWriter(partial, tensors, most=SHARD_BYTES)
        for name, tensor in tensors.items():
            pool = floats if tensor.dtype == jnp.bfloat16 else scales if name.endswith("scales") else codes
            writer.write_bytes(name, _repeated(pool, tensor.nbytes))
        (partial / "config.json").write_text(json.dumps(config.to_json(), indent=1) + "\n", encoding="utf-8")
    return total


def _tensors(config: ModelConfig) -> dict[str, Outline]:
    found: dict[str, Outline] = {}
    rules = table(config)
    for path, target in flatten(abstract_params(build(config))).items():
        names, transform = names_of(rules, path)
        dtype = np.dtype(np.uint8 if transform.dtypes == ("U8",) else jnp.bfloat16)
        shapes = transform.source_shapes(tuple(target.shape))
        found |= {name: Outline(dtype, shape) for name, shape in zip(names, shapes, strict=True)}
    return found


def _repeated(pool: bytes, size: int) -> Iterator[memoryview]:
    while size > 0:
        yield memoryview(pool)[:size]
        size -= len(pool)
