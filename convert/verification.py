"""Checks a converted directory against the checksums in its manifest."""

import dataclasses
import os
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from gptjax.checkpoints.manifest import Leaf, Manifest, read_manifest
from gptjax.checkpoints.orbax_piece import file_fault, piece_faults
from gptjax.checkpoints.weights import checked_manifest
from gptjax.config import read_config
from gptjax.errors import CheckpointError, GptjaxError
from gptjax.models.params import abstract_params
from gptjax.models.registry import build
from gptjax.support.progress import Advance, Progress, silent
from gptjax.support.quoting import shown


@dataclasses.dataclass(frozen=True)
class Verified:
    """What a check found."""

    num_weights: int
    bytes: int  # of weights
    faults: tuple[str, ...]  # one for each damaged or missing file, which it names; empty if all is as it was written


def verify(directory: str | PathLike[str], *, progress: Progress | None = None) -> Verified:
    """Reads a whole converted directory and compares it with its checksums.

    Args:
      directory: written by `convert.convert`.
      progress: reports progress.

    Raises:
      CheckpointError: it is not a converted directory, or its manifest cannot be read.
    """
    directory = Path(directory)
    if not os.path.lexists(directory / "manifest.json"):
        raise CheckpointError(
            f"{shown(directory)} has no manifest.json; only a directory that `gptjax convert` wrote has checksums"
        )
    manifest = read_manifest(directory)
    total = sum(leaf.nbytes for leaf in manifest.leaves)
    with (progress or silent)("checking", total) as advance:
        faults = tuple(_faults(directory, manifest, advance))
    return Verified(len(manifest.leaves), total, faults)


def _faults(directory: Path, manifest: Manifest, advance: Advance) -> Iterator[str]:
    leaves: dict[str, list[Leaf]] = {piece: [] for piece in manifest.pieces}
    for leaf in manifest.leaves:
        leaves[leaf.piece].append(leaf)
    others = dict(manifest.others)
    for piece, files in manifest.pieces.items():
        folder = f"params/{piece}/"
        own = {name.removeprefix(folder): others.pop(name) for name in list(others) if name.startswith(folder)}
        yield from piece_faults(directory / "params" / piece, files, leaves[piece], own, advance)
    copies = [fault for name, sha256 in others.items() if (fault := file_fault(directory / name, sha256))]
    yield from copies
    if not copies:
        try:
            checked_manifest(directory, abstract_params(build(read_config(directory))))
        except GptjaxError as error:  # the manifest was changed, or has no checksum of config.json
            yield str(error)
