"""Llama's configuration, and that of its relatives: Mistral, Qwen2 (and 2.5) and Qwen3, all without experts.

Sources: transformers 5 `models/{llama,mistral,qwen2,qwen3}/configuration_*.py` and `modeling_*.py`. Absent keys mean
the same as there, except that sizes have no defaults.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from gptjax.config.attention import check_heads, layer_types, read_layer_types
from gptjax.config.keys import MOST_LAYERS, Keys
from gptjax.config.quantization import Types, packing_to_json, read_packing
from gptjax.config.rope import Rope, read_rope, rope_to_json
from gptjax.support.quoting import quoted

_ROPE: Final = Rope(10000.0)  # of a config that says nothing about rotation
_WINDOW: Final = 4096
_MAX_WINDOW_LAYERS: Final = 28


@dataclasses.dataclass(frozen=True)
class Family:
    """What distinguishes the configs of one `model_type`."""

    title: str  # in messages
    architecture: str  # transformers' class
    attention_bias: bool = False  # it reads `attention_bias`, for queries, keys, values and the output
    qkv_bias: bool = False  # it always has biases on queries, keys and values
    mlp_bias: bool = False  # it reads `mlp_bias`
    qk_norm: bool = False
    head_width: int | None = None  # if `head_dim` is absent; None: the width divided among the heads
    own_kv_heads: bool = False  # each query head has its own key/value head if `num_key_value_heads` is absent
    window: bool = False  # it reads `sliding_window`, for all layers ...
    use_window: bool = False  # ... or, if `use_sliding_window`, for those that `layer_types` or `max_window_layers` say


FAMILIES: Final[Mapping[str, Family]] = {
    "llama": Family("Llama", "LlamaForCausalLM", attention_bias=True, mlp_bias=True, own_kv_heads=True),
    "mistral": Family("Mistral", "MistralForCausalLM", window=True),
    "qwen2": Family("Qwen2", "Qwen2ForCausalLM", qkv_bias=True, use_window=True),
    "qwen3": Family("Qwen3", "Qwen3ForCausalLM", attention_bias=True, qk_norm=True, head_width=128, use_window=True),
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The architecture of a Llama model, or of a relative whose blocks differ only in what is named here."""

    family: str  # transformers' model_type: a key of FAMILIES
    vocab_size: int  # V
    context_length: int  # the most positions a sequence may have
    width: int  # D
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_width: int  # H
    mlp_width: int  # F
    windows: tuple[int | None, ...]  # per layer: positions that a query sees, its own included; None for all
    rope: Rope
    norm_epsilon: float  # inside the square root of RMSNorm
    qkv_bias: bool  # on queries, keys and values
    out_bias: bool  # on attention's output
    mlp_bias: bool  # on gate, up and down
    qk_norm: bool  # RMSNorm of each query and key head, before the rotation
    tied_head: bool  # logits use the token embedding; otherwise a matrix of their own
    mxfp4: str = "none"  # the weights that are packed: one of `quantization.TARGETS`
    types: Types = ()  # the weights that stay in a GGUF file's types

    def with_one_layer(self) -> "LlamaConfig":
        """The same configuration with only the first layer."""
        return dataclasses.replace(self, num_layers=1, windows=self.windows[:1])

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "LlamaConfig":
        """Reads a parsed Hugging Face `config.json` whose `model_type` is in FAMILIES.

        Raises:
          ConfigError: names all faults together.
        """
        keys, family = Keys(raw), FAMILIES[raw["model_type"]]
        _check_effects(keys, raw, family)
        num_layers = keys.size("num_hidden_layers", most=MOST_LAYERS)
        context_length, num_heads = keys.size("max_position_embeddings"), keys.size("num_attention_heads")
        width, mlp_width = keys.size("hidden_size"), keys.size("intermediate_size")
        head_width = keys.size("head_dim", absent=family.head_width or width // max(1, num_heads))
        own_kv_heads = family.own_kv_heads or keys.null("num_key_value_heads")
        bias = family.attention_bias and keys.flag("attention_bias", absent=False)
        config = cls(
            family=raw["model_type"],
            vocab_size=keys.size("vocab_size"),
            context_length=context_length,
            width=width,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=keys.size("num_key_value_heads", absent=num_heads if own_kv_heads else None),
            head_width=head_width,
            mlp_width=mlp_width,
            windows=_windows(keys, family, num_layers),
            rope=read_rope(keys, context_length, head_width, absent=_ROPE),
            norm_epsilon=keys.positive_float("rms_norm_eps", absent=1e-6),
            qkv_bias=bias or family.qkv_bias,
            out_bias=bias,
            mlp_bias=family.mlp_bias and keys.flag("mlp_bias", absent=False),
            qk_norm=family.qk_norm,
            tied_head=keys.flag("tie_word_embeddings", absent=False),
            **read_packing(keys, linear=(width, mlp_width, num_heads * head_width)),
        )
        if num_heads and width % num_heads and not family.head_width and not keys.has("head_dim"):
            keys.fault(f"hidden_size {width} is not a multiple of num_attention_heads {num_heads}: head_dim is missing")
        check_heads(num_heads, config.num_kv_heads, head_width, keys)
        keys.raise_faults(family.title)
        return config

    def to_json(self) -> dict[str, Any]:
        """The inverse of `from_json`: the contents of a Hugging Face `config.json`."""
        family = FAMILIES[self.family]
        window = next((window for window in self.windows if window is not None), None)
        raw: dict[str, Any] = {
            "model_type": self.family,
            "architectures": [family.architecture],
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context_length,
            "hidden_size": self.width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_width,
            "intermediate_size": self.mlp_width,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_epsilon,
            "tie_word_embeddings": self.tied_head,
        }
        if family.attention_bias:
            raw["attention_bias"] = self.out_bias
        if family.mlp_bias:
            raw["mlp_bias"] = self.mlp_bias
        if family.window or family.use_window:
            raw["sliding_window"] = window
        if family.use_window:
            raw |= {"use_sliding_window": window is not None, "layer_types": layer_types(self.windows)}
        return raw | rope_to_json(self.rope) | packing_to_json(self.mxfp4, self.types)


def _check_effects(keys: Keys, raw: Mapping[str, Any], family: Family) -> None:
    """Reads the keys that must have one value or have no effect."""
    for key in ("num_local_experts", "num_experts"):
        keys.ignore(key)
        if keys.has(key):
            keys.fault(f"{key} is {quoted(raw[key])}: gptjax runs only {family.title} models without experts")
    for key in ("rope_interleaved", "use_mrope"):  # in published files; transformers does not read them
        if keys.flag(key, absent=False):
            keys.fault(f"{key} is true: gptjax rotates the halves of a head, by one position")
    keys.choice("hidden_act", {"silu": "silu", "swish": "silu"}, absent="silu")
    keys.ignore("attention_dropout", "is_llama_config", "transformers.js_config")


def _windows(keys: Keys, family: Family, num_layers: int) -> tuple[int | None, ...]:
    window, first = None, 0
    if family.use_window:
        used = keys.flag("use_sliding_window", absent=False)
        if used and not keys.null("sliding_window"):
            window = keys.size("sliding_window", absent=_WINDOW)
            first = keys.size("max_window_layers", absent=_MAX_WINDOW_LAYERS, least=0)
        keys.ignore("sliding_window", "max_window_layers")
    elif family.window:
        keys.ignore("sliding_window")
        window = None if keys.null("sliding_window") else keys.size("sliding_window", absent=_WINDOW)
    expected = [window is not None and layer >= first for layer in range(num_layers)]
    slides = read_layer_types(keys, num_layers, absent=expected)
    if any(slides) and window is None:
        why = "use_sliding_window is false or sliding_window null" if family.use_window else "there is no window"
        keys.fault(f"layer_types has layers that slide, but {why}")
    elif slides and slides != expected and not family.use_window:
        keys.fault(f"layer_types has layers that do not slide, which transformers does not support in {family.title}")
    return tuple(window if slide else None for slide in slides)
