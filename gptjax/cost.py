"""What a forward pass costs, by formula: the bytes that must move and the arithmetic that must be done."""

import math

import jax

from gptjax.models import registry
from gptjax.models.registry import Model


def weight_bytes_per_step(model: Model) -> int:
    """Bytes of weights that a decode step reads, whatever its rows: all, but of embeddings that are only looked up.

    A tied token embedding is the head's matrix as well, and is read whole; a learned position embedding never is.
    """
    params = registry.abstract_params(model)
    looked_up = {"position_embedding"} if model.config.tied_head else {"position_embedding", "token_embedding"}
    return sum(_bytes(leaf) for name, part in params.items() if name not in looked_up for leaf in jax.tree.leaves(part))


def cache_bytes_per_position(model: Model) -> int:
    """Bytes of keys and values of one position of one row, in all layers."""
    config = model.config
    itemsize = jax.numpy.dtype(model.dtype).itemsize
    return 2 * config.num_layers * config.num_kv_heads * config.head_width * itemsize


def decode_bytes(model: Model, *, batch: int, length: int) -> int:
    """Bytes that a decode step of `batch` rows must move, each attending to `length` positions, itself included."""
    return weight_bytes_per_step(model) + batch * length * cache_bytes_per_position(model)


def token_flops(model: Model, *, length: int, logits: bool = True) -> int:
    """Floating-point operations of one token that attends to `length` positions: 2 for each weight that it meets in a
    matrix product, and 4·N·H for each position and layer (scores, and weighted values).

    Args:
      logits: whether the head is computed for this token, as for all in decoding and for the last of a prompt.
    """
    config = model.config
    params = registry.abstract_params(model)
    matrices = sum(
        math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith("/kernel")
    )
    attention = 4 * config.num_layers * config.num_heads * config.head_width * length
    head = 2 * config.vocab_size * config.width if logits else 0
    return 2 * matrices + attention + head


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize
