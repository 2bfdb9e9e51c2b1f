"""The header of a safetensors file, read within limits and checked before any data is read.

The `safetensors` library reads each header too, as a second opinion; also checked here are duplicate keys, NaN in the
JSON, the number of tensors, and that the file is exactly as long as its header says.

Format: https://huggingface.co/docs/safetensors, "Format".
"""

import contextlib
import dataclasses
import math
import os
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from gptjax.checkpoints.foreign import refusal
from gptjax.errors import CheckpointError
from gptjax.support.files import MISSING, Stamp, opened, parse_json, stamp
from gptjax.support.quoting import shown
from gptjax.support.raw import missing, truncated

MAX_HEADER_BYTES: Final = 16 << 20  # GPT-OSS 120b has 543 tensors in headers of 60 kB
MAX_TENSORS: Final = 1 << 16

NUMPY_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {  # what can be read; tensors of other dtypes are only listed
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
}
_BITS: Final = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32},
    **{"U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in a header."""

    name: str
    dtype: str  # safetensors' name: "F32", "BF16", ...
    shape: tuple[int, ...]
    file: Path
    start: int  # its bytes in the file
    stop: int


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of a safetensors file, and the file's stamp when it was read."""

    tensors: dict[str, TensorInfo]  # in the order of their data
    data_start: int
    crc32: int  # of the bytes before the data
    stamp: Stamp


def read_header(path: Path) -> Header:
    """The header of one safetensors file. Raises `CheckpointError`."""
    try:
        reason = refusal(path)
        if reason is not None:
            raise CheckpointError(reason)
        with opened(path) as descriptor:
            found = stamp(os.fstat(descriptor))
            first = os.pread(descriptor, 8, 0)
            (length,) = struct.unpack("<Q", first.ljust(8, b"\0"))
            if length > MAX_HEADER_BYTES:
                raise _damaged(path, f"its header claims {length:,} bytes; at most {MAX_HEADER_BYTES:,} are accepted")
            if found.size < max(8 + length, 10):
                raise truncated(path, max(8 + length, 10), found.size)
            text = os.pread(descriptor, length, 8)
    except MISSING:
        raise missing(path) from None
    if len(text) < length:
        raise truncated(path, 8 + length, 8 + len(text))
    tensors = _infos(path, text, data_start=8 + length)
    end = max((info.stop for info in tensors.values()), default=8 + length)
    if found.size < end:
        raise truncated(path, end, found.size)
    if found.size > end:
        raise _damaged(path, f"it has {found.size:,} bytes, but its header accounts for {end:,}")
    _ask_library(path, first + text, found.size)
    return Header(tensors, 8 + length, zlib.crc32(first + text), found)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{shown(path)} is not a valid safetensors file: {what}; download the file again")


def parse(text: bytes) -> dict[str, Any]:
    """Parses a JSON object strictly: no duplicate keys, no NaN. Raises `ValueError`."""
    raw = parse_json(text.decode("utf-8"), strict=True)
    if not isinstance(raw, dict):
        raise ValueError(f"it is a JSON {type(raw).__name__}, expected an object")
    return raw


def _infos(path: Path, text: bytes, data_start: int) -> dict[str, TensorInfo]:
    try:
        raw = parse(text)
    except ValueError as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from None
    raw.pop("__metadata__", None)
    if len(raw) > MAX_TENSORS:
        raise _damaged(path, f"it lists {len(raw):,} tensors; at most {MAX_TENSORS:,} are accepted")
    infos = [_info(path, name, entry, data_start) for name, entry in raw.items()]
    infos.sort(key=lambda info: (info.start, info.stop))
    position = data_start
    for info in infos:
        if info.start != position:
            raise _damaged(path, f"the data of {shown(repr(info.name))} overlaps another tensor's or leaves a gap")
        position = info.stop
    return {info.name: info for info in infos}


def _info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"its entry {shown(repr(name))} does not consist of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _damaged(path, f"{shown(repr(name))} has the unknown dtype {shown(repr(dtype))}")
    if not _sizes(shape) or len(shape) > 32:
        raise _damaged(path, f"{shown(repr(name))} has the invalid shape {shown(repr(shape))}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"{shown(repr(name))} has the invalid data_offsets {shown(repr(offsets))}")
    if math.prod(shape) * _BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise _damaged(path, f"{shown(repr(name))}, {dtype} {shape}, has {offsets[1] - offsets[0]:,} bytes of data")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0], data_start + offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _ask_library(path: Path, beginning: bytes, size: int) -> None:
    import safetensors

    try:
        with _stand_in(path, beginning, size) as file, safetensors.safe_open(file, framework="np"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, f"the safetensors library says: {shown(error)}") from None


@contextlib.contextmanager
def _stand_in(path: Path, beginning: bytes, size: int) -> Iterator[str]:
    """The name of a sparse file in memory with the same beginning and size, for the library to read.

    The library maps the file it reads; if someone truncated the real one meanwhile, SIGBUS would kill the process.
    """
    if sys.platform != "linux":
        yield str(path)
        return
    descriptor = os.memfd_create("safetensors header")
    try:
        os.write(descriptor, beginning)
        os.ftruncate(descriptor, size)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
