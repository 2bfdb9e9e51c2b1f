"""SHA-256 of the files that a conversion reads, and a check that they did not change during it."""

import concurrent.futures
import hashlib
import os
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gptjax.checkpoints.checkpoint import TensorSource
from gptjax.checkpoints.manifest import SourceFile
from gptjax.checkpoints.safetensors_header import Header
from gptjax.gguf.header import Header as GGUFHeader
from gptjax.support.files import MISSING, opened, read_bytes, stamp
from gptjax.support.raw import changed

_BLOCK: Final = 1 << 20


class Hashes:
    """Hashes safetensors or GGUF files in a thread while they are converted, and checks that both read the same bytes.

    SHA-256 needs a file's bytes in order, but the conversion reads tensors in another order. So the files are read a
    second time, and the CRC-32 of each tensor must match the one taken when it was converted.
    """

    def __init__(self, small: Mapping[Path, bytes], source: TensorSource):
        """Starts hashing.

        Args:
          small: the small files and their bytes.
          source: the large files; from now on it records the checksum of each tensor it reads.
        """
        self._small, self._headers = small, source.headers
        self.converted: dict[str, int] = {}  # the CRC-32 of each tensor that the source has read
        self._hashed: dict[str, int] = {}
        source.checksums = self.converted
        self._cancelled = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._future = self._pool.submit(lambda: [self._hash(path, header) for path, header in self._headers.items()])

    def __enter__(self) -> "Hashes":
        return self

    def __exit__(self, *_: object) -> None:
        self._cancelled.set()
        self._pool.shutdown()

    @property
    def state(self) -> str:
        """Changes when the files are changed or replaced, as far as one can tell without reading them."""
        large = [
            (path.name, header.crc32, header.stamp.size, header.stamp.modified_ns)
            for path, header in self._headers.items()
        ]
        small = [(path.name, zlib.crc32(data)) for path, data in self._small.items()]
        return repr((large, small))

    def result(self) -> tuple[SourceFile, ...]:
        """Waits for the hashes. Raises `CheckpointError` if a file has changed."""
        large = self._future.result()
        for path, header in self._headers.items():
            read = self.converted.keys() & header.tensors.keys()
            if any(self.converted[name] != self._hashed[name] for name in read) or not _is_unchanged(path, header):
                raise changed(path)
        for path, data in self._small.items():
            if read_bytes(path) != data:
                raise changed(path)
        small = [
            SourceFile(path.name, len(data), hashlib.sha256(data).hexdigest()) for path, data in self._small.items()
        ]
        return (*small, *large)

    def _hash(self, path: Path, header: Header | GGUFHeader) -> SourceFile:
        digest = hashlib.sha256()
        try:
            with opened(path) as descriptor:
                beginning = self._crc32(descriptor, header.data_start, digest)
                position = header.data_start
                for name, info in header.tensors.items():
                    self._crc32(descriptor, info.start - position, digest)  # padding
                    self._hashed[name] = self._crc32(descriptor, info.stop - info.start, digest)
                    position = info.stop
                self._crc32(descriptor, header.stamp.size - position, digest)
        except MISSING:
            raise changed(path) from None
        if beginning != header.crc32 and not self._cancelled.is_set():
            raise changed(path)
        return SourceFile(path.name, header.stamp.size, digest.hexdigest())

    def _crc32(self, descriptor: int, size: int, digest: Any) -> int:
        """The CRC-32 of the next `size` bytes, or of those left; updates the digest too."""
        crc = 0
        while size and not self._cancelled.is_set() and (block := os.read(descriptor, min(size, _BLOCK))):
            digest.update(block)
            crc = zlib.crc32(block, crc)
            size -= len(block)
        return crc


def _is_unchanged(path: Path, header: Header | GGUFHeader) -> bool:
    try:
        return stamp(os.stat(path)) == header.stamp
    except OSError:
        return False
