"""Our GPT-2 as tests run it: Hugging Face tensors put in place by a mapping of the tests' own, all layers' outputs.

The mapping does not use `convert`, so that a model test fails for the model's faults alone.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gptjax.layers.cache import KVCache
from gptjax.layers.observe import COLLECTION
from gptjax.models.gpt2 import GPT2

_TOP = {
    "wte.weight": "token_embedding",
    "wpe.weight": "position_embedding",
    "ln_f.weight": "final_norm/scale",
    "ln_f.bias": "final_norm/bias",
    "lm_head.weight": "head_embedding",
}
_IN_BLOCK = {
    "ln_1.weight": "attention_norm/scale",
    "ln_1.bias": "attention_norm/bias",
    "attn.c_attn.weight": "attention/qkv/kernel",
    "attn.c_attn.bias": "attention/qkv/bias",
    "attn.c_proj.weight": "attention/out/kernel",
    "attn.c_proj.bias": "attention/out/bias",
    "ln_2.weight": "mlp_norm/scale",
    "ln_2.bias": "mlp_norm/bias",
    "mlp.c_fc.weight": "mlp/up/kernel",
    "mlp.c_fc.bias": "mlp/up/bias",
    "mlp.c_proj.weight": "mlp/down/kernel",
    "mlp.c_proj.bias": "mlp/down/bias",
}


class Outputs(NamedTuple):
    """What the model computes for a batch; like `gpt2_numpy.Outputs` without the embedding."""

    blocks_LBTD: jax.Array
    final_BTD: jax.Array
    logits_BTV: jax.Array


def target(name: str) -> str:
    """The path of a Hugging Face tensor in our params, separated by slashes."""
    if name in _TOP:
        return _TOP[name]
    _, layer, rest = name.split(".", 2)
    return f"block_{layer}/{_IN_BLOCK[rest]}"


def params(tensors: Mapping[str, np.ndarray], dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """Our params of a checkpoint's tensors, whose layouts are ours as they are."""
    tree: dict[str, Any] = {}
    for name, value in tensors.items():
        *parents, leaf = target(name.removeprefix("transformer.")).split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jnp.asarray(value, dtype)
    return tree


@partial(jax.jit, static_argnums=0)
def run(
    model: GPT2, params: dict[str, Any], tokens_BT: jax.Array, positions_BT: jax.Array, cache: KVCache | None = None
) -> tuple[Outputs, KVCache | None]:
    """A forward pass with the residual stream after every block, and the cache."""
    (final_BTD, cache), state = model.apply(
        {"params": params},
        tokens_BT,
        positions_BT,
        cache,
        mutable=[COLLECTION],
    )
    seen = state[COLLECTION]
    blocks_LBTD = jnp.stack([seen[f"block_{layer}"]["mlp_residual"] for layer in range(model.config.num_layers)])
    return Outputs(blocks_LBTD, final_BTD, model.apply({"params": params}, final_BTD, method="head")), cache


def pack(
    rows: Sequence[Sequence[int]], length: int, *, starts: Sequence[int] | None = None, layout: str = "right"
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions [B, T] of rows of different lengths, the first token of row b at position starts[b].

    `layout` says where the padding goes: "left", "right" or "mixed" (anywhere). Ids at padding are out of range.
    """
    rng = np.random.default_rng(7)
    tokens_BT = rng.choice([-1, -(2**31), 2**31 - 1, 10**6], size=(len(rows), length)).astype(np.int32)
    positions_BT = -rng.integers(1, 4, size=(len(rows), length)).astype(np.int32)
    for b, row in enumerate(rows):
        where = {
            "left": np.arange(length - len(row), length),
            "right": np.arange(len(row)),
            "mixed": np.sort(rng.choice(length, len(row), replace=False)),
        }[layout]
        tokens_BT[b, where] = row
        positions_BT[b, where] = np.arange(len(row)) + (starts[b] if starts else 0)
    return tokens_BT, positions_BT


def contents(cache: KVCache, row: int) -> list[np.ndarray]:
    """What the cache has of a row by position, [K, S, H]: the keys of each layer, then the values of each."""
    tables = [np.asarray(cache.table(layer))[row] for layer in range(len(cache.k))]
    return [
        np.concatenate(np.asarray(x)[table_Z], axis=1) for x, table_Z in zip(cache.k + cache.v, tables * 2, strict=True)
    ]
