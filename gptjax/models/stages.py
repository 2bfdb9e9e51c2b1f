"""The stages of a forward pass, by name, in the order of computation."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import GPT2Config, GptOssConfig, LlamaConfig, ModelConfig
from gptjax.layers.observe import COLLECTION
from gptjax.models.params import Params
from gptjax.models.registry import Model

_ATTENTION_STAGES = (
    "attention_norm",
    "attention/q",
    "attention/k",
    "attention/v",
    "attention/heads",
    "attention/out",
    "attention_residual",
)
_BLOCK_STAGES: Final[Mapping[type[ModelConfig], Sequence[str]]] = {
    GPT2Config: (*_ATTENTION_STAGES, "mlp_norm", "mlp/up", "mlp/activation", "mlp/down", "mlp_residual"),
    GptOssConfig: (*_ATTENTION_STAGES, "moe_norm", "moe/router", "moe", "moe_residual"),
    LlamaConfig: (*_ATTENTION_STAGES, "mlp_norm", "mlp/gate", "mlp/up", "mlp/activation", "mlp/down", "mlp_residual"),
}


def stages(config: ModelConfig) -> list[str]:
    """The names of all stages, in order."""
    block_stages = list(_BLOCK_STAGES[type(config)])
    if isinstance(config, LlamaConfig) and config.qk_norm:
        heads = block_stages.index("attention/heads")
        block_stages[heads:heads] = ["attention/q_norm", "attention/k_norm"]
    blocks = [f"block_{layer}/{stage}" for layer in range(config.num_layers) for stage in block_stages]
    return ["embedding", *blocks, "final_norm", "logits"]


def activations(model: Model, params: Params, token_ids: Sequence[int]) -> dict[str, np.ndarray]:
    """The values of all stages for one sequence, without the batch axis, in the order of computation.

    Args:
      token_ids: T ids, at most the model's context; all T positions are computed at once, without a cache.

    Returns:
      Stage name -> array of the model's dtype: [T, D]; [T, N, H] for heads, with queries and keys before their
      rotation; [T, F] inside an MLP, [T, E] for a router's logits; logits [T, V] float32.
    """
    recorded, logits_TV = _forward(model, params, jnp.asarray([list(token_ids)], jnp.int32))
    found = {}
    for path, value in jax.tree_util.tree_leaves_with_path(recorded):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/output")
        found[name] = np.asarray(value[0])
    found["logits"] = np.asarray(logits_TV)
    return {name: found[name] for name in stages(model.config)}


@partial(jax.jit, static_argnames=("model",))
def _forward(model: Model, params: Params, tokens_BT: jax.Array) -> tuple[Params, jax.Array]:
    positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    (hidden_BTD, _), recorded = model.apply({"params": params}, tokens_BT, positions_BT, mutable=[COLLECTION])
    logits_TV = model.apply({"params": params}, hidden_BTD[0], method="head")
    return recorded[COLLECTION], logits_TV
