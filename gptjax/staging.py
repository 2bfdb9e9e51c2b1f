"""A directory that appears whole or not at all.

It is written under a hidden name beside its destination, `.NAME.partial-PID`, and renamed when it is complete and on
disk. The hidden directory is locked while its process lives, so that whoever comes next can tell a leftover of a
killed process from the work of a living one.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from gptjax.errors import CheckpointError


@contextlib.contextmanager
def staged(destination: Path, *, overwrite: bool, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yields an empty directory that becomes `destination` when the body ends, and vanishes when it raises.

    Args:
      destination: where the directory is to be; its parent must exist.
      overwrite: replace what is there, provided that it is `ours`. The old one stays in place until the new one is
        complete, and is moved back where the exchange fails; killed between two renames, it is put back by the next
        call.
      ours: whether a directory is of the kind that may be overwritten.

    Raises:
      CheckpointError: the destination exists, has no parent or cannot be written.
    """
    destination = Path(os.path.realpath(destination))
    if not destination.parent.is_dir():
        raise CheckpointError(
            f"{destination.parent} does not exist, so {destination.name} cannot be written into it; "
            f"create it first: mkdir -p {destination.parent}"
        )
    partial = _sibling(destination, "partial")
    try:
        _clean(destination)
        _check_free(destination, overwrite, ours)
        partial.mkdir()
        with _locked(partial):
            try:
                yield partial
                _sync(partial)
                _publish(partial, destination, overwrite)
            finally:
                if partial.exists():
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise unwritable(destination, error) from error


def unwritable(destination: Path, error: Exception) -> CheckpointError:
    """What to say where writing failed."""
    number, text = getattr(error, "errno", None), str(error)
    if number == errno.EEXIST or number == errno.ENOTEMPTY:
        return CheckpointError(
            f"{destination} is being written by another process; wait for it or name another directory"
        )
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "quota" in text:
        fix = "the disk is full: free some space or name a directory on another disk"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
        fix = "change its permissions or name a directory that you may write to"
    else:
        fix = "check the disk and its permissions, or name another directory"
    return CheckpointError(f"{destination} cannot be written ({text}); {fix}; nothing was left behind")


def _sibling(destination: Path, kind: str) -> Path:
    return destination.with_name(f".{destination.name}.{kind}-{os.getpid()}")


def _check_free(destination: Path, overwrite: bool, ours: Callable[[Path], bool]) -> None:
    if not os.path.lexists(destination):
        return
    if not overwrite:
        raise CheckpointError(
            f"{destination} exists; name another directory, or pass overwrite=True (--overwrite) to replace it"
        )
    if not ours(destination):
        raise CheckpointError(
            f"{destination} exists and was not written by gptjax, so it is not overwritten; name another directory, "
            "or remove it yourself if nothing in it is needed"
        )


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Whether the lock of a directory could be had, which is let go of at the end. The system does so for the dead."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _clean(destination: Path) -> None:
    """Removes what killed processes left beside a destination, and puts back a directory they had moved aside."""
    pattern = re.compile(rf"\.{re.escape(destination.name)}\.(partial|old)-\d+")
    for name in os.listdir(destination.parent):
        match, path = pattern.fullmatch(name), destination.parent / name
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        with _locked(path) as dead:
            if dead and match[1] == "old" and not os.path.lexists(destination):
                os.rename(path, destination)
            elif dead:
                shutil.rmtree(path)


def _sync(directory: Path) -> None:
    for folder, _, files in os.walk(directory):
        for path in (*(os.path.join(folder, file) for file in files), folder):
            _sync_one(path)


def _sync_one(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(partial: Path, destination: Path, overwrite: bool) -> None:
    if not (overwrite and destination.exists()):
        os.rename(partial, destination)
        _sync_one(destination.parent)
        return
    old = _sibling(destination, "old")
    with _locked(destination):
        try:
            os.rename(destination, old)
            os.rename(partial, destination)
        except BaseException:
            if old.exists() and not destination.exists():
                os.rename(old, destination)
            raise
        _sync_one(destination.parent)
        os.rename(old, partial)  # killed while half of it is deleted, it must not be put back
        shutil.rmtree(partial, ignore_errors=True)
