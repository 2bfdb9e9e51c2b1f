"""Where the text tests' vocabularies are, and making variants of them."""

import json
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
GPT2 = TESTS / "data" / "gpt2_vocab"
DEMO = TESTS.parent / "gptjax" / "demo" / "gpt2-tales"
HARMONY = ["<|startoftext|>", "<|return|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>"]
CONTINUATION_BYTE = "Ģ"  # 0x80 in GPT-2's alphabet


def write_json(directory: Path, name: str, value: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(json.dumps(value), encoding="utf-8")
    return directory


def demo_json() -> dict[str, Any]:
    return json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))


def with_added(file: dict[str, Any], contents: list[str], **flags: bool) -> dict[str, Any]:
    """`file` with further added tokens, special unless told otherwise, the ids following on."""
    first = 1 + max([*file["model"]["vocab"].values(), *(token["id"] for token in file["added_tokens"])])
    base = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    more = [{**base, **flags, "id": first + n, "content": content} for n, content in enumerate(contents)]
    return {**file, "added_tokens": file["added_tokens"] + more}
