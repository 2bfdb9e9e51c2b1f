"""Model configurations: frozen dataclasses, read strictly from a checkpoint's `config.json`.

A key that is neither understood nor known to be without effect raises `ConfigError`: a setting that is silently
ignored is a wrong answer. Sizes have no defaults. What an absent key means is stated where it is read, and follows
transformers 5 (`models/gpt2/configuration_gpt2.py`).
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gptjax.errors import CheckpointError, ConfigError
from gptjax.files import read_json

# Keys of published configs that change nothing about inference. Known by name; every other unknown key raises.
WITHOUT_EFFECT: Final = frozenset(
    """
    _name_or_path _num_labels add_cross_attention architectures attn_pdrop bos_token_id chunk_size_feed_forward dtype
    embd_pdrop eos_token_id finetuning_task gradient_checkpointing id2label initializer_range is_decoder
    is_encoder_decoder label2id model_type n_special output_attentions output_hidden_states output_past
    output_router_logits pad_token_id predict_special_tokens pretraining_tp problem_type
    reorder_and_upcast_attn resid_pdrop return_dict router_aux_loss_coef sep_token_id summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj task_specific_params tokenizer_class
    torch_dtype torchscript transformers_version use_bfloat16 use_cache
    """.split()
)
# The same for `generation_config.json`: they say where a text begins, or how transformers goes about its work.
GENERATION_WITHOUT_EFFECT: Final = frozenset(
    """
    _from_model_config bos_token_id cache_implementation decoder_start_token_id max_length max_new_tokens
    output_attentions output_hidden_states output_logits output_scores pad_token_id return_dict_in_generate
    transformers_version trust_remote_code use_cache
    """.split()
)
# And with these values, settings that gptjax does not have change nothing.
_NEUTRAL: Final = {
    "diversity_penalty": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "length_penalty": 1,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "early_stopping": False,
    "typical_p": 1,
}
_MOST_LAYERS, _MOST_SIZE = 1024, 1 << 24  # beyond any real model: a size that would only exhaust memory or patience

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
    scale_attention_by_layer: bool  # scores of layer l divided by l + 1 as well
    tied_head: bool  # logits from the token embedding; otherwise from a matrix of their own

    @property
    def num_kv_heads(self) -> int:
        """K: GPT-2 has a key/value head for each query head."""
        return self.num_heads

    @property
    def head_width(self) -> int:
        """H."""
        return self.width // self.num_heads

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "GPT2Config":
        """Reads the mapping of a Hugging Face `config.json`. Raises `ConfigError`, naming all faults together."""
        keys = _Keys(raw)
        width = keys.size("n_embd")
        mlp_width = keys.size("n_inner", alias="intermediate_size", absent=4 * width)
        activation = keys.choice("activation_function", ACTIVATIONS, absent="gelu_new")
        num_heads = keys.size("n_head")
        keys.ignore("pruned_heads")
        if raw.get("pruned_heads"):
            keys.fault("pruned_heads is not empty: gptjax does not run models with pruned heads")
        config = cls(
            vocab_size=keys.size("vocab_size"),
            context_length=keys.size("n_positions", alias="n_ctx"),
            width=width,
            num_layers=keys.size("n_layer", most=_MOST_LAYERS),
            num_heads=num_heads,
            mlp_width=mlp_width,
            activation=activation,
            norm_epsilon=keys.positive_float("layer_norm_epsilon", absent=1e-5),
            scale_attention=keys.flag("scale_attn_weights", absent=True),
            scale_attention_by_layer=keys.flag("scale_attn_by_inverse_layer_idx", absent=False),
            tied_head=keys.flag("tie_word_embeddings", absent=True),
        )
        if raw.get("add_cross_attention"):
            keys.fault("add_cross_attention is true: gptjax runs decoder-only GPT-2 without cross-attention")
        if num_heads and width % num_heads:
            keys.fault(f"n_embd {width} is not a multiple of n_head {num_heads}")
        keys.raise_faults("GPT-2")
        return config


ModelConfig = GPT2Config  # the union of all model configurations


def _published_gpt2(num_layers: int, num_heads: int, width: int) -> GPT2Config:
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


PUBLISHED: Final[Mapping[str, ModelConfig]] = {
    "gpt2": _published_gpt2(12, 12, 768),
    "gpt2-medium": _published_gpt2(24, 16, 1024),
    "gpt2-large": _published_gpt2(36, 20, 1280),
    "gpt2-xl": _published_gpt2(48, 25, 1600),
}

_READERS: Final = {"gpt2": GPT2Config.from_json}


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint's `generation_config.json` says of sampling; arguments of a request override it."""

    eos_ids: tuple[int, ...] = ()  # generation stops at any of these
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def read_config(directory: Path) -> ModelConfig:
    """Reads `directory/config.json`.

    Raises:
      CheckpointError: there is no such file, or it is not a JSON object.
      ConfigError: an unsupported architecture, or unknown, missing or unusable keys, all named.
    """
    raw = read_json(directory / "config.json")
    if raw is None:
        raise CheckpointError(
            f"{directory} has no config.json; expected a Hugging Face checkpoint (config.json, *.safetensors, "
            "tokenizer.json) or a directory written by `gptjax convert`"
        )
    return config_from_json(raw)


def config_from_json(raw: Mapping[str, Any]) -> ModelConfig:
    """The configuration that the mapping of a `config.json` describes. Raises `ConfigError`."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in _READERS:
        found = "no model_type" if model_type is None else f"model_type {model_type!r}"
        raise ConfigError(f"config.json has {found}; gptjax supports {', '.join(sorted(_READERS))}")
    return _READERS[model_type](raw)


def read_generation_defaults(directory: Path) -> GenerationDefaults:
    """Reads `generation_config.json`, else the end-of-text id of `config.json`; absent files mean greedy.

    A setting that the file does not have is off. (transformers fills in top_k 50.)
    """
    found = read_json(directory / "generation_config.json") or {}
    raw = {key: value for key, value in found.items() if value is not None}
    if "eos_token_id" not in raw:
        raw["eos_token_id"] = (read_json(directory / "config.json") or {}).get("eos_token_id")
    eos = raw["eos_token_id"]
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    keys = _Keys(raw, without_effect=GENERATION_WITHOUT_EFFECT | {"eos_token_id"})
    sampled = keys.flag("do_sample", absent=False)
    drawn = GenerationDefaults(
        eos_ids=eos_ids,
        temperature=keys.positive_float("temperature", absent=1.0),
        top_k=keys.size("top_k", absent=0) if raw.get("top_k") else 0,
        top_p=keys.positive_float("top_p", absent=1.0, most=1),
        min_p=keys.positive_float("min_p", absent=0.0, most=1) if raw.get("min_p") else 0.0,
        repetition_penalty=keys.positive_float("repetition_penalty", absent=1.0),
    )
    keys.ignore("top_k", "min_p", *(key for key, value in _NEUTRAL.items() if raw.get(key) == value))
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in eos_ids):
        keys.fault(f"eos_token_id is {eos!r}; expected token ids")
    keys.raise_faults("generation", file="generation_config.json")
    greedy = GenerationDefaults(eos_ids=eos_ids, repetition_penalty=drawn.repetition_penalty)
    return drawn if sampled else greedy


class _Keys:
    """Reads typed values out of a raw config, collecting every fault so that they can be reported together."""

    def __init__(self, raw: Mapping[str, Any], without_effect: frozenset[str] = WITHOUT_EFFECT):
        self._raw = raw
        self._read = set(without_effect)
        self._faults: list[str] = []

    def fault(self, text: str) -> None:
        self._faults.append(text)

    def _get(self, key: str, alias: str | None, absent: Any) -> Any:
        names = (key,) if alias is None else (key, alias)
        self._read.update(names)
        values = [self._raw[name] for name in names if self._raw.get(name) is not None]
        if len(values) == 2 and values[0] != values[1]:
            self.fault(f"{key} is {values[0]!r} but {alias} is {values[1]!r}: they mean the same and must agree")
        if not values and absent is None:
            self.fault(f"{' or '.join(names)} is missing")
        return values[0] if values else absent

    def size(self, key: str, *, alias: str | None = None, absent: int | None = None, most: int = _MOST_SIZE) -> int:
        value = self._get(key, alias, absent)
        if value is absent:
            return 0 if absent is None else absent
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            self.fault(f"{key} is {value!r}; expected a whole number from 1 to {most}")
            return 0
        return value

    def positive_float(self, key: str, *, absent: float, most: float = sys.float_info.max) -> float:
        value = self._get(key, None, absent)
        if value is absent:
            return absent
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            limit = "" if most == sys.float_info.max else f" and at most {most}"
            self.fault(f"{key} is {value!r}; expected a number above 0{limit}")
            return absent
        return float(value)

    def flag(self, key: str, *, absent: bool) -> bool:
        value = self._get(key, None, absent)
        if not isinstance(value, bool):
            self.fault(f"{key} is {value!r}; expected true or false")
            return absent
        return value

    def choice(self, key: str, choices: Mapping[str, str], *, absent: str) -> str:
        value = self._get(key, None, absent)
        if not isinstance(value, str) or value not in choices:
            self.fault(f"{key} is {value!r}; gptjax supports {', '.join(sorted(choices))}")
            return ""
        return choices[value]

    def ignore(self, *keys: str) -> None:
        self._read.update(keys)

    def raise_faults(self, model: str, *, file: str = "config.json") -> None:
        unknown = sorted(set(self._raw) - self._read)
        if unknown:
            self.fault(
                f"unknown key{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}: "
                "gptjax does not know what they change, so it will not guess"
            )
        if self._faults:
            raise ConfigError(f"{file} cannot be used for {model}:\n  " + "\n  ".join(self._faults))
