"""Tokenizers against sentencepiece and transformers, live."""

from pathlib import Path
from typing import Any

import pytest

from gptjax.text import Tokenizer, load_tokenizer, tokenizer_from_gguf
from tests.fuzz import rounds
from tests.oracles.sentencepiece_models import FEW, HELD_OUT, MODELS, ODD, metadata_of, sentences, trained
from tests.text.family_material import TEXTS, family
from tests.text.sentencepiece_material import llama2_json, mistral_json
from tests.text.text_material import write_json

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("name", MODELS)
def test_sentencepiece(name: str) -> None:
    options = MODELS[name]
    words = HELD_OUT.split()
    theirs = trained(words if name != "runs" else FEW, HELD_OUT.split("\n") if name != "runs" else [], **options)
    flags = {
        "add_space_prefix": options.get("add_dummy_prefix", True),
        "remove_extra_whitespaces": options.get("remove_extra_whitespaces", False),
    }
    ours = tokenizer_from_gguf(metadata_of(theirs, **flags))
    texts = [*ODD, *sentences(2, words + ODD, rounds(3_000)), *sentences(3, FEW, rounds(3_000))]
    if (
        name == "user-defined"
    ):  # to llama.cpp the text after such a token begins with a space, to sentencepiece it does not
        texts = [text for text in texts if "|" not in text] + ["<tool>", "king<tool>", "a|", "|"]
    for text in texts:
        ids = theirs.encode(text)
        if not (name == "user-defined" and text[:1] in "<|"):
            assert ours.encode(text) == ids, text
        if name == "as Llama 2's":
            assert ours.prompt(text) == theirs.encode(text, add_bos=True), text
            if "\x00" not in text:
                assert ours.decode(ids) == theirs.decode(ids) == text.replace("▁", " "), text


def test_a_sentencepiece_model_in_both_forms(tmp_path: Path) -> None:
    """GGUF's scores and the tokenizer.json that transformers makes of the same model give the same ids."""
    theirs = trained(HELD_OUT.split(), HELD_OUT.split("\n"))
    (tmp_path / "tokenizer.model").write_bytes(theirs.serialized_model_proto())
    write_json(tmp_path, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": False})
    converted = transformers.AutoTokenizer.from_pretrained(tmp_path)
    converted.save_pretrained(tmp_path / "converted")
    from_json, from_gguf = load_tokenizer(tmp_path / "converted"), tokenizer_from_gguf(metadata_of(theirs))
    assert from_json.kind == from_gguf.kind == "sentencepiece-bpe"
    for text in [*ODD, *sentences(4, HELD_OUT.split() + ODD, rounds(2_000))]:
        if any(token in text for token in ("<s>", "</s>")) or text.startswith(" "):
            continue
        ids = converted.encode(text, add_special_tokens=False)
        assert from_json.encode(text) == from_gguf.encode(text) == ids, text
        assert from_json.decode(ids) == from_gguf.decode(ids) == converted.decode(ids), text


FORMS = {**family(), "Llama 2": llama2_json(), "Mistral": mistral_json()}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"add_bos_token": True},
    {"add_bos_token": False, "add_eos_token": True},
    {"add_eos_token": False},
]


def both(directory: Path, name: str, **settings: Any) -> tuple[Tokenizer, Any]:
    names = ("<s>", "</s>") if name in ("Llama 2", "Mistral") else ("<|endoftext|>", "<|endoftext|>")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names[0], "eos_token": names[1], **settings}
    write_json(directory, "tokenizer_config.json", settings)
    write_json(directory, "tokenizer.json", FORMS[name])
    return load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_transformers(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, name, **settings)
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
    for text in TEXTS:
        if "<s>" not in text and not text.startswith("<|begin"):  # a BOS that is there is not added again
            assert ours.prompt(text, special=True) == theirs.encode(text), text
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, special=True) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize(
    "chat_template", [None, "one", [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]]
)
@pytest.mark.parametrize("file", [None, "two\r\nlines\n"])
def test_chat_templates(chat_template: Any, file: str | None, tmp_path: Path) -> None:
    if file is not None:
        (tmp_path / "chat_template.jinja").write_bytes(file.encode())
    ours, theirs = both(tmp_path, "gpt-2", **({} if chat_template is None else {"chat_template": chat_template}))
    expected = None if theirs.chat_template is None else theirs.get_chat_template()
    assert ours.chat_template == expected
