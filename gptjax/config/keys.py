"""Reads typed values out of a raw config, so that nothing in it is silently ignored."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Final

from gptjax.errors import ConfigError, RequestError
from gptjax.support.quoting import names, quoted, shown

# Keys of published configs that do not affect inference. Any other unknown key is an error.
WITHOUT_EFFECT: Final = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path _num_labels add_cross_attention
    architectures attn_implementation attn_pdrop author bos_token_id chunk_size_feed_forward created_date
    cross_attention_hidden_size decoder_start_token_id dtype embd_pdrop eos_token_id eos_token_ids finetuning_task
    gradient_checkpointing id2label initializer_range is_decoder is_encoder_decoder keys_to_ignore_at_inference
    label2id license loss_type max_seq_len_cached model_type n_special num_labels output_attentions
    output_hidden_states output_past output_router_logits pad_token_id pad_token_ids predict_special_tokens prefix
    pretraining_tp problem_type reorder_and_upcast_attn resid_pdrop return_dict return_dict_in_generate
    router_aux_loss_coef sep_token_id summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype torchscript
    transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache xla_device
    """.split()
)
# Settings of generation that older versions of transformers wrote into config.json. Version 5 drops them there, and
# reads them from generation_config.json only.
OF_GENERATION: Final = frozenset(
    """
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty suppress_tokens temperature top_k top_p typical_p
    """.split()
)
MOST_LAYERS, MOST_SIZE = 1024, 1 << 24  # beyond any real model: a size that would only exhaust memory or patience


def without(raw: Mapping[str, Any], ignored: Iterable[str]) -> Mapping[str, Any]:
    """A raw config without some of its keys; "rope_scaling.mscale" is a key inside another.

    Raises:
      RequestError: `ignored` is not a list of names.
      ConfigError: there is no such key.
    """
    if isinstance(ignored, str) or not all(isinstance(path, str) for path in ignored):
        raise RequestError(
            f'ignore_config must be a list of names, as in ignore_config=("key",), found {quoted(ignored)}'
        )
    for path in ignored:
        raw = _without(raw, path, path.split("."))
    return raw


def _without(raw: Mapping[str, Any], path: str, parts: list[str]) -> dict[str, Any]:
    first, *rest = parts
    if first not in raw or (rest and not isinstance(raw[first], Mapping)):
        raise ConfigError(f"config.json has no {shown(path)} to ignore; it has {names(sorted(raw), most=50)}")
    if not rest:
        return {key: value for key, value in raw.items() if key != first}
    return {**raw, first: _without(raw[first], path, rest)}


def _how_to_ignore(keys: Iterable[str]) -> str:
    """What to type to ignore keys."""
    listed = [shown(key) for key in keys][:10]
    options = " ".join(f"--ignore-config {key}" for key in listed)
    return f"ignore_config=({', '.join(map(repr, listed))},) or {options}"


def _is_number(value: object) -> bool:
    """Whether this is a finite number, as JSON has them."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


class Keys:
    """Reads typed values out of a raw config, collecting every fault so that they can be reported together.

    A key whose value is null counts as absent.
    """

    def __init__(
        self, raw: Mapping[str, Any], without_effect: frozenset[str] = WITHOUT_EFFECT | OF_GENERATION, inside: str = ""
    ):
        self._raw = raw
        self._read = set(without_effect)
        self._faults: list[str] = []
        self._inside = inside  # the names of the keys around this mapping, each followed by a dot

    def fault(self, text: str) -> None:
        """Notes a fault."""
        self._faults.append(text)

    def _get(self, key: str, alias: str | None, absent: Any) -> Any:
        names = (key,) if alias is None else (key, alias)
        self._read.update(names)
        values = [self._raw[name] for name in names if self._raw.get(name) is not None]
        if len(values) == 2 and values[0] != values[1]:
            self.fault(
                f"{key} is {quoted(values[0])} but {alias} is {quoted(values[1])}: they mean the same and must agree"
            )
        if not values and absent is None:
            self.fault(f"{' or '.join(names)} is missing")
        return values[0] if values else absent

    def older(self, key: str, older: str) -> str | None:
        """An older name of a key, if it counts: transformers ignores it if the key itself is present."""
        self.ignore(older)
        return None if self.has(key) else older

    def size(
        self, key: str, *, alias: str | None = None, absent: int | None = None, least: int = 1, most: int = MOST_SIZE
    ) -> int:
        """A whole number; `alias` is another name for the same key."""
        value = self._get(key, alias, absent)
        if value is absent:
            return 0 if absent is None else absent
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.fault(f"{key} is {quoted(value)}; expected a whole number from {least} to {most}")
            return 0
        return value

    def positive_float(self, key: str, *, absent: float | None) -> float:
        """A number above 0."""
        value = self._get(key, None, absent)
        if value is absent:
            return 1.0 if absent is None else absent
        if not _is_number(value) or value <= 0:
            self.fault(f"{key} is {quoted(value)}; expected a number above 0")
            return 1.0 if absent is None else absent
        return float(value)

    def flag(self, key: str, *, absent: bool) -> bool:
        """True or false."""
        value = self._get(key, None, absent)
        if not isinstance(value, bool):
            self.fault(f"{key} is {quoted(value)}; expected true or false")
            return absent
        return value

    def choice(self, key: str, choices: Mapping[str, str], *, alias: str | None = None, absent: str | None) -> str:
        """The value that `choices` has for the name found; "" if it has none."""
        value = self._get(key, alias, absent)
        if value is None:
            return ""
        if not isinstance(value, str) or value not in choices:
            self.fault(f"{key} is {quoted(value)}; gptjax supports {', '.join(sorted(choices))}")
            return ""
        return choices[value]

    def section(self, key: str) -> "Keys | None":
        """A mapping inside this one, to be read by itself; `take` collects its faults. None if absent."""
        value = self._get(key, None, {})
        if not isinstance(value, Mapping):
            self.fault(f"{key} is {quoted(value)}; expected an object")
            return None
        return Keys(value, without_effect=frozenset(), inside=f"{self._inside}{key}.") if value else None

    def take(self, key: str, section: "Keys") -> None:
        """Collects a section's faults, unknown keys included."""
        self._faults += [f"{key}: {fault}" for fault in section.faults()]

    def has(self, key: str) -> bool:
        """Whether a key is present, with a value."""
        return self._raw.get(key) is not None

    def null(self, key: str) -> bool:
        """Whether a key is present without a value."""
        return key in self._raw and self._raw[key] is None

    def empty(self, key: str) -> bool:
        """Whether a key is present with an empty mapping."""
        return self._raw.get(key) == {}

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An object, unchanged; {} if the key is absent."""
        value = self._get(key, None, {})
        if not isinstance(value, Mapping):
            self.fault(f"{key} is {quoted(value)}; expected an object")
            return {}
        return value

    def listed(self, key: str) -> list[Any] | None:
        """A list, or None if there is none."""
        value = self._get(key, None, [])
        if not isinstance(value, list):
            self.fault(f"{key} is {quoted(value)}; expected a list")
            return None
        return value or None

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers, which must be there."""
        value = self._get(key, None, None)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(_is_number(number) for number in value):
            self.fault(f"{key} is {quoted(value)}; expected a list of numbers")
            return ()
        return tuple(map(float, value))

    def ignore(self, *keys: str) -> None:
        """Accepts keys without reading them."""
        self._read.update(keys)

    def unknown(self) -> list[str]:
        """The keys with a value that were neither read nor ignored."""
        return sorted(key for key in set(self._raw) - self._read if self._raw[key] is not None)

    def faults(self) -> list[str]:
        """All faults, unknown keys included."""
        unknown = self.unknown()
        if not unknown:
            return self._faults
        many = len(unknown) > 1
        hint = _how_to_ignore(f"{self._inside}{key}" for key in unknown)
        change, them = ("they change", "them") if many else ("it changes", "it")
        return [
            *self._faults,
            f"unknown key{'s' * many} {names(unknown)}: gptjax does not know what {change}, so it will not guess; if "
            f"{change} nothing, ignore {them}: {hint}",
        ]

    def raise_faults(self, model: str) -> None:
        """Raises `ConfigError` with all faults."""
        if faults := self.faults():
            raise ConfigError(f"config.json cannot be used for {model}:\n  " + "\n  ".join(faults))
