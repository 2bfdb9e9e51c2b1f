"""A checkpoint as one thing: found by its name, opened once, and asked for what it has."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from gptjax.checkpoints import hub
from gptjax.checkpoints.manifest import is_converted
from gptjax.config import (
    TOKENIZER_FILES,
    GenerationDefaults,
    ModelConfig,
    read_config,
    read_generation_config,
    read_generation_defaults,
    text_directory,
)
from gptjax.text import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A directory whose config.json was read. Everything else is read when it is first asked for."""

    directory: Path
    config: ModelConfig
    override: Mapping[str, Any] | bool | None = None  # of generation_config.json, as for `gptjax.load`

    @property
    def is_converted(self) -> bool:
        """Whether `gptjax convert` wrote it; else it is as Hugging Face or OpenAI publish it."""
        return is_converted(self.directory)

    @cached_property
    def text_directory(self) -> Path:
        """Where its tokenizer and its generation_config.json are."""
        return text_directory(self.directory)

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """What generation_config.json says, or the override. Raises `CheckpointError` or `RequestError`."""
        return read_generation_config(self.text_directory, self.override)

    @property
    def defaults(self) -> GenerationDefaults:
        """The settings that a request starts from."""
        return read_generation_defaults(self.text_directory, self.generation_config)

    @property
    def has_tokenizer(self) -> bool:
        """Whether it has a tokenizer's files: if they cannot be read, that is a fault, and not the lack of one."""
        return any(os.path.lexists(self.text_directory / name) for name in TOKENIZER_FILES)

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer. Raises `CheckpointError` if there is none or it is damaged, `ConfigError` if unsupported."""
        return load_tokenizer(self.text_directory, generation_config=self.generation_config)


def open_checkpoint(
    name: str | os.PathLike[str],
    *,
    ignore_config: Sequence[str] = (),
    generation_config: Mapping[str, Any] | bool | None = None,
) -> Checkpoint:
    """Finds a checkpoint and reads its config.json.

    Args:
      name: a demo, a directory or a Hub id; see `gptjax.checkpoints.hub.resolve`.
      ignore_config, generation_config: as for `gptjax.load`.

    Raises:
      CheckpointError: there is no such checkpoint, or its config.json is damaged.
      ConfigError: the model, or a setting of it, is not supported.
    """
    directory = hub.resolve(name)
    return Checkpoint(directory, read_config(directory, ignore=ignore_config), generation_config)
