"""A directory that appears whole or not at all.

It is written to a hidden directory next to the destination and renamed once it is complete and on disk:

    .NAME.partial-xxxxxxxx/   random name; locked while its process lives
      gptjax-staging          marks the directory as ours
      new/                    becomes the destination
      old/                    the previous destination, between the two renames of an exchange
      discarded/              the previous destination, once the exchange is done

The lock distinguishes the remains of a killed process from the work of a live one. The mark distinguishes both from
someone else's directory with such a name, which is never deleted or moved.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from gptjax.errors import CheckpointError
from gptjax.support.files import read_bytes
from gptjax.support.quoting import shown

_MARK: Final = "gptjax-staging"
_MARKED: Final = b"gptjax writes a checkpoint here. What it leaves when it is killed is removed by its next run.\n"


@contextlib.contextmanager
def staged(destination: Path, *, overwrite: bool, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yields an empty directory that becomes `destination` when the body ends, and vanishes if it raises.

    Args:
      destination: the final directory; its parent must exist.
      overwrite: replace an existing directory if it is `ours`. The old one stays in place until the new one is
        complete, and is moved back if the exchange fails; if the process is killed between the two renames, the next
        call moves it back.
      ours: whether a directory may be overwritten.

    Raises:
      CheckpointError: the destination exists, has no parent directory or cannot be written.
    """
    destination = _real(destination)
    if not os.path.isdir(destination.parent):
        raise CheckpointError(
            f"{shown(destination.parent)} does not exist, so {shown(destination.name)} cannot be written to it; "
            f"create it first: mkdir -p {shown(destination.parent)}"
        )
    try:
        _clean(destination)
        _check_free(destination, overwrite, ours)
        staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.parent))
        with _locked(staging):
            try:
                (staging / _MARK).write_bytes(_MARKED)
                new = staging / "new"
                new.mkdir()
                yield new
                _sync(new)
                _publish(staging, destination, overwrite)
            finally:
                _remove(staging)
    except OSError as error:
        raise unwritable(destination, error) from error


def _real(destination: Path) -> Path:
    try:
        return Path(os.path.realpath(destination))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{shown(destination)} cannot be a directory ({error}); name another one") from None


def unwritable(destination: Path, error: Exception) -> CheckpointError:
    """The error for a failed write."""
    number, text = getattr(error, "errno", None), str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    if number == errno.EEXIST or number == errno.ENOTEMPTY:
        return CheckpointError(
            f"{shown(destination)} is being written by another process; wait for it or name another directory"
        )
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "quota" in text:
        fix = "the disk is full: free some space or name a directory on another disk"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
        fix = "change its permissions or name a directory that you may write to"
    else:
        fix = "check the disk and its permissions, or name another directory"
    return CheckpointError(f"{shown(destination)} cannot be written ({shown(text)}); {fix}; nothing was left behind")


def _check_free(destination: Path, overwrite: bool, ours: Callable[[Path], bool]) -> None:
    if not os.path.lexists(destination):
        return
    if not overwrite:
        raise CheckpointError(
            f"{shown(destination)} exists; name another directory, or pass overwrite=True (--overwrite) to replace it"
        )
    if not ours(destination):
        raise CheckpointError(
            f"{shown(destination)} exists and was not written by gptjax, so it will not be overwritten; name another "
            "directory, or remove it yourself if you do not need it"
        )


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Yields whether the directory could be locked; unlocks it at the end. The system does so for killed processes."""
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
    """Removes what killed processes left next to a destination, and restores a directory they had moved aside."""
    pattern = re.compile(rf"\.{re.escape(destination.name)}\.partial-\w{{8}}", re.ASCII)
    for name in os.listdir(destination.parent):
        path = destination.parent / name
        if pattern.fullmatch(name) is None or path.is_symlink() or not path.is_dir() or not _is_marked(path):
            continue
        with _locked(path) as dead:
            if not dead:
                continue
            if (path / "old").is_dir():
                os.rename(path / "old", path / "discarded" if os.path.lexists(destination) else destination)
            _remove(path)


def _is_marked(staging: Path) -> bool:
    try:
        return read_bytes(staging / _MARK, len(_MARKED)) == _MARKED
    except CheckpointError:
        return False


def _remove(staging: Path) -> None:
    """Deletes a staging directory, except for an old checkpoint that could not be moved back.

    The mark goes last, so that if the process is killed here, the remains are still marked.
    """
    for name in ("discarded", "new"):
        if (staging / name).exists():
            shutil.rmtree(staging / name, ignore_errors=True)
    if not (staging / "old").exists():
        with contextlib.suppress(FileNotFoundError):
            os.remove(staging / _MARK)
        with contextlib.suppress(OSError):
            os.rmdir(staging)  # fails if someone else has put something in it


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


def _publish(staging: Path, destination: Path, overwrite: bool) -> None:
    new, old = staging / "new", staging / "old"
    if not (overwrite and destination.exists()):
        os.rename(new, destination)
        _sync_one(destination.parent)
        return
    try:
        os.rename(destination, old)
        os.rename(new, destination)
    except BaseException:
        if old.exists() and not destination.exists():
            os.rename(old, destination)
        raise
    _sync_one(destination.parent)
    os.rename(old, staging / "discarded")  # so that it is not restored if we are killed with half of it deleted
