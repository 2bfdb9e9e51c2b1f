"""Saves weights with Orbax as a converted directory, a bounded piece at a time.

A converted directory has the model's JSON files, `manifest.json`, and under `params/` several Orbax checkpoints of at
most PIECE_BYTES or one larger weight each, all readable with Orbax alone.
"""

import dataclasses
import hashlib
import json
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Final

import jax
import numpy as np

from gptjax._version import __version__
from gptjax.checkpoints.atomic_directory import check_room, staged, unwritable
from gptjax.checkpoints.journal import Complete, Journal, Shapes, piece_name
from gptjax.checkpoints.manifest import Leaf, Manifest, SourceFile, is_converted, read_manifest, write_manifest
from gptjax.checkpoints.orbax_piece import checksum, other_files, write_piece
from gptjax.checkpoints.weights import Path, nest
from gptjax.errors import CheckpointError
from gptjax.support.progress import Progress, silent

PIECE_BYTES: Final = 128 << 20


@dataclasses.dataclass(frozen=True)
class Part:
    """Weights that are made and saved together."""

    weights: Mapping[Path, jax.ShapeDtypeStruct]  # the shape and dtype of each
    read: Callable[[], Mapping[Path, np.ndarray]]  # makes them

    @property
    def nbytes(self) -> int:
        """Their size."""
        return sum(math.prod(weight.shape) * weight.dtype.itemsize for weight in self.weights.values())


@dataclasses.dataclass(frozen=True)
class Source:
    """What a converted directory is made from."""

    name: str  # for the manifest
    files: Callable[[], tuple[SourceFile, ...]]  # for the manifest; called once all weights are written
    state: str = ""  # changes with the source's contents: only the conversion of the same state is continued
    noted: dict[str, int] = dataclasses.field(default_factory=dict)  # of what was read so far; kept when continued


def save(
    destination: FilePath,
    parts: Sequence[Part],
    *,
    source: Source,
    copies: Mapping[str, bytes] = types.MappingProxyType({}),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Writes a converted directory, which appears complete or not at all.

    If an earlier call with the same arguments was killed, its complete pieces are used.

    Args:
      destination: must not exist, or with `overwrite` may be a converted directory.
      parts: the weights. Only those of one piece are in memory at a time.
      source: the origin.
      copies: the directory's other files, by name.
      progress: reports progress.

    Raises:
      CheckpointError: the destination exists, is being written or cannot be written, or the disk is too full; nothing
        is left behind.
    """
    pieces = list(_pieces(parts))
    shapes = [_shapes(piece) for piece in pieces]
    sizes = [sum(part.nbytes for part in piece) for piece in pieces]
    with (
        staged(destination, overwrite=overwrite, ours=_replaceable, resume=True) as partial,
        (progress or silent)("writing weights", sum(sizes)) as advance,
    ):
        journal = Journal(partial, _job(source, copies, shapes), shapes, advance)
        check_room(destination, partial, sum(sizes[len(journal.complete) :]))
        for done in journal.complete:
            source.noted.update(done.noted)
        for name, data in copies.items():
            (partial / name).write_bytes(data)
        (partial / "params").mkdir(exist_ok=True)
        for number in range(len(journal.complete), len(pieces)):
            journal.add(_written(partial, number, pieces[number], source, destination))
            advance(sizes[number])
        manifest = _merged(source, copies, [done.manifest for done in journal.complete])
        write_manifest(partial, manifest)
    return manifest


def _pieces(parts: Sequence[Part]) -> Iterator[list[Part]]:
    piece: list[Part] = []
    for part in parts:
        if piece and sum(other.nbytes for other in piece) + part.nbytes > PIECE_BYTES:
            yield piece
            piece = []
        piece.append(part)
    if piece:
        yield piece


def _shapes(piece: Sequence[Part]) -> Shapes:
    return {path: (tuple(x.shape), str(np.dtype(x.dtype))) for part in piece for path, x in part.weights.items()}


def _job(source: Source, copies: Mapping[str, bytes], shapes: Sequence[Shapes]) -> str:
    """What identifies a conversion: whatever changes a byte of its result changes this."""
    weights = [[["/".join(path), *shape] for path, shape in piece.items()] for piece in shapes]
    copied = {name: hashlib.sha256(data).hexdigest() for name, data in copies.items()}
    text = json.dumps([__version__, source.name, source.state, copied, weights])
    return hashlib.sha256(text.encode()).hexdigest()


def _written(partial: FilePath, number: int, piece: Sequence[Part], source: Source, destination: FilePath) -> Complete:
    """Writes a piece. What it is made of is in memory only here."""
    name = piece_name(number)
    path = partial / "params" / name
    earlier = dict(source.noted)
    source.noted.clear()  # to see what this piece adds
    arrays = {key: array for part in piece for key, array in part.read().items()}
    noted = dict(source.noted)
    source.noted.update({**earlier, **noted})
    try:
        files = write_piece(path, nest(arrays))
    except Exception as error:  # Orbax and TensorStore report a full disk in many ways
        raise unwritable(destination, error) from error
    leaves = tuple(Leaf(key, array.shape, str(array.dtype), name, checksum(array)) for key, array in arrays.items())
    others = {f"params/{name}/{file}": sha256 for file, sha256 in other_files(path, files, leaves).items()}
    return Complete(Manifest(__version__, source.name, (), leaves, {name: files}, others), noted)


def _merged(source: Source, copies: Mapping[str, bytes], pieces: Sequence[Manifest]) -> Manifest:
    others = {name: hashlib.sha256(data).hexdigest() for name, data in copies.items()}
    return Manifest(
        gptjax_version=__version__,
        source=source.name,
        files=source.files(),
        leaves=tuple(leaf for piece in pieces for leaf in piece.leaves),
        pieces={name: files for piece in pieces for name, files in piece.pieces.items()},
        others=others | {name: sha256 for piece in pieces for name, sha256 in piece.others.items()},
    )


def _replaceable(directory: FilePath) -> bool:
    """Whether a directory is surely ours, with a complete manifest: no one else's files may be deleted."""
    try:
        return is_converted(directory) and bool(read_manifest(directory).leaves)
    except CheckpointError:
        return False
