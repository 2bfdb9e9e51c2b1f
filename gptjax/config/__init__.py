"""Model configurations: frozen dataclasses, read strictly from a checkpoint's `config.json`.

A key that is neither understood nor known to have no effect raises `ConfigError`: a silently ignored setting is a wrong
answer. Keys of a Hugging Face `config.json` that transformers does not read have no effect. Sizes have no defaults. The
code that reads a key says what its absence means.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from gptjax.config import gpt2, gpt_oss
from gptjax.config.generation import GenerationDefaults, generation_defaults, overridden, read_generation_config
from gptjax.config.gpt2 import GPT2Config
from gptjax.config.gpt_oss import GptOssConfig
from gptjax.config.keys import WITHOUT_EFFECT, without
from gptjax.errors import CheckpointError, ConfigError, RequestError
from gptjax.support.files import read_json
from gptjax.support.quoting import quoted, shown

__all__ = [
    "PUBLISHED",
    "TOKENIZER_FILES",
    "WITHOUT_EFFECT",
    "GPT2Config",
    "GenerationDefaults",
    "GptOssConfig",
    "ModelConfig",
    "config_from_json",
    "generation_defaults",
    "overridden",
    "published",
    "read_config",
    "read_generation_config",
    "text_directory",
]

ModelConfig = GPT2Config | GptOssConfig

TOKENIZER_FILES: Final = ("tokenizer.json", "vocab.json", "merges.txt")

PUBLISHED: Final[Mapping[str, ModelConfig]] = {
    "gpt2": gpt2.published(num_layers=12, num_heads=12, width=768),
    "gpt2-medium": gpt2.published(num_layers=24, num_heads=16, width=1024),
    "gpt2-large": gpt2.published(num_layers=36, num_heads=20, width=1280),
    "gpt2-xl": gpt2.published(num_layers=48, num_heads=25, width=1600),
    "gpt-oss-20b": gpt_oss.published(num_layers=24, num_experts=32),
    "gpt-oss-120b": gpt_oss.published(num_layers=36, num_experts=128),
}

_READERS: Final[Mapping[str, Callable[[Mapping[str, Any]], ModelConfig]]] = {
    "gpt2": GPT2Config.from_json,
    "gpt_oss": GptOssConfig.from_json,
}


def published(name: str) -> ModelConfig:
    """The configuration of a published size, such as "gpt2-xl". Raises `RequestError`."""
    if name not in PUBLISHED:
        raise RequestError(f"unknown size {quoted(name)}; choose one of {', '.join(PUBLISHED)}")
    return PUBLISHED[name]


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
            "tokenizer.json) or a directory written by `gptjax convert`"
        )
    return config_from_json(without(raw, ignore))


def config_from_json(raw: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a parsed `config.json` describes. Raises `ConfigError`."""
    if gpt_oss.is_original(raw):
        return GptOssConfig.from_original_json(raw)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in _READERS:
        found = "no model_type" if model_type is None else f"model_type {quoted(model_type)}"
        raise ConfigError(f"config.json has {found}; gptjax supports {', '.join(sorted(_READERS))}")
    return _READERS[model_type](raw)


def text_directory(directory: Path) -> Path:
    """Where a checkpoint's tokenizer and generation_config.json are.

    OpenAI's own directory has neither: it is the folder `original` of a repository that does.
    """
    if any(os.path.lexists(directory / name) for name in TOKENIZER_FILES):
        return directory
    raw = read_json(directory / "config.json") or {}
    parent = directory.absolute().parent
    return parent if gpt_oss.is_original(raw) and os.path.isfile(parent / "tokenizer.json") else directory
