"""Whether a request's bits depend on what is computed together with it."""

import jax
import jax.numpy as jnp

from gptjax.config import GPT2Config, GptOssConfig, LlamaConfig
from gptjax.models.registry import Model
from pallas_kernels import block, dispatch, same_bits
from pallas_kernels.matvec import FEW
from pallas_kernels.pages import PAGE

_EXPERTS = (8, 16, 32, 64, 128)  # that Hopper's router takes
_TILE = 64  # Hopper's kernels take widths that are multiples of it
_LEAST_CALL = 32
_LEAST_CALL_OF_KERNELS = 2 * FEW  # up to FEW rows, a product has the order of a decode step's


def is_exact_by_default(model: Model, *, rows: int = 1) -> bool:
    """Whether results have the same bits in any company unless speed is asked for: where that costs little.

    Args:
      rows: of a decode step, at most.
    """
    return _is_float32_on_cpu(model) or (is_free_of_load(model, rows=rows) and least_rows(model, slots=rows) == 1)


def is_free_of_load(model: Model, *, rows: int = 1) -> bool:
    """Whether the bits of a row do not depend on how many rows and tokens are computed together.

    On Hopper, each sum has a kernel that adds up in an order of its own; but not those of packed matrices, except for
    experts'. Prompts need calls of `least_call` tokens, and decode steps need `least_rows`.

    Args:
      rows: of a decode step, at most.
    """
    return (_is_float32_on_cpu(model) and same_bits.holds()) or (rows <= FEW and _has_kernels(model))


def least_call(model: Model) -> int:
    """Tokens of the smallest call for prompts whose bits do not depend on its size."""
    return _LEAST_CALL_OF_KERNELS if _has_kernels(model) else _LEAST_CALL


def least_rows(model: Model, *, slots: int) -> int:
    """Rows of the smallest decode step that adds up as one of all slots does.

    Up to eight rows, a block of GPT-2 is one kernel on Hopper, with an order of its own. Without it, one row would take
    1.7 times as long. So there are two classes: bits depend on whether there are more than eight slots. (That kernel
    does not read pages in float8.)
    """
    is_one_kernel = isinstance(model.config, GPT2Config) and model.cache_dtype is None
    has_classes = is_one_kernel and _has_kernels(model)
    return 2 * block.MOST_ROWS if has_classes and slots > block.MOST_ROWS else 1


def _is_float32_on_cpu(model: Model) -> bool:
    return jax.default_backend() == "cpu" and jnp.dtype(model.dtype) == jnp.float32


def _has_kernels(model: Model) -> bool:
    """Whether each sum of the model has a kernel for Hopper whose order goes by the sum alone."""
    config = model.config
    if dispatch.wanted(model.implementation) != dispatch.MOSAIC or model.dtype != jnp.bfloat16 or config.types:
        return False
    if model.own.mesh is not None:  # where XLA adds up a token's experts; not seen to be so on GPUs yet
        return False
    packed, others = "none", True
    if isinstance(config, GptOssConfig):
        packed, others = "experts", config.num_experts in _EXPERTS
    elif isinstance(config, GPT2Config):
        others = config.context_length <= block.MOST_PAGES * PAGE
    elif not isinstance(config, LlamaConfig):
        return False
    widths = config.width, config.head_width, config.mlp_width
    return others and config.mxfp4 == packed and not any(width % _TILE for width in widths)
