"""Writes a Hugging Face directory again: safetensors named as transformers saves them, its config.json and tokenizer.

The names and layouts follow from the tables that conversion reads.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from convert import mxfp4, parts
from convert.conversion import COPIED, Summary, check_paths, named_dtype, small_files, to_copy
from convert.matching import names_of
from convert.rules import Table
from convert.sources import open_source
from convert.tables import table
from gptjax.checkpoints.atomic_directory import check_room, staged
from gptjax.checkpoints.checkpoint import Checkpoint, open_path
from gptjax.checkpoints.safetensors import INDEX, SINGLE
from gptjax.checkpoints.safetensors_writer import Outline, SafetensorsWriter, is_ours
from gptjax.checkpoints.saving import Part
from gptjax.checkpoints.text_files import METADATA, GGUFText
from gptjax.checkpoints.weights import checked_manifest
from gptjax.config import GptOssConfig, ModelConfig
from gptjax.config.generation import FILE as GENERATION
from gptjax.config.gpt_oss import is_original
from gptjax.config.keys import without
from gptjax.config.quantization import packing_to_json
from gptjax.errors import ConfigError, RequestError
from gptjax.gguf.types import FLOATS
from gptjax.models.params import abstract_params
from gptjax.models.registry import build
from gptjax.support.files import parse_json
from gptjax.support.progress import Progress, silent
from gptjax.support.quoting import names, shown

SHARD_BYTES: Final = 5 * 10**9
_READABLE: Final = ("none", "experts")  # of `gptjax.config.quantization.TARGETS`, by transformers
Tensors = Mapping[str, Outline]


def export(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    quantize: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    ignore_config: Sequence[str] = (),
    progress: Progress | None = None,
) -> Summary:
    """Writes a checkpoint as a Hugging Face directory, in bounded memory.

    Tensors that are neither cast nor rounded have the bits that the checkpoint was made from. The destination appears
    complete or not at all.

    Args:
      source: a converted directory, or what `convert.convert` takes.
      destination: the directory to create; its parent must exist.
      dtype: float32, bfloat16 or float16 for all floating-point weights; None keeps each tensor's dtype. The numbers of
        a GGUF file's packed types are float32, which loses nothing.
      quantize: "experts" rounds GPT-OSS's experts to MXFP4, as in OpenAI's checkpoints. (transformers has no other
        weights in MXFP4.)
      max_shard_bytes: the most bytes of tensors in a file; a larger tensor is in a file of its own.
      overwrite: replace the destination if it has nothing but files that this function wrote.
      ignore_config: keys of config.json to leave out.
      progress: reports progress.

    Raises:
      ConfigError: the model or one of its settings is not supported, or transformers cannot read its packed weights.
      CheckpointError: the source is missing or damaged, or the destination cannot be written. Nothing is left behind.
      RequestError: `max_shard_bytes` is not a positive number.
    """
    started = time.monotonic()
    source, destination = Path(source), Path(destination)
    if max_shard_bytes < 1:
        raise RequestError(f"max_shard_bytes is {max_shard_bytes}; a shard has at least 1 byte")
    check_paths(source, destination)
    wanted = None if dtype is None else named_dtype(dtype)
    checkpoint = open_path(source, ignore_config=ignore_config)
    copies, notes = _small_files(checkpoint)
    target = _target(_expanded(checkpoint.config), quantize)
    chosen = mxfp4.chosen(_expanded(checkpoint.config), target)
    written = [parts.part(weight, wanted, chosen) for weight in _weights(checkpoint)]
    rules = table(target)
    tensors = {name: outline for part in written for name, outline in _outlines(part, rules)}
    ignored = ignore_config if checkpoint.gguf is None else ()  # a GGUF file's keys are not those of config.json
    copies["config.json"] = _config_json(copies["config.json"], checkpoint.config, target, tensors.values(), ignored)
    with staged(destination, overwrite=overwrite, ours=_is_exported) as partial:
        check_room(destination, partial, sum(tensor.nbytes for tensor in tensors.values()))
        _write(partial, written, rules, tensors, max_shard_bytes, progress)
        for name, data in copies.items():
            (partial / name).write_bytes(data)
    arrays = [(tensor.dtype.name, tensor.nbytes) for tensor in tensors.values()]
    notes = (*_expansions(checkpoint, wanted), *notes)
    return Summary.of(destination, target, arrays, started=started, notes=notes)


def _expanded(config: ModelConfig) -> ModelConfig:
    """The configuration with a GGUF file's packed types as numbers, which is all that transformers' files can have."""
    return dataclasses.replace(config, types=()) if config.types else config


def _expansions(checkpoint: Checkpoint, dtype: np.dtype[Any] | None) -> list[str]:
    """Says which packed types become numbers, if any do."""
    if checkpoint.gguf is None:
        types = {kind for _, kinds in checkpoint.config.types for kind in kinds}
    else:
        types = {tensor.type for tensor in checkpoint.gguf.tensors.values()} - FLOATS.keys()
        types -= {"MXFP4"} if checkpoint.config.mxfp4 != "none" else set()
    return [f"weights in {names(sorted(types))} were expanded to {dtype or 'float32'}"] if types else []


def _small_files(checkpoint: Checkpoint) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The contents of the files next to the weights, and what to say about them.

    Raises:
      CheckpointError: a file is damaged.
    """
    copies = to_copy(checkpoint, small_files(checkpoint.path))
    if not isinstance(checkpoint.text, GGUFText):
        return copies, ()
    if not checkpoint.has_tokenizer:
        return copies, (f"tokenizer.json is missing: {shown(checkpoint.text.path)} does not describe a tokenizer",)
    try:
        files = checkpoint.text.huggingface_files()
    except ConfigError as error:
        return copies, (f"tokenizer.json is missing: {error}",)
    del copies[METADATA]
    # Without these, transformers takes the first and last token of the family's first model.
    ends = {key: files[GENERATION][key] for key in ("bos_token_id", "eos_token_id")}
    config = {**parse_json(copies["config.json"].decode()), **ends}
    faults = [fault.text or f"gptjax has no {fault.key}" for fault in checkpoint.text.faults()]
    notes = (f"{GENERATION} lacks settings that cannot be followed: {', '.join(faults)}",) if faults else ()
    return copies | {name: _json(value) for name, value in {**files, "config.json": config}.items()}, notes


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _target(config: ModelConfig, quantize: str | None) -> ModelConfig:
    """The configuration to write. Raises `ConfigError` if transformers could not read it."""
    if config.mxfp4 not in _READABLE:
        fix = "export the checkpoint that this one was made from"
    elif quantize is None:
        return config
    elif quantize in _READABLE and isinstance(config, GptOssConfig):
        return mxfp4.packed_config(config, quantize)
    else:
        fix = "choose mxfp4=experts" if isinstance(config, GptOssConfig) else "do not quantize"
    raise ConfigError(f"transformers reads MXFP4 in the experts of GPT-OSS and nowhere else; {fix}")


def _weights(checkpoint: Checkpoint) -> Iterator[parts.Weight]:
    """All weights, none of them in a GGUF file's packed types."""
    config = checkpoint.config
    if checkpoint.is_converted:
        manifest = checked_manifest(checkpoint.path, abstract_params(build(config)))
        return parts.expanded(parts.of_manifest(checkpoint.path, manifest), config.types)
    return parts.of_plan(*open_source(dataclasses.replace(checkpoint, config=_expanded(config))))


def _outlines(part: Part, rules: Table) -> Iterator[tuple[str, Outline]]:
    """The tensors that a part becomes."""
    for path, weight in part.weights.items():
        names, transform = names_of(rules, path)
        for name, shape in zip(names, transform.source_shapes(tuple(weight.shape)), strict=True):
            yield name, Outline(np.dtype(weight.dtype), shape)


def _write(
    partial: Path, written: Iterable[Part], rules: Table, tensors: Tensors, most: int, progress: Progress | None
) -> None:
    total = sum(tensor.nbytes for tensor in tensors.values())
    writer = SafetensorsWriter(partial, tensors, most=most)
    with (progress or silent)("writing tensors", total) as advance:
        for part in written:
            _write_part(writer, part, rules)
            advance(part.nbytes)


def _write_part(writer: SafetensorsWriter, part: Part, rules: Table) -> None:
    """Reads and writes a part, which is in memory only here."""
    for path, array in part.read().items():
        names, transform = names_of(rules, path)
        for name, tensor in zip(names, transform.invert(array), strict=True):
            writer.write(name, tensor)


def _config_json(
    data: bytes, config: ModelConfig, target: ModelConfig, tensors: Iterable[Outline], ignored: Sequence[str]
) -> bytes:
    """The `config.json` to write: the source's own bytes, unless one of its values has changed."""
    before = parse_json(data.decode())
    raw: dict[str, Any] = dict(without(before, ignored))
    if is_original(raw):  # OpenAI's own keys, which transformers does not know
        raw = target.to_json()
    elif target != config:
        raw.pop("quantization_config", None)
        raw |= packing_to_json(target.mxfp4, target.types)
    floats = {tensor.dtype.name for tensor in tensors if jnp.issubdtype(tensor.dtype, jnp.floating)}
    if len(floats) == 1:  # what transformers loads the weights as
        raw |= dict.fromkeys(raw.keys() & {"dtype", "torch_dtype"}, *floats)
    return data if raw == before else _json(raw)


def _is_exported(directory: Path) -> bool:
    """Whether a directory has only files that `export` writes, and the weights are surely ours."""
    if directory.is_symlink() or not directory.is_dir():
        return False
    found = set(os.listdir(directory))
    shards = {name for name in found if name == SINGLE or (name.startswith("model-") and name.endswith(".safetensors"))}
    known = found <= {"config.json", INDEX, *COPIED, *shards}
    return known and bool(shards) and all(is_ours(directory / name) for name in shards)
