"""Tiny random GPT-2 checkpoints in Hugging Face's names and layouts, of NumPy arrays.

All dimensions differ (equal sizes hide transposes), weights are some ten times larger than at initialisation and
LayerNorms are far from 1 and 0 (small weights hide bugs: a block that adds almost nothing may do anything).
"""

from typing import Any

import numpy as np

# V 101, positions 37, D 60, N 5, H 12, F 52, L 3.
CONFIG: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 101,
    "n_positions": 37,
    "n_embd": 60,
    "n_head": 5,
    "n_inner": 52,
    "n_layer": 3,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}

# Every reading of a config that changes the result, as changes to CONFIG.
VARIANTS: dict[str, dict[str, Any]] = {
    "gelu_tanh": {},
    "gelu_erf": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "tanh": {"activation_function": "tanh"},
    "four_times_width": {"n_inner": None},
    "scaled_by_layer": {"scale_attn_by_inverse_layer_idx": True},
    "unscaled": {"scale_attn_weights": False},
    "unscaled_but_by_layer": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "large_epsilon": {"layer_norm_epsilon": 0.25},
    "untied": {"tie_word_embeddings": False},
}


def checkpoint(seed: int = 0, *, std: float = 0.3, **changes: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A config (CONFIG with `changes`) and float32 tensors for it, normal with standard deviation `std`."""
    config = {**CONFIG, **changes}
    width, mlp_width = config["n_embd"], config["n_inner"] or 4 * config["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config["vocab_size"], width),
        "wpe.weight": (config["n_positions"], width),
    }
    for layer in range(config["n_layer"]):
        products = {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, mlp_width),
            "mlp.c_proj": (mlp_width, width),
        }
        for name, shape in products.items():
            shapes |= {f"h.{layer}.{name}.weight": shape, f"h.{layer}.{name}.bias": shape[1:]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{name}.{part}": (width,) for part in ("weight", "bias")}
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (config["vocab_size"], width)

    rng = np.random.default_rng(seed)
    tensors = {name: std * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for name in tensors:
        if "ln_" in name and name.endswith(".weight"):
            tensors[name] = 1 + tensors[name]
    return config, tensors


def tokens(seed: int, count: int, vocab_size: int = CONFIG["vocab_size"]) -> list[int]:
    """Random token ids."""
    return [int(token) for token in np.random.default_rng(seed).integers(vocab_size, size=count)]
