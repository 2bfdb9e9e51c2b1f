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

    Floating-point weights are bfloat16 with standard deviation 0.02, or 1 for the scales of norms (see
    `models.params.random_params`). No tokenizer is written.

    Raises:
      CheckpointError: the directory exists or cannot be written, or the disk is too full.
    """
    tensors, norms = _tensors(config)
    total = sum(tensor.nbytes for tensor in tensors.values())
    rng = np.random.default_rng(seed)
    floats = (0.02 * rng.standard_normal(_POOL_BYTES // 2, np.float32)).astype(jnp.bfloat16).tobytes()
    ones = np.ones(_POOL_BYTES // 2, jnp.bfloat16).tobytes()
    codes, scales = rng.bytes(_POOL_BYTES), bytes([RANDOM_SCALE]) * _POOL_BYTES
    with staged(directory, overwrite=False, ours=lambda _: False) as partial:
        check_room(directory, partial, total)
        writer = SafetensorsWriter(partial, tensors, most=SHARD_BYTES)
        for name, tensor in tensors.items():
            if tensor.dtype == jnp.bfloat16:
                pool = ones if name in norms else floats
            else:
                pool = scales if name.endswith("scales") else codes
            writer.write_bytes(name, _repeated(pool, tensor.nbytes, first=2 * int(rng.integers(_POOL_BYTES // 2))))
        (partial / "config.json").write_text(json.dumps(config.to_json(), indent=1) + "\n", encoding="utf-8")
    return total


def _tensors(config: ModelConfig) -> tuple[dict[str, Outline], set[str]]:
    """All tensors, and the names of those that are a norm's scale."""
    found: dict[str, Outline] = {}
    norms: set[str] = set()
    rules = table(config)
    for path, target in flatten(abstract_params(build(config))).items():
        names, transform = names_of(rules, path)
        dtype = np.dtype(np.uint8 if transform.dtypes == ("U8",) else jnp.bfloat16)
        shapes = transform.source_shapes(tuple(target.shape))
        found |= {name: Outline(dtype, shape) for name, shape in zip(names, shapes, strict=True)}
        norms |= set(names) if path[-1] == "scale" else set()
    return found, norms


def _repeated(pool: bytes, size: int, *, first: int) -> Iterator[memoryview]:
    """Bytes of the pool from `first` on: if all tensors began alike, biases would favour the same rows of a router."""
    while size > 0:
        piece = memoryview(pool)[first : first + size]
        yield piece
        size, first = size - len(piece), 0
