"""Whether a request's bits depend on what is computed together with it."""

import jax
import jax.numpy as jnp

from gptjax.config import GptOssConfig, LlamaConfig
from gptjax.models.registry import Model
from pallas_kernels import dispatch, same_bits

_EXPERTS = (8, 16, 32, 64, 128)  # that Hopper's router takes
_TILE = 64  # Hopper's kernels take widths that are multiples of it


def is_exact_by_default(model: Model) -> bool:
    """Whether results have the same bits in any company unless speed is asked for."""
    return jax.default_backend() == "cpu" and jnp.dtype(model.dtype) == jnp.float32


def is_free_of_load(model: Model) -> bool:
    """Whether the bits of a row do not depend on how many rows and tokens are computed together."""
    return is_exact_by_default(model) and same_bits.holds()


def decodes_free_of_load(model: Model) -> bool:
    """Whether the bits of a row do not depend on how many rows a decode step computes: on Hopper.

    There, each sum of a step has a kernel that adds up in an order of its own. Not GPT-2's, whose blocks are one kernel
    up to eight rows; nor packed matrices', but experts'.
    """
    has_kernels = dispatch.wanted(model.implementation) == dispatch.MOSAIC and model.dtype == jnp.bfloat16
    return is_free_of_load(model) or (has_kernels and not model.config.types and _has_kernels(model))


def _has_kernels(model: Model) -> bool:
    config = model.config
    if not isinstance(config, GptOssConfig | LlamaConfig):
        return False
    packed, has_router = "none", True
    if isinstance(config, GptOssConfig):
        packed, has_router = "experts", config.num_experts in _EXPERTS
    widths = config.width, config.head_width, model.own.mlp_width
    return has_router and config.mxfp4 == packed and not any(width % _TILE for width in widths)
