"""The chat template next to a tokenizer: its text, which is recognised elsewhere and never executed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptjax.support.files import raise_damaged, read_text


def read_chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """The template in chat_template.jinja, else in tokenizer_config.json, or None. The order is transformers'.

    Args:
      settings: tokenizer_config.json. Of several named templates, "default" is taken.

    Raises:
      CheckpointError: a file is damaged.
    """
    text = read_text(directory / "chat_template.jinja")
    if text is not None:
        return text.replace("\r\n", "\n")  # as a file is read in text mode
    found = settings.get("chat_template")
    if found is None or isinstance(found, str):
        return found
    named = _named(found)
    if named is None:
        raise_damaged(directory / "tokenizer_config.json", "chat_template is neither a text nor a list of named ones")
    return named.get("default")


def _named(found: object) -> dict[str, str] | None:
    """Templates by name, from either spelling: [{"name": ..., "template": ...}] or {name: template}."""
    if isinstance(found, dict):
        pairs = list(found.items())
    elif isinstance(found, list) and all(isinstance(item, dict) for item in found):
        pairs = [(item.get("name"), item.get("template")) for item in found]
    else:
        return None
    return dict(pairs) if all(isinstance(part, str) for pair in pairs for part in pair) else None
