"""Reads untrusted files: text and JSON in bounded memory, with errors that say what to do.

A name in a checkpoint's directory may be a pipe, a device, a circular link or a sparse terabyte. Everything here opens
only regular files, never blocks, and reads no more than the file's limit.
"""

import contextlib
import errno
import itertools
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

from gptjax.errors import CheckpointError
from gptjax.support.quoting import shown

LIMITS: Final[Mapping[str, int]] = {  # bytes; GPT-OSS's tokenizer.json, the largest, has 28 million
    "tokenizer.json": 64 << 20,
    "vocab.json": 64 << 20,
    "merges.txt": 64 << 20,
    "manifest.json": 64 << 20,
    "config.json": 4 << 20,
    "generation_config.json": 1 << 20,
}
OTHER_LIMIT: Final = 16 << 20  # for files not listed above
MAX_DEPTH: Final = 64  # of JSON; Python versions differ in how deep their parser goes before it fails
MAX_CONTAINERS: Final = 1 << 22  # arrays and objects in a JSON file; GPT-OSS's tokenizer.json has 450,000
MISSING: Final = (FileNotFoundError, NotADirectoryError)  # what opening a file that does not exist raises

_FIXES: Final = {
    errno.ELOOP: "its symbolic links form a loop; replace them with the file",
    errno.ENAMETOOLONG: "use a shorter name",
}
_NOT_BRACKETS: Final = bytes(set(range(256)) - set(b'"[]{}'))
_DELTAS: Final = [{ord("["): 1, ord("{"): 1}.get(byte, -1) for byte in range(256)]


class Stamp(NamedTuple):
    """Identifies a file's version: changes when the file is rewritten or replaced."""

    size: int
    modified_ns: int
    inode: int
    device: int


def stamp(status: os.stat_result) -> Stamp:
    """The stamp of a file."""
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[int]:
    """Yields a descriptor for reading a regular file, and closes it at the end.

    Raises:
      FileNotFoundError, NotADirectoryError (`MISSING`): the file does not exist.
      CheckpointError: it is not a regular file, cannot be opened, or fails while being read.
    """
    try:
        _check_regular(path, os.stat(path))  # first, because opening a device may have side effects
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except MISSING:
        if os.path.islink(path):
            raise CheckpointError(f"{shown(path)} links to a file that does not exist; download the file") from None
        raise
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:  # a NUL, or half a surrogate pair
        raise CheckpointError(f"{shown(path)} cannot be a file ({error}); use another name") from None
    try:
        _check_regular(path, os.fstat(descriptor))  # it may have been replaced in between
        yield descriptor
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(descriptor)


def _check_regular(path: str | os.PathLike[str], status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe, a device or the like"
        raise CheckpointError(
            f"{shown(path)} cannot be read: it is {kind}, not a regular file; put the file itself there"
        )


def _unreadable(path: str | os.PathLike[str], error: OSError) -> CheckpointError:
    fix = _FIXES.get(error.errno or 0, "check its permissions")
    return CheckpointError(f"{shown(path)} cannot be read ({error.strerror}): {fix}")


def read_bytes(path: Path, limit: int | None = None) -> bytes | None:
    """The bytes of a file, or None if it does not exist.

    Args:
      path: the file.
      limit: the most bytes to read; by default, the limit for its name in `LIMITS`.

    Raises:
      CheckpointError: the file is too large, is not a regular file, or cannot be read.
    """
    limit = LIMITS.get(path.name, OTHER_LIMIT) if limit is None else limit
    try:
        with opened(path) as descriptor:
            parts, left = [], limit + 1 if os.fstat(descriptor).st_size <= limit else 0
            while left and (part := os.read(descriptor, min(left, 1 << 20))):
                parts.append(part)
                left -= len(part)
    except MISSING:
        return None
    if not left:
        raise CheckpointError(f"{shown(path)} is larger than the limit of {limit:,} bytes; download it again")
    return b"".join(parts)


def read_text(path: Path) -> str | None:
    """The text of a UTF-8 file, or None if it does not exist. Raises `CheckpointError` if it is unreadable."""
    data = read_bytes(path)
    if data is None:
        return None
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise_damaged(path, f"not valid JSON or text ({error})")
    if text.startswith("version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` there")
    return text


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None if the file does not exist. Raises `CheckpointError` if it is damaged."""
    text = read_text(path)
    if text is None:
        return None
    try:
        value = parse_json(text)
    except ValueError as error:
        raise_damaged(path, f"not valid JSON ({error})")
    if not isinstance(value, dict):
        raise_damaged(path, f"it contains a JSON {type(value).__name__}, not an object")
    return value


def parse_json(text: str, *, strict: bool = False) -> Any:
    """Parses JSON text of bounded nesting, so that the parser does not overflow its stack.

    Args:
      text: the JSON.
      strict: reject duplicate keys, and NaN and infinity, which Python accepts but JSON does not have.

    Raises:
      ValueError: invalid JSON, more than MAX_DEPTH levels, or more than MAX_CONTAINERS arrays and objects.
    """
    _check_nesting(text)
    try:
        if strict:
            return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        return json.loads(text)
    except RecursionError:  # called from deep within a program
        raise ValueError("it is nested too deeply") from None


def _check_nesting(text: str) -> None:
    # Measures correctly up to the first syntax error, and no parser gets beyond that.
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    data = text.replace("\\\\", "").replace('\\"', "").encode("utf-8", "surrogatepass")
    # Adjacent quotes can be dropped: inside a string stays inside, and outside stays outside.
    data = data.translate(None, delete=_NOT_BRACKETS).replace(b'""', b"")
    data = re.sub(rb'"[^"]*("|$)', b"", data)
    if data.count(b"[") + data.count(b"{") > MAX_CONTAINERS:
        raise ValueError(f"it has more than {MAX_CONTAINERS:,} arrays and objects")
    if max(itertools.accumulate(map(_DELTAS.__getitem__, data)), default=0) > MAX_DEPTH:
        raise ValueError(f"it is nested too deeply, more than {MAX_DEPTH} levels")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        doubled = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(repr(doubled))} occurs twice")
    return keys


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def raise_damaged(path: Path, what: str) -> NoReturn:
    """Raises the `CheckpointError` for a damaged file."""
    raise CheckpointError(f"{path} is damaged: {what}; download it again")
