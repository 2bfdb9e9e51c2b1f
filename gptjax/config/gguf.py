"""A model's configuration from the metadata of a GGUF file, which says what config.json says in other words.

Source: llama.cpp `conversion/` (what writers of such files write) and `src/models/` (what absent keys mean).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Protocol

import numpy as np

from gptjax.config.keys import MOST_LAYERS
from gptjax.config.quantization import KEPT
from gptjax.errors import ConfigError
from gptjax.support.quoting import names, quoted

ROPE_FREQS: Final = "rope_freqs.weight"
_MOST_PAIRS: Final = 4096  # of a head's values; real models have 32 to 128

# The words for the same things in GGUF, without the architecture in front, and in config.json.
_COMMON: Final = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_WORDS: Final[Mapping[str, Mapping[str, str]]] = {
    "gpt2": {
        "context_length": "n_positions",
        "embedding_length": "n_embd",
        "block_count": "n_layer",
        "feed_forward_length": "n_inner",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
    "gpt-oss": {
        **{theirs: ours for theirs, ours in _COMMON.items() if theirs != "feed_forward_length"},
        "attention.sliding_window": "sliding_window",
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "intermediate_size",
    },
    "llama": _COMMON,
    "qwen2": _COMMON,
    "qwen3": _COMMON,
}
_OPTIONAL: Final = frozenset({"attention.head_count_kv", "attention.key_length"})
_MODEL_TYPES: Final = {"gpt-oss": "gpt_oss"}  # elsewhere the names are the same
_THETA: Final = 10000.0  # of an absent rope.freq_base
# What llama.cpp writes and does not compute with.
_WITHOUT_EFFECT: Final = frozenset({"vocab_size", "rope.scaling.finetuned"})


# Matrices that can stay packed, and the tensors that their rows come from; in a block or outside.
_IN_BLOCKS: Final = {
    "attention/qkv/kernel": (("attn_q", "attn_k", "attn_v"), ("attn_qkv",)),
    "attention/out/kernel": (("attn_output",),),
    "mlp/gate_up/kernel": (("ffn_gate", "ffn_up"),),
    "mlp/up/kernel": (("ffn_up",),),
    "mlp/down/kernel": (("ffn_down",),),
}
_OUTSIDE: Final = {"token_embedding": "token_embd", "head_embedding": "output"}


class Tensor(Protocol):
    """What a configuration depends on: a tensor's shape and type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in NumPy's order, [out, in] of a matrix."""

    @property
    def type(self) -> str:
        """The type's name, such as "Q4_K"."""


def config_json_from_gguf(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    read: Callable[[str], np.ndarray],
    ignore: Iterable[str] = (),
) -> dict[str, Any]:
    """What a GGUF file says about its model, as the contents of a config.json.

    Args:
      metadata: all of the file's keys and values.
      tensors: the file's tensors by name. Some settings are not among the keys but follow from these.
      read: reads a tensor by name; only called for ROPE_FREQS, once its shape is known to be that of factors.
      ignore: keys to leave out, if you know that they change nothing.

    Raises:
      ConfigError: an unknown architecture, or keys that are unknown or contradict each other.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _WORDS:
        found = "no general.architecture" if architecture is None else f"the architecture {quoted(architecture)}"
        raise ConfigError(f"it has {found}; gptjax supports {', '.join(sorted(_WORDS))}")
    if missing := [key for key in ignore if key not in metadata]:
        raise ConfigError(f"it has no {names(missing)} to ignore; it has {names(sorted(metadata), most=50)}")
    return _Reader(architecture, metadata, tensors, ignore).config_json(read)


def in_words_of_gguf(architecture: str, text: str) -> str:
    """The GGUF names of the config.json keys in a message; "" if it has none."""
    pairs = [f"{ours} is {architecture}.{theirs}" for theirs, ours in _WORDS[architecture].items() if ours in text]
    return ", ".join(pairs)


class _Reader:
    """Reads one file's metadata, collecting all faults."""

    def __init__(
        self, architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], ignore: Iterable[str]
    ):
        self._architecture, self._tensors = architecture, tensors
        prefix = f"{architecture}."
        ignored = set(ignore)
        self._values = {
            key.removeprefix(prefix): _settled(value)
            for key, value in metadata.items()
            if key.startswith(prefix) and key not in ignored
        }
        self._read = set(_WITHOUT_EFFECT)
        self._faults: list[str] = []

    def config_json(self, read: Callable[[str], np.ndarray]) -> dict[str, Any]:
        words = _WORDS[self._architecture]
        raw = {ours: value for theirs, ours in words.items() if (value := self._take(theirs)) is not None}
        self._faults += [
            f"{self._architecture}.{theirs} is missing"
            for theirs, ours in words.items()
            if ours not in raw and theirs not in _OPTIONAL
        ]
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            self._faults.append(
                "it has no tensor token_embd.weight"
                if self._tensors
                else "it has no tensors, only a vocabulary; choose a file with weights"
            )
        else:
            raw["vocab_size"] = embedding.shape[0]
        raw["model_type"] = _MODEL_TYPES.get(self._architecture, self._architecture)
        raw["tie_word_embeddings"] = "output.weight" not in self._tensors
        if self._architecture == "gpt2":
            self._expect("attention.head_count_kv", raw.get("n_head"))
        else:
            self._check_heads(raw)
            raw |= self._rope(raw, read)
            raw |= self._gpt_oss() if self._architecture == "gpt-oss" else self._dense()
        self._expect("attention.causal", True)
        self._raise_faults()
        raw |= self._packing(raw)
        return raw

    def _take(self, key: str) -> Any:
        self._read.add(key)
        return self._values.get(key)

    def _expect(self, key: str, *accepted: Any) -> None:
        """Refuses a key that is there with another value."""
        value = self._take(key)
        if value is not None and value not in accepted:
            self._faults.append(
                f"{self._architecture}.{key} is {quoted(value)}; gptjax supports {' or '.join(map(str, accepted))}"
            )

    def _check_heads(self, raw: dict[str, Any]) -> None:
        width, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
        if "head_dim" not in raw and isinstance(width, int) and isinstance(heads, int) and heads:
            raw["head_dim"] = width // heads
        self._expect("attention.value_length", raw.get("head_dim"))
        self._expect("rope.dimension_count", raw.get("head_dim"))

    def _rope(self, raw: Mapping[str, Any], read: Callable[[str], np.ndarray]) -> dict[str, Any]:
        theta = self._take("rope.freq_base")
        found: dict[str, Any] = {"rope_theta": _THETA if theta is None else theta}
        kind, factor = self._take("rope.scaling.type"), self._take("rope.scaling.factor")
        old_factor = self._take("rope.scale_linear")
        factor = old_factor if factor is None else factor
        original = self._take("rope.scaling.original_context_length")
        if kind not in (None, "none", "linear", "yarn"):
            self._faults.append(
                f"{self._architecture}.rope.scaling.type is {quoted(kind)}; gptjax supports none, linear and yarn"
            )
        if kind == "yarn":
            found["rope_scaling"] = self._yarn(
                factor, raw.get("max_position_embeddings") if original is None else original
            )
        elif kind != "none" and factor not in (None, 0, 1):
            found["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        if (tensor := self._tensors.get(ROPE_FREQS)) is not None:
            if "rope_scaling" in found:
                self._faults.append(f"it has both {ROPE_FREQS} and {self._architecture}.rope.scaling.factor")
            if len(tensor.shape) != 1 or 2 * tensor.shape[0] != raw.get("head_dim") or tensor.shape[0] > _MOST_PAIRS:
                self._faults.append(
                    f"{ROPE_FREQS} is {list(tensor.shape)}; expected a factor for each pair of values of a head, and "
                    f"at most {_MOST_PAIRS:,}"
                )
            else:
                found["rope_scaling"] = _per_pair(read(ROPE_FREQS))
        return found

    def _yarn(self, factor: Any, original: Any) -> dict[str, Any]:
        self._expect("rope.scaling.yarn_ext_factor", 1)
        self._expect("rope.scaling.yarn_log_multiplier", 0)
        given = {
            "attention_factor": self._take("rope.scaling.yarn_attn_factor"),
            "beta_fast": self._take("rope.scaling.yarn_beta_fast"),
            "beta_slow": self._take("rope.scaling.yarn_beta_slow"),
        }
        self._expect("rope.scaling.attn_factor", 1)
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            # llama.cpp rounds the bounds of every model; GPT-OSS was trained and published without that.
            "truncate": self._architecture != "gpt-oss",
            **{key: value for key, value in given.items() if value is not None},
        }

    def _gpt_oss(self) -> dict[str, Any]:
        self._expect("attention.sliding_window_pattern", 2)
        self._take("feed_forward_length")  # for layers without experts; GPT-OSS has none
        return {"attention_bias": self._has("attn_q.bias", "attn_qkv.bias")}

    def _packing(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Which weights stay packed, in the words of `gptjax.config.quantization`."""
        types: dict[str, list[str]] = {}
        layers = raw.get("num_hidden_layers", raw.get("n_layer"))
        gated = self._has("ffn_gate.weight")
        for layer in range(layers if isinstance(layers, int) and layers <= MOST_LAYERS else 0):
            for target, choices in _IN_BLOCKS.items():
                for sources in choices if target != "mlp/up/kernel" or not gated else ():
                    parts = [f"blk.{layer}.{source}" for source in sources]
                    self._keep(types, f"block_{layer}/{target}", parts, _row_length(raw, target))
        for target, source in _OUTSIDE.items():
            self._keep(types, target, [source], _row_length(raw, target))
        experts = [tensor.type for name, tensor in self._tensors.items() if name.endswith("_exps.weight")]
        method = {"quant_method": "mxfp4" if experts and set(experts) == {"MXFP4"} else "ggml"}
        if method["quant_method"] == "ggml" and not types:
            return {}
        return {"quantization_config": {**method, "types": types} if types else method}

    def _keep(self, types: dict[str, list[str]], target: str, sources: list[str], row_length: Any) -> None:
        """Notes the types of a matrix, if all of it can stay packed.

        Rows of another length do not go with the metadata. `convert` says so when it finds no place for their tensor.
        """
        tensors = [tensor for name in sources if (tensor := self._tensors.get(f"{name}.weight")) is not None]
        found = [tensor.type for tensor in tensors if tensor.type in KEPT and tensor.shape[-1] == row_length]
        if len(found) == len(sources):
            types[target] = found if len(set(found)) > 1 else found[:1]

    def _dense(self) -> dict[str, Any]:
        experts = self._take("expert_count")
        self._expect("expert_used_count", 0)
        if experts:
            self._faults.append(
                f"{self._architecture}.expert_count is {quoted(experts)}: gptjax runs this architecture without "
                "experts only (Mixtral has them)"
            )
        found: dict[str, Any] = {}
        if self._architecture in ("llama", "qwen3"):
            found["attention_bias"] = self._has("attn_q.bias", "attn_qkv.bias")
        if self._architecture == "llama":
            found["mlp_bias"] = self._has("ffn_up.bias")
        return found

    def _has(self, *endings: str) -> bool:
        """Whether the first block has a tensor."""
        return any(f"blk.0.{ending}" in self._tensors for ending in endings)

    def _raise_faults(self) -> None:
        unknown = sorted(f"{self._architecture}.{key}" for key in set(self._values) - self._read)
        if unknown:
            options = " ".join(f"--ignore-config {key}" for key in unknown[:10])
            self._faults.append(
                f"unknown key{'s' * (len(unknown) > 1)} {names(unknown)}: gptjax will not guess what they change; if "
                f"they change nothing, ignore them: {options}"
            )
        if self._faults:
            raise ConfigError(f"its metadata cannot be used for {self._architecture}:\n  " + "\n  ".join(self._faults))


def _row_length(raw: Mapping[str, Any], target: str) -> Any:
    """The length of a matrix's rows, which products sum over."""
    if target == "mlp/down/kernel":
        return raw.get("n_inner", raw.get("intermediate_size"))
    heads, head_width = raw.get("num_attention_heads"), raw.get("head_dim")
    if target == "attention/out/kernel" and isinstance(heads, int) and isinstance(head_width, int):
        return heads * head_width
    return raw.get("hidden_size", raw.get("n_embd"))


def _settled(value: Any) -> Any:
    """A value as config.json would have it: decimal numbers as written, one value for all layers if they agree."""
    if isinstance(value, float):
        return float(str(np.float32(value)))  # the shortest decimal, as these keys are float32
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        return value[0]
    return value


def _per_pair(rope_freqs: np.ndarray) -> dict[str, Any]:
    """A scaling that divides each pair's frequency by its own factor, in the words that config.json has for it."""
    factors = [float(str(np.float32(factor))) for factor in rope_freqs]
    return {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
