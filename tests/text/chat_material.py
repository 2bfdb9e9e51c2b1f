"""A small tokenizer with the special tokens of all chat formats, the published templates, and a reader of texts."""

import json
from pathlib import Path
from typing import Any

from gptjax.text import Tokenizer, load_tokenizer
from gptjax.text.chat_formats import FORMATS, ChatOptions, TurnReader
from tests.text.text_material import TESTS, demo_json, with_added

TEMPLATES = TESTS / "data" / "chat_templates"
TEMPLATE_FILES = {path.stem for path in TEMPLATES.glob("*.jinja")}
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<s>", "</s>"),
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
    *("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
]
PLAIN = ["<tool_call>", "</tool_call>", "<think>", "</think>"]  # added tokens that are not special, as Qwen has them
BEGIN_THE_THOUGHT = ("qwen3-thinking", "qwq", "qwq-first", "deepseek-r1-thinking")  # formats whose prompts do


def template(file: str) -> str:
    return (TEMPLATES / f"{file}.jinja").read_text(encoding="utf-8")


def chat_tokenizer(directory: Path, *, tags: bool = True, **config: Any) -> Tokenizer:
    """A tokenizer with all special tokens; `config` is its tokenizer_config.json. Without `tags`, those are words."""
    file = with_added(demo_json(), SPECIAL)
    if tags:
        file = with_added(file, PLAIN, special=False)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(directory)


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}


def prompt(tokenizer: Tokenizer, name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """A prompt, with its special tokens."""
    ids = FORMATS[name].render(messages, tokenizer, ChatOptions(**options), max_length=10_000)
    return tokenizer.decode(ids, special=True)


def read(tokenizer: Tokenizer, name: str, ids: list[int], *offered: str) -> tuple[TurnReader, str]:
    """A reader that has read a whole turn, and the answer."""
    reader = FORMATS[name].reader(tokenizer, ChatOptions(tools=[tool(each) for each in offered]))
    return reader, "".join(map(reader.push, ids)) + reader.finish()
