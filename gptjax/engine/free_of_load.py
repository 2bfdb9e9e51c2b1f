"""Whether a request's bits depend on what is computed together with it."""

import jax
import jax.numpy as jnp

from gptjax.config import GptOssConfig, LlamaConfig, ModelConfig
from gptjax.models.registry import Model
from pallas_kernels import dispatch, same_bits
from pallas_kernels.matvec import FEW

_EXPERTS = (8, 16, 32, 64, 128)  # that Hopper's router takes
_TILE = 64  # Hopper's kernels take widths that are multiples of it


def is_exact_by_default(model: Model) -> bool:
    """Whether results have the same bits in any company unless speed is asked for."""
    return _is_float32_on_cpu(model) or _has_ordered_kernels(model)


def is_free_of_load(model: Model) -> bool:
    """Whether the bits of a row do not depend on how many rows and tokens are computed together.

    On a CPU XLA's order of sums is known; on Hopper our kernels add up in an order that a matrix's shape decides.
    """
    return (_is_float32_on_cpu(model) and same_bits.holds()) or _has_ordered_kernels(model)


def least_call(model: Model) -> int:
    """The tokens of the smallest call of a prompt whose bits do not depend on its size: smaller ones are padded.

    On Hopper, more rows than a decode step has: such calls have kernels of their own.
    """
    return 2 * FEW if _has_ordered_kernels(model) else 32


def _is_float32_on_cpu(model: Model) -> bool:
    return jax.default_backend() == "cpu" and jnp.dtype(model.dtype) == jnp.float32


def _has_ordered_kernels(model: Model) -> bool:
    """Whether each of the model's sums has a kernel for Hopper.

    Not GPT-2's, whose blocks are one kernel up to eight rows; nor packed matrices', but experts'.
    """
    config = model.config
    has_kernels = dispatch.wanted(model.implementation) == dispatch.MOSAIC and model.dtype == jnp.bfloat16
    return has_kernels and not config.types and _takes(config)


def _takes(config: ModelConfig) -> bool:
    if not isinstance(config, GptOssConfig | LlamaConfig):
        return False
    packed, has_router = "none", True
    if isinstance(config, GptOssConfig):
        packed, has_router = "experts", config.num_experts in _EXPERTS
    widths = config.width, config.head_width, config.mlp_width
    return has_router and config.mxfp4 == packed and not any(width % _TILE for width in widths)
