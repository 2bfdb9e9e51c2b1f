"""What a checkpoint is and what memory it needs, told without loading its weights."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from jax.typing import DTypeLike

import convert
from gptjax import checkpoint, hub, memory, runtime
from gptjax.config import read_config, read_generation_defaults
from gptjax.errors import CheckpointError, GptjaxError
from gptjax.language_model import check_rows
from gptjax.models import registry
from gptjax.models.registry import Model
from gptjax.text import load_tokenizer


def describe(
    name: str | os.PathLike[str], *, dtype: DTypeLike | None = None, max_length: int | None = None, max_batch: int = 1
) -> dict[str, Any]:
    """Facts of a checkpoint, in the order to show them. Keys ending in `_bytes` are bytes.

    "fits" is "yes", or "no; try …" with settings that would. The memory needed is the most at a time, so less than the
    sum: what loading holds goes before the cache comes.

    Raises:
      CheckpointError, ConfigError: as `gptjax.load`.
    """
    directory = hub.resolve(name)
    config = read_config(directory)
    model = registry.build(config, dtype=runtime.compute_dtype(dtype))
    length, max_batch = registry.positions(config, max_length), check_rows("max_batch", max_batch)
    need = memory.needed(model, batch=max_batch, max_length=length)
    lack = memory.shortfall(model, batch=max_batch, max_length=length, has=need.device.available, device=need.device)
    try:
        tokenizer = load_tokenizer(directory)
        text = f"{tokenizer.kind}, {tokenizer.vocab_size} tokens, ends with {list(tokenizer.eos_ids)}"
    except GptjaxError as error:
        text = f"none: {error}"
    defaults = dataclasses.asdict(read_generation_defaults(directory))
    return {
        "checkpoint": str(directory),
        "form": "converted by gptjax" if checkpoint.is_converted(directory) else "Hugging Face",
        "architecture": type(model).__name__,
        "parameters": registry.num_params(model),
        **dataclasses.asdict(config),
        "weights": _weights(directory, model),
        "tokenizer": text,
        "generation": ", ".join(f"{key} {value}" for key, value in defaults.items()),
        "dtype": jax.numpy.dtype(model.dtype).name,
        "max_length": length,
        "max_batch": max_batch,
        "weights_bytes": need.weights,
        "cache_bytes": need.cache,
        "logits_bytes": need.logits,
        "activations_bytes": need.activations,
        "loading_bytes": need.loading,
        "needed_bytes": need.total,
        "available_bytes": need.device.available,
        "device": need.device.device,
        "fits": "yes" if lack is None else f"no; {lack.partition('; ')[2]}",
    }


def describe_tensors(name: str | os.PathLike[str]) -> dict[str, str]:
    """Every weight, by its path: its shape, and its dtype as stored.

    Raises:
      CheckpointError: the weights are missing, damaged or not those of the config, as far as headers tell.
    """
    directory = hub.resolve(name)
    model = registry.build(read_config(directory))
    shapes = checkpoint.flatten(registry.abstract_params(model))
    stored = _stored_dtypes(directory, model)
    return {"/".join(path): f"{list(leaf.shape)} {stored[path]}" for path, leaf in shapes.items()}


def _stored_dtypes(directory: Path, model: Model) -> dict[tuple[str, ...], str]:
    """The dtype of each weight, told from headers alone. Raises `CheckpointError` where they are not the model's."""
    if checkpoint.is_converted(directory):
        manifest = checkpoint.checked_manifest(directory, registry.abstract_params(model))
        return {leaf.path: leaf.dtype for leaf in manifest.leaves}
    return convert.stored_dtypes(directory, model.config)


def _weights(directory: Path, model: Model) -> str:
    try:
        stored = _stored_dtypes(directory, model)
    except CheckpointError as error:
        return f"cannot be used: {error}"
    return f"{len(stored)} arrays, stored as {' and '.join(sorted(set(stored.values())))}; their headers are sound"
