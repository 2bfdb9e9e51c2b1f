"""A tokenizer with harmony's special tokens, and prompts in its form."""

from typing import Any

from gptjax.text import load_tokenizer
from tests.text.text_material import TESTS

TALES = load_tokenizer(TESTS.parent / "gptjax" / "demo" / "gpt-oss-tales")
USER = {"role": "user", "content": "Hi."}


def ids(text: str) -> list[int]:
    """The ids of a text in which special tokens are written out."""
    return TALES.encode(text, special=True)


def call(name: str = "f", arguments: Any = "{}", call_id: Any = "1", **more: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}, **more}


def function(name: Any = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]
