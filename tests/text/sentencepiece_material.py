"""A small tokenizer of Llama 2's form, trained here by the tokenizers library, and variants of its tokenizer.json."""

import copy
import functools
import json
from typing import Any

import tokenizers
from tokenizers import models, normalizers, trainers

from tests.text.text_material import TESTS

SPACE = "▁"
CONTROL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PREFIX = {"type": "Prepend", "prepend": SPACE}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
DECODERS = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]


def template(*before: str, after: tuple[str, ...] = ()) -> dict[str, Any]:
    parts = [{"SpecialToken": {"id": token, "type_id": 0}} for token in before]
    ends = [{"SpecialToken": {"id": token, "type_id": 0}} for token in after]
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    ids = {token: {"id": token, "ids": [CONTROL.index(token)], "tokens": [token]} for token in (*before, *after)}
    return {"type": "TemplateProcessing", "single": parts + text + ends, "pair": text + text, "special_tokens": ids}


@functools.cache
def _trained() -> dict[str, Any]:
    engine = tokenizers.Tokenizer(models.BPE())
    engine.normalizer = normalizers.Replace(" ", SPACE)
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*CONTROL, *BYTES], show_progress=False, max_token_length=12
    )
    lines = (TESTS / "data" / "held-out.txt").read_text(encoding="utf-8").split("\n")
    engine.train_from_iterator([" " + line + " " * (n % 7) for n, line in enumerate(lines)], trainer)
    return json.loads(engine.to_str())


def llama2_json() -> dict[str, Any]:
    """The structure of Llama 2's tokenizer.json (meta-llama/Llama-2-7b-hf), with 700 tokens."""
    file = copy.deepcopy(_trained())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    file["added_tokens"] = [{"id": n, "content": token, **flags} for n, token in enumerate(CONTROL)]
    file["model"] |= {"type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    return file | {
        "normalizer": {"type": "Sequence", "normalizers": [PREFIX, SPACES]},
        "pre_tokenizer": None,
        "post_processor": template("<s>"),
        "decoder": {"type": "Sequence", "decoders": DECODERS},
    }


def mistral_json(scheme: str = "first") -> dict[str, Any]:
    """The structure of Mistral 7B v0.3's tokenizer.json: a Metaspace in place of the normalizer."""
    cut = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    return llama2_json() | {"normalizer": None, "pre_tokenizer": cut}
