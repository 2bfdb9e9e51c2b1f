"""The manifest of a converted checkpoint: what it was made from, and where each weight is."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from gptjax.errors import CheckpointError
from gptjax.support.files import read_json
from gptjax.support.quoting import shown

FILE: Final = "manifest.json"
FORMAT: Final = "gptjax-checkpoint"
VERSION: Final = 1
MAX_AXES: Final = 16
DTYPES: Final = frozenset({"float32", "float16", "bfloat16", "uint8"})  # allowed for weights
_AGAIN: Final = "convert the checkpoint again: python -m convert SOURCE DESTINATION"


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file that a checkpoint was made from."""

    name: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A weight."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str  # NumPy's name, or "bfloat16"
    piece: str  # a key of `Manifest.pieces`
    crc32: int  # of its bytes in C order, little-endian

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`."""

    gptjax_version: str
    source: str  # the name of the directory that was converted
    files: tuple[SourceFile, ...]
    leaves: tuple[Leaf, ...]
    pieces: dict[str, dict[str, int]]  # the directory under `params/` -> its files and their bytes
    others: dict[str, str]  # the path of every other file -> its SHA-256; empty in older directories


def is_converted(directory: Path) -> bool:
    """Whether gptjax wrote this checkpoint directory (which is then complete: the manifest is written last)."""
    return (read_json(directory / FILE) or {}).get("format") == FORMAT


def read_manifest(directory: Path) -> Manifest:
    """Reads `directory/manifest.json`. Raises `CheckpointError` if it is missing, damaged or of another version."""
    path = directory / FILE
    raw = read_json(path) or {}
    if raw.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a gptjax manifest; {_AGAIN}")
    if raw.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {shown(repr(raw.get('version')))}, but this gptjax reads version {VERSION}; "
            f"use the gptjax that wrote it ({shown(raw.get('gptjax_version'))}), or {_AGAIN}"
        )
    try:
        return from_json(raw)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); {_AGAIN}") from None


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes `directory/manifest.json`."""
    (directory / FILE).write_text(json.dumps(to_json(manifest), indent=1) + "\n", encoding="utf-8")


def from_json(raw: Mapping[str, Any]) -> Manifest:
    """The manifest that `to_json` wrote. Raises `ValueError` if anything in it cannot be one's."""
    try:
        manifest = Manifest(
            gptjax_version=_text(raw["gptjax_version"]),
            source=_text(raw["source"]["name"]),
            files=tuple(
                SourceFile(_text(file["name"]), _count(file["bytes"]), _text(file["sha256"]))
                for file in raw["source"]["files"]
            ),
            leaves=tuple(map(_leaf, raw["leaves"])),
            pieces={
                _piece(piece): {name: _count(size) for name, size in files.items()}
                for piece, files in raw["pieces"].items()
            },
            others={_file(name): _text(sha256) for name, sha256 in raw.get("others", {}).items()},
        )
        for leaf in manifest.leaves:
            if leaf.piece not in manifest.pieces:
                raise ValueError(f"the piece {leaf.piece} is not listed")
        return manifest
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def to_json(manifest: Manifest) -> dict[str, Any]:
    """The contents of `manifest.json`."""
    leaves: Sequence[dict[str, Any]] = [
        {
            "path": "/".join(leaf.path),
            "shape": list(leaf.shape),
            "dtype": leaf.dtype,
            "piece": leaf.piece,
            "crc32": leaf.crc32,
        }
        for leaf in manifest.leaves
    ]
    return {
        "format": FORMAT,
        "version": VERSION,
        "gptjax_version": manifest.gptjax_version,
        "source": {"name": manifest.source, "files": [dataclasses.asdict(file) for file in manifest.files]},
        "leaves": leaves,
        "pieces": manifest.pieces,
        "others": manifest.others,
    }


def _leaf(raw: Any) -> Leaf:
    return Leaf(
        path=_path(raw["path"]),
        shape=_shape(raw["shape"]),
        dtype=_dtype(raw["dtype"]),
        piece=_piece(raw["piece"]),
        crc32=_count(raw["crc32"]),
    )


def _path(name: Any) -> tuple[str, ...]:
    if re.fullmatch(r"\w{1,100}(/\w{1,100}){0,15}", _text(name), re.ASCII) is None:  # it becomes part of a file's path
        raise ValueError(f"the weight {shown(repr(name))} is not a path of names joined with slashes")
    return tuple(_text(name).split("/"))


def _shape(raw: Any) -> tuple[int, ...]:
    if not isinstance(raw, list) or len(raw) > MAX_AXES:
        raise TypeError(f"{shown(repr(raw))} is not a shape")
    return tuple(map(_count, raw))


def _piece(name: Any) -> str:
    if re.fullmatch(r"[0-9]{1,9}", _text(name)) is None:  # it becomes part of a path
        raise ValueError(f"the piece {shown(repr(name))} is not a number")
    return _text(name)


def _file(name: Any) -> str:
    """The path of a file in the directory: in it itself, or in a piece."""
    if re.fullmatch(r"(params/[0-9]{1,9}/)?[\w.-]{1,100}(/[\w.-]{1,100})?", _text(name), re.ASCII) is None:
        raise ValueError(f"{shown(repr(name))} is not the name of a file")
    if {".", ".."} & set(name.split("/")):
        raise ValueError(f"{shown(repr(name))} leads elsewhere")
    return _text(name)


def _dtype(name: Any) -> str:
    if name not in DTYPES:
        raise ValueError(f"the dtype {shown(repr(name))} is unknown")
    return _text(name)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{shown(repr(value))} is not text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise TypeError(f"{shown(repr(value))} is not a count")
    return value
