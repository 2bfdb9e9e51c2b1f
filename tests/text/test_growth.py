"""Normalizers that make a text far longer, and patterns that give up: errors, since the library aborts or panics."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from gptjax.errors import ConfigError, RequestError
from gptjax.text import load_tokenizer
from gptjax.text.growth import MOST_GROWTH, growth
from tests.text.text_material import demo_json, write_json

A = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
RUNS = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
COMMON: list[Any] = [  # of published models
    None,
    {"type": "NFC"},
    {"type": "Sequence", "normalizers": []},
    {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACE]},
    {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "Lowercase"}, {"type": "StripAccents"}]},
    {
        "type": "Sequence",
        "normalizers": [{"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}],
    },
]


@pytest.mark.parametrize("normalizer", COMMON)
def test_common_normalizers_are_read(tmp_path: Path, normalizer: Any) -> None:
    assert load_tokenizer(write_json(tmp_path, "tokenizer.json", demo_json() | {"normalizer": normalizer}))


@pytest.mark.parametrize(
    ("normalizer", "text"),
    [
        (tokenizers.normalizers.NFKD(), "\ufdfa"),  # the longest decomposition
        (tokenizers.normalizers.NFD(), "\u1f82"),
        (tokenizers.normalizers.NFC(), "\ufb2c"),
        (tokenizers.normalizers.Lowercase(), "İ"),
        (tokenizers.normalizers.ByteLevel(), "🐲"),
        (tokenizers.normalizers.Replace(tokenizers.Regex("x?"), "yz"), "a"),
        (tokenizers.normalizers.Replace("ab", "abcde"), "ab"),
        (tokenizers.normalizers.Prepend("abc"), "a"),
    ],
)
def test_no_text_grows_more_than_that(normalizer: Any, text: str) -> None:
    """Compared with the library."""
    described = json.loads(normalizer.__getstate__())
    assert 1 <= len(normalizer.normalize_str(text)) / len(text) <= growth(described) <= MOST_GROWTH


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Sequence", "normalizers": [A] * 7},
        {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [A] * 50_000}]},
        {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 64},
        {"type": "Prepend", "prepend": "x" * 64},
        {"type": "Precompiled", "precompiled_charsmap": ""},
    ],
)
def test_normalizers_that_could_take_all_memory_are_refused(tmp_path: Path, normalizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json .*normalizer can make a text more than 64 times as long"):
        load_tokenizer(write_json(tmp_path, "tokenizer.json", demo_json() | {"normalizer": normalizer}))


def test_a_pattern_that_gives_up_on_a_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The library panics, which is not an `Exception`."""
    file = demo_json()
    cut = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    file["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [cut, file["pre_tokenizer"]]}
    tokenizer = load_tokenizer(write_json(tmp_path, "tokenizer.json", file))
    assert tokenizer.decode(tokenizer.encode("aaa!")) == "aaa!"
    with pytest.raises(RequestError, match=r"tokenizer\.json cannot cut this text into words .*give token ids"):
        tokenizer.encode("a" * 40 + "!")
    assert tokenizer.decode(tokenizer.encode("aaa!")) == "aaa!"
