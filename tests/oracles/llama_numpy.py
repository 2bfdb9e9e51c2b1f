"""Llama and its relatives in float64 NumPy: the oracle of `gptjax.models.llama`, written from the references.

Source: transformers `models/{llama,mistral,qwen2,qwen3}`, `modeling_rope_utils.py` and docs/MODELS.md. Takes the
tensors and the `config.json` of a Hugging Face checkpoint, one sequence at a time. Checked against transformers in
`tests/oracle/test_llama_transformers.py`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.oracles import gpt_oss_numpy


class Outputs(NamedTuple):
    """What the model computes for a sequence of T tokens, float64."""

    blocks_LTD: np.ndarray  # the residual stream after each block, before the final norm
    final_TD: np.ndarray  # after the final norm
    logits_TV: np.ndarray


def head_width(config: Mapping[str, Any]) -> int:
    """H, given or not."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def windows(config: Mapping[str, Any]) -> list[int | None]:
    """How many positions a query of each layer sees; None for all."""
    layers = config["num_hidden_layers"]
    if config["model_type"] == "mistral":
        return [config["sliding_window"]] * layers
    if not config.get("use_sliding_window"):
        return [None] * layers
    types = config.get("layer_types")
    if types is None:
        first = config["max_window_layers"]
        types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    return [config["sliding_window"] if kind == "sliding_attention" else None for kind in types]


def inv_freq(config: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Radians a position of each pair of dimensions, [H/2], and what cosines and sines are multiplied with."""
    rope, width = gpt_oss_numpy.rope_settings({"rope_scaling": None, **config}), head_width(config)
    f = 1 / rope["rope_theta"] ** (2 * np.arange(width // 2) / width)
    kind = rope.pop("type", None) or rope["rope_type"]
    if kind == "default":
        return f, 1.0
    if kind == "linear":
        return f / rope["factor"], 1.0
    if kind == "longrope":
        return f / np.array(rope["long_factor"]), 1.0
    if kind == "yarn":
        return gpt_oss_numpy.inv_freq({"rope_parameters": {**rope, "rope_type": "yarn"}, "head_dim": width})
    assert kind == "llama3"
    low, high, original = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    result = []
    for each in f:
        wavelength = 2 * math.pi / each
        if wavelength < original / high:
            result.append(each)
        elif wavelength > original / low:
            result.append(each / rope["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            result.append((1 - smooth) * each / rope["factor"] + smooth * each)
    return np.array(result), 1.0


def forward(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], ids: Sequence[int]) -> Outputs:
    """Runs the whole sequence at once, from position 0, without a cache."""
    weights = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    H, T = head_width(config), len(ids)
    frequencies, factor = inv_freq(config)
    angles = np.arange(T)[:, None, None] * frequencies
    cos, sin = np.cos(angles) * factor, np.sin(angles) * factor

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config["rms_norm_eps"]) * weights[f"{name}.weight"]

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def rotated(x_TNH: np.ndarray) -> np.ndarray:
        first, second = x_TNH[..., : H // 2], x_TNH[..., H // 2 :]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def attend(name: str, window: int | None, x_TD: np.ndarray) -> np.ndarray:
        q_TNH, k_TKH, v_TKH = (linear(f"{name}.{part}_proj", x_TD).reshape(T, -1, H) for part in "qkv")
        if config["model_type"] == "qwen3":
            q_TNH, k_TKH = norm(f"{name}.q_norm", q_TNH), norm(f"{name}.k_norm", k_TKH)
        q_TNH, k_TKH = rotated(q_TNH), rotated(k_TKH)
        behind_TT = np.arange(T)[:, None] - np.arange(T)  # how far a key lies behind a query
        seen_TT = (behind_TT >= 0) & (behind_TT < (T if window is None else window))
        heads = []
        for head in range(q_TNH.shape[1]):
            shared = head // (q_TNH.shape[1] // k_TKH.shape[1])
            scores_TT = np.where(seen_TT, q_TNH[:, head] @ k_TKH[:, shared].T / math.sqrt(H), -np.inf)
            shares_TT = np.exp(scores_TT - scores_TT.max(axis=1, keepdims=True))
            heads.append(shares_TT / shares_TT.sum(axis=1, keepdims=True) @ v_TKH[:, shared])
        return linear(f"{name}.o_proj", np.concatenate(heads, axis=1))

    def mlp(name: str, x_TD: np.ndarray) -> np.ndarray:
        gate_TF = linear(f"{name}.gate_proj", x_TD)
        return linear(f"{name}.down_proj", gate_TF / (1 + np.exp(-gate_TF)) * linear(f"{name}.up_proj", x_TD))

    x_TD, blocks = weights["model.embed_tokens.weight"][list(ids)], []
    for layer, window in enumerate(windows(config)):
        block = f"model.layers.{layer}"
        x_TD = x_TD + attend(f"{block}.self_attn", window, norm(f"{block}.input_layernorm", x_TD))
        x_TD = x_TD + mlp(f"{block}.mlp", norm(f"{block}.post_attention_layernorm", x_TD))
        blocks.append(x_TD)
    final_TD = norm("model.norm", x_TD)
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return Outputs(np.stack(blocks), final_TD, linear(head, final_TD))
