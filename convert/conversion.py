"""Converts a Hugging Face directory or a GGUF file to a converted directory."""

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Final

import numpy as np
from jax.typing import DTypeLike

from convert import DTYPES, mxfp4, parts
from convert.hashing import Hashes
from convert.sources import open_source
from gptjax.checkpoints import foreign, safetensors
from gptjax.checkpoints.checkpoint import Checkpoint, open_path
from gptjax.checkpoints.manifest import is_converted
from gptjax.checkpoints.saving import Source, save
from gptjax.checkpoints.text_files import METADATA
from gptjax.config import ModelConfig, text_directory
from gptjax.config.keys import without
from gptjax.errors import CheckpointError
from gptjax.models.params import num_params
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
    METADATA,
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
    notes: tuple[str, ...] = ()  # what the destination has differently from the source, or lacks

    @classmethod
    def of(
        cls,
        destination: Path,
        config: ModelConfig,
        arrays: Sequence[tuple[str, int]],
        *,
        started: float,
        notes: tuple[str, ...] = (),
    ) -> "Summary":
        """The summary of what was written: each array's dtype and bytes. `started` is from `time.monotonic`."""
        return cls(
            destination=destination,
            num_weights=len(arrays),
            num_params=num_params(build(config)),
            bytes=sum(nbytes for _, nbytes in arrays),
            dtypes=tuple(sorted({dtype for dtype, _ in arrays})),
            seconds=time.monotonic() - started,
            notes=notes,
        )


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
    """Converts a Hugging Face checkpoint directory or a GGUF file, in bounded memory.

    Everything that can be checked from headers and configuration is checked before the first byte is written, and
    the destination appears complete or not at all. If the process is killed, calling this again with the same arguments
    continues where it was.

    Args:
      source: a directory with `config.json` and safetensors files, or a GGUF file.
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
            f"{source} is already converted; name the directory or GGUF file it was made from, or export it: --to hf"
        )
    wanted = None if dtype is None else named_dtype(dtype)
    small = small_files(source)  # read once; a change before the end is an error
    checkpoint = open_path(source, ignore_config=ignore_config)
    config = checkpoint.config
    target = config if quantize is None else mxfp4.packed_config(config, quantize)
    plan, reader = open_source(checkpoint)
    chosen = mxfp4.chosen(config, target)
    copies = to_copy(checkpoint, small)
    if target != config or (ignore_config and checkpoint.gguf is None):
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
    return Summary.of(destination, target, [(leaf.dtype, leaf.nbytes) for leaf in manifest.leaves], started=started)


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
    """Raises `CheckpointError` unless the source is a directory or a GGUF file, and the destination lies elsewhere."""
    try:
        inside, outside = Path(os.path.realpath(destination)), Path(os.path.realpath(source))
    except (OSError, ValueError) as error:  # a NUL, half a surrogate pair
        path = destination if os.path.lexists(source) else source
        raise CheckpointError(f"{shown(path)} cannot be a path ({error}); name another directory") from None
    if os.path.isfile(source):
        if not foreign.is_gguf(source):
            foreign.refuse(source)
            raise CheckpointError(f"{source} is a file; name its directory: {source.absolute().parent}")
    elif not os.path.isdir(source):
        raise CheckpointError(
            f"{shown(source)} does not exist; name a GGUF file, or a directory with config.json, *.safetensors and "
            "tokenizer.json"
        )
    else:
        foreign.refuse_adapter(source)
    if inside == outside:
        raise CheckpointError(f"source and destination are the same directory, {source}; name another destination")
    if outside in inside.parents or inside in outside.parents:
        raise CheckpointError(
            f"one of {shown(destination)} and {source} is inside the other; name a destination elsewhere"
        )


def small_files(source: Path) -> dict[Path, bytes]:
    """The bytes of a directory's files to copy and of its index, for those that exist. Raises `CheckpointError`."""
    if os.path.isfile(source):
        return {}
    text = text_directory(source)
    paths = (source / "config.json", *(text / name for name in COPIED), source / safetensors.INDEX)
    found = {path: read_bytes(path) for path in paths}
    return {path: data for path, data in found.items() if data is not None}


def to_copy(checkpoint: Checkpoint, small: Mapping[Path, bytes]) -> dict[str, bytes]:
    """The contents of the destination's small files: the source's own, or what a GGUF file says in their place."""
    if checkpoint.gguf is None:
        return {path.name: data for path, data in small.items() if path.name != safetensors.INDEX}
    config = json.dumps(checkpoint.config.to_json(), indent=2) + "\n"
    return {"config.json": config.encode(), METADATA: checkpoint.gguf.metadata_file()}


def _rewritten(config_json: bytes, config: ModelConfig, target: ModelConfig, ignored: Sequence[str]) -> bytes:
    """The target's `config.json`: ignored keys dropped, packed weights declared."""
    raw = dict(without(parse_json(config_json.decode()), ignored))
    if target != config:
        raw = mxfp4.config_json(raw, target)
    return (json.dumps(raw, indent=2, ensure_ascii=False) + "\n").encode()
