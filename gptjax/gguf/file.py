"""A GGUF file, or the set of files that a large one was split into: opened once, its tensors read in bounded memory.

Nothing is memory-mapped, for the reason that `gptjax.support.raw` gives.
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from gptjax.errors import CheckpointError
from gptjax.gguf.header import Header, Tensor, read_header
from gptjax.gguf.split import read_parts
from gptjax.gguf.types import BLOCKS, FLOATS, READ, USE_ANOTHER, expand
from gptjax.support.quoting import shown
from gptjax.support.raw import Buffers, read_array

_TENSOR_COUNT: Final = 8  # where a file says how many tensors it has, in 64 bits
_PIECE: Final = 1 << 20  # values whose blocks are read at a time, to need little memory


class GGUFFile:
    """The metadata and tensors of one or more files.

    `metadata` has ints, floats, bools, strings and lists of one of these; `tensors` lists the tensors by name, in their
    order on disk; `headers` has the files' headers.
    """

    def __init__(self, headers: Mapping[Path, Header], metadata: Mapping[str, Any]) -> None:
        self.headers, self.metadata = headers, metadata
        self.tensors: dict[str, Tensor] = {
            name: tensor for header in headers.values() for name, tensor in header.tensors.items()
        }
        self.checksums: dict[str, int] | None = None  # if set, records the CRC-32 of the data of each tensor read
        self.buffers: Buffers | None = None  # reused memory, for arrays that are released one by one

    def read(self, name: str) -> np.ndarray:
        """A tensor's numbers, read-only: float32, float16 or bfloat16 as stored; float32 from a packed type.

        Raises:
          KeyError: unknown name.
          CheckpointError: gptjax does not read the tensor's type, or the file cannot be read or has changed since its
            header was read.
        """
        tensor = self.tensors[name]
        count, (size, _) = math.prod(tensor.shape), self._block(name)
        if tensor.type in FLOATS:
            (array,) = self.slices(name, count)
            return array.reshape(tensor.shape)
        array, done = self._empty(name, count), 0
        for blocks in self._blocks(name, _PIECE // size):
            expand(tensor.type, blocks, array[done:])
            done += len(blocks) * size
        array.flags.writeable = False
        return array.reshape(tensor.shape)

    def slices(self, name: str, most: int) -> Iterator[np.ndarray]:
        """A tensor's numbers in order, at most `most` at a time but at least one block. Raises what `read` raises."""
        size, _ = self._block(name)
        type_name = self.tensors[name].type
        for blocks in self._blocks(name, max(1, most // size)):
            if type_name in FLOATS:
                yield blocks.reshape(-1).view(FLOATS[type_name])
            else:
                array = self._empty(name, len(blocks) * size)
                expand(type_name, blocks, array)
                array.flags.writeable = False
                yield array

    def packed(self, name: str) -> np.ndarray:
        """A tensor as stored: uint8 [..., blocks, bytes of a block], read-only. Raises what `read` raises."""
        size, width = self._block(name)
        shape = self.tensors[name].shape
        (blocks,) = self._blocks(name, math.prod(shape) // size)
        return blocks.reshape(*shape[:-1], shape[-1] // size, width)

    def metadata_file(self) -> bytes:
        """The contents of a GGUF file with the same metadata and no tensors. Raises `CheckpointError`."""
        path, header = next(iter(self.headers.items()))
        shape, byte = (header.metadata_stop,), np.dtype(np.uint8)
        data = read_array(path, byte, shape, offset=0, expected=header.stamp, buffers=None).tobytes()
        return data[:_TENSOR_COUNT] + bytes(8) + data[_TENSOR_COUNT + 8 :]

    def _block(self, name: str) -> tuple[int, int]:
        """Values and bytes of a block."""
        tensor = self.tensors[name]
        if tensor.type not in READ:
            raise CheckpointError(
                f"{shown(name)} in {shown(tensor.file)} is stored as {tensor.type}, which gptjax does not read; "
                f"{USE_ANOTHER}"
            )
        return BLOCKS[tensor.type]

    def _blocks(self, name: str, most: int) -> Iterator[np.ndarray]:
        """A tensor's blocks in order, at most `most` at a time: uint8 [blocks, bytes of a block]."""
        tensor, (_, width), crc = self.tensors[name], self._block(name), 0
        count, byte = tensor.nbytes // width, np.dtype(np.uint8)
        expected = self.headers[tensor.file].stamp
        for first in range(0, count, most):
            shape, offset = (min(most, count - first), width), tensor.start + first * width
            blocks = read_array(tensor.file, byte, shape, offset=offset, expected=expected, buffers=self.buffers)
            if self.checksums is not None:
                crc = zlib.crc32(blocks.reshape(-1).data, crc)
            yield blocks
        if self.checksums is not None:
            self.checksums[name] = crc

    def _empty(self, name: str, count: int) -> np.ndarray:
        """Memory for `count` numbers of a tensor, in float32."""
        dtype = np.dtype(np.float32)
        try:
            return np.empty(count, dtype) if self.buffers is None else self.buffers.empty((count,), dtype)
        except MemoryError:
            raise CheckpointError(
                f"not enough memory for {shown(name)}, {4 * count:,} bytes when expanded; use a larger machine"
            ) from None


def open_gguf(path: str | Path) -> GGUFFile:
    """Reads the header of a file, and of all others of its set if it is part of one (NAME-00001-of-00003.gguf).

    Raises:
      CheckpointError: it is missing, damaged, truncated, or not GGUF of version 2 or 3 in little-endian order; or parts
        of the set are missing or disagree.
    """
    return GGUFFile(*read_parts(Path(path)))


def read_metadata(path: Path) -> Mapping[str, Any]:
    """The metadata of one file, whether or not it is part of a set. Raises `CheckpointError`."""
    return read_header(path).metadata
