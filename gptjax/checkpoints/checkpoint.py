"""A checkpoint: found by name, opened once, and asked for what it has."""

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
    generation_defaults,
    read_config,
    read_generation_config,
    text_directory,
)
from gptjax.text import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A directory whose config.json has been read. Everything else is read on first use."""

    directory: Path
    config: ModelConfig
    override: Mapping[str, Any] | bool | None = None  # replaces generation_config.json, as for `gptjax.load`

    @property
    def is_converted(self) -> bool:
        """Whether `gptjax convert` wrote it; otherwise it is in Hugging Face's or OpenAI's format."""
        return is_converted(self.directory)

    @cached_property
    def text_directory(self) -> Path:
        """The directory with its tokenizer and its generation_config.json."""
        return text_directory(self.directory)

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """The contents of generation_config.json, or the override. Raises `CheckpointError` or `RequestError`."""
        return read_generation_config(self.text_directory, self.override)

    @property
    def defaults(self) -> GenerationDefaults:
        """The default settings of a request."""
        return generation_defaults(self.generation_config, self.text_directory)

    @property
    def has_tokenizer(self) -> bool:
        """Whether it has tokenizer files: if so, failing to read them is a fault, not a missing tokenizer."""
        return any(os.path.lexists(self.text_directory / name) for name in TOKENIZER_FILES)

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer. Raises `CheckpointError` if it is missing or damaged, `ConfigError` if unsupported."""
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
      CheckpointError: the checkpoint does not exist, or its config.json is damaged.
      ConfigError: the model or one of its settings is not supported.
    """
    directory = hub.resolve(name)
    return Checkpoint(directory, read_config(directory, ignore=ignore_config), generation_config)
