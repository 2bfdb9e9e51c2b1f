"""Writes a checkpoint of random weights in Hugging Face's layout, for measuring without real weights."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from convert.matching import source_shapes
from convert.rules import Shape
from convert.tables import table
from gptjax.checkpoints.atomic_directory import staged, unwritable
from gptjax.checkpoints.safetensors import INDEX
from gptjax.config import ModelConfig
from gptjax.errors import CheckpointError
from gptjax.models.params import abstract_params
from gptjax.models.registry import build

SHARD_BYTES: Final = 4 << 30
_POOL_BYTES: Final = 64 << 20  # random bytes, generated once and written repeatedly
_SCALE: Final = 120  # an MXFP4 scale: 2^-7


def write_random(config: ModelConfig, directory: Path, *, seed: int = 0) -> int:
    """Writes `config.json`, an index and shards, tensor by tensor in bounded memory. Returns the bytes of the weights.

    Floating-point weights are bfloat16 with standard deviation 0.02. No tokenizer is written.

    Raises:
      CheckpointError: the directory exists or cannot be written, or the disk is too full.
    """
    shapes = source_shapes(table(config), abstract_params(build(config)))
    tensors = {name: (shape, "U8" if dtypes == ("U8",) else "BF16") for name, (shape, dtypes) in shapes.items()}
    shards = list(_shards(tensors))
    total = sum(_size(*tensor) for tensor in tensors.values())
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    with staged(directory, overwrite=False, ours=lambda _: False) as partial:
        if shutil.disk_usage(partial).free < total:
            raise CheckpointError(
                f"{directory} needs {total / 1e9:.1f} GB, more than its disk has free; name one on another disk"
            )
        try:
            for file, names in zip(files, shards, strict=True):
                _write_shard(partial / file, {name: tensors[name] for name in names}, seed)
        except OSError as error:
            raise unwritable(directory, error) from error
        (partial / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        (partial / "config.json").write_text(json.dumps(config.to_json(), indent=1) + "\n", encoding="utf-8")
    return total


def _shards(tensors: dict[str, tuple[Shape, str]]) -> Iterator[list[str]]:
    names: list[str] = []
    for name in tensors:
        if names and sum(_size(*tensors[other]) for other in names) + _size(*tensors[name]) > SHARD_BYTES:
            yield names
            names = []
        names.append(name)
    yield names


def _write_shard(path: Path, tensors: dict[str, tuple[Shape, str]], seed: int) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + _size(shape, dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    rng = np.random.default_rng(seed)
    floats = (0.02 * rng.standard_normal(_POOL_BYTES // 2, np.float32)).astype(jnp.bfloat16).tobytes()
    codes = rng.bytes(_POOL_BYTES)
    scales = bytes([_SCALE]) * _POOL_BYTES
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, (shape, dtype) in tensors.items():
            pool = memoryview(floats if dtype == "BF16" else scales if name.endswith("scales") else codes)
            left = _size(shape, dtype)
            while left:
                left -= file.write(pool[: min(left, len(pool))])


def _size(shape: Shape, dtype: str) -> int:
    return math.prod(shape) * (1 if dtype == "U8" else 2)
