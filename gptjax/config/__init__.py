"""Model configurations: frozen dataclasses, read strictly from a checkpoint's `config.json`.

A key that is neither understood nor known to have no effect raises `ConfigError`: a silently ignored setting is a wrong
answer. Keys of a Hugging Face `config.json` that transformers does not read have no effect. Sizes have no defaults. The
code that reads a key says what its absence means.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from gptjax.config import gpt_oss
from gptjax.config.generation import GenerationDefaults, generation_defaults, overridden, read_generation_config
from gptjax.config.gpt2 import GPT2Config
from gptjax.config.gpt_oss import GptOssConfig
from gptjax.config.keys import WITHOUT_EFFECT, without
from gptjax.config.llama import FAMILIES, LlamaConfig
from gptjax.config.sizes import PUBLISHED, ModelConfig, published
from gptjax.errors import CheckpointError, ConfigError
from gptjax.support.files import read_json
from gptjax.support.quoting import quoted, shown

__all__ = [
    "MODEL_TYPES",
    "PUBLISHED",
    "TOKENIZER_FILES",
    "WITHOUT_EFFECT",
    "GPT2Config",
    "GenerationDefaults",
    "GptOssConfig",
    "LlamaConfig",
    "ModelConfig",
    "config_from_json",
    "generation_defaults",
    "overridden",
    "published",
    "read_config",
    "read_generation_config",
    "text_directory",
]

TOKENIZER_FILES: Final = ("tokenizer.json", "vocab.json", "merges.txt")

MODEL_TYPES: Final[Mapping[str, type[ModelConfig]]] = {
    "gpt2": GPT2Config,
    "gpt_oss": GptOssConfig,
    **dict.fromkeys(FAMILIES, LlamaConfig),
}


def read_config(directory: Path, *, ignore: Iterable[str] = ()) -> ModelConfig:
    """Reads `directory/config.json`.

    Args:
      ignore: keys to leave out, if you know that they change nothing; "rope_scaling.mscale" is a key inside another.

    Raises:
      CheckpointError: there is no such file, or it is not a JSON object.
      ConfigError: an unsupported architecture, or unknown, missing or unusable keys, all named.
    """
    raw = read_json(directory / "config.json")
    if raw is None:
        raise CheckpointError(
            f"{shown(directory)} has no config.json; expected a Hugging Face checkpoint (config.json, *.safetensors, "
            "tokenizer.json), a directory written by `gptjax convert`, or a GGUF file, named itself"
        )
    return config_from_json(without(raw, ignore))


def config_from_json(raw: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a parsed `config.json` describes. Raises `ConfigError`."""
    if gpt_oss.is_original(raw):
        return GptOssConfig.from_original_json(raw)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        found = "no model_type" if model_type is None else f"model_type {quoted(model_type)}"
        raise ConfigError(f"config.json has {found}; gptjax supports {', '.join(sorted(MODEL_TYPES))}")
    return MODEL_TYPES[model_type].from_json(raw)


def text_directory(directory: Path) -> Path:
    """Where a checkpoint's tokenizer and generation_config.json are.

    OpenAI's own directory has neither: it is the folder `original` of a repository that does.
    """
    if any(os.path.lexists(directory / name) for name in TOKENIZER_FILES):
        return directory
    raw = read_json(directory / "config.json") or {}
    parent = directory.absolute().parent
    return parent if gpt_oss.is_original(raw) and os.path.isfile(parent / "tokenizer.json") else directory
