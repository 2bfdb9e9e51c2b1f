"""The two real vocabularies that the text tests run on, in both file forms."""

import json
from pathlib import Path

import pytest

from gptjax.text import Tokenizer, load_tokenizer
from tests.text.text_material import DEMO, GPT2, HARMONY, demo_json, with_added, write_json


@pytest.fixture(scope="session")
def gpt2() -> Tokenizer:
    """From vocab.json and merges.txt."""
    return load_tokenizer(GPT2)


@pytest.fixture(scope="session")
def gpt2_json(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same from a tokenizer.json, with merges in the older spelling."""
    merges = (GPT2 / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    vocab = json.loads((GPT2 / "vocab.json").read_text(encoding="utf-8"))
    file = demo_json()
    file["model"] |= {"vocab": vocab, "merges": merges}
    file["added_tokens"][0]["id"] = 50256
    return load_tokenizer(write_json(tmp_path_factory.mktemp("gpt2"), "tokenizer.json", file))


@pytest.fixture(scope="session")
def demo() -> Tokenizer:
    return load_tokenizer(DEMO)


@pytest.fixture(scope="session")
def harmony_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's vocabulary with GPT-OSS's special tokens."""
    return write_json(tmp_path_factory.mktemp("harmony"), "tokenizer.json", with_added(demo_json(), HARMONY))


@pytest.fixture(scope="session")
def harmony(harmony_dir: Path) -> Tokenizer:
    return load_tokenizer(harmony_dir)
