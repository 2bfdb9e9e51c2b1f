"""First and last tokens and the longest context, from the configs next to a tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.errors import ConfigError
from gptjax.support.files import read_json
from gptjax.support.quoting import quoted
from gptjax.text.additions import read_special_tokens
from gptjax.text.reading import END_OF_TEXT

# If no file has the key: what GPT-2 and GPT-OSS begin with and stop at, as far as the vocabulary has it.
_DEFAULTS = {"bos": ("<|startoftext|>", END_OF_TEXT), "eos": ("<|return|>", END_OF_TEXT, "<|call|>")}
_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "model_max_length")
_UNLIMITED = 2**31  # transformers writes about 10**30 if a tokenizer has no limit


@dataclass(frozen=True, slots=True)
class Settings:
    """The configs next to a tokenizer, as read; {} for a missing one."""

    directory: Path
    generation: Mapping[str, Any]
    model: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    special: Mapping[str, Any]

    def ends(self, which: str, known: Mapping[str, int]) -> tuple[int, ...]:
        """Ids of the "bos" or "eos" tokens; `known` has each token's id. Raises ConfigError for anything else."""
        key = f"{which}_token_id"
        for name, config in (("generation_config.json", self.generation), ("config.json", self.model)):
            if config.get(key) is not None:
                return _checked(self.directory / name, key, config[key])
        for name, config in (("special_tokens_map.json", self.special), ("tokenizer_config.json", self.tokenizer)):
            text = config.get(f"{which}_token")
            if text is not None:
                return (_id_of(self.directory / name, f"{which}_token", text, known),)
        if key in self.generation or key in self.model or f"{which}_token" in self.tokenizer:
            return ()
        return tuple(known[text] for text in _DEFAULTS[which] if text in known)

    @property
    def context_length(self) -> int | None:
        """The most positions, or None if no file says (the model's config checks whether it fits the model)."""
        for config in (self.model, self.tokenizer):
            for key in _LENGTHS:
                value = config.get(key)
                if type(value) is int and 0 < value < _UNLIMITED:
                    return value
        return None


def read_settings(directory: Path, generation: Mapping[str, Any] | None = None) -> Settings:
    """Reads the files next to a tokenizer.

    Args:
      generation: replaces generation_config.json.

    Raises:
      CheckpointError: one is damaged.
    """
    names = ("config.json", "tokenizer_config.json")
    model, tokenizer = (read_json(directory / name) or {} for name in names)
    if generation is None:
        generation = read_json(directory / "generation_config.json") or {}
    return Settings(directory, generation, model, tokenizer, read_special_tokens(directory, tokenizer))


def _checked(path: Path, key: str, value: object) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    if any(type(number) is not int or number < 0 for number in ids):
        raise ConfigError(f"{path} has {key} = {quoted(value)}; expected a token id or a list of them")
    if key.startswith("bos") and len(ids) != 1:
        raise ConfigError(f"{path} has {key} = {quoted(value)}; expected one id, since a text begins with one token")
    return tuple(dict.fromkeys(ids))


def _id_of(path: Path, key: str, value: object, known: Mapping[str, int]) -> int:
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or content not in known:
        raise ConfigError(f"{path} has {key} = {quoted(value)}, which is not in the vocabulary: use a token that is")
    return known[content]
