"""Our Llama as tests run it: Hugging Face tensors put in place by a mapping of the tests' own.

The mapping does not use `convert`, so that a model test fails for the model's faults alone. Models run with
`gpt2_ours.run`, whose blocks have the same stages.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gptjax.config import config_from_json
from gptjax.models import registry
from gptjax.models.params import Params
from gptjax.models.registry import Model
from tests.oracles import gpt2_ours, gpt_oss_ours, llama_numpy, llama_random
from tests.oracles.gpt2_ours import Outputs


class Case(NamedTuple):
    """A checkpoint, and what it is loaded as."""

    checkpoint: llama_random.Checkpoint
    model: Model
    params: Params

    def oracle(self, ids: Sequence[int]) -> llama_numpy.Outputs:
        return llama_numpy.forward(self.checkpoint.tensors, self.checkpoint.config, ids)


def make_case(dtype: Any = jnp.float32, **changes: Any) -> Case:
    """A checkpoint of weights rounded to `dtype`."""
    checkpoint = llama_random.checkpoint(dtype=dtype, **changes)
    model = registry.build(config_from_json(checkpoint.config), dtype=dtype)
    return Case(checkpoint, model, params(checkpoint.tensors, dtype))


def params(tensors: Mapping[str, np.ndarray], dtype: DTypeLike = jnp.float32) -> Params:
    """Our params of a checkpoint's tensors. Only products' weights change their layout: torch's are [out, in]."""

    def number(name: str) -> jax.Array:
        return jnp.asarray(tensors[name], dtype)

    def norm(name: str) -> Params:
        return {"scale": number(f"{name}.weight")}

    def linear(*names: str) -> Params:
        result = {"kernel": jnp.concatenate([number(f"{name}.weight") for name in names]).T}
        if f"{names[0]}.bias" in tensors:
            result["bias"] = jnp.concatenate([number(f"{name}.bias") for name in names])
        return result

    tree: Params = {"token_embedding": number("model.embed_tokens.weight"), "final_norm": norm("model.norm")}
    if "lm_head.weight" in tensors:
        tree["head_embedding"] = number("lm_head.weight")
    for layer in range(sum(name.endswith(".down_proj.weight") for name in tensors)):
        block = f"model.layers.{layer}"
        tree[f"block_{layer}"] = {
            "attention_norm": norm(f"{block}.input_layernorm"),
            "attention": {
                "qkv": linear(*(f"{block}.self_attn.{part}_proj" for part in "qkv")),
                "out": linear(f"{block}.self_attn.o_proj"),
            },
            "mlp_norm": norm(f"{block}.post_attention_layernorm"),
            "mlp": {
                "gate_up": linear(*(f"{block}.mlp.{part}_proj" for part in ("gate", "up"))),
                "down": linear(f"{block}.mlp.down_proj"),
            },
        }
        for part in ("q_norm", "k_norm"):
            if f"{block}.self_attn.{part}.weight" in tensors:
                tree[f"block_{layer}"]["attention"][part] = norm(f"{block}.self_attn.{part}")
    return tree


def run_whole(model: Model, params: Params, ids: Sequence[int]) -> Outputs:
    """One sequence at once, without a cache."""
    tokens, positions = gpt2_ours.pack([ids], len(ids))
    return gpt_oss_ours.row(gpt2_ours.run(model, params, tokens, positions)[0], 0, positions)


def run_chunks(model: Model, params: Params, ids: Sequence[int], counts: Sequence[int], width: int) -> Outputs:
    """One sequence over a cache full of NaN, in chunks of `counts` tokens; those of several are padded to `width`."""
    cache = gpt_oss_ours.filled(registry.create_cache(model, batch=1, max_length=len(ids)), np.nan)
    outputs, start = [], 0
    for count in counts:
        part = ids[start : start + count]
        tokens, positions = gpt2_ours.pack([part], width if count > 1 else 1, starts=[start])
        chunk, cache = gpt2_ours.run(model, params, tokens, positions, cache)
        outputs.append(gpt_oss_ours.row(chunk, 0, positions))
        start += count
    return gpt_oss_ours.join(outputs)
