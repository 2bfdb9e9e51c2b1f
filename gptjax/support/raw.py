"""Reads arrays from files into memory.

Nothing is memory-mapped: if someone truncates a mapped file, reading it kills the process with SIGBUS, which cannot be
turned into an error.
"""

import math
import os
import threading
from pathlib import Path
from typing import Any, Final

import numpy as np

from gptjax.errors import CheckpointError
from gptjax.support.files import MISSING, Stamp, opened, stamp
from gptjax.support.quoting import shown

_SMALL: Final = 1 << 20  # bytes; smaller arrays are not worth keeping
_MOST_FREE: Final = 4


class Buffers:
    """Memory for arrays, reused once an array and all its views are gone.

    The operating system clears each new page: with fresh memory for every array, loading gpt-oss-20b on an H200 took
    4.7 s instead of 4.0.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lock = threading.RLock()  # re-entrant: a buffer may be freed, and come back here, while we hold it

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Like `np.empty`."""
        size = math.prod(shape) * dtype.itemsize
        if size < _SMALL:
            return np.empty(shape, dtype)
        with self._lock:
            fitting = [index for index, free in enumerate(self._free) if free.nbytes >= size]
            smallest = min(fitting, key=lambda index: self._free[index].nbytes, default=None)
            buffer = None if smallest is None else self._free.pop(smallest)
        lent = _Lent(self, np.empty(size, np.uint8) if buffer is None else buffer, size)
        return np.asarray(lent).view(dtype).reshape(shape)

    def take_back(self, buffer: np.ndarray) -> None:
        """Returns a buffer to the free ones, of which the largest few are kept."""
        with self._lock:
            self._free = sorted([*self._free, buffer], key=lambda free: -free.nbytes)[:_MOST_FREE]


class _Lent:
    """Owns an array's memory and returns it when the array is gone."""

    def __init__(self, owner: Buffers, buffer: np.ndarray, size: int) -> None:
        self._owner, self._buffer = owner, buffer
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "data": (buffer.ctypes.data, False),
            "shape": (size,),
            "typestr": "|u1",
        }

    def __del__(self) -> None:
        self._owner.take_back(self._buffer)


def read_array(
    path: Path,
    dtype: np.dtype,
    shape: tuple[int, ...],
    *,
    offset: int = 0,
    expected: Stamp | None = None,
    buffers: Buffers | None = None,
) -> np.ndarray:
    """A read-only array from part of a file, in C order and the machine's byte order.

    Args:
      path: the file.
      dtype, shape: of the array.
      offset: where it begins, in bytes.
      expected: the file's stamp when it was first read.
      buffers: provides the array's memory; None allocates new memory.

    Raises:
      CheckpointError: the file is missing, too short or has changed, or memory runs out.
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        with opened(path) as descriptor:
            found = stamp(os.fstat(descriptor))
            if expected is not None and found != expected:
                raise changed(path)
            if found.size < offset + size:
                raise truncated(path, offset + size, found.size)
            array = np.empty(shape, dtype) if buffers is None else buffers.empty(shape, dtype)
            view = array.reshape(-1).view(np.uint8).data if size else memoryview(b"")
            done = 0
            while done < size:
                count = os.preadv(descriptor, [view[done:]], offset + done)
                if count == 0:
                    raise truncated(path, offset + size, offset + done)
                done += count
    except MISSING:
        raise missing(path) from None
    except MemoryError:
        raise CheckpointError(
            f"not enough memory for an array of {size:,} bytes in {shown(path)}; use a larger machine"
        ) from None
    array.flags.writeable = False
    return array


def changed(path: Path) -> CheckpointError:
    """The error for a file that was written to, or replaced, while it was being read."""
    return CheckpointError(
        f"{shown(path)} changed while it was being read; wait until nothing writes to it, then try again"
    )


def missing(path: Path) -> CheckpointError:
    """The error for a file of a checkpoint that does not exist."""
    return CheckpointError(f"{shown(path)} does not exist but belongs to the checkpoint; download it")


def truncated(path: Path, expected: int, found: int) -> CheckpointError:
    """The error for a file that has fewer bytes than expected."""
    return CheckpointError(
        f"{shown(path)} is truncated: expected {expected:,} bytes, found {found:,}; download the file again"
    )
