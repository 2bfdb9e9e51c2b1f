"""A directory that appears whole or not at all.

It is written to a hidden directory next to the destination and renamed once it is complete and on disk:

    .NAME.partial/
      gptjax-staging          marks the directory as ours; locked while the process that writes here lives
      new/                    becomes the destination
      journal                 what is complete in new/, see `gptjax.checkpoints.journal`
      old/                    the previous destination, between the two renames of an exchange
      discarded/              the previous destination, once the exchange is done

The lock distinguishes the remains of a killed process, which the next one takes over, from the work of a live one. The
mark distinguishes both from someone else's directory with such a name, which is never deleted, moved or written to.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from gptjax.errors import CheckpointError
from gptjax.support.quoting import shown

JOURNAL: Final = "journal"
_MARK: Final = "gptjax-staging"
_MARKED: Final = b"gptjax writes a checkpoint here. If it is killed, its next run continues or removes this.\n"


@contextlib.contextmanager
def staged(destination: Path, *, overwrite: bool, ours: Callable[[Path], bool], resume: bool = False) -> Iterator[Path]:
    """Yields a directory that becomes `destination` when the body ends, and vanishes if it raises.

    Args:
      destination: the final directory; its parent must exist.
      overwrite: replace an existing directory if it is `ours`. The old one stays in place until the new one is
        complete, and is moved back if the exchange fails; if the process is killed between the two renames, the next
        call moves it back.
      ours: whether a directory may be overwritten.
      resume: keep the files of a killed process, unchecked; otherwise the directory is empty.

    Raises:
      CheckpointError: the destination exists, is being written by another process, has no parent directory or cannot
        be written.
    """
    destination = _real(destination)
    if not os.path.isdir(destination.parent):
        raise CheckpointError(
            f"{shown(destination.parent)} does not exist, so {shown(destination.name)} cannot be written to it; "
            f"create it first: mkdir -p {shown(destination.parent)}"
        )
    try:
        with _taken(destination) as staging:
            new = staging / "new"
            _put_back(staging, destination)
            try:
                _check_free(destination, overwrite, ours)
            except CheckpointError:
                if not os.path.lexists(new):  # otherwise a run with other options may continue it
                    _remove(staging)
                raise
            try:
                if not (resume and is_plain(new, stat.S_ISDIR)):
                    delete(staging / JOURNAL)
                    delete(new)
                    new.mkdir()
                yield new
                _sync(new)
                _publish(staging, destination, overwrite)
            finally:
                _remove(staging)
    except OSError as error:
        raise unwritable(destination, error) from error


def delete(path: Path) -> None:
    """Deletes a file, a link or a whole directory, if there is one; never follows a link."""
    if is_plain(path, stat.S_ISDIR):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)


def is_plain(path: str | Path, kind: Callable[[int], bool]) -> bool:
    """Whether a path is of this kind (`stat.S_ISDIR` or `stat.S_ISREG`), and not a link to one."""
    try:
        return kind(os.lstat(path).st_mode)
    except OSError:
        return False


def check_room(destination: Path, partial: Path, needed: int) -> None:
    """Raises `CheckpointError` if a staging directory's disk has fewer bytes free than are needed."""
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise CheckpointError(
            f"{shown(destination)} needs {needed / 1e6:,.0f} MB, but its disk has {free / 1e6:,.0f} MB free; "
            "free some space or name a directory on another disk"
        )


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
        return _busy(destination)
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
def _taken(destination: Path) -> Iterator[Path]:
    """Yields the destination's staging directory, locked; made if need be. The system unlocks it if we are killed."""
    staging = destination.parent / f".{destination.name}.partial"
    descriptor = None
    while descriptor is None:
        try:
            os.mkdir(staging, 0o700)
        except FileExistsError:
            if not _is_ours(staging):
                raise _in_the_way(staging, "gptjax did not make it, so it does not write") from None
        with contextlib.suppress(FileNotFoundError):  # the process before us has just removed it
            descriptor = _locked(staging, destination)
    try:
        yield staging
    finally:
        os.close(descriptor)


def _locked(staging: Path, destination: Path) -> int | None:
    """The descriptor of the mark, locked; None if it was removed meanwhile."""
    mark = staging / _MARK
    try:
        descriptor = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        is_new = True
    except FileExistsError:
        descriptor = os.open(mark, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        is_new = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        is_locked = error.errno == errno.EWOULDBLOCK
        if is_locked or not is_new:  # if it is new and the file system has no locks, nobody else is here
            os.close(descriptor)
            raise _busy(destination) if is_locked else _in_the_way(staging, "another process may be writing") from None
    if not (os.path.lexists(mark) and os.path.samestat(os.fstat(descriptor), os.lstat(mark))):
        os.close(descriptor)
        return None
    os.pwrite(descriptor, _MARKED, 0)
    return descriptor


def _busy(destination: Path) -> CheckpointError:
    return CheckpointError(
        f"{shown(destination)} is being written by another process; wait for it or name another directory"
    )


def _is_ours(staging: Path) -> bool:
    """Whether we made a directory: only we may write to it, and it has our mark or is empty."""
    try:
        status = os.lstat(staging)
        private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
        return private and (_is_marked(staging / _MARK) or not os.listdir(staging))
    except FileNotFoundError:  # just removed
        return True


def _is_marked(mark: Path) -> bool:
    if not is_plain(mark, stat.S_ISREG):
        return False
    with mark.open("rb") as file:
        return _MARKED.startswith(file.read(len(_MARKED) + 1))


def _in_the_way(staging: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{shown(staging)} is in the way: {reason} there; move it elsewhere or name another destination"
    )


def _put_back(staging: Path, destination: Path) -> None:
    """Restores a directory that a killed process had moved aside; removes it if the new one is in place."""
    if is_plain(staging / "old", stat.S_ISDIR):
        os.rename(staging / "old", staging / "discarded" if os.path.lexists(destination) else destination)
    delete(staging / "discarded")


def _remove(staging: Path) -> None:
    """Deletes a staging directory, except for an old checkpoint that could not be moved back.

    The mark goes last, so that if the process is killed here, the remains are still marked.
    """
    for name in ("discarded", "new", JOURNAL):
        with contextlib.suppress(OSError):
            delete(staging / name)
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
