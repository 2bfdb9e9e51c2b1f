"""One Orbax checkpoint of some weights, as host arrays: what a converted directory has several of.

Measured on 320 MB: Orbax holds a copy of a piece while it saves (0.2 s) and two while it restores; restoring is three
times faster without OCDBT, and weights do not compress.
"""

import contextlib
import ctypes
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import CheckpointError


def write_piece(path: Path, tree: Mapping[str, Any]) -> dict[str, int]:
    """Saves nested dicts of host arrays to a new directory. Returns its files, by relative path, with their bytes.

    Raises what Orbax and TensorStore raise: `OSError`, `ValueError` and others.
    """
    with _quiet(), _checkpointer() as checkpointer:
        checkpointer.save(path.absolute(), dict(tree))
    return _files(path)


def read_piece(path: Path, files: Mapping[str, int]) -> dict[str, Any]:
    """Nested dicts of host arrays, as `write_piece` saved them.

    Args:
      path: the piece's directory.
      files: what `write_piece` returned.

    Raises:
      CheckpointError: the piece, or a file of it, is missing or damaged.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is missing; copy the whole directory, or convert the checkpoint again")
    # Looked at first: TensorStore's threads print tracebacks of their own about truncated files.
    found = _files(path)
    for name, size in files.items():
        if found.get(name) != size:
            state = "is missing" if name not in found else f"has {found[name]:,} bytes, expected {size:,}"
            raise damaged(path, f"its file {name} {state}")
    try:
        with _quiet(), _checkpointer() as checkpointer:
            tree: dict[str, Any] = checkpointer.restore(path.absolute())
            return tree
    except Exception as error:  # whatever Orbax and TensorStore make of a damaged file
        raise damaged(path, f"{type(error).__name__}: {error}") from error


def damaged(path: Path, what: str) -> CheckpointError:
    """The error about a piece that is not as it was written."""
    return CheckpointError(f"{path} is damaged: {what}; copy the directory or convert the checkpoint again")


def checksum(array: np.ndarray) -> int:
    """CRC-32 of the bytes of an array in C order. (7 GB/s: worth it on every load, which SHA-256 at 2 GB/s is not.)"""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def return_memory() -> None:
    """Gives freed memory back to the system. Orbax works in many threads, and glibc keeps what each of them freed:
    1.1 GB after restoring gpt2-xl. Does nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _files(path: Path) -> dict[str, int]:
    paths = [Path(folder, file) for folder, _, files in os.walk(path) for file in files]
    return {file.relative_to(path).as_posix(): file.stat().st_size for file in sorted(paths)}


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp  # a third of a second, which `import gptjax` should not take

    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax tells of its work on stderr, through absl's logger; what goes wrong comes as an exception anyway."""
    logger = logging.getLogger("absl")
    silence: Callable[[logging.LogRecord], bool] = lambda record: record.levelno >= logging.ERROR  # noqa: E731
    logger.addFilter(silence)
    try:
        yield
    finally:
        logger.removeFilter(silence)
