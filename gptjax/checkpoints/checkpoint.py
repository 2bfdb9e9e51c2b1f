"""A checkpoint: found by name, opened once, and asked for what it has."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from gptjax.checkpoints import hub, safetensors
from gptjax.checkpoints.manifest import is_converted
from gptjax.checkpoints.text_files import GGUFText, TextFiles, text_of, tokenizer_at
from gptjax.config import (
    GenerationDefaults,
    ModelConfig,
    config_from_json,
    generation_defaults,
    overridden,
    read_config,
)
from gptjax.config.gguf import config_json_from_gguf, in_words_of_gguf
from gptjax.errors import CheckpointError, ConfigError, GptjaxError
from gptjax.gguf import GGUFFile, open_gguf
from gptjax.support.quoting import shown
from gptjax.text import Tokenizer

TensorSource = safetensors.SafetensorsSource | GGUFFile


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A directory or a GGUF file whose configuration has been read. Everything else is read on first use."""

    path: Path
    config: ModelConfig
    text: TextFiles | GGUFText  # its tokenizer and generation settings
    gguf: GGUFFile | None = None  # None: a directory
    override: Mapping[str, Any] | bool | None = None  # replaces its generation settings, as for `gptjax.load`

    @property
    def is_converted(self) -> bool:
        """Whether `gptjax convert` wrote it; otherwise it is a GGUF file, or in Hugging Face's or OpenAI's format."""
        return self.gguf is None and is_converted(self.path)

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """The settings of generation_config.json, or the override. Raises `CheckpointError` or `RequestError`."""
        return overridden(self.text.settings(), self.override)

    @property
    def defaults(self) -> GenerationDefaults:
        """The default settings of a request."""
        words = self.text.words if self.override is None else {}
        return generation_defaults(
            self.generation_config, self.text.config_directory, source=self.text.source, words=words
        )

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is one: if so, failing to read it is a fault, not a missing tokenizer."""
        return self.text.has_tokenizer

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer. Raises `CheckpointError` if it is missing or damaged, `ConfigError` if unsupported."""
        return self.text.tokenizer(self.generation_config)

    def tokenizer_or_reason(self, other: str | os.PathLike[str] | None = None) -> Tokenizer | GptjaxError:
        """Its tokenizer or another one; or why it has none, since the model also works on token ids.

        Raises:
          GptjaxError: the other tokenizer cannot be read, or the checkpoint's own is damaged.
        """
        if other is not None:
            return tokenizer_at(other)
        try:
            return self.tokenizer()
        except CheckpointError as error:
            if self.has_tokenizer:
                raise
            return error
        except GptjaxError as error:  # an unsupported kind
            return error

    def source(self) -> TensorSource:
        """Its tensors, if `gptjax convert` did not write it. Raises `CheckpointError` if they cannot be read."""
        return safetensors.open_directory(self.path) if self.gguf is None else self.gguf


def open_checkpoint(
    name: str | os.PathLike[str],
    *,
    ignore_config: Sequence[str] = (),
    generation_config: Mapping[str, Any] | bool | None = None,
) -> Checkpoint:
    """Finds a checkpoint and reads its configuration.

    Args:
      name: a demo, a directory, a GGUF file or a Hub id; see `gptjax.checkpoints.hub.resolve`.
      ignore_config, generation_config: as for `gptjax.load`.

    Raises:
      CheckpointError: the checkpoint does not exist, or its config.json or header is damaged.
      ConfigError: the model or one of its settings is not supported.
    """
    return open_path(hub.resolve(name), ignore_config=ignore_config, generation_config=generation_config)


def open_path(
    path: Path, *, ignore_config: Sequence[str] = (), generation_config: Mapping[str, Any] | bool | None = None
) -> Checkpoint:
    """Like `open_checkpoint`, for a directory or a GGUF file that is known to exist."""
    if os.path.isfile(path):
        file = open_gguf(path)
        config = _config(path, file, ignore_config)
        return Checkpoint(path, config, GGUFText(path, file.metadata), file, generation_config)
    config = read_config(path, ignore=ignore_config)
    return Checkpoint(path, config, text_of(path), None, generation_config)


def _config(path: Path, file: GGUFFile, ignore: Sequence[str]) -> ModelConfig:
    try:
        raw = config_json_from_gguf(file.metadata, file.tensors, read=file.read, ignore=ignore)
    except ConfigError as error:
        raise ConfigError(f"{shown(path)}: {error}") from None
    try:
        return config_from_json(raw)
    except ConfigError as error:
        words = in_words_of_gguf(str(file.metadata["general.architecture"]), str(error))
        raise ConfigError(
            f"{shown(path)}: its metadata, in the words of {error}" + f"\n({words})" * bool(words)
        ) from None
