"""Tiny random checkpoints of Llama and its relatives, of NumPy arrays, in transformers' layout.

All dimensions differ (equal sizes hide transposes), biases are large and norms far from 1: what changes nothing in a
checkpoint cannot be tested with it.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.oracles import gpt_oss_random, llama_numpy

# V 101, D 96, N 6, K 2, F 80, L 2; H is 16, or what a variant says.
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 101,
    "max_position_embeddings": 512,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FACTORS = [1.0, 1.5, 3.0, 0.5, 2.0, 7.0, 1.25, 30.0]
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": FACTORS,
    "long_factor": FACTORS,
    "attention_factor": 1.0,
    "original_max_position_embeddings": 64,
}
_QWEN2 = {"model_type": "qwen2", "rope_theta": 1e6, "rms_norm_eps": 1e-6}
_QWEN3 = {"model_type": "qwen3", "rope_theta": 1e6, "rms_norm_eps": 1e-6, "head_dim": 20}
_WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama2": {"num_key_value_heads": 6},
    "llama3": {"rope_theta": 5e5},
    "llama3.1": {"rope_theta": 5e5, "rope_scaling": LLAMA3, "head_dim": 20},
    "llama biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "factors": {"rope_scaling": LONGROPE},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "mistral full": {"model_type": "mistral", "sliding_window": None, "head_dim": 20},
    "qwen2": {**_QWEN2, "sliding_window": 9, "use_sliding_window": False, "tie_word_embeddings": True},
    "qwen2 window": {**_QWEN2, **_WINDOW},
    "qwen2 yarn": {**_QWEN2, "rope_scaling": YARN},
    "qwen3": {**_QWEN3, "tie_word_embeddings": True},
    "qwen3 window": {
        **_QWEN3,
        **_WINDOW,
        "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


class Checkpoint(NamedTuple):
    """A model by its Hugging Face config and tensors."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


def checkpoint(seed: int = 0, *, std: float = 0.15, dtype: Any = np.float32, **changes: Any) -> Checkpoint:
    """A random model of CONFIG with `changes`: weights normal with `std`, rounded to `dtype`."""
    config = {**CONFIG, **changes}
    D, F, V = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    H, family = llama_numpy.head_width(config), config["model_type"]
    q_width, kv_width = (config[f"num_{heads}_heads"] * H for heads in ("attention", "key_value"))
    bias = config.get("attention_bias", False)
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}

    def normal(name: str, *shape: int, mean: float = 0, std: float = std) -> None:
        tensors[name] = (mean + std * rng.standard_normal(shape)).astype(dtype)

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        normal(f"{name}.weight", rows, columns)
        if bias:
            normal(f"{name}.bias", rows, std=0.5)

    normal("model.embed_tokens.weight", V, D, std=1)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        normal(f"{block}.input_layernorm.weight", D, mean=1, std=0.3)
        for part, width in (("q", q_width), ("k", kv_width), ("v", kv_width)):
            linear(f"{block}.self_attn.{part}_proj", width, D, bias or family == "qwen2")
        if family == "qwen3":
            for part in "qk":
                normal(f"{block}.self_attn.{part}_norm.weight", H, mean=1, std=0.3)
        linear(f"{block}.self_attn.o_proj", D, q_width, bias)
        normal(f"{block}.post_attention_layernorm.weight", D, mean=1, std=0.3)
        for part in ("gate", "up"):
            linear(f"{block}.mlp.{part}_proj", F, D, config.get("mlp_bias", False))
        linear(f"{block}.mlp.down_proj", D, F, config.get("mlp_bias", False))
    normal("model.norm.weight", D, mean=1, std=0.3)
    if not config["tie_word_embeddings"]:
        normal("lm_head.weight", V, D)
    return Checkpoint(config, tensors)


def write(directory: Path, model: Checkpoint, *, shards: int = 1, **more: np.ndarray) -> Path:
    """Writes `config.json` and safetensors, with `more` tensors; returns the directory, which is made if need be."""
    gpt_oss_random.write_files(directory, model.config, {**model.tensors, **more}, shards=shards)
    return directory
