"""A tokenizer with harmony's special tokens, and prompts in its form."""

import re
from typing import Any

from gptjax.chat import ChatCompletion
from gptjax.engine.output import Completion, Timings, Usage
from gptjax.text import load_tokenizer
from gptjax.text.chat_formats import ToolCall
from gptjax.text.chat_formats.harmony import HarmonyReader
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


def read(tokenizer, text: str, *offered: str) -> tuple[HarmonyReader, str]:
    """A reader that has read a text with special tokens written out, and the answer."""
    reader = HarmonyReader(tokenizer, offered=frozenset(offered))
    return reader, "".join(map(reader.push, tokenizer.encode(text, special=True))) + reader.finish()


def called(reader: HarmonyReader) -> list[tuple[str, str]]:
    """The calls, after a look at their ids."""
    for found in reader.tool_calls:
        assert re.fullmatch("call_[0-9a-f]{24}", found.id)
    return [(found.name, found.arguments) for found in reader.tool_calls]


def completed(text: str = "", reasoning: str = "", calls: tuple[ToolCall, ...] = ()) -> ChatCompletion:
    whole = Completion(text, (), (), (), "stop", None, 0, Usage(1, 1), Timings(0, 0))
    return ChatCompletion(text, reasoning, calls, "stop", whole)
