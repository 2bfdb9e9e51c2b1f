"""Describes a checkpoint and the memory it needs, without loading its weights."""

import collections
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

import convert
from gptjax.api import on_mesh
from gptjax.checkpoints import weights
from gptjax.checkpoints.checkpoint import Checkpoint, open_checkpoint
from gptjax.config import GenerationDefaults, ModelConfig, published
from gptjax.config.gpt_oss import is_original
from gptjax.diagnostics.cards import Card, decode_floor
from gptjax.engine import limits, memory
from gptjax.engine.pool_sizes import foreseen
from gptjax.errors import CheckpointError, ConfigError, GptjaxError, RequestError
from gptjax.gguf import GGUFFile
from gptjax.layers.cache import capacity_of
from gptjax.models import registry
from gptjax.models.params import abstract_params, num_params, weights_by_path
from gptjax.models.registry import Model
from gptjax.sharding.mesh import described, planned
from gptjax.support import runtime
from gptjax.support.files import read_json
from gptjax.support.quoting import names
from gptjax.support.runtime import DeviceMemory
from gptjax.support.units import readable
from gptjax.text import Tokenizer
from gptjax.text.chat_formats import choose_format
from pallas_kernels.formats import is_packed

_MOST_VALUES: Final = 8  # of a list that is shown whole


def describe(
    name: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    cache_dtype: str | None = None,
    max_length: int | None = None,
    max_batch: int = 1,
    packed: bool | None = None,
    device: DeviceMemory | None = None,
    ignore_config: Sequence[str] = (),
    generation_config: Mapping[str, Any] | bool | None = None,
    mesh: Mapping[str, int] | None = None,
    card: Card | None = None,
) -> dict[str, Any]:
    """Facts about a checkpoint, in display order. Values of keys ending in `_bytes` are bytes.

    "metadata" has the keys and values of a GGUF file, but of a list of more than 8 values only {"length": how many}.

    For a checkpoint with packed weights, `packed_numbers` counts the packed numbers, and `packed_vs_float16` and
    `whole_vs_float16` say how many times larger these, and all weights as stored, would be in float16.

    "fits" is "yes", or "no; try …" with settings that would fit. The memory needed is the peak, so less than the sum:
    what loading holds is freed before the cache is allocated.

    If some are in a GGUF file's packed types, `weights_kept_bytes` and `weights_expanded_bytes` are the memory of all
    weights if these stay packed or become numbers; `weights_bytes` is the one of the two that `gptjax.load` chooses.

    Args:
      device: the memory to fit in; by default that of the default device. See `imagined_gpu`.
      cache_dtype, packed, ignore_config, generation_config: as for `gptjax.load`.
      mesh: sizes of a mesh, whose devices need not be there: then all memory is that of one of them.
      card: adds how fast it could decode at best, if `max_batch` rows have `max_length` positions, or as many as the
        cache has room for: see `decode_floor`.

    Raises:
      CheckpointError, ConfigError: as for `gptjax.load`.
      RequestError: the model does not divide so.
    """
    checkpoint = open_checkpoint(name, ignore_config=ignore_config, generation_config=generation_config)
    model = _model(checkpoint.config, dtype, cache_dtype, device)
    defaults = checkpoint.defaults
    try:
        tokenizer = checkpoint.tokenizer()
        text = f"{tokenizer.kind}, {tokenizer.vocab_size} tokens, ends with {list(tokenizer.eos_ids)}"
    except GptjaxError as error:
        text = chat = f"none: {error}"
    else:
        chat = _chat_format(tokenizer)
    stored = _stored(checkpoint, model)
    return {
        "checkpoint": str(checkpoint.path),
        "form": _form(checkpoint),
        **_architecture(model),
        "weights": _weights(stored),
        **_packing(checkpoint, model, stored),
        "tokenizer": text,
        "chat_format": chat,
        "generation": _generation(defaults, model.config),
        **_memory(model, max_length, max_batch, device, packed, mesh, card),
        **_metadata(checkpoint),
    }


def _metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """A GGUF file's keys and values, as JSON can have them."""
    if checkpoint.gguf is None:
        return {}
    return {"metadata": {key: _short(value) for key, value in checkpoint.gguf.metadata.items()}}


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return {"length": len(value)} if len(value) > _MOST_VALUES else [_short(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _chat_format(tokenizer: Tokenizer) -> str:
    try:
        return choose_format(tokenizer).name
    except GptjaxError as error:
        return f"none: {error}"


def _generation(defaults: GenerationDefaults, config: ModelConfig) -> str:
    """The generation settings, and why generation is refused if it is."""
    settings = [field.name for field in dataclasses.fields(defaults) if field.name not in ("faults", "source")]
    text = ", ".join(f"{name} {getattr(defaults, name)}" for name in settings)
    if beyond := [token for token in defaults.eos_ids if token >= config.vocab_size]:
        text += f"; the model has no token {names(list(map(str, beyond)))}, so it cannot end a text"
    try:
        defaults.check()
    except ConfigError as error:
        text += f"; refused: {error}"
    return text


def describe_published(
    name: str,
    *,
    dtype: DTypeLike | None = None,
    cache_dtype: str | None = None,
    max_length: int | None = None,
    max_batch: int = 1,
    device: DeviceMemory | None = None,
    mesh: Mapping[str, int] | None = None,
    card: Card | None = None,
) -> dict[str, Any]:
    """Like `describe`, for a published size (a key of `gptjax.config.PUBLISHED`): the facts that need no checkpoint.

    Raises:
      RequestError: an unknown size, or one that does not divide so.
    """
    model = _model(published(name), dtype, cache_dtype, device)
    return {"size": name, **_architecture(model), **_memory(model, max_length, max_batch, device, mesh=mesh, card=card)}


def imagined_gpu(size: float, name: str | None = None) -> DeviceMemory:
    """An imaginary GPU with `size` bytes, all free, to see what would fit."""
    if not 0 < size < float("inf"):
        raise RequestError(f"a device's memory must be more than 0 bytes, found {size}")
    return DeviceMemory(name or f"GPU of {readable(int(size))}", "gpu", int(size), 0, int(size))


def _model(config: ModelConfig, dtype: DTypeLike | None, cache_dtype: str | None, device: DeviceMemory | None) -> Model:
    if dtype is None and device is not None and device.platform != "cpu":
        dtype = "bfloat16"
    return registry.build(config, dtype=runtime.compute_dtype(dtype), cache_dtype=runtime.cache_dtype(cache_dtype))


def _form(checkpoint: Checkpoint) -> str:
    if checkpoint.gguf is not None:
        return f"GGUF, {names(_types(checkpoint.gguf))}"
    if checkpoint.is_converted:
        return "converted by gptjax"
    raw = read_json(checkpoint.path / "config.json") or {}
    return "OpenAI's original" if is_original(raw) else "Hugging Face"


def _types(file: GGUFFile) -> list[str]:
    """The types of a file's tensors, as "210 Q4_1", most first."""
    counted = collections.Counter(tensor.type for tensor in file.tensors.values())
    return [f"{count} {kind}" for kind, count in counted.most_common()]


def _architecture(model: Model) -> dict[str, Any]:
    facts = {"architecture": type(model).__name__, "parameters": num_params(model)}
    settings = dataclasses.asdict(model.config)
    del settings["types"]  # hundreds; the form counts them, and `describe_tensors` lists them
    return facts | settings


def _memory(
    stored: Model,
    max_length: int | None,
    max_batch: int,
    device: DeviceMemory | None,
    packed: bool | None = None,
    mesh: Mapping[str, int] | None = None,
    card: Card | None = None,
) -> dict[str, Any]:
    length, max_batch = limits.positions(stored.config, max_length), limits.at_least_one("max_batch", max_batch)
    sizes: dict[str, Any] = {"batch": max_batch, "max_length": length}
    if mesh is None:
        model = memory.as_loaded(stored, **sizes, packed=packed, device=device)
    else:
        model = on_mesh(stored, planned(mesh))
    need = memory.needed(model, **sizes, device=device)
    lack = memory.shortfall(model, **sizes, has=need.device.available, device=need.device)
    cache, tokens = foreseen(model, **sizes, device=need.device)
    all_tokens, shared = max_batch * capacity_of(length), tokens // max_batch
    room = "" if tokens >= all_tokens else f", with room for {tokens} tokens in the cache instead of {all_tokens}"
    forms = {"kept": True, "expanded": False} if stored.config.types else {}
    both = {
        f"weights_{name}_bytes": memory.needed(memory.as_loaded(stored, **sizes, packed=form), **sizes).weights
        for name, form in forms.items()
    }
    return {
        "dtype": jax.numpy.dtype(model.dtype).name,
        **({} if model.cache_dtype is None else {"cache_dtype": model.cache_dtype}),
        **({} if mesh is None else {"mesh": f"{described(mesh)}; memory is that of each device"}),
        "max_length": length,
        "max_batch": max_batch,
        "weights_bytes": need.weights,
        **both,
        "cache_bytes": cache,
        "cache_tokens": tokens,
        "logits_bytes": need.logits,
        "activations_bytes": need.activations,
        "loading_bytes": need.loading,
        "needed_bytes": need.peak(cache),
        "available_bytes": need.device.available,
        "device": need.device.device,
        "fits": f"yes{room}" if lack is None else f"no; {lack.partition('; ')[2]}",
        **({} if card is None else decode_floor(model, card, batch=max_batch, length=max(1, min(length, shared)))),
    }


def describe_tensors(name: str | os.PathLike[str], *, ignore_config: Sequence[str] = ()) -> dict[str, str]:
    """Shape and stored dtype of every weight, by path.

    Args:
      ignore_config: as for `gptjax.load`.

    Raises:
      CheckpointError: the weights are missing, damaged or do not match the config, judging by their headers.
    """
    checkpoint = open_checkpoint(name, ignore_config=ignore_config)
    model = registry.build(checkpoint.config)
    shapes = weights.flatten(abstract_params(model))
    stored = _stored_dtypes(checkpoint, model)
    return {"/".join(path): f"{list(leaf.shape)} {stored[path]}" for path, leaf in shapes.items()}


def _stored_dtypes(checkpoint: Checkpoint, model: Model) -> dict[tuple[str, ...], str]:
    """The dtype of each weight, from headers only. Raises `CheckpointError` if they are not the model's weights."""
    if checkpoint.is_converted:
        manifest = weights.checked_manifest(checkpoint.path, abstract_params(model))
        return {leaf.path: leaf.dtype for leaf in manifest.leaves}
    return convert.stored_dtypes(checkpoint)


def _stored(checkpoint: Checkpoint, model: Model) -> dict[tuple[str, ...], str] | CheckpointError:
    try:
        return _stored_dtypes(checkpoint, model)
    except CheckpointError as error:
        return error


def _weights(stored: dict[tuple[str, ...], str] | CheckpointError) -> str:
    if isinstance(stored, CheckpointError):
        return f"cannot be used: {stored}"
    return f"{len(stored)} arrays, stored as {' and '.join(sorted(set(stored.values())))}; their headers are valid"


def _packing(
    checkpoint: Checkpoint, model: Model, stored: dict[tuple[str, ...], str] | CheckpointError
) -> dict[str, Any]:
    """How much is packed and what that saves; empty if nothing is."""
    params = abstract_params(model)
    packed = [leaf for leaf in weights_by_path(params).values() if is_packed(leaf)]
    if not packed:
        return {}
    numbers, size = sum(leaf.size for leaf in packed), sum(leaf.nbytes for leaf in packed)
    facts = {"packed_numbers": numbers, "packed_bytes": size, "packed_vs_float16": _times_smaller(numbers, size)}
    if not isinstance(stored, CheckpointError):
        if checkpoint.gguf is not None:
            whole = sum(tensor.nbytes for tensor in checkpoint.gguf.tensors.values())
        else:
            shapes = weights.flatten(params).items()
            whole = sum(math.prod(leaf.shape) * jnp.dtype(stored[path]).itemsize for path, leaf in shapes)
        facts["whole_vs_float16"] = _times_smaller(num_params(model), whole)
    return facts


def _times_smaller(numbers: int, size: int) -> float:
    return round(2 * numbers / size, 4)
