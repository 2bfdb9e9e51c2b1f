"""The header of one GGUF file, read within limits and checked before any data is read.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama.cpp's ggml/src/gguf.cpp.
"""

import dataclasses
import math
import os
import zlib
from pathlib import Path
from typing import Any, Final

from gptjax.errors import CheckpointError
from gptjax.gguf.cursor import Cursor, damaged
from gptjax.gguf.types import BLOCKS, FLOATS, NAMES, nbytes
from gptjax.support.files import MISSING, Stamp, opened, stamp
from gptjax.support.quoting import quoted, shown
from gptjax.support.raw import missing

MAX_TENSORS: Final = 1 << 16
MAX_ALIGNMENT: Final = 1 << 20
MAX_DIMENSIONS: Final = 4  # of ggml's tensors
_DEFAULT_ALIGNMENT: Final = 32
_LEAST_OF_A_KEY: Final = 8 + 1 + 4 + 1  # bytes: a length, a name, a type, a value
_LEAST_OF_A_TENSOR: Final = 8 + 1 + 4 + 8 + 4 + 8


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor's entry in a header."""

    name: str
    type: str  # ggml's name: "F16", "Q4_K", ...; "type 99" if unknown
    shape: tuple[int, ...]  # as NumPy has it: a weight is [out, in], and packed blocks lie along the last axis
    file: Path
    start: int  # its bytes in the file; those of an unknown type end at the next tensor
    stop: int

    @property
    def nbytes(self) -> int:
        """The bytes of its data."""
        return self.stop - self.start

    @property
    def dtype(self) -> str:
        """What it is when it is read, by safetensors' name: "F32", "F16" or "BF16"."""
        return self.type if self.type in FLOATS else "F32"


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of a GGUF file, and the file's stamp when it was read."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]  # in the order of their data
    metadata_stop: int  # where the metadata ends
    data_start: int
    crc32: int  # of the bytes before the data
    stamp: Stamp


def read_header(path: Path) -> Header:
    """The header of one file. Raises `CheckpointError`."""
    try:
        with opened(path) as descriptor:
            found = stamp(os.fstat(descriptor))
            cursor = Cursor(path, descriptor, found.size)
            keys, tensors = _counts(cursor)
            metadata = _metadata(cursor, keys)
            metadata_stop = cursor.position
            entries = _entries(cursor, tensors)
            alignment = _alignment(path, metadata)
            padding = -cursor.position % alignment
            cursor.require(padding if entries else min(padding, cursor.left), "the padding before the tensors")
    except MISSING:
        raise missing(path) from None
    start = cursor.position
    checked = _checked(path, entries, start, found.size, alignment)
    return Header(metadata, checked, metadata_stop, start, zlib.crc32(cursor.data[:start]), found)


def _counts(cursor: Cursor) -> tuple[int, int]:
    """The numbers of keys and of tensors."""
    path = cursor.path
    cursor.require(min(4, cursor.left), "the first bytes")
    magic = cursor.data[:4]
    if not magic:
        raise CheckpointError(f"{shown(path)} is empty; download the file again")
    if magic != b"GGUF":
        raise CheckpointError(
            f"{shown(path)} is not a GGUF file: it begins with {magic!r} and not with b'GGUF'; choose another file"
        )
    version = cursor.u32("the version")
    if version and version & 0xFFFF == 0:
        raise CheckpointError(f"{shown(path)} is big-endian; make it again in little-endian order, or get another one")
    if version not in (2, 3):
        fix = "make it again with a current llama.cpp, or get a newer one" if version < 2 else "update gptjax"
        raise CheckpointError(f"{shown(path)} is GGUF version {version}, and gptjax reads 2 and 3; {fix}")
    tensors, keys = cursor.u64("the number of tensors"), cursor.u64("the number of keys")
    for count, least, what in ((tensors, _LEAST_OF_A_TENSOR, "tensors"), (keys, _LEAST_OF_A_KEY, "keys")):
        if count * least > cursor.left:
            raise damaged(path, f"it claims {count:,} {what}, but has only {cursor.left:,} bytes after that")
        if count > MAX_TENSORS:
            raise damaged(path, f"it claims {count:,} {what}; at most {MAX_TENSORS:,} are accepted")
    return keys, tensors


def _metadata(cursor: Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for number in range(1, count + 1):
        key = cursor.name(f"the name of key {number} of {count}")
        what = f"the value of {shown(repr(key))}"
        if key in metadata:
            raise damaged(cursor.path, f"the key {shown(repr(key))} occurs twice")
        metadata[key] = cursor.value(cursor.u32(what), what)
    return metadata


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise damaged(
            path,
            f"general.alignment is {quoted(alignment)}, expected a power of two up to {MAX_ALIGNMENT:,}",
        )
    return alignment


def _entries(cursor: Cursor, count: int) -> list[Tensor]:
    """The tensors, each checked on its own, with `start` and `stop` counted from the beginning of the data."""
    entries: dict[str, Tensor] = {}
    for number in range(1, count + 1):
        name = cursor.name(f"the name of tensor {number} of {count}")
        if name in entries:
            raise damaged(cursor.path, f"it has two tensors called {shown(repr(name))}")
        entries[name] = _entry(cursor, name)
    return list(entries.values())


def _entry(cursor: Cursor, name: str) -> Tensor:
    what = f"the entry of {shown(repr(name))}"
    dimensions = cursor.u32(what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise damaged(cursor.path, f"{shown(repr(name))} has {dimensions:,} dimensions, expected 1 to {MAX_DIMENSIONS}")
    shape = tuple(cursor.u64(what) for _ in range(dimensions))[::-1]
    number, start = cursor.u32(what), cursor.u64(what)
    type_name = NAMES.get(number, f"type {number}")
    if not 0 < math.prod(shape) < 2**63:
        raise damaged(cursor.path, f"{shown(repr(name))} has the invalid shape {list(shape)}")
    block = BLOCKS[type_name][0] if type_name in BLOCKS else 1
    if shape[-1] % block:
        raise damaged(
            cursor.path,
            f"{shown(repr(name))}, {type_name} {list(shape)}, has rows that are not whole blocks of {block}",
        )
    size = nbytes(type_name, shape) if type_name in BLOCKS else 0
    return Tensor(name, type_name, shape, cursor.path, start, start + size)


def _checked(path: Path, entries: list[Tensor], data_start: int, size: int, alignment: int) -> dict[str, Tensor]:
    """The tensors in the order of their data, which must be in the file and apart from each other."""
    tensors: dict[str, Tensor] = {}
    entries = sorted(entries, key=lambda entry: (entry.start, entry.stop))
    limits = [*(entry.start for entry in entries), size - data_start][1:]
    for entry, limit in zip(entries, limits, strict=True):
        name = shown(repr(entry.name))
        if entry.start % alignment:
            raise damaged(path, f"the data of {name} begins at {entry.start:,}, not at a multiple of {alignment:,}")
        if max(entry.start + 1, entry.stop) > size - data_start:
            end = data_start + max(entry.start + 1, entry.stop)
            raise damaged(path, f"the data of {name} ends at byte {end:,}, but the file has {size:,}")
        if max(entry.start + 1, entry.stop) > limit:
            raise damaged(path, f"the data of {name} overlaps another tensor's")
        stop = entry.stop if entry.type in BLOCKS else limit
        tensors[entry.name] = dataclasses.replace(entry, start=data_start + entry.start, stop=data_start + stop)
    return tensors
