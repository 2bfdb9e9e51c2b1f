"""GPT-OSS in float64 NumPy: the oracle of `gptjax.models.gpt_oss`, written from the reference and not from our code.

Source: openai/gpt-oss `gpt_oss/torch/model.py`, transformers `models/gpt_oss` and docs/MODELS.md. Takes the tensors and
the `config.json` of a Hugging Face checkpoint, one sequence at a time. Checked against transformers in
`tests/oracle/test_gpt_oss_transformers.py` and against its recorded outputs in `tests/models/test_golden_gpt_oss.py`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# The values of a nibble, sign in its highest bit; 8 is -0.
MXFP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


class Outputs(NamedTuple):
    """What the model computes for a sequence of T tokens, float64."""

    embedding_TD: np.ndarray
    blocks_LTD: np.ndarray  # the residual stream after each block, before the final norm
    final_TD: np.ndarray  # after the final norm
    logits_TV: np.ndarray
    margin: float  # the least distance of a chosen expert's logit from the best that was not chosen


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 [..., G, 16] and [..., G] uint8 as float64 [..., 32·G]; the low nibble is the even element."""
    nibbles = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    values = np.ldexp(MXFP4[nibbles], scales.astype(int)[..., None] - 127)
    return values.reshape(*scales.shape[:-1], 32 * scales.shape[-1])


def dequantized(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A Hugging Face checkpoint with its packed experts as the dequantised layout has them: [E, in, out]."""
    result = {}
    for name, value in tensors.items():
        if name.endswith("_blocks"):
            weight = name.removesuffix("_blocks")
            result[weight] = dequantize(value, tensors[f"{weight}_scales"]).swapaxes(1, 2)
        elif not name.endswith("_scales"):
            result[name] = value
    return result


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the rotary embedding, in whichever of the two spellings they are."""
    if "rope_parameters" in config:
        return dict(config["rope_parameters"])
    return {"rope_theta": config["rope_theta"], **(config["rope_scaling"] or {"rope_type": "default"})}


def inv_freq(config: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Radians a position of each pair of dimensions, [H/2], and what cosines and sines are multiplied with."""
    rope, width = rope_settings(config), config["head_dim"]
    theta = rope["rope_theta"]
    f = theta ** (2 * np.arange(width // 2) / width)
    if rope["rope_type"] == "default":
        return 1 / f, 1.0
    original, factor = rope["original_max_position_embeddings"], rope["factor"]

    def dimension(rotations: float) -> float:
        """Which pair of dimensions turns so often within the original context."""
        return width / 2 * math.log(original / (rotations * 2 * math.pi)) / math.log(theta)

    low, high = dimension(rope.get("beta_fast", 32)), dimension(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)
    return ramp / (factor * f) + (1 - ramp) / f, 0.1 * math.log(factor) + 1


def forward(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], ids: Sequence[int]) -> Outputs:
    """Runs the whole sequence at once, from position 0, without a cache. Experts are [E, in, out], not packed."""
    weights = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    margin = math.inf

    def norm(name: str, x_TD: np.ndarray) -> np.ndarray:
        mean_square = (x_TD**2).sum(axis=1, keepdims=True) / x_TD.shape[1]
        return x_TD / np.sqrt(mean_square + config["rms_norm_eps"]) * weights[f"{name}.weight"]

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def attend(name: str, window: int | None, x_TD: np.ndarray) -> np.ndarray:
        T, H = len(x_TD), config["head_dim"]
        q_TNH, k_TKH, v_TKH = (linear(f"{name}.{part}_proj", x_TD).reshape(T, -1, H) for part in "qkv")
        q_TNH, k_TKH = _rotate(q_TNH, config), _rotate(k_TKH, config)
        behind_TT = np.arange(T)[:, None] - np.arange(T)  # how far a key lies behind a query
        seen_TT = behind_TT >= 0 if window is None else (behind_TT >= 0) & (behind_TT < window)
        out_TNH = np.zeros_like(q_TNH)
        for head in range(config["num_attention_heads"]):
            shared = head // (config["num_attention_heads"] // config["num_key_value_heads"])
            scores_TT = np.where(seen_TT, q_TNH[:, head] @ k_TKH[:, shared].T / math.sqrt(H), -np.inf)
            sink_T1 = np.full((T, 1), weights[f"{name}.sinks"][head])
            weights_TS = _softmax(np.concatenate([scores_TT, sink_T1], axis=1))[:, :-1]
            out_TNH[:, head] = weights_TS @ v_TKH[:, shared]
        return linear(f"{name}.o_proj", out_TNH.reshape(T, -1))

    def mix(name: str, x_TD: np.ndarray) -> np.ndarray:
        nonlocal margin
        logits_TE = linear(f"{name}.router", x_TD)
        order_TE, X = np.argsort(-logits_TE, axis=1), config["num_experts_per_tok"]
        ranked_TE = np.take_along_axis(logits_TE, order_TE, axis=1)
        margin = min(margin, float(np.min(ranked_TE[:, X - 1 : X] - ranked_TE[:, X:], initial=math.inf)))
        chosen_TX, shares_TX = order_TE[:, :X], _softmax(ranked_TE[:, :X])
        out_TD = np.zeros_like(x_TD)
        for expert in range(logits_TE.shape[1]):
            t, rank = np.nonzero(chosen_TX == expert)
            up_weight, up_bias, down_weight, down_bias = (
                weights[f"{name}.experts.{part}"][expert]
                for part in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
            )
            hidden = _swiglu(x_TD[t] @ up_weight + up_bias, config)
            out_TD[t] += shares_TX[t, rank][:, None] * (hidden @ down_weight + down_bias)
        return out_TD

    embedding_TD = weights["model.embed_tokens.weight"][list(ids)]
    x_TD, blocks = embedding_TD, []
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        window = config["sliding_window"] if config["layer_types"][layer] == "sliding_attention" else None
        x_TD = x_TD + attend(f"{block}.self_attn", window, norm(f"{block}.input_layernorm", x_TD))
        x_TD = x_TD + mix(f"{block}.mlp", norm(f"{block}.post_attention_layernorm", x_TD))
        blocks.append(x_TD)
    final_TD = norm("model.norm", x_TD)
    head = "model.embed_tokens" if config.get("tie_word_embeddings", False) else "lm_head"
    return Outputs(embedding_TD, np.stack(blocks), final_TD, linear(head, final_TD), margin)


def _rotate(x_TNH: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Turns the pairs (x[i], x[i + H/2]) of all heads by position times frequency."""
    frequencies, factor = inv_freq(config)
    angles = np.arange(len(x_TNH))[:, None, None] * frequencies
    cos, sin = np.cos(angles) * factor, np.sin(angles) * factor
    first, second = np.split(x_TNH, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _swiglu(x: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """The experts' activation; `hidden_act: silu` of the config is not it."""
    limit, alpha = config["swiglu_limit"], config.get("swiglu_alpha", 1.702)
    gate, up = np.minimum(x[..., ::2], limit), np.clip(x[..., 1::2], -limit, limit)
    return gate / (1 + np.exp(-alpha * gate)) * (up + 1)
