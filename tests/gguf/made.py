"""GGUF files for tests, sound ones and hostile ones, written by hand from the format's specification."""

import random
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
PACKING = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}

# Sizes, types and lengths at which something might go wrong.
NUMBERS = [0, 1, 2, 7, 8, 9, 13, 31, 32, 33, 255, 2**16, 2**31, 2**32 - 1, 2**32, 2**61, 2**63 - 1, 2**63, 2**64 - 1]


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


def tokenizer(**changes: bytes) -> dict[str, bytes]:
    """The metadata of a tokenizer of a few letters."""
    values = {
        "model": string("gpt2"),
        "pre": string("gpt-2"),
        "tokens": array(STRING, ["a", "b", "ab", "<s>"]),
        "token_type": array(I32, [1, 1, 1, 3]),
        "merges": array(STRING, ["a b"]),
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


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


def bent(rng: random.Random, data: bytes) -> bytes:
    """A file with random changes: cut, bytes inserted, removed or repeated, bits flipped, numbers replaced."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at, kind = rng.randrange(len(changed) + 1), rng.randrange(8)
        if kind == 0:
            del changed[at:]
        elif kind == 1:
            changed[at:at] = rng.randbytes(rng.randrange(1, 40))
        elif kind == 2:
            del changed[at : at + rng.randrange(1, 40)]
        elif kind == 3:
            start = rng.randrange(len(changed) + 1)
            changed[at:at] = changed[start : start + rng.randrange(1, 200)]
        elif kind < 6 and changed:
            at %= len(changed)
            changed[at] = rng.choice((rng.randrange(256), changed[at] ^ 1 << rng.randrange(8)))
        else:
            value, size = rng.choice(NUMBERS) + rng.randrange(-2, 3), rng.choice((1, 2, 4, 8))
            changed[at : at + size] = value.to_bytes(16, "little", signed=True)[:size]
    return bytes(changed)
