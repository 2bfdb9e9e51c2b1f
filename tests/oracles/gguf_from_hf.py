"""GGUF files of Hugging Face checkpoints, written as llama.cpp's converter writes them.

Source: llama.cpp `conversion/{base,gpt2,gpt_oss,llama,qwen}.py`. Files that the converter itself made of gpt2-tales and
gpt-oss-tales gave the same bits through gptjax as the directories that they were made from.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.gguf import made

MXFP4, F32, F16 = 39, 0, 1
Q4_0, Q8_0 = 2, 8
_NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "lm_head": "output",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.sinks": "attn_sinks",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.router": "ffn_gate_inp",
}


def write(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    types: Mapping[str, int] | None = None,
    metadata: Mapping[str, bytes] | None = None,
    *,
    fused: bool = False,
    rope_freqs: np.ndarray | None = None,
) -> Path:
    """A file of a checkpoint's config.json and tensors, those whose names end with a key of `types` packed.

    `metadata` is more of it, each value with its type, as `made.string` and `made.number` give it. With `fused`,
    queries, keys and values are one tensor, as the converter's --fuse-qkv makes them.
    """
    metadata = {"general.architecture": made.string(architecture(config)), **_metadata(config), **(metadata or {})}
    entries = {name: entry for each in tensors for name, entry in _entries(config, tensors, each)}
    entries = _fused(entries) if fused else entries
    for name, entry in entries.items():
        for ending, kind in (types or {}).items():
            if name.endswith(ending):
                values = np.frombuffer(entry.data, np.float32).reshape(-1, 32)
                entries[name] = made.Entry(kind, entry.dims, {Q4_0: q4_0, Q8_0: q8_0}[kind](values))
    if (config.get("rope_scaling") or {}).get("rope_type") == "llama3":
        rope_freqs = _llama3_factors(config)
    if rope_freqs is not None:
        entries["rope_freqs.weight"] = _float(rope_freqs)
    path.write_bytes(made.file(metadata, entries))
    return path


def architecture(config: Mapping[str, Any]) -> str:
    return {"gpt_oss": "gpt-oss", "mistral": "llama"}.get(config["model_type"], config["model_type"])


def _metadata(config: Mapping[str, Any]) -> dict[str, bytes]:
    u32, f32 = lambda value: made.number(made.U32, value), lambda value: made.number(made.F32, value)
    prefix = architecture(config)
    if prefix == "gpt2":
        values = {
            "context_length": u32(config["n_positions"]),
            "embedding_length": u32(config["n_embd"]),
            "block_count": u32(config["n_layer"]),
            "feed_forward_length": u32(config["n_inner"] or 4 * config["n_embd"]),
            "attention.head_count": u32(config["n_head"]),
            "attention.layer_norm_epsilon": f32(config["layer_norm_epsilon"]),
        }
        return {f"gpt2.{key}": value for key, value in values.items()}
    head_width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    values = {
        "context_length": u32(config["max_position_embeddings"]),
        "embedding_length": u32(config["hidden_size"]),
        "block_count": u32(config["num_hidden_layers"]),
        "feed_forward_length": u32(config["intermediate_size"]),
        "attention.head_count": u32(config["num_attention_heads"]),
        "attention.head_count_kv": u32(config["num_key_value_heads"]),
        "attention.layer_norm_rms_epsilon": f32(config["rms_norm_eps"]),
        "rope.freq_base": f32(config["rope_theta"]),
    }
    if "head_dim" in config:
        values |= {"attention.key_length": u32(head_width), "attention.value_length": u32(head_width)}
    if prefix == "llama":
        values |= {"vocab_size": u32(config["vocab_size"]), "rope.dimension_count": u32(head_width)}
    scaling = config.get("rope_scaling") or {}
    if (kind := scaling.get("rope_type", scaling.get("type"))) in ("yarn", "linear"):
        values |= {"rope.scaling.type": made.string(kind), "rope.scaling.factor": f32(scaling["factor"])}
    if kind == "yarn":
        values["rope.scaling.original_context_length"] = u32(scaling["original_max_position_embeddings"])
        for beta in scaling.keys() & {"beta_fast", "beta_slow"}:
            values[f"rope.scaling.yarn_{beta}"] = f32(scaling[beta])
    if prefix == "gpt-oss":
        values |= {
            "expert_count": u32(config["num_local_experts"]),
            "expert_used_count": u32(config["num_experts_per_tok"]),
            "attention.sliding_window": u32(config["sliding_window"]),
            "expert_feed_forward_length": u32(config["intermediate_size"]),
        }
    return {f"{prefix}.{key}": value for key, value in values.items()}


def _entries(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], name: str) -> list[tuple[str, made.Entry]]:
    """The tensors that one becomes."""
    match = re.fullmatch(r"(?:transformer\.h|h|model\.layers)\.(\d+)\.(.*)", name)
    block, rest = (f"blk.{match[1]}.", match[2]) if match else ("", name.removeprefix("transformer."))
    if "experts" in rest:
        return _experts(block, rest, tensors, name)
    stem, _, kind = rest.rpartition(".")
    if rest == "self_attn.sinks":
        stem, kind = rest, "weight"
    value = tensors[name]
    if stem.startswith(("attn.c_", "mlp.c_")) and kind == "weight":
        value = value.T
    if architecture(config) == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = config["num_attention_heads" if "q_proj" in stem else "num_key_value_heads"]
        value = (
            value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        )
    target = _NAMES[stem]
    if config["model_type"] == "gpt_oss" and stem == "post_attention_layernorm":
        target = "post_attention_norm"
    return [(f"{block}{target}.{kind}", _float(value))]


def _fused(entries: Mapping[str, made.Entry]) -> dict[str, made.Entry]:
    rest = {name: entry for name, entry in entries.items() if not re.search(r"attn_[qkv]\.", name)}
    for name in entries:
        if ".attn_q." in name:
            parts = [entries[name.replace("attn_q", f"attn_{part}")] for part in "qkv"]
            dims = (*parts[0].dims[:-1], sum(part.dims[-1] for part in parts))
            rest[name.replace("attn_q", "attn_qkv")] = made.Entry(F32, dims, b"".join(part.data for part in parts))
    return rest


def _experts(block: str, rest: str, tensors: Mapping[str, np.ndarray], name: str) -> list[tuple[str, made.Entry]]:
    part = rest.removeprefix("mlp.experts.")
    halves = (
        [("gate", slice(0, None, 2)), ("up", slice(1, None, 2))]
        if part.startswith("gate_up")
        else [("down", slice(None))]
    )
    value = tensors[name]
    if part.endswith("_scales"):
        return []
    if part.endswith("_bias"):
        return [(f"{block}ffn_{half}_exps.bias", _float(value[:, rows])) for half, rows in halves]
    if not part.endswith("_blocks"):  # [E, in, out]
        value = value.swapaxes(1, 2)
        return [(f"{block}ffn_{half}_exps.weight", _float(value[:, rows])) for half, rows in halves]
    scales = tensors[name.replace("_blocks", "_scales")]
    entries = []
    for half, rows in halves:
        codes = np.stack([value[:, rows] & 15, value[:, rows] >> 4], axis=-1).reshape(*value[:, rows].shape[:-1], 32)
        packed = codes[..., :16] | codes[..., 16:] << 4
        data = np.concatenate([scales[:, rows, :, None], packed], axis=-1)
        dims = (data.shape[2] * 32, data.shape[1], data.shape[0])
        entries.append((f"{block}ffn_{half}_exps.weight", made.Entry(MXFP4, dims, data.tobytes())))
    return entries


def q8_0(values: np.ndarray) -> bytes:
    """Blocks of 32 values rounded to Q8_0: a half-precision scale, and 32 signed bytes."""
    scales = (np.abs(values).max(axis=1) / 127).astype(np.float16)
    codes = np.rint(values / np.float32(scales)[:, None]).astype(np.int8)
    return np.concatenate([scales[:, None].view(np.uint8), codes.view(np.uint8)], axis=1).tobytes()


def q4_0(values: np.ndarray) -> bytes:
    """Blocks of 32 values rounded to Q4_0: a half-precision scale, and 16 bytes of nibbles, the first half low."""
    scales = (np.abs(values).max(axis=1) / 7).astype(np.float16)
    codes = np.clip(np.rint(values / np.float32(scales)[:, None]) + 8, 0, 15).astype(np.uint8)
    return np.concatenate([scales[:, None].view(np.uint8), codes[:, :16] | codes[:, 16:] << 4], axis=1).tobytes()


def _float(value: np.ndarray) -> made.Entry:
    kind = F16 if value.dtype == np.float16 else F32
    return made.Entry(kind, value.shape[::-1], np.ascontiguousarray(value).tobytes())


def _llama3_factors(config: Mapping[str, Any]) -> np.ndarray:
    """Each pair's divisor."""
    scaling = config["rope_scaling"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    original, factors = scaling["original_max_position_embeddings"], []
    for pair in range(width // 2):
        wavelength = 2 * np.pi * config["rope_theta"] ** (2 * pair / width)
        smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
        factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)
