"""GPT-2's configuration. Absent keys mean the same as in transformers 5, `models/gpt2/configuration_gpt2.py`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from gptjax.config.keys import MOST_LAYERS, Keys
from gptjax.config.quantization import Types, packing_to_json, read_packing

ACTIVATIONS: Final = {  # config.json's name -> the function's name in `layers.mlp`
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The architecture of a GPT-2 model. Source: openai/gpt-2 `src/model.py`, transformers `models/gpt2`."""

    vocab_size: int  # V
    context_length: int  # the most positions a sequence may have (rows of wpe)
    width: int  # D
    num_layers: int  # L
    num_heads: int  # N
    mlp_width: int  # F
    activation: str  # one of the values of ACTIVATIONS
    norm_epsilon: float  # inside the square root of LayerNorm
    scale_attention: bool  # scores divided by sqrt(H)
    scale_attention_by_layer: bool  # scores of layer l also divided by l + 1
    tied_head: bool  # logits use the token embedding; otherwise a matrix of their own
    mxfp4: str = "none"  # the weights that are packed: one of `quantization.TARGETS`
    types: Types = ()  # the weights that stay in a GGUF file's types

    @property
    def num_kv_heads(self) -> int:
        """K: GPT-2 has a key/value head for each query head."""
        return self.num_heads

    @property
    def head_width(self) -> int:
        """H."""
        return self.width // self.num_heads

    @property
    def windows(self) -> tuple[None, ...]:
        """Every layer attends to all positions."""
        return (None,) * self.num_layers

    def with_one_layer(self) -> "GPT2Config":
        """The same configuration with only the first layer."""
        return dataclasses.replace(self, num_layers=1)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "GPT2Config":
        """Reads a parsed Hugging Face `config.json`. Raises `ConfigError`, naming all faults together."""
        keys = Keys(raw)
        # The aliases are names that transformers reads as the same keys (`GPT2Config.attribute_map`).
        width = keys.size("n_embd", alias="hidden_size")
        mlp_width = keys.size("n_inner", alias=keys.older("n_inner", "intermediate_size"), absent=4 * width)
        activation = keys.choice("activation_function", ACTIVATIONS, absent="gelu_new")
        num_heads = keys.size("n_head", alias="num_attention_heads")
        keys.ignore("pruned_heads")
        if raw.get("pruned_heads"):
            keys.fault("pruned_heads is not empty: gptjax does not run models with pruned heads")
        config = cls(
            vocab_size=keys.size("vocab_size"),
            context_length=keys.size("n_positions", alias=_length_alias(keys)),
            width=width,
            num_layers=keys.size("n_layer", alias="num_hidden_layers", most=MOST_LAYERS),
            num_heads=num_heads,
            mlp_width=mlp_width,
            activation=activation,
            norm_epsilon=keys.positive_float("layer_norm_epsilon", absent=1e-5),
            scale_attention=keys.flag("scale_attn_weights", absent=True),
            scale_attention_by_layer=keys.flag("scale_attn_by_inverse_layer_idx", absent=False),
            tied_head=keys.flag("tie_word_embeddings", absent=True),
            **read_packing(keys, linear=(width, mlp_width)),
        )
        if raw.get("add_cross_attention"):
            keys.fault("add_cross_attention is true: gptjax runs decoder-only GPT-2 without cross-attention")
        if num_heads and width % num_heads:
            keys.fault(f"n_embd {width} is not a multiple of n_head {num_heads}")
        keys.raise_faults("GPT-2")
        return config

    def to_json(self) -> dict[str, Any]:
        """The inverse of `from_json`: the contents of a Hugging Face `config.json`."""
        names = {read: name for name, read in reversed(ACTIVATIONS.items())}
        raw = {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": self.vocab_size,
            "n_positions": self.context_length,
            "n_ctx": self.context_length,  # as OpenAI has it: llama.cpp's converter knows no other name
            "n_embd": self.width,
            "n_layer": self.num_layers,
            "n_head": self.num_heads,
            "n_inner": self.mlp_width,
            "activation_function": names[self.activation],
            "layer_norm_epsilon": self.norm_epsilon,
            "scale_attn_weights": self.scale_attention,
            "scale_attn_by_inverse_layer_idx": self.scale_attention_by_layer,
            "tie_word_embeddings": self.tied_head,
        }
        return raw | packing_to_json(self.mxfp4, self.types)


def _length_alias(keys: Keys) -> str | None:
    """The other key for the context length: OpenAI's own n_ctx, only if there is none that transformers reads."""
    keys.ignore("n_ctx")
    if keys.has("max_position_embeddings"):
        return "max_position_embeddings"
    return None if keys.has("n_positions") else "n_ctx"


def published(num_layers: int, num_heads: int, width: int) -> GPT2Config:
    """One of the published sizes."""
    return GPT2Config(
        vocab_size=50257,
        context_length=1024,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        mlp_width=4 * width,
        activation="gelu_tanh",
        norm_epsilon=1e-5,
        scale_attention=True,
        scale_attention_by_layer=False,
        tied_head=True,
    )
