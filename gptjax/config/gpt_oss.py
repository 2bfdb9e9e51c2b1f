"""GPT-OSS's configuration, in Hugging Face's spelling and in that of OpenAI's original files.

Sources: transformers `models/gpt_oss/configuration_gpt_oss.py`; openai/gpt-oss `gpt_oss/torch/model.py`. Absent keys
mean the same as there.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from gptjax.config.attention import check_heads, layer_types, read_layer_types
from gptjax.config.keys import MOST_LAYERS, MOST_SIZE, Keys
from gptjax.config.quantization import Types, check_widths, packing_to_json, read_packing
from gptjax.config.rope import Rope, Yarn, check_rope, read_rope, rope_to_json

SWIGLU_ALPHA: Final = 1.702
SWIGLU_LIMIT: Final = 7.0
_THETA: Final = 150000.0
_WINDOW: Final = 128
_ORIGINAL_KEYS: Final = ("num_experts", "experts_per_token", "initial_context_length", "rope_scaling_factor")


@dataclasses.dataclass(frozen=True)
class GptOssConfig:
    """The architecture of a GPT-OSS model."""

    vocab_size: int  # V
    context_length: int  # the most positions a sequence may have
    width: int  # D
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_width: int  # H
    mlp_width: int  # F: of each expert
    num_experts: int  # E
    experts_per_token: int  # X
    windows: tuple[int | None, ...]  # per layer: positions that a query sees, its own included; None for all
    rope: Rope
    norm_epsilon: float  # inside the square root of RMSNorm
    swiglu_limit: float  # gate and up are clamped to it
    swiglu_alpha: float  # gate · sigmoid(alpha · gate)
    attention_bias: bool  # on q, k, v and the output
    tied_head: bool  # logits use the token embedding; otherwise a matrix of their own
    mxfp4: str  # the weights that are packed: one of `quantization.TARGETS`
    types: Types = ()  # the weights that stay in a GGUF file's types

    def with_one_layer(self) -> "GptOssConfig":
        """The same configuration with only the first layer."""
        return dataclasses.replace(self, num_layers=1, windows=self.windows[:1])

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "GptOssConfig":
        """Reads a parsed Hugging Face `config.json`. Raises `ConfigError`, naming all faults together."""
        keys = Keys(raw)
        num_layers = keys.size("num_hidden_layers", most=MOST_LAYERS)
        context_length = keys.size("max_position_embeddings")
        width, mlp_width = keys.size("hidden_size"), keys.size("intermediate_size")
        num_heads, head_width = keys.size("num_attention_heads"), keys.size("head_dim")
        if keys.has("hidden_act"):  # "silu" here means the clamped SwiGLU, with x·sigmoid(αx) inside
            keys.choice("hidden_act", {"silu": "silu"}, absent=None)
        keys.ignore("hidden_act", "attention_dropout")
        config = cls(
            vocab_size=keys.size("vocab_size"),
            context_length=context_length,
            width=width,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=keys.size("num_key_value_heads"),
            head_width=head_width,
            mlp_width=mlp_width,
            num_experts=keys.size("num_local_experts", alias="num_experts"),
            experts_per_token=keys.size(
                "num_experts_per_tok", alias=keys.older("num_experts_per_tok", "experts_per_token")
            ),
            windows=_windows(keys, num_layers),
            rope=read_rope(keys, context_length, head_width, absent=_rope(4096)),
            norm_epsilon=keys.positive_float("rms_norm_eps", absent=1e-5),
            swiglu_limit=keys.positive_float("swiglu_limit", absent=SWIGLU_LIMIT),
            swiglu_alpha=keys.positive_float("swiglu_alpha", absent=SWIGLU_ALPHA),
            attention_bias=keys.flag("attention_bias", absent=True),
            tied_head=keys.flag("tie_word_embeddings", absent=False),
            **read_packing(keys, experts=(width, mlp_width), linear=(num_heads * head_width,)),
        )
        _check_sizes(config, keys)
        keys.raise_faults("GPT-OSS")
        return config

    @classmethod
    def from_original_json(cls, raw: Mapping[str, Any]) -> "GptOssConfig":
        """Reads the parsed `config.json` of OpenAI's own directory. Raises `ConfigError`."""
        keys = Keys(raw)
        num_layers = keys.size("num_hidden_layers", most=MOST_LAYERS)
        initial_length = keys.size("initial_context_length")
        factor = keys.positive_float("rope_scaling_factor", absent=1.0)
        window = keys.size("sliding_window")
        yarn = Yarn(
            factor=factor,
            original_length=initial_length,
            beta_fast=keys.positive_float("rope_ntk_beta", absent=32.0),
            beta_slow=keys.positive_float("rope_ntk_alpha", absent=1.0),
            truncate=False,
        )
        config = cls(
            vocab_size=keys.size("vocab_size"),
            context_length=round(initial_length * min(factor, MOST_SIZE)),
            width=keys.size("hidden_size"),
            num_layers=num_layers,
            num_heads=keys.size("num_attention_heads"),
            num_kv_heads=keys.size("num_key_value_heads"),
            head_width=keys.size("head_dim"),
            mlp_width=keys.size("intermediate_size"),
            num_experts=keys.size("num_experts"),
            experts_per_token=keys.size("experts_per_token"),
            windows=tuple(None if layer % 2 else window for layer in range(num_layers)),
            rope=Rope(theta=keys.positive_float("rope_theta", absent=_THETA), scaling=yarn if factor > 1 else None),
            norm_epsilon=1e-5,
            swiglu_limit=keys.positive_float("swiglu_limit", absent=SWIGLU_LIMIT),
            swiglu_alpha=SWIGLU_ALPHA,
            attention_bias=True,
            tied_head=False,
            mxfp4="experts",
        )
        check_widths(keys, (config.width, config.mlp_width))
        check_rope(config.rope, config.head_width, keys)
        _check_sizes(config, keys)
        keys.raise_faults("GPT-OSS (OpenAI's original files)")
        return config

    def to_json(self) -> dict[str, Any]:
        """The inverse of `from_json`: the contents of a Hugging Face `config.json`."""
        raw: dict[str, Any] = {
            "model_type": "gpt_oss",
            "architectures": ["GptOssForCausalLM"],
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context_length,
            "hidden_size": self.width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_width,
            "intermediate_size": self.mlp_width,
            "num_local_experts": self.num_experts,
            "num_experts_per_tok": self.experts_per_token,
            "layer_types": layer_types(self.windows),
            "sliding_window": next((window for window in self.windows if window is not None), None),
            "rms_norm_eps": self.norm_epsilon,
            "swiglu_limit": self.swiglu_limit,
            "swiglu_alpha": self.swiglu_alpha,
            "attention_bias": self.attention_bias,
            "tie_word_embeddings": self.tied_head,
        }
        return raw | rope_to_json(self.rope) | packing_to_json(self.mxfp4, self.types)


def is_original(raw: Mapping[str, Any]) -> bool:
    """Whether a `config.json` comes from OpenAI's own directory, whose file names no model type."""
    return "model_type" not in raw and all(key in raw for key in _ORIGINAL_KEYS)


def published(num_layers: int, num_experts: int) -> GptOssConfig:
    """One of the published sizes."""
    return GptOssConfig(
        vocab_size=201088,
        context_length=131072,
        width=2880,
        num_layers=num_layers,
        num_heads=64,
        num_kv_heads=8,
        head_width=64,
        mlp_width=2880,
        num_experts=num_experts,
        experts_per_token=4,
        windows=tuple(None if layer % 2 else 128 for layer in range(num_layers)),
        rope=_rope(4096),
        norm_epsilon=1e-5,
        swiglu_limit=SWIGLU_LIMIT,
        swiglu_alpha=SWIGLU_ALPHA,
        attention_bias=True,
        tied_head=False,
        mxfp4="experts",
    )


def _rope(original_length: int) -> Rope:
    """The published models' setting, which transformers takes as the default."""
    return Rope(_THETA, Yarn(32.0, original_length, beta_fast=32.0, beta_slow=1.0, truncate=False))


def _windows(keys: Keys, num_layers: int) -> tuple[int | None, ...]:
    slides = read_layer_types(keys, num_layers, absent=[layer % 2 == 0 for layer in range(num_layers)])
    keys.ignore("sliding_window")
    absent = None if keys.null("sliding_window") else _WINDOW  # null means no window
    window = keys.size("sliding_window", absent=absent) if any(slides) else None
    return tuple(window if slide else None for slide in slides)


def _check_sizes(config: GptOssConfig, keys: Keys) -> None:
    check_heads(config.num_heads, config.num_kv_heads, config.head_width, keys)
    if not 1 <= config.context_length <= MOST_SIZE:
        keys.fault(f"the context of {config.context_length} positions is not from 1 to {MOST_SIZE}")
    if config.experts_per_token > config.num_experts:
        keys.fault(f"{config.experts_per_token} experts per token, but there are only {config.num_experts}")
