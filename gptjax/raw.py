"""Arrays read from files into memory.

Nothing is memory-mapped: if somebody truncates a mapped file, reading it ends the process with SIGBUS, which cannot be
turned into an error.
"""

import math
import os
from pathlib import Path

import numpy as np

from gptjax.errors import CheckpointError
from gptjax.files import MISSING, Stamp, opened, stamp
from gptjax.quoting import shown


def read_array(
    path: Path, dtype: np.dtype, shape: tuple[int, ...], *, offset: int = 0, expected: Stamp | None = None
) -> np.ndarray:
    """A read-only array of a part of a file, in C order and the machine's byte order.

    Args:
      path: the file.
      dtype, shape: of the array.
      offset: in bytes, where it begins.
      expected: the stamp that the file had when it was first looked at.

    Raises:
      CheckpointError: the file is missing, too short or has changed, or there is not enough memory.
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        with opened(path) as descriptor:
            found = stamp(os.fstat(descriptor))
            if expected is not None and found != expected:
                raise changed(path)
            if found.size < offset + size:
                raise truncated(path, offset + size, found.size)
            array = np.empty(shape, dtype)
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
        f"{shown(path)} has changed while it was being read; wait until nothing writes to it, and start again"
    )


def missing(path: Path) -> CheckpointError:
    """The error for a file of a checkpoint that does not exist."""
    return CheckpointError(f"{shown(path)} does not exist; download the file, it belongs to the checkpoint")


def truncated(path: Path, expected: int, found: int) -> CheckpointError:
    """The error for a file that has fewer bytes than expected."""
    return CheckpointError(
        f"{shown(path)} is truncated: expected {expected:,} bytes, found {found:,}; download the file again"
    )
