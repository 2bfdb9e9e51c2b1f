"""Which pieces of an unfinished converted directory are complete, so that a conversion that was killed continues.

The journal lies next to the unfinished directory and has a line of JSON for each piece, in order. Nothing in it is
trusted: a piece counts only if it is one of the same conversion and all of its files have the checksums noted.
"""

import dataclasses
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gptjax.checkpoints.atomic_directory import JOURNAL, delete, is_plain
from gptjax.checkpoints.manifest import Leaf, Manifest, from_json, to_json
from gptjax.checkpoints.orbax_piece import piece_faults
from gptjax.errors import CheckpointError
from gptjax.support.files import parse_json, read_bytes
from gptjax.support.progress import Advance

_LIMIT: Final = 64 << 20  # bytes; GPT-OSS 120b's journal has less than 1 million
Shapes = Mapping[tuple[str, ...], tuple[tuple[int, ...], str]]  # shape and dtype of each weight of a piece, by path


@dataclasses.dataclass(frozen=True)
class Complete:
    """A piece that is complete."""

    manifest: Manifest  # of this piece alone
    noted: Mapping[str, int]  # checksums of the source's tensors that it was made from


class Journal:
    """The journal of an unfinished directory. Opening it deletes everything there that is not a complete piece."""

    def __init__(self, new: Path, job: str, pieces: Sequence[Shapes], advance: Advance):
        """Reads what an earlier process noted.

        Args:
          new: the unfinished directory.
          job: identifies the conversion. Pieces of another one are deleted.
          pieces: what this conversion will write.
          advance: takes the bytes of each complete piece.
        """
        self._path, self._job = new.parent / JOURNAL, job
        self.complete: list[Complete] = []
        for done in self._verified(new, pieces):
            self.complete.append(done)
            advance(sum(leaf.nbytes for leaf in done.manifest.leaves))
        keep = [piece for done in self.complete for piece in done.manifest.pieces]
        _clear(new, keep=["params"] if keep else [])
        if keep:
            _clear(new / "params", keep)
        delete(self._path)
        for done in self.complete:
            self._write(done)

    def add(self, done: Complete) -> None:
        """Notes that a piece is complete."""
        self.complete.append(done)
        self._write(done)

    def _write(self, done: Complete) -> None:
        line = json.dumps({"job": self._job, "noted": done.noted, "manifest": to_json(done.manifest)})
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        with open(os.open(self._path, flags, 0o600), "w", encoding="utf-8") as file:
            file.write(line + "\n")

    def _verified(self, new: Path, pieces: Sequence[Shapes]) -> Iterator[Complete]:
        if not is_plain(self._path, stat.S_ISREG) or not is_plain(new / "params", stat.S_ISDIR):
            return
        try:
            lines = (read_bytes(self._path, _LIMIT) or b"").splitlines()
        except CheckpointError:
            return
        for number, (line, expected) in enumerate(zip(lines, pieces, strict=False)):
            done = _parsed(line, self._job)
            if done is None or not _is_sound(new / "params" / piece_name(number), done.manifest, expected):
                return
            yield done


def piece_name(number: int) -> str:
    """The directory of a piece."""
    return f"{number:04}"


def _parsed(line: bytes, job: str) -> Complete | None:
    try:
        raw: Any = parse_json(line.decode())
        noted = {str(name): int(crc32) for name, crc32 in raw["noted"].items()}
        return Complete(from_json(raw["manifest"]), noted) if raw["job"] == job else None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None  # cut short, or not ours


def _is_sound(path: Path, manifest: Manifest, expected: Shapes) -> bool:
    """Whether a piece is complete: its weights the expected ones, and its files those of the journal, unchanged."""
    found: dict[tuple[str, ...], tuple[tuple[int, ...], str]] = {
        leaf.path: (leaf.shape, leaf.dtype) for leaf in manifest.leaves
    }
    prefix = f"params/{path.name}/"
    others = {name.removeprefix(prefix): sha256 for name, sha256 in manifest.others.items()}
    return (
        found == dict(expected)
        and list(manifest.pieces) == [path.name]
        and all(name.startswith(prefix) for name in manifest.others)
        and _plain_files(path) == _described(manifest.pieces[path.name], manifest.leaves, others)
        and not any(piece_faults(path, manifest.pieces[path.name], manifest.leaves, others, lambda _: None))
    )


def _described(files: Mapping[str, int], leaves: Sequence[Leaf], others: Mapping[str, str]) -> set[str] | None:
    """The files of a piece, if each belongs to a weight or has a checksum of its own."""
    folders = {".".join(leaf.path) for leaf in leaves}
    return set(files) if all(name in others or name.rpartition("/")[0] in folders for name in files) else None


def _plain_files(path: Path) -> set[str] | None:
    """The files under a directory; None if anything there is a link, or neither a file nor a directory."""
    found = set()
    if not is_plain(path, stat.S_ISDIR):
        return None
    for folder, folders, files in os.walk(path):
        if not all(is_plain(os.path.join(folder, name), stat.S_ISDIR) for name in folders):
            return None
        if not all(is_plain(os.path.join(folder, name), stat.S_ISREG) for name in files):
            return None
        found |= {Path(folder, name).relative_to(path).as_posix() for name in files}
    return found


def _clear(directory: Path, keep: Sequence[str]) -> None:
    for name in os.listdir(directory):
        if name not in keep:
            delete(directory / name)
