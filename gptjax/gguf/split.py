"""The set of files that a large GGUF file was split into: NAME-00001-of-00003.gguf and so on, in one directory.

Only names that follow from the opened file's own are read: nothing in a file names another.

Source: llama.cpp, tools/gguf-split/README.md, and `llama_model_loader` in src/llama-model-loader.cpp.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gptjax.errors import CheckpointError
from gptjax.gguf.cursor import damaged
from gptjax.gguf.header import Header, read_header
from gptjax.support.quoting import listed, names, quoted, shown

MAX_PARTS: Final = 4096
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
_NUMBERED: Final = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<total>[0-9]{5})\.gguf", re.DOTALL)


def read_parts(path: Path) -> tuple[dict[Path, Header], Mapping[str, Any]]:
    """The headers of a file and of those that it belongs to, in their order, and the metadata of the first.

    Raises:
      CheckpointError: a file is missing, damaged or truncated, or they are not the parts of one set. Lists all faults.
    """
    header = read_header(path)
    count = _number(path, header, COUNT) or 1  # llama.cpp writes 0 when it joins parts
    if count == 1:
        return {path: header}, header.metadata
    if count > MAX_PARTS:
        raise damaged(path, f"{COUNT} is {count:,}; at most {MAX_PARTS:,} parts are accepted")
    paths = _paths(path, count)
    headers: dict[Path, Header] = {}
    faults = []
    for part in paths:
        try:
            headers[part] = header if part == path else read_header(part)
        except CheckpointError as error:
            faults.append(str(error))
    if not faults:
        faults = _disagreements(headers)
    if faults:
        raise CheckpointError(f"the {count} parts of {shown(path)} cannot be read:\n" + listed(faults))
    return headers, headers[paths[0]].metadata


def _paths(path: Path, count: int) -> list[Path]:
    """The paths of all parts. Raises `CheckpointError` if there are not as many, or some are missing."""
    match = _NUMBERED.fullmatch(path.name)
    if match is None or int(match["total"]) != count or not 1 <= int(match["number"]) <= count:
        raise CheckpointError(
            f"{shown(path)} is one of {count} parts, but its name does not say which; rename the parts to "
            f"NAME-00001-of-{count:05}.gguf and so on"
        )
    wanted = [f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    missing = [name for name in wanted if not os.path.lexists(path.parent / name)]
    if missing:
        raise CheckpointError(
            f"{shown(path)} is one of {count} parts, but {shown(path.parent)} lacks {names(missing)}; download them too"
        )
    return [path.parent / name for name in wanted]


def _disagreements(headers: Mapping[Path, Header]) -> list[str]:
    """What keeps files from being the parts of one set, in their order."""
    fix = "download the parts again, all from one place"
    opening, first = next(iter(headers.items()))
    total = _number(opening, first, TENSORS)
    homes: dict[str, Path] = {}
    faults = []
    for index, (path, header) in enumerate(headers.items()):
        for key, expected in ((NUMBER, index), (COUNT, len(headers))):
            if (found := _number(path, header, key)) != expected:
                faults.append(f"{shown(path)} has {key} {found}, expected {expected}; {fix}")
        for name in header.tensors:
            if name in homes:
                faults.append(f"{shown(repr(name))} is in {shown(homes[name])} and in {shown(path)}; {fix}")
            homes[name] = path
        for key, value in header.metadata.items():
            if not key.startswith("split.") and first.metadata.get(key) != value:
                faults.append(f"{shown(path)} has another {shown(repr(key))} than the first part; {fix}")
    if total not in (None, len(homes)):
        faults.append(f"the parts have {len(homes):,} tensors, but {TENSORS} of the first is {total}; {fix}")
    return faults


def _number(path: Path, header: Header, key: str) -> int | None:
    value = header.metadata.get(key)
    if value is not None and (type(value) is not int or value < 0):
        raise damaged(path, f"{key} is {quoted(value)}, expected a number")
    return value
