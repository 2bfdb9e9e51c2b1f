"""Our GPT-OSS as tests run it: Hugging Face tensors put in place by a mapping of the tests' own, all layers' outputs.

The mapping does not use `convert`, so that a model test fails for the model's faults alone; `load` does.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gptjax import api
from gptjax.checkpoints.checkpoint import open_path
from gptjax.config import GptOssConfig
from gptjax.layers.cache import KVCache
from gptjax.layers.observe import COLLECTION
from gptjax.models import registry
from gptjax.models.params import Params
from gptjax.models.registry import Model
from pallas_kernels.formats.mxfp4 import MXFP4
from tests.oracles.gpt2_ours import Outputs


def load(directory: Path, dtype: DTypeLike = jnp.float32) -> tuple[Model, Params]:
    """The model and the weights of a checkpoint directory."""
    checkpoint = open_path(directory)
    model = registry.build(checkpoint.config, dtype=dtype)
    return model, api.load_params(checkpoint, model)


def params(tensors: Mapping[str, np.ndarray], dtype: DTypeLike = jnp.float32) -> Params:
    """Our params of a checkpoint's tensors, by their Hugging Face names; experts stay packed, if they are.

    Only products' weights change their layout: torch's Linear has them [out, in].
    """

    def number(name: str) -> jax.Array:
        return jnp.asarray(tensors[name], dtype)

    def norm(name: str) -> Params:
        return {"scale": number(f"{name}.weight")}

    def linear(*names: str) -> Params:
        result = {"kernel": jnp.concatenate([number(f"{name}.weight") for name in names]).T}
        if f"{names[0]}.bias" in tensors:
            result["bias"] = jnp.concatenate([number(f"{name}.bias") for name in names])
        return result

    def experts(name: str) -> jax.Array | MXFP4:
        if name in tensors:
            return number(name)
        return MXFP4(*(jnp.asarray(tensors[f"{name}_{part}"]) for part in ("blocks", "scales")))

    tree: Params = {"token_embedding": number("model.embed_tokens.weight"), "final_norm": norm("model.norm")}
    if "lm_head.weight" in tensors:
        tree["head_embedding"] = number("lm_head.weight")
    for layer in range(sum(name.endswith(".sinks") for name in tensors)):
        block = f"model.layers.{layer}"
        tree[f"block_{layer}"] = {
            "attention_norm": norm(f"{block}.input_layernorm"),
            "attention": {
                "qkv": linear(*(f"{block}.self_attn.{part}_proj" for part in "qkv")),
                "out": linear(f"{block}.self_attn.o_proj"),
                "sinks": number(f"{block}.self_attn.sinks"),
            },
            "moe_norm": norm(f"{block}.post_attention_layernorm"),
            "moe": {
                "router": linear(f"{block}.mlp.router"),
                "gate_up_kernel": experts(f"{block}.mlp.experts.gate_up_proj"),
                "gate_up_bias": number(f"{block}.mlp.experts.gate_up_proj_bias"),
                "down_kernel": experts(f"{block}.mlp.experts.down_proj"),
                "down_bias": number(f"{block}.mlp.experts.down_proj_bias"),
            },
        }
    return tree


@partial(jax.jit, static_argnums=0)
def run(
    model: Model, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array, cache: KVCache | None = None
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
    blocks_LBTD = jnp.stack([seen[f"block_{layer}"]["moe_residual"] for layer in range(model.config.num_layers)])
    return Outputs(blocks_LBTD, final_BTD, model.apply({"params": params}, final_BTD, method="head")), cache


def wider_windows(config: GptOssConfig) -> tuple[int | None, ...]:
    """The windows with the mistake of ports that cannot be seen below a window's length: one position too many."""
    return tuple(None if window is None else window + 1 for window in config.windows)


def without_sinks(params: Params) -> Params:
    """Weights whose sinks take no part in any softmax."""

    def drop(path: Any, leaf: Any) -> Any:
        return jnp.full_like(leaf, -1e9) if "sinks" in jax.tree_util.keystr(path) else leaf

    return jax.tree_util.tree_map_with_path(drop, params)


def filled(cache: KVCache, value: float) -> KVCache:
    """The cache with a number everywhere."""
    return dataclasses.replace(cache, **{kv: tuple(jnp.full_like(x, value) for x in getattr(cache, kv)) for kv in "kv"})


def row(outputs: Outputs, index: int, positions_BT: np.ndarray) -> Outputs:
    """The real positions of one row."""
    real_T = np.asarray(positions_BT[index]) >= 0
    blocks_LBTD, final_BTD, logits_BTV = (np.asarray(x) for x in outputs)
    return Outputs(blocks_LBTD[:, index, real_T], final_BTD[index, real_T], logits_BTV[index, real_T])


def join(chunks: list[Outputs]) -> Outputs:
    """Outputs of consecutive chunks of one row as those of the whole."""
    return Outputs(*(np.concatenate(parts, axis=-2) for parts in zip(*chunks, strict=True)))
