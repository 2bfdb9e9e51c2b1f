"""A streaming reader, in bounded memory, for the safetensors files of a Hugging Face directory.

Headers are read first (`gptjax.checkpoints.safetensors_header`), then one tensor at a time.
"""

import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np

from gptjax.checkpoints.foreign import GET_SAFETENSORS, refusal
from gptjax.checkpoints.safetensors_header import MAX_HEADER_BYTES, NUMPY_DTYPES, Header, TensorInfo, parse, read_header
from gptjax.errors import CheckpointError
from gptjax.support.files import read_bytes
from gptjax.support.quoting import listed, shown
from gptjax.support.raw import Buffers, missing, read_array

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_NUMBERED: Final = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<total>\d{5})\.safetensors")


class SafetensorsSource:
    """The tensors of one or more safetensors files.

    `tensors` lists them by name, in their order on disk; `headers` has the files' headers.
    """

    def __init__(self, headers: Mapping[Path, Header]):
        self.headers = headers
        self.tensors: dict[str, TensorInfo] = {
            name: info for header in headers.values() for name, info in header.tensors.items()
        }
        self.checksums: dict[str, int] | None = None  # if set, records the CRC-32 of each tensor read
        self.buffers: Buffers | None = None  # reused memory, for arrays that are released one by one

    def read(self, name: str) -> np.ndarray:
        """A tensor, read-only.

        Raises:
          KeyError: unknown name, or NumPy lacks the tensor's dtype.
          CheckpointError: the file cannot be read, or has changed since its header was read.
        """
        shape = self.tensors[name].shape
        (array,) = self.slices(name, max(1, math.prod(shape)))
        return array.reshape(shape)

    def slices(self, name: str, most: int) -> Iterator[np.ndarray]:
        """A tensor's elements, at most `most` at a time, in at least one array. Raises what `read` raises."""
        count, crc = math.prod(self.tensors[name].shape), 0
        for start in range(0, max(1, count), most):
            array = self._part(name, start, min(most, count - start))
            if self.checksums is not None:
                crc = zlib.crc32(array.view(np.uint8).data, crc)
            yield array
        if self.checksums is not None:
            self.checksums[name] = crc

    def _part(self, name: str, start: int, count: int) -> np.ndarray:
        info = self.tensors[name]
        dtype = NUMPY_DTYPES[info.dtype]
        offset = info.start + start * dtype.itemsize
        stamp = self.headers[info.file].stamp
        return read_array(info.file, dtype, (count,), offset=offset, expected=stamp, buffers=self.buffers)


def open_directory(directory: Path) -> SafetensorsSource:
    """Reads the headers of `model.safetensors`, or of the files that `model.safetensors.index.json` names.

    If both exist, the single file is used, as in transformers. If neither does, numbered files
    (`model--00001-of-00007.safetensors`, as in OpenAI's own directories) are used if the set is complete.

    Raises:
      CheckpointError: weights are missing or of another format; a file is truncated, damaged or not what its name
        says; or the index names files outside the directory or disagrees with its files. Lists all faults.
    """
    if os.path.lexists(directory / SINGLE):
        names, weight_map = [SINGLE], None
    elif os.path.lexists(directory / INDEX):
        weight_map = read_index(directory / INDEX)
        names = list(dict.fromkeys(weight_map.values()))
    elif names := _numbered(directory):
        weight_map = None
    else:
        raise CheckpointError(_no_weights(directory))
    faults: list[str] = []
    headers: dict[str, Header] = {}
    for name in names:
        try:
            headers[name] = read_header(_contained(directory, name) if weight_map else directory / name)
        except CheckpointError as error:
            faults.append(str(error))
    tensors = {name: header.tensors for name, header in headers.items()}
    faults += _doubled(tensors) if weight_map is None else _disagreements(weight_map, tensors)
    if faults:
        raise CheckpointError(f"{directory} cannot be read:\n" + listed(faults))
    return SafetensorsSource({directory / name: header for name, header in headers.items()})


def read_index(path: Path) -> dict[str, str]:
    """An index's map from tensor names to file names, unchecked. Raises `CheckpointError`."""
    data = read_bytes(path, MAX_HEADER_BYTES)
    if data is None:
        raise missing(path)
    try:
        weight_map = parse(data).get("weight_map")
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download the file again") from None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names; download the file again")
    if not weight_map:
        raise CheckpointError(f"{path} lists no tensors; download the file again")
    return weight_map


def _contained(directory: Path, name: str) -> Path:
    """The path of a file that an index names. An index is untrusted: it must not reach other files."""
    path = directory / name
    fault = f"{directory / INDEX} names the file {shown(repr(name))}"
    fix = "an index may only name files in its own directory; download the checkpoint again from a source you trust"
    if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise CheckpointError(f"{fault}, which is not a plain file name; {fix}")
    if not name.endswith(".safetensors"):
        raise CheckpointError(f"{fault}, which is not a safetensors file; {GET_SAFETENSORS}")
    root = directory.resolve()
    roots = [root]
    if root.parent.name == "snapshots":  # the Hub's cache: snapshots/<commit>/<file> -> ../../blobs/<hash>
        roots.append(root.parent.parent / "blobs")
    try:
        inside = path.resolve().parent in roots
    except (OSError, ValueError, RuntimeError) as error:  # too long, half a surrogate pair, a symlink loop
        raise CheckpointError(f"{fault}, which is not a usable name ({error}); {fix}") from None
    if not inside:
        raise CheckpointError(f"{fault}, a link that leads out of the directory; {fix}")
    return path


def _numbered(directory: Path) -> list[str]:
    """The names of numbered files, if any. Raises `CheckpointError` if some are missing."""
    found = {path.name: _NUMBERED.fullmatch(path.name) for path in sorted(directory.glob("*.safetensors"))}
    matches = [match for match in found.values() if match is not None]
    sets = {(match["stem"], int(match["total"])) for match in matches}
    if not matches or len(sets) > 1 or len(matches) < len(found):
        return []
    ((stem, total),) = sets
    wanted = [f"{stem}-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1)]
    missing = [name for name in wanted if name not in found]
    if missing:
        raise CheckpointError(f"{directory} lacks {', '.join(missing[:5])} of {total} files; download them again")
    return wanted


def _homes(headers: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, list[str]]:
    """The files that each tensor is in."""
    homes: dict[str, list[str]] = {}
    for file, header in headers.items():
        for name in header:
            homes.setdefault(name, []).append(file)
    return homes


def _doubled(headers: Mapping[str, Mapping[str, TensorInfo]]) -> list[str]:
    """Tensors that several files have."""
    homes = _homes(headers).items()
    return [f"{shown(name)} is in several files: {', '.join(files)}" for name, files in homes if len(files) > 1]


def _disagreements(weight_map: Mapping[str, str], headers: Mapping[str, Mapping[str, TensorInfo]]) -> list[str]:
    """Disagreements between an index and the readable files."""
    fix = f"correct or download again {INDEX} and the file"
    homes = _homes(headers)
    faults = [
        f"{INDEX} says that {shown(name)} is in {file}, but it is not; {fix}"
        for name, file in weight_map.items()
        if file in headers and file not in homes.get(name, [])
    ]
    for name, files in homes.items():
        if len(files) > 1:
            faults.append(f"{shown(name)} is in several files: {', '.join(files)}; {fix}")
        elif name not in weight_map:
            faults.append(f"{shown(name)} is in {files[0]} but not in {INDEX}; {fix}")
    return faults


def _no_weights(directory: Path) -> str:
    """Why there is nothing to read, and what the directory has instead."""
    expected = f"{directory} has neither {SINGLE} nor {INDEX}"
    if (directory / "params").is_dir():
        fault = "not a manifest" if (directory / "manifest.json").is_file() else "missing"
        return (
            f"{expected}; it looks like a directory that gptjax converted, but its manifest.json is {fault}: convert "
            "it again"
        )
    try:
        files = sorted(path for path in directory.iterdir() if os.path.isfile(path))
        others = [path.name for path in files if path.suffix == ".safetensors"]
        if others:
            return f"{expected}, but has {', '.join(others[:5])}; rename a single file to {SINGLE}, or add the index"
        reasons = [reason for path in files if (reason := refusal(path)) is not None]
    except OSError as error:
        return f"{directory} cannot be read ({error.strerror}); check its permissions"
    return "; ".join([expected, *reasons[:1]]) if reasons else f"{expected}; {GET_SAFETENSORS}"
