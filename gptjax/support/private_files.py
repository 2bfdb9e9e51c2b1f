"""Files that nobody but this user can have written, of bounded size in all: for what is trusted when it is read."""

import contextlib
import hashlib
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

_MAGIC = b"gptjax 1\n"
_NUMBER = 8  # bytes of a length
_DIGEST = hashlib.sha256().digest_size
_START = len(_MAGIC) + 2 * (_NUMBER + _DIGEST)  # bytes before the head
_PARTIAL = ".partial"
_ABANDONED = 3600.0  # seconds after which a partial file is what a killed process left
_log = logging.getLogger(__name__)


class _UntrustedError(Exception):
    """Why a directory or a file is not used."""


class PrivateFiles:
    """Files of a head and a body each. Several processes may read and write them at the same time.

    A file is read only if it and its directory belong to this user, nobody else may write to either, neither is a
    symbolic link, and what is read has the digest that the file begins with. Files appear whole or not at all. What is
    wrong is logged once, and is never an error.
    """

    def __init__(self, directory: Path, *, most_bytes: int):
        """Touches nothing yet.

        Args:
          most_bytes: of all files together. To make room, those that were not used for longest are removed.
        """
        self._directory = directory
        self._most_bytes = most_bytes
        self._logged: set[str] = set()

    def problem(self) -> str | None:
        """Why nothing in the directory is read; None if it is, or if there is no such directory."""
        try:
            with self._opened():
                return None
        except FileNotFoundError:
            return None
        except (OSError, _UntrustedError) as error:
            return str(error)

    def head(self, name: str) -> bytes | None:
        """The head of a file; None if there is no such file, or none to be trusted."""
        return self._read(name, body=False)

    def body(self, name: str) -> bytes | None:
        """The body of a file, likewise. The file counts as used now."""
        return self._read(name, body=True)

    def write(self, name: str, head: bytes, body: bytes) -> None:
        """Writes or replaces a file, if that is possible."""
        if _START + len(head) + len(body) > self._most_bytes:
            return
        partial = f"{name}.{secrets.token_hex(8)}{_PARTIAL}"
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._opened() as directory:
                try:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                    with open(os.open(partial, flags, 0o600, dir_fd=directory), "wb") as file:
                        file.writelines((_MAGIC, *map(_stamp, (head, body)), head, body))
                    os.rename(partial, name, src_dir_fd=directory, dst_dir_fd=directory)
                finally:
                    with contextlib.suppress(FileNotFoundError):  # it has its name
                        os.unlink(partial, dir_fd=directory)
                self._make_room(directory)
        except (OSError, _UntrustedError) as error:
            self._log(f"compiled programs are not kept in {self._directory}: {error}")

    def remove(self, name: str) -> None:
        """Removes a file, if that is possible."""
        with contextlib.suppress(OSError, _UntrustedError), self._opened() as directory:
            os.unlink(name, dir_fd=directory)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """Yields a descriptor of the directory: what was checked is what is used."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._directory, flags)
        try:
            _check(os.fstat(descriptor))
            yield descriptor
        finally:
            os.close(descriptor)

    def _read(self, name: str, *, body: bool) -> bytes | None:
        where = self._directory
        try:
            with self._opened() as directory:
                where /= name
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                descriptor = os.open(name, flags, dir_fd=directory)
                try:
                    return _part(descriptor, body=body)
                finally:
                    os.close(descriptor)
        except FileNotFoundError:
            return None
        except (OSError, _UntrustedError) as error:
            self._log(f"{where} is not read, and programs are compiled instead: {error}")
            return None

    def _make_room(self, directory: int) -> None:
        found = []
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):  # another process may remove the same
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                if not name.endswith(_PARTIAL):
                    found.append((status.st_mtime, status.st_size, name))
                elif status.st_mtime < time.time() - _ABANDONED:
                    os.unlink(name, dir_fd=directory)
        left = sum(size for _, size, _ in found)
        for _, size, name in sorted(found):
            if left <= self._most_bytes:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
            left -= size

    def _log(self, message: str) -> None:
        if message not in self._logged:
            self._logged.add(message)
            _log.warning(message)


def _stamp(part: bytes) -> bytes:
    return len(part).to_bytes(_NUMBER, "little") + hashlib.sha256(part).digest()


def _part(descriptor: int, *, body: bool) -> bytes:
    """The head or the body of an open file."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise _UntrustedError("it is not a regular file")
    _check(status)
    start = os.pread(descriptor, _START, 0)
    stamps = [start[-2 * (_NUMBER + _DIGEST) : -(_NUMBER + _DIGEST)], start[-(_NUMBER + _DIGEST) :]]
    lengths = [int.from_bytes(each[:_NUMBER], "little") for each in stamps]
    if not start.startswith(_MAGIC) or status.st_size != _START + sum(lengths):
        raise _UntrustedError("it is damaged")
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(_START + (lengths[0] if body else 0))
        part = file.read(lengths[body])
    if _stamp(part) != stamps[body]:
        raise _UntrustedError("it is damaged")
    if body:
        os.utime(descriptor)
    return part


def _check(status: os.stat_result) -> None:
    """Raises `_UntrustedError` if anybody but this user may have written something. (The superuser always may.)"""
    if status.st_uid != os.geteuid():
        raise _UntrustedError(f"it belongs to user {status.st_uid}, not to user {os.geteuid()}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _UntrustedError("others may write to it; remove it, or change that with chmod go-w")
