"""Converts a Hugging Face directory to parameters or to a converted directory."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Final

import numpy as np
from jax.typing import DTypeLike

from convert import DTYPES, filling, matching, mxfp4, parts
from convert.hashing import Hashes
from convert.tables import table
from gptjax.checkpoints import foreign, safetensors, weights
from gptjax.checkpoints.manifest import is_converted
from gptjax.checkpoints.raw import Buffers
from gptjax.checkpoints.safetensors_header import NUMPY_DTYPES
from gptjax.checkpoints.saving import Source, save
from gptjax.config import ModelConfig, read_config, text_directory
from gptjax.config.keys import without
from gptjax.errors import CheckpointError
from gptjax.models.params import abstract_params, num_params
from gptjax.models.registry import build
from gptjax.support.files import parse_json, read_bytes
from gptjax.support.progress import Progress
from gptjax.support.quoting import shown

COPIED: Final = (  # copied to the converted directory if present
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    destination: Path
    num_weights: int  # arrays; a weight in MXFP4 counts as two
    num_params: int  # packed or not
    bytes: int  # of weights written
    dtypes: tuple[str, ...]
    seconds: float


def convert(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
    ignore_config: Sequence[str] = (),
    progress: Progress | None = None,
) -> Summary:
    """Converts a Hugging Face checkpoint directory, in bounded memory.

    Everything that can be checked from headers and configuration is checked before the first byte is written, and
    the destination appears complete or not at all. If the process is killed, calling this again with the same arguments
    continues where it was.

    Args:
      source: a directory with `config.json` and safetensors files.
      destination: the directory to create; its parent must exist.
      dtype: float32, bfloat16 or float16 for all floating-point weights; None keeps each tensor's dtype.
      quantize: "experts", "linear" or "all": which weights to round to MXFP4, from their values in the source; see
        `gptjax.config.quantization`. Weights already in MXFP4 are kept bit for bit.
      overwrite: replace the destination if it is a converted directory.
      ignore_config: keys of config.json to ignore, as for `gptjax.load`; the destination's config.json omits them.
      progress: reports progress; see `gptjax.support.progress.progress`.

    Raises:
      ConfigError: the model or one of its settings is not supported, or the weights cannot be packed in MXFP4.
      CheckpointError: the source is missing, damaged, does not match its configuration or changes during the
        conversion; or the destination cannot be written. Nothing is left behind.
    """
    started = time.monotonic()
    source, destination = Path(source), Path(destination)
    check_paths(source, destination)
    if is_converted(source):
        raise CheckpointError(
            f"{source} is already converted; name the Hugging Face directory it was made from, or export it: --to hf"
        )
    wanted = None if dtype is None else named_dtype(dtype)
    small = small_files(source)  # read once; a change before the end is an error
    config = read_config(source, ignore=ignore_config)
    target = config if quantize is None else mxfp4.packed_config(config, quantize)
    plan, reader = open_source(source, config)
    chosen = mxfp4.chosen(config, target)
    copies = {path.name: data for path, data in small.items() if path.name != safetensors.INDEX}
    if target != config or ignore_config:
        copies["config.json"] = _rewritten(copies["config.json"], config, target, ignore_config)
    with Hashes(small, reader) as hashes:
        manifest = save(
            destination,
            [parts.part(weight, wanted, chosen) for weight in parts.of_plan(plan, reader)],
            source=Source(source.resolve().name, hashes.result, hashes.state, hashes.converted),
            copies=copies,
            overwrite=overwrite,
            progress=progress,
        )
    return Summary(
        destination=destination,
        num_weights=len(manifest.leaves),
        num_params=num_params(build(target)),
        bytes=sum(leaf.nbytes for leaf in manifest.leaves),
        dtypes=tuple(sorted({leaf.dtype for leaf in manifest.leaves})),
        seconds=time.monotonic() - started,
    )


def stream_params(directory: str | PathLike[str], config: ModelConfig) -> Iterator[tuple[weights.Path, np.ndarray]]:
    """Lazily yields path and array of each weight of a Hugging Face directory, for `gptjax.checkpoints.weights.place`.

    This call already checks the directory's headers; data is read as the iterator advances. Arrays have the files'
    dtypes.

    Raises:
      CheckpointError: the directory's weights are missing, damaged or not those of the configuration's model.
    """
    plan, reader = open_source(Path(directory), config)
    return filling.stream(plan, reader)


def open_params(
    directory: str | PathLike[str], config: ModelConfig
) -> Iterator[tuple[weights.Path, Callable[[], np.ndarray]]]:
    """Like `stream_params`, but with a function that reads the array; several may run at a time."""
    plan, reader = open_source(Path(directory), config)
    reader.buffers = Buffers()
    return filling.readers(plan, reader)


def stored_dtypes(directory: str | PathLike[str], config: ModelConfig) -> dict[weights.Path, str]:
    """The dtype of each weight of a Hugging Face directory. Checks and reads headers only.

    Raises:
      CheckpointError: as for `stream_params`.
    """
    plan, reader = open_source(Path(directory), config)
    return {fill.path: NUMPY_DTYPES[reader.tensors[fill.sources[0]].dtype].name for fill in plan.fills}


def open_source(source: Path, config: ModelConfig) -> tuple[matching.Plan, safetensors.SafetensorsSource]:
    """A source's tensors, and which of them fill which weight. Reads headers only. Raises `CheckpointError`."""
    reader = safetensors.open_directory(source)
    targets = abstract_params(build(config))
    try:
        plan = matching.check(table(config, reader.tensors), reader.tensors, targets)
    except CheckpointError as error:
        raise CheckpointError(f"{source} cannot be used: {error}") from None
    return plan, reader


def named_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """A dtype that weights can be converted to. Raises `CheckpointError`."""
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        raise CheckpointError(f"weights cannot be converted to {dtype}; use {', '.join(DTYPES)}")
    return found


def check_paths(source: Path, destination: Path) -> None:
    """Raises `CheckpointError` unless the source is a directory, and the destination lies elsewhere."""
    try:
        inside, outside = Path(os.path.realpath(destination)), Path(os.path.realpath(source))
    except (OSError, ValueError) as error:  # a NUL, half a surrogate pair
        path = destination if os.path.lexists(source) else source
        raise CheckpointError(f"{shown(path)} cannot be a path ({error}); name another directory") from None
    if os.path.isfile(source):
        foreign.refuse(source)
        raise CheckpointError(f"{source} is a file; name its directory: {source.absolute().parent}")
    if not os.path.isdir(source):
        raise CheckpointError(
            f"{shown(source)} does not exist; name a directory with config.json, *.safetensors and tokenizer.json"
        )
    foreign.refuse_adapter(source)
    if inside == outside:
        raise CheckpointError(f"source and destination are the same directory, {source}; name another destination")
    if outside in inside.parents or inside in outside.parents:
        raise CheckpointError(
            f"one of {shown(destination)} and {source} is inside the other; name a destination elsewhere"
        )


def small_files(source: Path) -> dict[Path, bytes]:
    """The bytes of the files to copy and of the index, for those that exist. Raises `CheckpointError`."""
    text = text_directory(source)
    paths = (source / "config.json", *(text / name for name in COPIED), source / safetensors.INDEX)
    found = {path: read_bytes(path) for path in paths}
    return {path: data for path, data in found.items() if data is not None}


def _rewritten(config_json: bytes, config: ModelConfig, target: ModelConfig, ignored: Sequence[str]) -> bytes:
    """The target's `config.json`: ignored keys dropped, packed weights declared."""
    raw = dict(without(parse_json(config_json.decode()), ignored))
    if target != config:
        raw = mxfp4.config_json(raw, target)
    return (json.dumps(raw, indent=2, ensure_ascii=False) + "\n").encode()
