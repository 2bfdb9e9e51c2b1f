"""`load`: makes a `LanguageModel` from a checkpoint."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

import convert
from gptjax.checkpoints import weights
from gptjax.checkpoints.checkpoint import Checkpoint, open_checkpoint
from gptjax.engine import limits
from gptjax.engine.free_of_load import is_exact_by_default
from gptjax.engine.memory import as_loaded, check, explained
from gptjax.errors import RequestError
from gptjax.language_model import LanguageModel
from gptjax.models import registry, shards
from gptjax.models.params import Params, abstract_params, check_float16, expanded, repacked
from gptjax.models.registry import Model
from gptjax.sharding.mesh import as_mesh
from gptjax.sharding.share import share_of
from gptjax.support import runtime
from gptjax.support.progress import progress
from gptjax.support.quoting import quoted
from gptjax.text import Tokenizer
from gptjax.text.chat_formats import choose_format
from pallas_kernels.dispatch import IMPLEMENTATIONS

DEFAULT_MODEL = "gpt2-tales"


def load(
    name: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    dtype: DTypeLike | None = None,
    cache_dtype: str | None = None,
    max_length: int | None = None,
    max_batch: int | None = None,
    memory: float | str | None = None,
    exact: bool | None = True,
    implementation: str = "auto",
    packed: bool | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    chat_format: str | None = None,
    ignore_config: Sequence[str] = (),
    generation_config: Mapping[str, Any] | bool | None = None,
    mesh: Mesh | Mapping[str, int] | None = None,
) -> LanguageModel:
    """Loads a model onto the default device, or divided among several.

    Args:
      name: a demo ("gpt2-tales"), a directory (a Hugging Face checkpoint, or one that `gptjax convert` wrote), a GGUF
        file, "smollm2" (see README), or a Hub id, looked up in the local Hub cache first.
      dtype: the dtype of weights and computation: "float32", "bfloat16" or "float16". Default: float32 on a CPU, else
        bfloat16.
      cache_dtype: "fp8" keeps keys and values in half the memory of bfloat16, rounded to float8_e4m3fn with a scale for
        each head and position: see docs/precision-and-cost.md. Default: `dtype`.
      max_length: the most positions in a sequence, prompt and output together. Default: $GPTJAX_MAX_LENGTH, else all
        that the model has.
      max_batch: the most rows of a decode step. With a given `max_batch`, a prompt's results are bit-identical whether
        it runs alone or with others, unless `exact` is false. Default: each call uses as many rows as it has prompts,
        rounded up to a power of two, at most 32. On a mesh, its axis `data` divides them, so they are rounded up to a
        multiple of it.
      memory: how much memory to use: a share of the device's, such as 0.9, for the weights, the cache and all else; or
        the number of tokens that the cache has room for, such as "262144tokens". All rows share the cache. It has room
        for at least one row of `max_length`, and, unless a number is given, at most for `max_batch` of them. If it is
        full, newer requests wait. On a GPU, a share above JAX's usual 0.75 must be given before anything else uses JAX.
        Default: on a GPU, nearly all that JAX has taken; on a CPU, up to half of the free memory for the cache.
      exact: whether results must have the same bits whatever else is or was computed. In float32 on an x86 CPU
        with AVX2, and for GPT-OSS, Llama, Qwen and (up to 8 rows) GPT-2 in bfloat16 on Hopper, the only cost is that
        later turns do not reuse generated tokens. GPT-2 with more rows computes at least 16 (or all). Elsewhere, each
        step computes all `max_batch` rows (without `max_batch`, as many as the call uses), each prompt is read by
        itself, and a prompt that begins like an earlier one reuses only whole chunks of it (of 1024 tokens; 2048 where
        there are kernels for prompts). None: true where that reuse is the only cost, and on any CPU in float32; else
        false.
      implementation: which kernels to use; "auto" takes the best available, a named one runs or raises.
      packed: whether weights in the packed types of a GGUF file stay packed in memory. Default: yes, except on a CPU
        that has room for their numbers, because computing with these is faster there.
      tokenizer: a directory or a GGUF file to take the tokenizer from, instead of the checkpoint's own.
      chat_format: how conversations are written, such as "chatml" (the names: `gptjax.text.chat_formats.FORMATS`).
        Default: recognised by the tokenizer's chat template, or by harmony's special tokens.
      ignore_config: keys of config.json, or of a GGUF file's metadata, to ignore, if you know that they do not change
        the results, such as `("rotary_dim", "rope_scaling.mscale")`.
      generation_config: settings that replace the checkpoint's generation_config.json, by the same names, or False for
        none. The tokens that end a text are kept, unless `eos_token_id` is given.
      mesh: divides the model and its rows among devices: sizes by name, such as `{"data": 2, "tensor": 4}`, or a
        `jax.sharding.Mesh` with these axes. See docs/more-than-one-device.md.

    Raises:
      CheckpointError, ConfigError: the checkpoint does not exist, is damaged or is unsupported.
      RequestError: `memory`, `implementation` or `chat_format` is not one that is understood, JAX has started with less
        than that share of a GPU or the environment gives it less, the tokenizer lacks special tokens of the format, or
        the model cannot be divided over the mesh.
      CapacityError: `max_length` is more than the model's positions, or the model does not fit in memory; says which
        settings would fit. Raised before the weights are read.
    """
    checkpoint = open_checkpoint(name, ignore_config=ignore_config, generation_config=generation_config)
    return load_checkpoint(
        checkpoint,
        dtype=dtype,
        cache_dtype=cache_dtype,
        max_length=max_length,
        max_batch=max_batch,
        memory=memory,
        exact=exact,
        implementation=implementation,
        packed=packed,
        tokenizer=tokenizer,
        chat_format=chat_format,
        mesh=mesh,
    )


def load_checkpoint(
    checkpoint: Checkpoint,
    *,
    dtype: DTypeLike | None = None,
    cache_dtype: str | None = None,
    max_length: int | None = None,
    max_batch: int | None = None,
    memory: float | str | None = None,
    exact: bool | None = True,
    implementation: str = "auto",
    packed: bool | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    chat_format: str | None = None,
    mesh: Mesh | Mapping[str, int] | None = None,
) -> LanguageModel:
    """Like `load`, for a checkpoint that is already open because its configuration was needed first."""
    runtime.check_process()
    runtime.enable_compilation_cache()
    defaults = checkpoint.defaults
    length = limits.positions(checkpoint.config, max_length)
    rows = limits.at_least_one("max_batch", 1 if max_batch is None else max_batch)
    limit = limits.memory_limit(memory)
    if limit is not None and limit.share is not None:
        runtime.reserve(limit.share)  # before anything uses JAX
    if implementation not in IMPLEMENTATIONS:
        raise RequestError(
            f"unknown implementation {quoted(implementation)}; choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    stored = registry.build(
        checkpoint.config,
        dtype=runtime.compute_dtype(dtype),
        implementation=implementation,
        cache_dtype=runtime.cache_dtype(cache_dtype),
    )
    model = as_loaded(stored, batch=rows, max_length=length, packed=packed) if mesh is None else on_mesh(stored, mesh)
    check(model, batch=rows, max_length=length, limit=limit)
    text = checkpoint.tokenizer_or_reason(tokenizer)
    if chat_format is not None and isinstance(text, Tokenizer):
        choose_format(text, chat_format)  # now, before the weights are read
    with explained(model, batch=rows, max_length=length, loaded=False):
        if mesh is None:
            params = repacked(model, load_params(checkpoint, stored))
        else:
            params = shards.repacked(model, load_params(checkpoint, stored, shards.putter(model, stored)))
        if model.config is not stored.config:
            params = expanded(params, model.param_dtype)
    return LanguageModel(
        model,
        params,
        tokenizer=text,
        defaults=defaults,
        max_length=length,
        max_batch=max_batch,
        exact=is_exact_by_default(model, rows=rows) if exact is None else exact,
        chat_format=chat_format,
        memory_limit=limit,
    )


def on_mesh(model: Model, mesh: Mesh | AbstractMesh | Mapping[str, int]) -> Model:
    """The model as each device of a mesh runs it. Raises `RequestError` if it does not divide so."""
    mesh = mesh if isinstance(mesh, AbstractMesh) else as_mesh(mesh)
    return shards.divided(model, share_of(model.config, mesh, dtype=model.dtype))


def load_params(checkpoint: Checkpoint, model: Model, put: Callable[..., jax.Array] | None = None) -> Params:
    """Loads a checkpoint's weights onto the default device, in the model's dtype, checking each leaf.

    Args:
      put: how, otherwise: see `checkpoints.weights.place`.
    """
    targets = abstract_params(model)
    if checkpoint.is_converted:
        params = weights.restore(checkpoint.path, targets, progress=progress, put=put)
    else:
        params = weights.place(convert.open_params(checkpoint), targets, progress=progress, put=put)
    if jnp.dtype(model.dtype) == jnp.float16:
        check_float16(params)
    return params
