"""What a checkpoint is and what memory it needs, told without loading its weights."""

import dataclasses
import os
from typing import Any

import jax
from jax.typing import DTypeLike

from gptjax import checkpoint, hub, memory, runtime
from gptjax.config import read_config, read_generation_defaults
from gptjax.errors import GptjaxError
from gptjax.models import registry
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
    length = registry.positions(config, max_length)
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


def describe_tensors(name: str | os.PathLike[str], *, dtype: DTypeLike | None = None) -> dict[str, str]:
    """Every weight, by its path: shape and dtype as loaded."""
    model = registry.build(read_config(hub.resolve(name)), dtype=runtime.compute_dtype(dtype))
    leaves = jax.tree_util.tree_leaves_with_path(registry.abstract_params(model))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{list(leaf.shape)} {leaf.dtype.name}"
        for path, leaf in leaves
    }
