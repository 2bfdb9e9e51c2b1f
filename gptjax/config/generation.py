"""The sampling settings in a checkpoint's `generation_config.json`.

No setting keeps a model from loading. Those that gptjax cannot honour are refused when something is generated with them
(`GenerationDefaults.check`). `load(generation_config=...)` replaces them.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from gptjax.config.keys import MOST_SIZE
from gptjax.errors import ConfigError, RequestError
from gptjax.support.files import read_json
from gptjax.support.quoting import names, quoted

FILE: Final = "generation_config.json"
# Beyond these, products and quotients of logits overflow in float32, or become meaningless.
MOST_TEMPERATURE: Final = 100
LEAST_REPETITION_PENALTY: Final = 0.01
MOST_REPETITION_PENALTY: Final = 100

_SPECIAL_TOKENS: Final = ("bos_token_id", "eos_token_id")
# Keys that do not change which tokens are generated, whatever their values, as of transformers 5. They are about where
# a text begins or how long it gets, how transformers does its work (caches, compilation, assistants that propose tokens
# for the model to confirm), what it returns, or beams, which only `num_beams` turns on.
GENERATION_WITHOUT_EFFECT: Final = frozenset(
    """
    _commit_hash _from_model_config assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight
    assistant_lookbehind bos_token_id cache_config cache_implementation chat_format compile_config
    continuous_batching_config max_window_size
    decoder_start_token_id disable_compile diversity_penalty early_stopping is_assistant length_penalty low_memory
    max_cache_len max_length max_matching_ngram_size max_new_tokens num_assistant_tokens num_assistant_tokens_schedule
    num_beam_groups output_attentions output_hidden_states output_logits output_scores pad_token_id prefill_chunk_size
    prompt_lookup_num_tokens remove_invalid_values renormalize_logits return_dict_in_generate return_legacy_cache
    speculation_type target_lookbehind transformers_version trust_remote_code use_cache use_mtp
    """.split()
)
# Settings that gptjax does not have, and that are off if 0, false or empty (null means absent for all keys) ...
_OFF_IF_EMPTY: Final = frozenset(
    """
    bad_words_ids begin_suppress_tokens constraints dola_layers encoder_no_repeat_ngram_size
    exponential_decay_length_penalty force_words_ids generation_kwargs max_time min_length min_new_tokens
    no_repeat_ngram_size penalty_alpha sequence_bias stop_strings stop_words_ids suppress_tokens token_healing
    watermarking_config general.sampling.penalty_last_n
    """.split()
)
# ... or if 1.
_OFF_IF_ONE: Final = frozenset("encoder_repetition_penalty guidance_scale num_beams num_return_sequences".split())
# Settings that matter only when sampling: those that gptjax has, and others.
_OF_SAMPLING: Final = frozenset(("temperature", "top_k", "top_p", "min_p"))
# Those of GGUF files have the names that they have there (`gptjax.checkpoints.text_files`).
_OFF_IF_EMPTY_WHEN_SAMPLING: Final = frozenset(
    """
    epsilon_cutoff eta_cutoff top_h general.sampling.mirostat general.sampling.sequence general.sampling.xtc_probability
    """.split()
)
_OFF_IF_ONE_WHEN_SAMPLING: Final = frozenset(("epsilon_cutoff", "eta_cutoff", "typical_p"))
_UNSUPPORTED_WHEN_SAMPLING: Final = _OFF_IF_EMPTY_WHEN_SAMPLING | _OFF_IF_ONE_WHEN_SAMPLING


@dataclasses.dataclass(frozen=True)
class Fault:
    """A setting that gptjax cannot honour."""

    key: str
    text: str  # what is wrong with it; "" if gptjax does not know or have such a setting
    when_sampling: bool  # whether it matters only when sampling, and not when the most likely token is taken


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """The sampling settings of a checkpoint's `generation_config.json`; arguments of a request override them."""

    eos_ids: tuple[int, ...] = ()  # generation stops at any of these
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    faults: tuple[Fault, ...] = ()  # what cannot be honoured
    source: str = FILE  # where the settings are from

    def check(self, given: Collection[str] = (), *, draws: bool = True) -> None:
        """Raises `ConfigError` if generation would need settings that gptjax cannot honour.

        Args:
          given: options that the caller sets, which override the settings of the same names.
          draws: whether tokens are sampled; otherwise the most likely one is taken.
        """
        faults = [fault for fault in self.faults if fault.key not in given and (draws or not fault.when_sampling)]
        if not faults:
            return
        unsupported = [fault.key for fault in faults if not fault.text]
        lines = [fault.text for fault in faults if fault.text]
        if unsupported:
            lines.append(f"{names(unsupported)}: gptjax has no such setting{'s' * (len(unsupported) > 1)}")
        raise ConfigError(
            f"{self.source} has settings that cannot be followed:\n  "
            + "\n  ".join(lines)
            + "\nTo generate without them, "
            "load the model with generation_config=False (--no-generation-config), or with your own settings in place "
            "of the file's, as in generation_config={'do_sample': True, 'temperature': 0.7}"
        )


def read_generation_config(directory: Path) -> Mapping[str, Any]:
    """The settings of `directory/generation_config.json`; {} if there is none. Raises `CheckpointError`."""
    return read_json(directory / FILE) or {}


def overridden(found: Mapping[str, Any], override: Mapping[str, Any] | bool | None) -> Mapping[str, Any]:
    """The settings of a generation_config.json, or those that override them.

    Args:
      override: settings in place of the file's; False for none at all; None for the file's. In any case the file's BOS
        and EOS tokens are kept, unless the override has others.

    Raises:
      RequestError: the override is not a dict of settings or False.
    """
    if override is None:
        return found
    if override is not False and not isinstance(override, Mapping):
        raise RequestError(f"generation_config must be a dict of settings, or False for none, found {quoted(override)}")
    special = {key: found[key] for key in _SPECIAL_TOKENS if _are_tokens(found.get(key))}
    return {**special, **(override or {})}


def generation_defaults(
    settings: Mapping[str, Any],
    directory: Path | None,
    *,
    source: str = FILE,
    words: Mapping[str, str] = MappingProxyType({}),
) -> GenerationDefaults:
    """What settings of a generation_config.json mean; without any, text is generated greedily.

    A setting that is absent is off. (transformers fills in top_k 50.)

    Args:
      settings: from `read_generation_config`.
      directory: its config.json may name the end-of-text id, if the settings do not; None if there is no config.json.
      source: where the settings are from, for messages.
      words: what that calls them, if not as generation_config.json does.
    """
    return dataclasses.replace(_with_ends(settings, directory, words), source=source)


def _with_ends(settings: Mapping[str, Any], directory: Path | None, words: Mapping[str, str]) -> GenerationDefaults:
    raw = {key: value for key, value in settings.items() if value is not None}
    if "eos_token_id" in raw or directory is None:
        return _defaults(raw, words)
    eos = (read_json(directory / "config.json") or {}).get("eos_token_id")
    if eos is None or _are_tokens(eos):
        return _defaults(raw | {"eos_token_id": eos}, words)
    defaults = _defaults(raw, words)
    fault = Fault(
        "eos_token_id", f"config.json's eos_token_id is {quoted(eos)}; expected token ids", when_sampling=False
    )
    return dataclasses.replace(defaults, faults=(*defaults.faults, fault))


def _defaults(raw: Mapping[str, Any], words: Mapping[str, str]) -> GenerationDefaults:
    reader = _Reader(raw, words)
    sampled = reader.flag("do_sample")
    penalty = reader.number("repetition_penalty", 1.0, LEAST_REPETITION_PENALTY, MOST_REPETITION_PENALTY)
    eos_ids = reader.tokens("eos_token_id")
    reader.refuse_unsupported(when_sampling=False)
    greedy = GenerationDefaults(eos_ids=eos_ids, repetition_penalty=penalty, faults=tuple(reader.faults))
    if not sampled:
        return greedy
    top_p = reader.number("top_p", 1.0, 0, 1, when_sampling=True)
    if top_p == 0:  # keeps only the most likely token
        return greedy
    drawn = dataclasses.replace(
        greedy,
        temperature=reader.number("temperature", 1.0, 0, MOST_TEMPERATURE, above=True, when_sampling=True),
        top_k=reader.whole("top_k"),
        top_p=top_p,
        min_p=reader.number("min_p", 0.0, 0, 1, when_sampling=True),
    )
    reader.refuse_unsupported(when_sampling=True)
    return dataclasses.replace(drawn, faults=tuple(reader.faults))


class _Reader:
    """Reads settings. One that cannot be honoured becomes a fault, and its neutral value is returned."""

    def __init__(self, raw: Mapping[str, Any], words: Mapping[str, str]):
        self._raw = raw  # without nulls
        self._words = words
        self.faults: list[Fault] = []

    def _fault(self, key: str, wanted: str, when_sampling: bool) -> None:
        text = f"{self._words.get(key, key)} is {quoted(self._raw[key])}; expected {wanted}"
        self.faults.append(Fault(key, text, when_sampling))

    def flag(self, key: str) -> bool:
        value = self._raw.get(key, False)
        if not isinstance(value, bool):
            self._fault(key, "true or false", False)
        return value is True

    def number(
        self, key: str, neutral: float, low: float, high: float, *, above: bool = False, when_sampling: bool = False
    ) -> float:
        value = self._raw.get(key, neutral)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high or (above and value == low):
            self._fault(
                key,
                f"a number above {low} and at most {high}" if above else f"a number from {low} to {high}",
                when_sampling,
            )
            return neutral
        return float(value)

    def whole(self, key: str) -> int:
        value = self._raw.get(key, 0)
        if value in (0, -1):  # other programs write -1 to keep all
            return 0
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_SIZE:
            self._fault(key, f"a whole number from 0 to {MOST_SIZE}", True)
            return 0
        return value

    def tokens(self, key: str) -> tuple[int, ...]:
        value = self._raw.get(key)
        if value is None:
            return ()
        if not _are_tokens(value):
            self._fault(key, "a token id, or a list of them", False)
            return ()
        return tuple(value) if isinstance(value, list) else (value,)

    def refuse_unsupported(self, *, when_sampling: bool) -> None:
        """Notes settings that gptjax does not have and that are not off: those of sampling, or all others."""
        for key, value in self._raw.items():
            if (key in _UNSUPPORTED_WHEN_SAMPLING) == when_sampling and not _without_effect(key, value):
                self.faults.append(Fault(key, "", when_sampling))


def _without_effect(key: str, value: object) -> bool:
    """Whether a setting changes nothing, or is one that `_defaults` reads."""
    if key in GENERATION_WITHOUT_EFFECT | _OF_SAMPLING or key in ("do_sample", "eos_token_id", "repetition_penalty"):
        return True
    if key in _OFF_IF_EMPTY | _OFF_IF_EMPTY_WHEN_SAMPLING and not value:
        return True
    return key in _OFF_IF_ONE | _OFF_IF_ONE_WHEN_SAMPLING and value == 1


def _are_tokens(value: object) -> bool:
    return all(type(each) is int and each >= 0 for each in (value if isinstance(value, list) else [value]))
