"""What a checkpoint's `generation_config.json` says of sampling."""

import dataclasses
from pathlib import Path
from typing import Final

from gptjax.config.keys import Keys
from gptjax.files import read_json

# Keys that change nothing about inference: they say where a text begins, or how transformers goes about its work.
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


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint's `generation_config.json` says of sampling; arguments of a request override it."""

    eos_ids: tuple[int, ...] = ()  # generation stops at any of these
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


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
    keys = Keys(raw, without_effect=GENERATION_WITHOUT_EFFECT | {"eos_token_id"})
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
