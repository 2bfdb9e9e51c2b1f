"""A piece of a converted directory: one Orbax checkpoint of some weights, as host arrays.

Orbax writes it in Zarr version 2: one directory per weight, with a single chunk, neither compressed nor filtered, and
a `.zarray` that describes it. It is read here without Orbax and TensorStore, because they trust that file: an edited
shape, compressor or nesting makes them abort, crash or take any amount of memory. Anything that differs from what this
module writes is an error. Reading directly also avoids the two copies that Orbax makes.

Measured on 320 MB: Orbax holds a copy of a piece while saving it (0.2 s), and weights do not compress.
"""

import contextlib
import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from gptjax.checkpoints.manifest import Leaf
from gptjax.errors import CheckpointError
from gptjax.support.files import parse_json, read_bytes
from gptjax.support.raw import Buffers, read_array

_ZARRAY_BYTES: Final = 4096  # the size limit for a .zarray; ours have 150
_TIMES: Final = ("init_timestamp_nsecs", "commit_timestamp_nsecs")


def write_piece(path: Path, tree: Mapping[str, Any]) -> dict[str, int]:
    """Saves nested dicts of host arrays to a new directory. Returns the sizes of its files by relative path.

    The same arrays give the same files, byte for byte.

    Raises whatever Orbax and TensorStore raise: `OSError`, `ValueError` and others.
    """
    import orbax.checkpoint as ocp  # takes a third of a second, which `import gptjax` should not pay

    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    with _quiet(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path.absolute(), dict(tree))
    _forget_time_and_place(path)
    return _files(path)


def _forget_time_and_place(path: Path) -> None:
    """Removes what differs between equal pieces: Orbax records the time and the directory of each save."""
    metadata, success = path / "_CHECKPOINT_METADATA", path / "commit_success.txt"
    if metadata.exists():
        raw = json.loads(metadata.read_text(encoding="utf-8"))
        metadata.write_text(json.dumps(raw | dict.fromkeys(_TIMES, 0)), encoding="utf-8")
    if success.exists():
        success.write_text("Checkpoint commit was successful", encoding="utf-8")


def check_piece(path: Path, files: Mapping[str, int]) -> None:
    """Raises `CheckpointError` if a piece's directory or one of its files is missing, or a file has the wrong size.

    Args:
      path: the piece's directory.
      files: what `write_piece` returned.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is missing; copy the whole directory, or convert the checkpoint again")
    found = _files(path)
    for name, size in files.items():
        if found.get(name) != size:
            state = "is missing" if name not in found else f"has {found[name]:,} bytes, expected {size:,}"
            raise damaged_piece(path, f"its file {name} {state}")


def read_leaf(path: Path, leaf: Leaf, buffers: Buffers) -> np.ndarray:
    """A weight of a piece, as `write_piece` saved it.

    Args:
      path: the piece's directory.
      leaf: the weight's entry in the manifest.
      buffers: provides its memory.

    Raises:
      CheckpointError: its files are missing, or not exactly what `write_piece` writes for such a weight.
    """
    name, dtype = ".".join(leaf.path), np.dtype(leaf.dtype)
    data = read_bytes(path / name / ".zarray", _ZARRAY_BYTES)
    try:
        found = None if data is None else parse_json(data.decode())
    except ValueError as error:
        raise damaged_piece(path, f"its file {name}/.zarray is not valid JSON ({error})") from None
    if found != _zarray(dtype, leaf.shape):
        raise damaged_piece(path, f"{name}/.zarray does not describe {dtype} {list(leaf.shape)} as gptjax writes it")
    file = f"{name}/{'.'.join('0' for _ in leaf.shape) or '0'}"
    size = math.prod(leaf.shape) * dtype.itemsize
    try:
        there = os.stat(path / file).st_size
    except OSError:
        raise damaged_piece(path, f"its file {file} is missing") from None
    if there != size:
        raise damaged_piece(path, f"its file {file} has {there:,} bytes, expected {size:,}")
    array = read_array(path / file, dtype, leaf.shape, buffers=buffers)
    if checksum(array) != leaf.crc32:
        raise damaged_piece(path, f"the bytes of {'/'.join(leaf.path)} have changed")
    return array


def _zarray(dtype: np.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        "chunks": list(shape),
        "compressor": None,
        "dimension_separator": ".",
        "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.str,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(shape),
        "zarr_format": 2,
    }


def damaged_piece(path: Path, what: str) -> CheckpointError:
    """The error for a piece that is not as it was written."""
    return CheckpointError(f"{path} is damaged: {what}; copy the directory or convert the checkpoint again")


def checksum(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes in C order. (At 7 GB/s it is worth it on every load; SHA-256 at 2 GB/s is not.)"""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _files(path: Path) -> dict[str, int]:
    """The sizes of the files under a directory, without broken links."""
    found = {}
    for file in sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names):
        with contextlib.suppress(OSError):
            found[file.relative_to(path).as_posix()] = file.stat().st_size
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences Orbax's chatter on stderr, which goes through absl's logger; failures raise exceptions anyway."""
    logger = logging.getLogger("absl")
    silence: Callable[[logging.LogRecord], bool] = lambda record: record.levelno >= logging.ERROR  # noqa: E731
    logger.addFilter(silence)
    try:
        yield
    finally:
        logger.removeFilter(silence)
