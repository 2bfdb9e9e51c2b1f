"""The tokenizers of Llama 3, Qwen, SmolLM2, Mistral Nemo and gpt-oss, from tokenizer.json and from GGUF metadata."""

import json

import pytest
import tokenizers

from gptjax.text import Tokenizer, load_tokenizer, tokenizer_from_gguf
from tests.text.family_material import TEXTS, family, gguf_metadata
from tests.text.text_material import write_json

FAMILY = family()


@pytest.fixture(scope="module", params=FAMILY)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["tokenizer.json", "GGUF"])
def ours(name: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "GGUF":
        return tokenizer_from_gguf(gguf_metadata(FAMILY[name], name))
    return load_tokenizer(write_json(tmp_path_factory.mktemp(name), "tokenizer.json", FAMILY[name]))


@pytest.fixture(scope="module")
def theirs(name: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(FAMILY[name]))


def test_ids_are_the_librarys(ours: Tokenizer, theirs: tokenizers.Tokenizer) -> None:
    for text in TEXTS:
        ids = ours.encode(text, special=True)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.prompt(text, special=True) == theirs.encode(text).ids, text
        assert ours.decode(ids, special=True) == theirs.decode(ids, skip_special_tokens=False), text
        assert ours.decode(ids) == theirs.decode(ids), text


def test_special_tokens_of_a_user_are_text(name: str, ours: Tokenizer) -> None:
    for text in TEXTS:
        ids = ours.encode(text)
        assert not set(ids) & set(ours.special_ids.values())
        if name != "qwen2":  # its NFC composes letters
            assert ours.decode(ids) == text


def test_every_expression_has_a_text_of_its_own() -> None:
    """Else a wrong one would pass."""
    engines = {name: tokenizers.Tokenizer.from_str(json.dumps(file)) for name, file in FAMILY.items()}
    ids = {name: [engine.encode(text).ids for text in TEXTS] for name, engine in engines.items()}
    assert all(ids[one] != ids[other] for one in ids for other in ids if one != other)
