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


def assembled(parts) -> list[tuple[str, str, str]]:
    """The id, name and arguments of calls, from the parts that a reader gave of them."""
    calls: list[tuple[str, str, str]] = []
    for part in parts:
        if part.begins:
            assert part.index == len(calls)
            calls.append((part.id, part.name, ""))
        assert (part.index, part.id, part.name) == (len(calls) - 1, *calls[-1][:2])
        calls[-1] = (*calls[-1][:2], calls[-1][2] + part.arguments)
    return calls


def function(name: Any = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]
