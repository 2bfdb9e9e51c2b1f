"""Tokens added to a tokenizer after its training, from the files next to its vocabulary.

transformers has two forms. Since 4.34, `added_tokens_decoder` in tokenizer_config.json has all of them, and nothing
else is read. Before that, added_tokens.json has their ids, and special_tokens_map.json their purposes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gptjax.support.files import raise_damaged, read_json

_NAMED: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTED: Final = ("additional_special_tokens", "extra_special_tokens")


def read_special_tokens(directory: Path, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """special_tokens_map.json; {} if it is absent, or if tokenizer_config.json has all added tokens."""
    if "added_tokens_decoder" in settings:
        return {}
    return read_json(directory / "special_tokens_map.json") or {}


def read_additions(directory: Path, settings: Mapping[str, Any], special: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The added tokens in the files next to a vocabulary, in tokenizer.json's form.

    Args:
      settings, special: tokenizer_config.json, and the result of `read_special_tokens`.

    Raises:
      CheckpointError: a file is damaged.
    """
    if "added_tokens_decoder" in settings:
        return _from_decoder(directory, settings["added_tokens_decoder"])
    path = directory / "added_tokens.json"
    purposes = special_tokens(settings, special)
    items = []
    for content, number in (read_json(path) or {}).items():
        if type(number) is not int:
            raise_damaged(path, "a token's id is not an integer")
        items.append({"content": content, "id": number, "special": content in purposes})
    return items


def special_tokens(settings: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The texts of tokens that have a purpose, with their flags, in the order in which transformers adds them."""
    names = {**settings, **special}
    values = [*(names.get(key) for key in _NAMED), *(item for key in _LISTED for item in _items(names.get(key)))]
    found: dict[str, Mapping[str, Any]] = {}
    for value in values:
        flags = value if isinstance(value, Mapping) else {"content": value}
        if isinstance(content := flags.get("content"), str) and content:
            found.setdefault(content, flags)
    return found


def _from_decoder(directory: Path, later: Any) -> list[dict[str, Any]]:
    try:
        return [{**item, "id": int(number)} for number, item in (later or {}).items()]
    except (AttributeError, TypeError, ValueError):
        raise_damaged(directory / "tokenizer_config.json", "added_tokens_decoder is not an object of ids and tokens")


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else list(value.values()) if isinstance(value, Mapping) else []
