"""Where a checkpoint's tokenizer and generation settings come from: the files of a directory, or GGUF metadata."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from gptjax.checkpoints import foreign
from gptjax.config import TOKENIZER_FILES, read_generation_config, text_directory
from gptjax.config.generation import FILE
from gptjax.errors import CheckpointError
from gptjax.gguf import open_gguf, read_metadata
from gptjax.support.quoting import shown
from gptjax.text import Tokenizer, load_tokenizer
from gptjax.text.gguf import describe, tokenizer_from_gguf
from gptjax.text.huggingface import huggingface_files

METADATA: Final = "metadata.gguf"  # in a directory converted from a GGUF file: that file's metadata, without tensors
# llama.cpp's names for settings of generation_config.json, and those that only llama.cpp has. The latter's details
# (mirostat_tau, mirostat_eta, xtc_threshold) have no effect without them.
_WORDS: Final = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
_LAST_N: Final = "general.sampling.penalty_last_n"  # tokens that are penalised: -1 for all, as here; 0 for none
_OTHERS: Final = ("general.sampling.mirostat", "general.sampling.sequence", "general.sampling.xtc_probability")


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """A directory with tokenizer.json, generation_config.json and the like."""

    directory: Path

    @property
    def config_directory(self) -> Path | None:
        """The directory whose config.json may name the token that ends a text."""
        return self.directory

    @property
    def source(self) -> str:
        """Where the settings are from, for messages."""
        return FILE

    @property
    def words(self) -> Mapping[str, str]:
        """What that calls them, if not as generation_config.json does."""
        return {}

    @property
    def has_tokenizer(self) -> bool:
        """Whether any file of a tokenizer is there."""
        return any(os.path.lexists(self.directory / name) for name in TOKENIZER_FILES)

    def settings(self) -> Mapping[str, Any]:
        """The settings of generation_config.json. Raises `CheckpointError`."""
        return read_generation_config(self.directory)

    def tokenizer(self, generation_config: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer, whose end tokens `generation_config` may name. Raises `CheckpointError` or `ConfigError`."""
        return load_tokenizer(self.directory, generation_config=generation_config)


@dataclasses.dataclass(frozen=True)
class GGUFText:
    """The metadata of a GGUF file."""

    path: Path
    metadata: Mapping[str, Any]
    config_directory: Path | None = None  # no config.json: the metadata names the tokens that end a text

    @property
    def source(self) -> str:
        """Where the settings are from, for messages."""
        return shown(self.path)

    @property
    def words(self) -> Mapping[str, str]:
        """What the file calls them."""
        return _WORDS

    @property
    def has_tokenizer(self) -> bool:
        """Whether it describes a tokenizer."""
        return "tokenizer.ggml.model" in self.metadata

    def settings(self) -> Mapping[str, Any]:
        """Settings by the names of generation_config.json, as far as it has them. A temperature of 0 is greedy."""
        found = {ours: _decimal(self.metadata[theirs]) for ours, theirs in _WORDS.items() if theirs in self.metadata}
        found |= {key: self.metadata[key] for key in _OTHERS if key in self.metadata}
        if (last := self.metadata.get(_LAST_N, -1)) == 0:
            found.pop("repetition_penalty", None)
        elif last != -1 and found.get("repetition_penalty", 1) != 1:
            found[_LAST_N] = last
        return {"do_sample": found.get("temperature") != 0, **found} if found else {}

    def tokenizer(self, generation_config: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer. Raises `CheckpointError` or `ConfigError`."""
        return tokenizer_from_gguf(self.metadata, self.path)

    def huggingface_files(self) -> dict[str, dict[str, Any]]:
        """The contents of tokenizer.json and the files next to it. Raises what `tokenizer` raises."""
        return huggingface_files(describe(self.metadata, self.path), self.settings())


def tokenizer_at(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a directory, converted or not, or of a GGUF file, one of a split set too.

    Raises:
      CheckpointError: there is none, or it is damaged.
      ConfigError: it is of a kind that gptjax does not read.
    """
    path = Path(path)
    if os.path.isfile(path):
        if not foreign.is_gguf(path):
            raise CheckpointError(f"{shown(path)} is not a GGUF file; name one, or the directory of a tokenizer")
        text: TextFiles | GGUFText = GGUFText(path, open_gguf(path).metadata)
    else:
        text = text_of(path)
    return text.tokenizer(text.settings())


def text_of(directory: Path) -> TextFiles | GGUFText:
    """The text side of a checkpoint's directory. Raises `CheckpointError`."""
    metadata = directory / METADATA
    if os.path.lexists(metadata):
        return GGUFText(metadata, read_metadata(metadata))
    return TextFiles(text_directory(directory))


def _decimal(value: Any) -> Any:
    """A float32 as the decimal number that was meant: 0.9, not 0.8999999761581421."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
