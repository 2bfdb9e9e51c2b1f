"""Checkpoint directories for tests, sound ones and damaged ones, written without the safetensors library."""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.oracles import gpt2_random

DTYPE_NAMES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3",
    "float64": "F64",
    "bool": "BOOL",
}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def header_of(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    position = 0
    for name, array in tensors.items():
        offsets = [position, position + array.nbytes]
        entries[name] = {
            "dtype": DTYPE_NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": offsets,
        }
        position = offsets[1]
    return entries


def write_raw(path: Path, header: bytes, data: bytes, *, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def write(path: Path, tensors: Mapping[str, np.ndarray], *, multiple: int = 8) -> None:
    """A safetensors file whose data starts at a multiple of so many bytes."""
    header = json.dumps({"__metadata__": {"format": "pt"}, **header_of(tensors)}).encode()
    header += b" " * (-(8 + len(header)) % multiple)
    write_raw(path, header, b"".join(array.tobytes() for array in tensors.values()))


def write_sharded(directory: Path, tensors: Mapping[str, np.ndarray], shards: int = 2) -> dict[str, str]:
    """Several files and their index. Returns the index's map."""
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        own = names[shard::shards]
        write(directory / file, {name: tensors[name] for name in own})
        weight_map |= dict.fromkeys(own, file)
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: Mapping[str, str]) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": dict(weight_map)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def gpt2(
    directory: Path, *, prefix: str = "", dtype: Any = np.float32, shards: int = 0, **changes: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A tiny random GPT-2 directory. Returns its config and its tensors, without prefix, as stored."""
    config, tensors = gpt2_random.checkpoint(**changes)
    tensors = {name: array.astype(dtype) for name, array in tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    write_gpt2(directory, tensors, prefix=prefix, shards=shards)
    return config, tensors


def write_gpt2(directory: Path, tensors: Mapping[str, np.ndarray], *, prefix: str = "", shards: int = 0) -> None:
    named = {(name if name == "lm_head.weight" else prefix + name): array for name, array in tensors.items()}
    if shards:
        write_sharded(directory, named, shards)
    else:
        write(directory / "model.safetensors", named)


def gpt2_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a GPT-2 too large to be made in memory."""
    width, mlp = config["n_embd"], 4 * config["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (config["vocab_size"], width)}
    shapes["wpe.weight"] = (config["n_positions"], width)
    for layer in range(config["n_layer"]):
        products = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
        products |= {"mlp.c_fc": (width, mlp), "mlp.c_proj": (mlp, width)}
        for name, shape in products.items():
            shapes |= {f"h.{layer}.{name}.weight": shape, f"h.{layer}.{name}.bias": shape[1:]}
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            shapes[f"h.{layer}.{name}"] = (width,)
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def stream_gpt2(directory: Path, **config: int) -> int:
    """Writes a float32 GPT-2 of any size in little memory. Returns how many parameters it has."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2", **config}))
    shapes = gpt2_shapes(config)
    entries, position = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    numbers = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for start in range(0, position // 4, numbers.size):
            block = numbers[: min(numbers.size, position // 4 - start)]
            file.write((block + np.float32(start % 97)).tobytes())  # no two blocks are alike
    return position // 4


def flat(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Nested parameters by their joined paths, as host arrays."""
    result: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            result |= {f"{name}/{path}": leaf for path, leaf in flat(value).items()}
        else:
            result[name] = np.asarray(value)
    return result


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def listing(directory: Path) -> Iterable[str]:
    """Everything below a directory, hidden things too."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def change_config(directory: Path, **changes: Any) -> None:
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | changes))


def contents(directory: Path) -> dict[str, bytes | bool]:
    """Everything below a directory, hidden things too: the bytes of files, False for others."""
    return {name: (directory / name).is_file() and (directory / name).read_bytes() for name in listing(directory)}


def flat_shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of nested parameters, which may be abstract, by their joined paths."""
    result: dict[str, tuple[int, ...]] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            result |= {f"{name}/{path}": shape for path, shape in flat_shapes(value).items()}
        else:
            result[name] = tuple(value.shape)
    return result
