"""Models that sentencepiece trains here, and their metadata as llama.cpp's converter writes it."""

import io
import random
from pathlib import Path
from typing import Any

import pytest

sentencepiece = pytest.importorskip("sentencepiece")

HELD_OUT = (Path(__file__).resolve().parents[1] / "data" / "held-out.txt").read_text(encoding="utf-8")
ODD = [
    "é",
    "日本",
    "🐲",
    "\u0301",
    "\xa0",
    "\x00",
    "\t",
    "<s>",
    "</s>",
    "<0x41>",
    "|",
    "x" * 9,
    "=" * 20,
    " " * 9,
    "\n\n",
]
MODELS: dict[str, dict[str, Any]] = {
    "as Llama 2's": {},
    "no prefix": {"add_dummy_prefix": False},
    "extra spaces removed": {"remove_extra_whitespaces": True},
    "pieces of several words": {"split_by_whitespace": False},
    "user-defined": {"user_defined_symbols": ["<tool>", "|"], "control_symbols": ["<|im_end|>"]},
    "runs": {"vocab_size": 330},
}
# Words of few letters make pieces that overlap themselves and each other.
FEW = ["ab", "ba", "aab", "abab", "aaaa", "bbb", "abb"]


def sentences(seed: int, words: list[str], count: int) -> list[str]:
    pick = random.Random(seed)
    return [(" " * pick.choice([0, 0, 1, 4])).join(pick.choices(words, k=pick.randint(1, 25))) for _ in range(count)]


def trained(words: list[str], lines: list[str], vocab_size: int = 700, **options: Any) -> Any:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines + sentences(1, words, 300)),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
        **{"remove_extra_whitespaces": False, **options},
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def metadata_of(theirs: Any, **values: Any) -> dict[str, Any]:
    """What llama.cpp's converter (conversion/base.py, `_create_vocab_sentencepiece`) writes for a model."""
    numbers = range(theirs.vocab_size())

    def kind(number: int) -> int:
        tests = {2: theirs.is_unknown, 3: theirs.is_control, 5: theirs.is_unused, 6: theirs.is_byte}
        user_defined = 4 if theirs.get_score(number) == 0 and theirs.id_to_piece(number) in ("<tool>", "|") else 1
        return next((kind for kind, test in tests.items() if test(number)), user_defined)

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(number) for number in numbers],
        "tokenizer.ggml.scores": [theirs.get_score(number) for number in numbers],
        "tokenizer.ggml.token_type": [kind(number) for number in numbers],
        "tokenizer.ggml.bos_token_id": theirs.bos_id(),
        "tokenizer.ggml.eos_token_id": theirs.eos_id(),
        **{f"tokenizer.ggml.{name}": value for name, value in values.items()},
    }
