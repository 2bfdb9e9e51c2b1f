"""SHA-256 of the files that a conversion reads, and a check that nothing changed them meanwhile."""

import concurrent.futures
import hashlib
import os
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gptjax.checkpoints.raw import changed
from gptjax.checkpoints.safetensors import SafetensorsSource
from gptjax.checkpoints.safetensors_header import Header
from gptjax.checkpoints.weights import SourceFile
from gptjax.support.files import MISSING, opened, read_bytes, stamp

_BLOCK: Final = 1 << 20


class Hashes:
    """Hashes safetensors files in a thread while they are converted, and compares what both have read.

    A SHA-256 needs a file's bytes in order, and the conversion reads tensors in another. So the files are read once
    more, taking the CRC-32 of each tensor, which must be the same as when the tensor was converted.
    """

    def __init__(self, small: Mapping[Path, bytes], source: SafetensorsSource):
        """Takes the small files with their bytes, and a source, which notes checksums of what it reads from now on."""
        self._small, self._headers = small, source.headers
        self._converted: dict[str, int] = {}
        self._hashed: dict[str, int] = {}
        source.checksums = self._converted
        self._cancelled = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._future = self._pool.submit(lambda: [self._hash(path, header) for path, header in self._headers.items()])

    def __enter__(self) -> "Hashes":
        return self

    def __exit__(self, *_: object) -> None:
        self._cancelled.set()
        self._pool.shutdown()

    def result(self) -> tuple[SourceFile, ...]:
        """The files, once they are read to the end. Raises `CheckpointError` if one has changed."""
        large = self._future.result()
        for path, header in self._headers.items():
            read = self._converted.keys() & header.tensors.keys()
            if any(self._converted[name] != self._hashed[name] for name in read) or not _is_as_it_was(path, header):
                raise changed(path)
        for path, data in self._small.items():
            if read_bytes(path) != data:
                raise changed(path)
        small = [
            SourceFile(path.name, len(data), hashlib.sha256(data).hexdigest()) for path, data in self._small.items()
        ]
        return (*small, *large)

    def _hash(self, path: Path, header: Header) -> SourceFile:
        digest = hashlib.sha256()
        try:
            with opened(path) as descriptor:
                beginning = self._crc32(descriptor, header.data_start, digest)
                for name, info in header.tensors.items():
                    self._hashed[name] = self._crc32(descriptor, info.stop - info.start, digest)
        except MISSING:
            raise changed(path) from None
        if beginning != header.crc32 and not self._cancelled.is_set():
            raise changed(path)
        return SourceFile(path.name, header.stamp.size, digest.hexdigest())

    def _crc32(self, descriptor: int, size: int, digest: Any) -> int:
        """The CRC-32 of the next bytes, or of the fewer that are left; feeds the digest, too."""
        crc = 0
        while size and not self._cancelled.is_set() and (block := os.read(descriptor, min(size, _BLOCK))):
            digest.update(block)
            crc = zlib.crc32(block, crc)
            size -= len(block)
        return crc


def _is_as_it_was(path: Path, header: Header) -> bool:
    try:
        return stamp(os.stat(path)) == header.stamp
    except OSError:
        return False
