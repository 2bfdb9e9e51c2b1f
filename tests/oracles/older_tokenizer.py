"""A GPT-2 tokenizer in the layout of transformers up to 4.4x: vocab.json, merges.txt and the files next to them."""

import json
import shutil
from pathlib import Path
from typing import Any

_GPT2 = Path(__file__).resolve().parents[1] / "data" / "gpt2_vocab"

# A chat model of 2019 as transformers up to 4.4x saved it.
ADDED = {"<bos>": 50257, "<eos>": 50258, "<pad>": 50259, "<speaker1>": 50260, "<speaker2>": 50261}
NAMED: dict[str, Any] = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<|endoftext|>"}
SPEAKERS = {"additional_special_tokens": ["<speaker1>", "<speaker2>"]}
DIALOGUE = "<bos><speaker1>Hi<speaker2>Hello<eos>"


def old_layout(directory: Path, **files: Any) -> Path:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(_GPT2 / name, directory)
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return directory
