"""GGUF files for tests, sound ones and hostile ones, written by hand from the format's specification."""

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
PACKING = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}


class Entry(NamedTuple):
    """A tensor: its type's number, its dimensions as the file has them (the row's length first), and its data."""

    type: int
    dims: Sequence[int]
    data: bytes = b""
    offset: int | None = None  # by default after the tensor before it


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def number(kind: int, value: float) -> bytes:
    """A value of metadata, with its type."""
    return struct.pack(f"<I{PACKING[kind]}", kind, value)


def string(value: str | bytes) -> bytes:
    return struct.pack("<I", STRING) + text(value)


def array(kind: int, values: Sequence, count: int | None = None) -> bytes:
    payload = b"".join(text(each) if kind == STRING else struct.pack(f"<{PACKING[kind]}", each) for each in values)
    return struct.pack("<IIQ", ARRAY, kind, len(values) if count is None else count) + payload


def header(
    metadata: Mapping[str | bytes, bytes] | Sequence[tuple[str | bytes, bytes]] = (),
    entries: Mapping[str | bytes, Entry] | Sequence[tuple[str | bytes, Entry]] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    keys: int | None = None,
    tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file without the tensors' data."""
    pairs = list(metadata.items() if isinstance(metadata, Mapping) else metadata)
    named = list(entries.items() if isinstance(entries, Mapping) else entries)
    counts = (len(named) if tensors is None else tensors, len(pairs) if keys is None else keys)
    parts = [magic, struct.pack("<IQQ", version, *counts)]
    parts += [text(key) + value for key, value in pairs]
    position = 0
    for name, entry in named:
        offset = position if entry.offset is None else entry.offset
        dims = struct.pack(f"<I{len(entry.dims)}Q", len(entry.dims), *entry.dims)
        parts.append(text(name) + dims + struct.pack("<IQ", entry.type, offset))
        position = -(-(offset + len(entry.data)) // alignment) * alignment
    return b"".join(parts)


def file(metadata=(), entries=(), *, alignment: int = 32, **changes) -> bytes:
    """A whole file."""
    parts = [padded(header(metadata, entries, alignment=alignment, **changes), alignment)]
    named = entries.values() if isinstance(entries, Mapping) else [entry for _, entry in entries]
    parts += [padded(entry.data, alignment) for entry in named]
    return b"".join(parts)


def padded(data: bytes, alignment: int = 32) -> bytes:
    return data + bytes(-len(data) % alignment)
