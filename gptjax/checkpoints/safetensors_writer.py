"""Writes the safetensors files of a Hugging Face directory, in bounded memory.

Names, dtypes and shapes are given first; the tensors follow in any order, each in pieces.

Format: https://huggingface.co/docs/safetensors, "Format".
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from gptjax.checkpoints.safetensors import INDEX, SINGLE
from gptjax.checkpoints.safetensors_header import MAX_HEADER_BYTES, NUMPY_DTYPES, parse
from gptjax.support.files import opened

_PIECE: Final = 1 << 22  # elements written at a time
_METADATA: Final = "__metadata__"
_OURS: Final = {"format": "pt", "written_by": "gptjax"}  # transformers wants to know the framework
_NAMES: Final = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Outline:
    """The dtype and shape of a tensor to write."""

    dtype: np.dtype[Any]  # one of NUMPY_DTYPES
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Files of a directory: `model.safetensors`, or several and their index."""

    def __init__(self, directory: Path, tensors: Mapping[str, Outline], *, most: int):
        """Writes the headers and the index.

        Args:
          directory: an existing one.
          tensors: what will be written, by name.
          most: the bytes of tensors in a file; a larger tensor is in a file of its own.

        Raises `OSError`.
        """
        self._tensors = tensors
        self._places: dict[str, tuple[Path, int]] = {}  # the file of each tensor, and its offset there
        shards = list(_shards(tensors, most))
        files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        if len(shards) == 1:
            files = [SINGLE]
        for file, names in zip(files, shards, strict=True):
            self._begin(directory / file, names)
        if len(shards) > 1:
            weight_map = {name: path.name for name, (path, _) in sorted(self._places.items())}
            index = {"metadata": {"total_size": _size(tensors.values())}, "weight_map": weight_map}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes a tensor, which may be a transposed view: no more than a piece of it is copied. Raises `OSError`."""
        if (array.shape, array.dtype) != (self._tensors[name].shape, self._tensors[name].dtype):
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, not as it was announced")
        self.write_bytes(name, _pieces(array))

    def write_bytes(self, name: str, pieces: Iterable[memoryview]) -> None:
        """Writes a tensor's bytes: consecutive pieces of its elements in C order, little-endian. Raises `OSError`."""
        path, offset = self._places[name]
        with path.open("r+b") as file:
            file.seek(offset)
            written = sum(file.write(piece) for piece in pieces)
        if written != self._tensors[name].nbytes:
            raise ValueError(f"{name} has {written} bytes, not {self._tensors[name].nbytes} as announced")

    def _begin(self, path: Path, names: list[str]) -> None:
        header: dict[str, Any] = {_METADATA: _OURS}
        end = 0
        # The widest elements first, so that all are aligned; otherwise in the order given.
        for name in sorted(names, key=lambda name: -self._tensors[name].dtype.itemsize):
            tensor = self._tensors[name]
            start, end = end, end + tensor.nbytes
            entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
            header[name] = entry
            self._places[name] = path, start
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        for name in names:
            self._places[name] = path, 8 + len(encoded) + self._places[name][1]
        with path.open("xb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(8 + len(encoded) + end)


def is_ours(path: Path) -> bool:
    """Whether a file was written by this class. Raises `CheckpointError` if it cannot be read."""
    with opened(path) as descriptor:
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        text = os.pread(descriptor, min(length, MAX_HEADER_BYTES), 8)
    try:
        return bool(parse(text).get(_METADATA) == _OURS)
    except ValueError:
        return False


def _shards(tensors: Mapping[str, Outline], most: int) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, tensor in tensors.items():
        if names and held + tensor.nbytes > most:
            yield names
            names, held = [], 0
        names.append(name)
        held += tensor.nbytes
    yield names


def _size(tensors: Iterable[Outline]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _pieces(array: np.ndarray) -> Iterator[memoryview]:
    """The bytes of an array in C order, a few rows at a time."""
    rows = array.reshape(1) if array.ndim == 0 else array
    step = max(1, _PIECE // max(1, math.prod(rows.shape[1:])))
    for start in range(0, len(rows), step):
        yield np.ascontiguousarray(rows[start : start + step]).reshape(-1).view(np.uint8).data
