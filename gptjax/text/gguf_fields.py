"""Reads the metadata of a GGUF file, each value checked: every fault names its key."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from gptjax.errors import CheckpointError, ConfigError
from gptjax.support.quoting import names, quoted
from gptjax.text.vocabulary import is_text

PREFIX: Final = "tokenizer.ggml."
_MOST_TOKENS: Final = 1 << 20  # Gemma's vocabulary, the largest published, has 262,144
_MOST_MERGES: Final = 1 << 22  # 514,906 are the most seen
_LONGEST: Final = 1024  # characters of a token


class Fields:
    """The values under `tokenizer.ggml.`; keys are without that prefix."""

    def __init__(self, source: Path, metadata: Mapping[str, Any]) -> None:
        self._source = source
        self._metadata = metadata

    def fault(self, key: str, what: str) -> CheckpointError:
        """The error for a damaged value."""
        return CheckpointError(f"{self._source} is damaged: {PREFIX}{key} {what}; download it again")

    def unsupported(self, key: str, what: str) -> ConfigError:
        """The error for a value that gptjax does not support."""
        return ConfigError(f"{self._source} has {PREFIX}{key} {what}")

    def refuse_others(self, known: frozenset[str]) -> None:
        """Raises ConfigError for keys that are not among the known ones."""
        found = (key.removeprefix(PREFIX) for key in self._metadata if key.startswith(PREFIX))
        if unknown := sorted(set(found) - known):
            raise ConfigError(
                f"{self._source} has {names([PREFIX + key for key in unknown])}, which gptjax does not know: use a "
                "file without that, or the Hugging Face checkpoint it was made from"
            )

    def has(self, key: str) -> bool:
        """Whether the file has a value."""
        return PREFIX + key in self._metadata

    def text(self, key: str) -> str:
        """A text; it must be there."""
        value = self._value(key)
        if not isinstance(value, str):
            raise self.fault(key, f"is {quoted(value)}, not a text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._metadata.get(PREFIX + key, default)
        if not isinstance(value, bool):
            raise self.fault(key, f"is {quoted(value)}, not true or false")
        return value

    def token_id(self, key: str, count: int) -> int | None:
        """The id of one of `count` tokens, or None if the file has none."""
        if not self.has(key):
            return None
        value = self._value(key)
        if type(value) is not int or not 0 <= value < count:
            raise self.fault(key, f"is {quoted(value)}, not the id of one of the {count} tokens")
        return value

    def tokens(self) -> list[str]:
        """The texts of the tokens, by id. Only empty ones may be equal."""
        tokens: list[str] = self._list("tokens", _MOST_TOKENS, _is_token, "a text of at most 1,024 characters")
        if not tokens:
            raise self.fault("tokens", "is empty")
        seen = set()
        for token in tokens:
            if token in seen:
                raise self.fault("tokens", f"has the token {quoted(token)} twice")
            if token:
                seen.add(token)
        return tokens

    def types(self, count: int) -> list[int]:
        """The type of each of `count` tokens."""
        return self._same_length("token_type", self._list("token_type", _MOST_TOKENS, _is_type, "1 to 6"), count)

    def scores(self, count: int) -> list[float]:
        """The score of each of `count` tokens."""
        return self._same_length("scores", self._list("scores", _MOST_TOKENS, _is_score, "a finite number"), count)

    def merges(self, tokens: set[str]) -> list[tuple[str, str]]:
        """Pairs of tokens that make another."""
        pairs = []
        for merge in self._list("merges", _MOST_MERGES, lambda merge: isinstance(merge, str), "a text"):
            cut = merge.find(" ", 1)
            left, right = merge[:cut], merge[cut + 1 :]
            if cut < 0 or left not in tokens or right not in tokens or left + right not in tokens:
                raise self.fault("merges", f"has {quoted(merge)}, which is not two tokens that make another")
            pairs.append((left, right))
        return pairs

    def _value(self, key: str) -> Any:
        if not self.has(key):
            raise self.fault(key, "is missing")
        return self._metadata[PREFIX + key]

    def _list(self, key: str, most: int, check: Callable[[Any], bool], expected: str) -> list[Any]:
        values = self._value(key)
        if not isinstance(values, list):
            raise self.fault(key, f"is {quoted(values)}, not a list")
        if len(values) > most:
            raise self.fault(key, f"has {len(values):,} items, more than {most:,}")
        for value in values:
            if not check(value):
                raise self.fault(key, f"has {quoted(value)}, not {expected}")
        return values

    def _same_length(self, key: str, values: list[Any], count: int) -> list[Any]:
        if len(values) != count:
            raise self.fault(key, f"has {len(values):,} items for {count:,} tokens")
        return values


def _is_token(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST and is_text(value)


def _is_type(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 6


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
