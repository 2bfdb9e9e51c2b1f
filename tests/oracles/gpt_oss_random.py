"""Tiny random GPT-OSS checkpoints, of NumPy arrays, in every layout and spelling that there is.

All dimensions differ (equal sizes hide transposes). Sinks are as large as scores, some of the experts' values are
clamped, biases are everywhere and norms are far from 1: what changes nothing in a checkpoint cannot be tested with it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from tests.oracles import gpt_oss_numpy

# V 101, D 96, N 10, K 2, H 16, F 64, E 6, X 3, L 3, window 9.
CONFIG: dict[str, Any] = {
    "model_type": "gpt_oss",
    "vocab_size": 101,
    "max_position_embeddings": 131072,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
    "hidden_act": "silu",
    "swiglu_limit": 7.0,
    "attention_bias": True,
    "tie_word_embeddings": False,
}

# Every reading of a config that changes the result, as changes to CONFIG.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window_5": {"sliding_window": 5},
    "other_layers_slide": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "all_layers_slide": {"layer_types": ["sliding_attention"] * 3},
    "theta": {"rope_theta": 10000.0},
    "truncated": {"rope_scaling": {**CONFIG["rope_scaling"], "truncate": True}},
    "short_yarn": {
        "max_position_embeddings": 4096,
        "rope_scaling": {**CONFIG["rope_scaling"], "original_max_position_embeddings": 512, "factor": 8.0},
    },
    "other_betas": {"rope_scaling": {**CONFIG["rope_scaling"], "beta_fast": 16.0, "beta_slow": 2.0}},
    "two_experts_a_token": {"num_experts_per_tok": 2},
    "limit": {"swiglu_limit": 1.5},
    "alpha": {"swiglu_alpha": 1.2},
    "large_epsilon": {"rms_norm_eps": 0.25},
    "without_biases": {"attention_bias": False},
    "tied": {"tie_word_embeddings": True},
}

# All of these in few models: compiling one takes seconds.
COMBINED: dict[str, dict[str, Any]] = {
    "all_slide": {
        "sliding_window": 5,
        "layer_types": ["sliding_attention"] * 3,
        "rope_theta": 10000.0,
        **VARIANTS["short_yarn"],
        "swiglu_alpha": 1.2,
        "rms_norm_eps": 0.25,
        "tie_word_embeddings": True,
    },
    "others_slide": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_scaling": {**CONFIG["rope_scaling"], "truncate": True, "beta_fast": 16.0, "beta_slow": 2.0},
        "num_experts_per_tok": 2,
        "swiglu_limit": 1.5,
        "attention_bias": False,
    },
}
TWO_LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}

QUANTIZATION = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
LAYOUTS = ("packed", "dequantised", "original")  # Hugging Face MXFP4, Hugging Face without, OpenAI's own
SPELLINGS = ("rope_scaling", "rope_parameters")

_ORIGINAL_NAMES = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "unembedding.weight",
    "input_layernorm.weight": "attn.norm.scale",
    "self_attn.sinks": "attn.sinks",
    "self_attn.o_proj.weight": "attn.out.weight",
    "self_attn.o_proj.bias": "attn.out.bias",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
    "mlp.experts.gate_up_proj_blocks": "mlp.mlp1_weight.blocks",
    "mlp.experts.gate_up_proj_scales": "mlp.mlp1_weight.scales",
    "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
    "mlp.experts.down_proj_blocks": "mlp.mlp2_weight.blocks",
    "mlp.experts.down_proj_scales": "mlp.mlp2_weight.scales",
    "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
}


class Checkpoint(NamedTuple):
    """A model by its Hugging Face config and tensors."""

    config: dict[str, Any]
    packed: dict[str, np.ndarray]  # experts as `_blocks` and `_scales`
    dense: dict[str, np.ndarray]  # experts dequantised, [E, in, out]; what the oracle takes


def checkpoint(seed: int = 0, *, std: float = 0.15, dtype: Any = np.float32, **changes: Any) -> Checkpoint:
    """A random model of CONFIG with `changes`: weights normal with `std`, rounded to `dtype`, and random MXFP4."""
    config = {**CONFIG, **changes}
    D, F, E, V = (config[key] for key in ("hidden_size", "intermediate_size", "num_local_experts", "vocab_size"))
    q_width, kv_width = (config[f"num_{heads}_heads"] * config["head_dim"] for heads in ("attention", "key_value"))
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}

    def normal(name: str, *shape: int, mean: float = 0, std: float = std) -> None:
        tensors[name] = (mean + std * rng.standard_normal(shape)).astype(dtype)

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> None:
        normal(f"{name}.weight", rows, columns)
        if bias:
            normal(f"{name}.bias", rows, std=0.5)

    def mxfp4(name: str, rows: int, columns: int, scale: int) -> None:
        tensors[f"{name}_blocks"] = rng.integers(256, size=(E, rows, columns // 32, 16), dtype=np.uint8)
        tensors[f"{name}_scales"] = rng.integers(scale, scale + 4, size=(E, rows, columns // 32), dtype=np.uint8)
        normal(f"{name}_bias", E, rows, std=0.5)

    normal("model.embed_tokens.weight", V, D, std=1)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        normal(f"{block}.input_layernorm.weight", D, mean=1, std=0.3)
        for part, width in (("q", q_width), ("k", kv_width), ("v", kv_width)):
            linear(f"{block}.self_attn.{part}_proj", width, D, config["attention_bias"])
        normal(f"{block}.self_attn.sinks", config["num_attention_heads"], mean=2, std=3)
        linear(f"{block}.self_attn.o_proj", D, q_width, config["attention_bias"])
        normal(f"{block}.post_attention_layernorm.weight", D, mean=1, std=0.3)
        linear(f"{block}.mlp.router", E, D)
        mxfp4(f"{block}.mlp.experts.gate_up_proj", 2 * F, D, 122)
        mxfp4(f"{block}.mlp.experts.down_proj", D, F, 117)
    normal("model.norm.weight", D, mean=1, std=0.3)
    if not config["tie_word_embeddings"]:
        normal("lm_head.weight", V, D)
    return Checkpoint(config, tensors, gpt_oss_numpy.dequantized(tensors))


def write(
    directory: Path, model: Checkpoint, *, layout: str = "packed", spelling: str = "rope_scaling", shards: int = 1
) -> Path:
    """Writes `config.json` and safetensors; returns the directory, which is made if need be."""
    config, tensors = spelled(model.config, spelling), model.packed
    if layout == "original":
        config, tensors = original_config(config), original_tensors(tensors)
    elif layout == "packed":
        config |= {"quantization_config": QUANTIZATION}
    else:
        dtype = tensors["model.embed_tokens.weight"].dtype
        tensors = {name: np.ascontiguousarray(value, dtype) for name, value in model.dense.items()}
    write_files(directory, config, tensors, shards=shards)
    return directory


def write_files(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], *, shards: int = 1
) -> None:
    """A directory of a config and tensors as they are; of several shards, neighbours are in different ones."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        own = names[shard::shards]
        safetensors.numpy.save_file({name: tensors[name] for name in own}, directory / file)
        weight_map |= dict.fromkeys(own, file)
    if shards > 1:
        index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def spelled(config: Mapping[str, Any], spelling: str) -> dict[str, Any]:
    """A Hugging Face config with its rotary settings as the release spells them, or as newer transformers does."""
    rest = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    settings = gpt_oss_numpy.rope_settings(config)
    if spelling == "rope_parameters":
        return {**rest, "rope_parameters": settings}
    theta = settings.pop("rope_theta")
    return {**rest, "rope_theta": theta, "rope_scaling": settings}


def original_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's own config of the model; what it cannot say must be as in the release."""
    same = (
        "num_hidden_layers vocab_size hidden_size intermediate_size swiglu_limit head_dim num_attention_heads "
        "num_key_value_heads sliding_window"
    ).split()
    rope = gpt_oss_numpy.rope_settings(config)
    return {key: config[key] for key in same} | {
        "num_experts": config["num_local_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "initial_context_length": rope["original_max_position_embeddings"],
        "rope_theta": rope["rope_theta"],
        "rope_scaling_factor": rope["factor"],
        "rope_ntk_alpha": rope["beta_slow"],
        "rope_ntk_beta": rope["beta_fast"],
    }


def original_tensors(packed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors by OpenAI's own names, q, k and v stacked."""
    result = {}
    for name, value in packed.items():
        if not name.startswith("model.layers."):
            result[_ORIGINAL_NAMES[name]] = value
            continue
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        if rest in _ORIGINAL_NAMES:
            result[f"block.{layer}.{_ORIGINAL_NAMES[rest]}"] = value
        elif rest.startswith("self_attn.q_proj."):
            stacked = [packed[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            result[f"block.{layer}.attn.qkv.{rest.rsplit('.', 1)[1]}"] = np.concatenate(stacked)
        elif not rest.startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
            raise KeyError(name)
    return result


def tokens(seed: int, count: int, vocab_size: int = CONFIG["vocab_size"]) -> list[int]:
    """Random token ids."""
    return [int(token) for token in np.random.default_rng(seed).integers(vocab_size, size=count)]
