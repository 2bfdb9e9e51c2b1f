"""What a hand-made hostile file is, and what several of them are made of."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Make = Callable[[Path], object]


class Row(NamedTuple):
    make: Make
    said: str  # part of the error


class Group(NamedTuple):
    """Rows of one format."""

    read: Callable[[Path], object]
    file: str  # which the error names
    rows: dict[str, Row]


HUGE = 2**64 - 1
DEEP = "[" * 100_000 + "]" * 100_000
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


def put(name: str, data: bytes | str) -> Make:
    return lambda directory: (directory / name).write_bytes(data if isinstance(data, bytes) else data.encode())
