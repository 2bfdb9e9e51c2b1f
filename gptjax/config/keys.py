"""Reading typed values out of a raw config, so that nothing in it is silently ignored."""

import sys
from collections.abc import Mapping
from typing import Any, Final

from gptjax.errors import ConfigError

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
MOST_LAYERS, MOST_SIZE = 1024, 1 << 24  # beyond any real model: a size that would only exhaust memory or patience


class Keys:
    """Reads typed values out of a raw config, collecting every fault so that they can be reported together."""

    def __init__(self, raw: Mapping[str, Any], without_effect: frozenset[str] = WITHOUT_EFFECT):
        self._raw = raw
        self._read = set(without_effect)
        self._faults: list[str] = []

    def fault(self, text: str) -> None:
        """Notes a fault."""
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

    def size(self, key: str, *, alias: str | None = None, absent: int | None = None, most: int = MOST_SIZE) -> int:
        """A whole number of at least 1; `alias` is another name for the same key."""
        value = self._get(key, alias, absent)
        if value is absent:
            return 0 if absent is None else absent
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            self.fault(f"{key} is {value!r}; expected a whole number from 1 to {most}")
            return 0
        return value

    def positive_float(self, key: str, *, absent: float | None, most: float = sys.float_info.max) -> float:
        """A number above 0."""
        value = self._get(key, None, absent)
        if value is absent:
            return 1.0 if absent is None else absent
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            limit = "" if most == sys.float_info.max else f" and at most {most}"
            self.fault(f"{key} is {value!r}; expected a number above 0{limit}")
            return 1.0 if absent is None else absent
        return float(value)

    def flag(self, key: str, *, absent: bool) -> bool:
        """True or false."""
        value = self._get(key, None, absent)
        if not isinstance(value, bool):
            self.fault(f"{key} is {value!r}; expected true or false")
            return absent
        return value

    def choice(self, key: str, choices: Mapping[str, str], *, alias: str | None = None, absent: str | None) -> str:
        """What `choices` has for the name found; "" where it has none."""
        value = self._get(key, alias, absent)
        if value is None:
            return ""
        if not isinstance(value, str) or value not in choices:
            self.fault(f"{key} is {value!r}; gptjax supports {', '.join(sorted(choices))}")
            return ""
        return choices[value]

    def section(self, key: str) -> "Keys | None":
        """A mapping inside this one, to be read by itself; its faults become this one's by `take`. None if absent."""
        value = self._get(key, None, {})
        if not isinstance(value, Mapping):
            self.fault(f"{key} is {value!r}; expected an object")
            return None
        return Keys(value, without_effect=frozenset()) if value else None

    def take(self, key: str, section: "Keys") -> None:
        """Collects what is wrong with a section, its unknown keys included."""
        self._faults += [f"{key}: {fault}" for fault in section.faults()]

    def has(self, key: str) -> bool:
        """Whether a key is there, with a value."""
        return self._raw.get(key) is not None

    def empty(self, key: str) -> bool:
        """Whether a key is there with an empty mapping."""
        return self._raw.get(key) == {}

    def listed(self, key: str) -> list[Any] | None:
        """A list, or None where there is none."""
        value = self._get(key, None, [])
        if not isinstance(value, list):
            self.fault(f"{key} is {value!r}; expected a list")
            return None
        return value or None

    def ignore(self, *keys: str) -> None:
        """Lets keys pass."""
        self._read.update(keys)

    def faults(self) -> list[str]:
        """All that is wrong, unknown keys included."""
        unknown = sorted(set(self._raw) - self._read)
        if not unknown:
            return self._faults
        named = f"unknown key{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}"
        return [*self._faults, f"{named}: gptjax does not know what they change, so it will not guess"]

    def raise_faults(self, model: str, *, file: str = "config.json") -> None:
        """Raises `ConfigError` with all that is wrong."""
        if faults := self.faults():
            raise ConfigError(f"{file} cannot be used for {model}:\n  " + "\n  ".join(faults))
