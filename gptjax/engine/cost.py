"""What a forward pass must cost, by formula: the bytes moved and the arithmetic done. On a mesh, by each device."""

from fractions import Fraction
from typing import Any

from gptjax.config import GptOssConfig, ModelConfig
from gptjax.models.params import abstract_params, weights_by_path
from gptjax.models.registry import Model, position_bytes
from pallas_kernels.formats import is_packed

_EXPERTS = ("gate_up_kernel", "down_kernel", "gate_up_bias", "down_bias")


def weight_bytes_per_step(model: Model, *, batch: int = 1) -> int:
    """Bytes of weights that a decode step of `batch` rows reads: all except embeddings that are only looked up.

    A tied token embedding is also the head's matrix and is read whole; a learned position embedding never is. Experts
    are counted as the number expected to be chosen by any row under even routing: E · (1 − (1 − X/E)^rows). A model
    that prefers some experts reads fewer.
    """
    looked_up = {"position_embedding"} if model.config.tied_head else {"position_embedding", "token_embedding"}
    total = sum(
        _bytes(leaf) * _share(model, path, batch)
        for path, leaf in weights_by_path(abstract_params(model)).items()
        if path[0] not in looked_up
    )
    return round(total)


def cache_bytes(model: Model, *, length: int) -> int:
    """Bytes of keys and values that one row's query reads in all layers, at `length` positions including its own."""
    return _attended(model.config, length) * position_bytes(model)


def decode_bytes(model: Model, *, batch: int, length: int) -> int:
    """Bytes that a decode step of `batch` rows must move, each attending to `length` positions including its own."""
    return weight_bytes_per_step(model, batch=batch) + batch * cache_bytes(model, length=length)


def token_flops(model: Model, *, length: int, logits: bool = True) -> int:
    """Floating-point operations for one token that attends to `length` positions.

    These are 2 for each weight it is multiplied by, and 4·N·H for each position and layer (scores and weighted values).

    Args:
      logits: whether to count the head, which runs for each decoded token and for the last one of a prompt.
    """
    config = model.config
    matrices = sum(
        leaf.size * _share(model, path, 1)
        for path, leaf in weights_by_path(abstract_params(model)).items()
        if path[-1].endswith("kernel")
    )
    attention = 4 * _attended(config, length) * model.own.num_heads * config.head_width
    head = 2 * model.own.vocab_size * config.width if logits else 0
    return round(2 * matrices) + attention + head


def _attended(config: ModelConfig, length: int) -> int:
    """The positions that one query attends to in all layers together."""
    return sum(length if window is None else min(length, window) for window in config.windows)


def _share(model: Model, path: tuple[str, ...], rows: int) -> Fraction:
    """The share of a weight that a step of `rows` rows reads."""
    config = model.config
    if not isinstance(config, GptOssConfig) or path[-1] not in _EXPERTS:
        return Fraction(1)
    return 1 - (1 - Fraction(config.experts_per_token, config.num_experts)) ** rows


def _bytes(leaf: Any) -> int:
    return int(leaf.nbytes if is_packed(leaf) else leaf.size * leaf.dtype.itemsize)
