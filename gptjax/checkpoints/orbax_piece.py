"""A piece of a converted directory: one Orbax checkpoint of some weights, as host arrays.

Orbax writes it in Zarr version 2: one directory per weight, with a single chunk, neither compressed nor filtered, and
a `.zarray` that describes it. It is read here without Orbax and TensorStore, because they trust that file: an edited
shape, compressor or nesting makes them abort, crash or take any amount of memory. Anything that differs from what this
module writes is an error. Reading directly also avoids the two copies that Orbax makes.

Measured on 320 MB: Orbax holds a copy of a piece while saving it (0.2 s), and weights do not compress.
"""

import contextlib
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from gptjax.checkpoints.manifest import Leaf
from gptjax.errors import CheckpointError
from gptjax.support.files import parse_json, read_bytes
from gptjax.support.progress import Advance
from gptjax.support.raw import Buffers, read_array

_ZARRAY_BYTES: Final = 4096  # the size limit for a .zarray; ours have 150
_TIMES: Final = ("init_timestamp_nsecs", "commit_timestamp_nsecs")


class DamagedPieceError(CheckpointError):
    """A piece that is not as it was written."""

    def __init__(self, path: Path, what: str):
        super().__init__(f"{path} is damaged: {what}; copy the directory or convert the checkpoint again")
        self.fault = f"{path}: {what}"


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
    for _, fault in _missized(path, files):
        raise DamagedPieceError(path, fault)


def _missized(path: Path, files: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The files that are missing or have another size, and what to say about them."""
    found = _files(path)
    for name, size in files.items():
        if found.get(name) != size:
            state = "is missing" if name not in found else f"has {found[name]:,} bytes, expected {size:,}"
            yield name, f"its file {name} {state}"


def piece_faults(
    path: Path, files: Mapping[str, int], leaves: Iterable[Leaf], others: Mapping[str, str], advance: Advance
) -> Iterator[str]:
    """Reads a whole piece and yields everything that is wrong with it, one file at a time.

    Args:
      path, files: as for `check_piece`.
      leaves: the piece's weights.
      others: the SHA-256 of its other files, by name, as `other_files` gives them.
      advance: takes the bytes of each weight that was checked.
    """
    wrong = dict(_missized(path, files))
    yield from (f"{path}: {fault}" for fault in wrong.values())
    buffers = Buffers()
    for leaf in leaves:
        if not any(name.startswith(f"{_folder(leaf)}/") for name in wrong):
            try:
                read_leaf(path, leaf, buffers)
            except DamagedPieceError as error:
                yield error.fault
            except CheckpointError as error:
                yield str(error)
        advance(leaf.nbytes)
    for name, sha256 in others.items():
        if name not in wrong and (fault := file_fault(path / name, sha256)):
            yield fault


def file_fault(path: Path, sha256: str) -> str:
    """What is wrong with a small file of this SHA-256; "" if nothing is."""
    try:
        data = read_bytes(path)
    except CheckpointError as error:
        return str(error)
    if data is None:
        return f"{path} is missing"
    return "" if hashlib.sha256(data).hexdigest() == sha256 else f"the bytes of {path} have changed"


def other_files(path: Path, files: Mapping[str, int], leaves: Iterable[Leaf]) -> dict[str, str]:
    """The SHA-256 of each file of a piece that is not part of a weight, by name."""
    folders = {_folder(leaf) for leaf in leaves}
    names = [name for name in files if name.rpartition("/")[0] not in folders]
    return {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}  # which Orbax just wrote


def _folder(leaf: Leaf) -> str:
    return ".".join(leaf.path)


def read_leaf(path: Path, leaf: Leaf, buffers: Buffers) -> np.ndarray:
    """A weight of a piece, as `write_piece` saved it.

    Args:
      path: the piece's directory.
      leaf: the weight's entry in the manifest.
      buffers: provides its memory.

    Raises:
      CheckpointError: its files are missing, or not exactly what `write_piece` writes for such a weight.
    """
    name, dtype = _folder(leaf), np.dtype(leaf.dtype)
    data = read_bytes(path / name / ".zarray", _ZARRAY_BYTES)
    try:
        found = None if data is None else parse_json(data.decode())
    except ValueError as error:
        raise DamagedPieceError(path, f"its file {name}/.zarray is not valid JSON ({error})") from None
    if found != _zarray(dtype, leaf.shape):
        what = f"{name}/.zarray does not describe {dtype} {list(leaf.shape)} as gptjax writes it"
        raise DamagedPieceError(path, what)
    file = f"{name}/{'.'.join('0' for _ in leaf.shape) or '0'}"
    size = leaf.nbytes
    try:
        there = os.stat(path / file).st_size
    except OSError:
        raise DamagedPieceError(path, f"its file {file} is missing") from None
    if there != size:
        raise DamagedPieceError(path, f"its file {file} has {there:,} bytes, expected {size:,}")
    array = read_array(path / file, dtype, leaf.shape, buffers=buffers)
    if checksum(array) != leaf.crc32:
        raise DamagedPieceError(path, f"the bytes of its file {file} have changed")
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
