"""Reads the parts of a GGUF header in order. Checks each length against the bytes left before it allocates anything."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from gptjax.errors import CheckpointError
from gptjax.support.quoting import shown
from gptjax.support.raw import truncated

MAX_HEADER_BYTES: Final = 64 << 20  # the largest published vocabularies take 16 million
MAX_ITEMS: Final = 1 << 22  # of all arrays; gpt-oss's vocabulary has 850,000
_FIRST_READ: Final = 1 << 18

STRING, ARRAY, BOOL = 8, 9, 7
_NUMBERS: Final[Mapping[int, np.dtype[Any]]] = {
    **{number: np.dtype(f"<{code}") for number, code in enumerate(("u1", "i1", "u2", "i2", "u4", "i4", "f4"))},
    **{BOOL: np.dtype("u1"), 10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8")},
}


def damaged(path: Path, what: str) -> CheckpointError:
    """The error for a file that breaks the format's rules."""
    return CheckpointError(f"{shown(path)} is not a valid GGUF file: {what}; download the file again")


class Cursor:
    """A position in a header, from byte 0 on. Every method raises `CheckpointError` if the file is too short."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self.path, self.position, self.data = path, 0, b""
        self._descriptor, self._size, self._items = descriptor, size, 0

    @property
    def left(self) -> int:
        """The bytes between here and the end of the file."""
        return self._size - self.position

    def require(self, count: int, what: str) -> int:
        """Has the next `count` bytes in `data`, and moves past them. Returns where they begin."""
        start, end = self.position, self.position + count
        if end > len(self.data):
            self._read(end, what)
        self.position = end
        return start

    def _read(self, end: int, what: str) -> None:
        if end > self._size:
            needed = end - self.position
            raise damaged(self.path, f"{what} would need {needed:,} more bytes, but the file has only {self.left:,}")
        if end > MAX_HEADER_BYTES:
            raise damaged(self.path, f"{what} ends beyond the {MAX_HEADER_BYTES:,} bytes that a header may have")
        while len(self.data) < end:
            wanted = max(end - len(self.data), len(self.data), _FIRST_READ)
            part = os.pread(self._descriptor, wanted, len(self.data))
            if not part:  # somebody cut the file meanwhile
                raise truncated(self.path, end, len(self.data))
            self.data += part

    def u32(self, what: str) -> int:
        """An unsigned number of 32 bits."""
        start = self.require(4, what)
        return int.from_bytes(self.data[start : start + 4], "little")

    def u64(self, what: str) -> int:
        """An unsigned number of 64 bits."""
        start = self.require(8, what)  # on its own line, because it replaces `data`
        return int.from_bytes(self.data[start : start + 8], "little")

    def text(self, what: str) -> str:
        """A string, which must be UTF-8."""
        start = self.require(self.u64(what), what)
        try:
            return self.data[start : self.position].decode()
        except UnicodeDecodeError as error:
            raise damaged(self.path, f"{what} is not UTF-8 ({error.reason} at byte {error.start})") from None

    def name(self, what: str) -> str:
        """A string that is a name: not empty, and printable."""
        name = self.text(what)
        if not name.isprintable() or not 0 < len(name) <= 1 << 16:
            raise damaged(self.path, f"{what} is {shown(repr(name))}, which is not a name")
        return name

    def value(self, type_number: int, what: str) -> Any:
        """A value of metadata: int, float, bool, str or a list of one of these."""
        if type_number == ARRAY:
            item, count = self.u32(what), self.u64(what)
            if item == ARRAY:
                raise damaged(self.path, f"{what} is an array of arrays, which llama.cpp refuses, too")
            return self._values(item, count, what)
        return self._values(type_number, 1, what)[0]

    def _values(self, type_number: int, count: int, what: str) -> list[Any]:
        self._items += count
        if type_number != STRING and type_number not in _NUMBERS:
            raise damaged(self.path, f"{what} has values of the unknown type {type_number}")
        least = count * (8 if type_number == STRING else _NUMBERS[type_number].itemsize)
        if least > self.left:
            raise damaged(
                self.path, f"{what} claims {count:,} values, but the file has only {self.left:,} bytes after it"
            )
        if self._items > MAX_ITEMS:
            raise damaged(self.path, f"its metadata has more than {MAX_ITEMS:,} values")
        if type_number == STRING:
            return [self.text(what) for _ in range(count)]
        dtype = _NUMBERS[type_number]
        start = self.require(count * dtype.itemsize, what)
        numbers = np.frombuffer(self.data, dtype, count, start)
        if type_number != BOOL:
            return numbers.tolist()
        if count and numbers.max() > 1:
            raise damaged(self.path, f"{what} has a truth value that is neither 0 nor 1")
        return numbers.astype(np.bool_).tolist()
