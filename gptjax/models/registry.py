"""Builds a configuration's model and cache."""

from collections.abc import Callable, Sequence
from typing import Final

import jax.numpy as jnp
from jax.typing import DTypeLike

from gptjax.config import GPT2Config, GptOssConfig, LlamaConfig, ModelConfig
from gptjax.layers.cache import KVCache
from gptjax.models.gpt2 import GPT2
from gptjax.models.gpt_oss import GptOss
from gptjax.models.llama import Llama
from gptjax.sharding.hosts import check_alone
from gptjax.sharding.share import Share
from pallas_kernels.fp8_pages import vector_bytes

Model = GPT2 | GptOss | Llama  # the union of all models

_MODELS: Final[dict[type[ModelConfig], Callable[..., Model]]] = {
    GPT2Config: GPT2,
    GptOssConfig: GptOss,
    LlamaConfig: Llama,
}


def build(
    config: ModelConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    implementation: str = "auto",
    share: Share | None = None,
    cache_dtype: str | None = None,
) -> Model:
    """The model of a configuration, or one device's share of it. Weights are declared in `param_dtype`, and keys and
    values kept in `cache_dtype`, by default `dtype`."""
    return _MODELS[type(config)](
        config,
        dtype=dtype,
        param_dtype=dtype if param_dtype is None else param_dtype,
        implementation=implementation,
        share=share,
        cache_dtype=cache_dtype,
    )


def kept_dtype(model: Model) -> DTypeLike | str:
    """Of keys and values in the model's caches."""
    return model.dtype if model.cache_dtype is None else model.cache_dtype


def position_bytes(model: Model) -> int:
    """Bytes of a position's key and value in one layer, on one device."""
    return 2 * model.own.num_kv_heads * vector_bytes(model.config.head_width, kept_dtype(model))


def create_cache(model: Model, *, batch: int, max_length: int, chunk: int | None = None) -> KVCache:
    """An empty cache for the model, for calls of at most `chunk` tokens a row: see `KVCache.create`. On a mesh, `batch`
    must be a multiple of its axis `data`, and its devices those of one process."""
    check_alone(model.own.mesh, "computing the logits of a prompt (lm.logits, perplexity, echo with logprobs)")
    config, own = model.config, model.own

    def create() -> KVCache:
        return KVCache.create(
            windows=config.windows,
            batch=batch // own.rows_parts,
            max_length=max_length,
            chunk=chunk,
            num_kv_heads=own.num_kv_heads,
            head_width=config.head_width,
            dtype=kept_dtype(model),
        )

    return _on_devices(model, create)


def create_pools(model: Model, *, pages: Sequence[int], rows: int, max_length: int) -> KVCache:
    """An empty cache for the model, whose pages are given to rows as needed: see `KVCache.pooled`."""
    config, own = model.config, model.own

    def create() -> KVCache:
        return KVCache.pooled(
            windows=config.windows,
            pages=pages,
            rows=rows // own.rows_parts,
            max_length=max_length,
            num_kv_heads=own.num_kv_heads,
            head_width=config.head_width,
            dtype=kept_dtype(model),
        )

    return _on_devices(model, create)


def _on_devices(model: Model, create: Callable[[], KVCache]) -> KVCache:
    """A cache; on a mesh, each device creates its part, which has pages and tables of its own rows and heads."""
    cache: KVCache = create() if model.own.mesh is None else model.own.made(create, model.own.cache_specs)
    return cache
