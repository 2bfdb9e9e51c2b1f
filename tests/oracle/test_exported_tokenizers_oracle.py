"""The tokenizer.json that an export makes of GGUF metadata, read by transformers: the same ids and texts as ours."""

import random
import unicodedata
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import convert
from gptjax.text import Tokenizer, load_tokenizer, tokenizer_from_gguf
from gptjax.text.pretokenizers import CUTS
from tests.fuzz import rounds
from tests.gguf import made
from tests.oracles import gguf_from_hf, gpt2_random, gpt_oss_random, llama_random
from tests.oracles.sentencepiece_models import HELD_OUT, ODD, metadata_of, trained
from tests.text.family_material import TEXTS, family, gguf_metadata
from tests.text.text_material import with_added

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

TEMPLATE = "{% for message in messages %}{{ message['content'] }}é\n{% endfor %}"
FAMILY = family()
# Those that no other name has a file for.
ALIKE = {"llama-v3": "llama-bpe", "llama3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "starcoder": "smollm"}
ALIKE |= {"refact": "smollm", "deepseek-coder": "gpt-2"}
SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "as Llama 2's": {},
    "no prefix": {"add_space_prefix": False},
    "extra spaces removed": {"remove_extra_whitespaces": True},
    "an eos as well": {"add_eos_token": True},
    "no bos": {"add_bos_token": False},
}
MODELS = {
    "gpt2": partial(gpt2_random.checkpoint, 4),
    "gpt_oss": lambda: gpt_oss_random.checkpoint(5)[:2],
    **{
        name: partial(llama_random.checkpoint, 3, **llama_random.VARIANTS[name])
        for name in ("llama3", "qwen2", "qwen3")
    },
}


def byte_level(pre: str) -> dict[str, Any]:
    """Metadata with special tokens, and one that is matched in any text."""
    file = with_added(FAMILY[ALIKE.get(pre, pre)], ["<|x|>", "<|eom_id|>"])
    file = with_added(file, ["<tool>", "\t\t\t"], special=False)
    return gguf_metadata(file, pre) | {"tokenizer.chat_template": TEMPLATE, "tokenizer.ggml.padding_token_id": 8191}


def typed(metadata: dict[str, Any]) -> dict[str, bytes]:
    """Metadata as a file has it."""

    def one(value: Any) -> bytes:
        if isinstance(value, list):
            kind = {str: made.STRING, int: made.I32, float: made.F32}[type(value[0])]
            return made.array(kind, value)
        if isinstance(value, str):
            return made.string(value)
        return made.number({bool: made.BOOL, int: made.U32, float: made.F32}[type(value)], value)

    return {key: one(value) for key, value in metadata.items() if key.startswith(("tokenizer.", "general.sampling"))}


def exported(directory: Path, model: str, metadata: dict[str, Any], by: str = "directly") -> Path:
    source = gguf_from_hf.write(directory / "model.gguf", *MODELS[model](), metadata=typed(metadata))
    if by == "converted":
        convert.convert(source, directory / "converted")
        source = directory / "converted"
    convert.export(source, directory / "hf")
    return directory / "hf"


def texts(special: list[str], seed: int) -> list[str]:
    """Random Unicode of all kinds, with special tokens between and inside."""
    pick = random.Random(seed)
    letters = [chr(pick.randrange(0x20, 0x30000)) for _ in range(4_000)]
    letters = [letter for letter in letters if unicodedata.category(letter) != "Cs"]
    words = ["the ", " King", "said", "'ve", "  ", " \n", "12345", "\r\n", "e\u0301", "▁", "Ġ", "</s>", "<0x41>"]
    pools = [letters, words, special, [chr(n) for n in range(0x20, 0x7F)]]
    return [
        *TEXTS,
        *ODD,
        *("".join(pick.choice(pick.choice(pools)) for _ in range(pick.randrange(1, 30))) for _ in range(rounds(300))),
    ]


def assert_same(ours: Tokenizer, theirs: Any, seed: int) -> None:
    assert theirs.eos_token_id == ours.eos_ids[0] and theirs.bos_token_id == ours.bos_id
    start, end = ours.prompt("")[:1], ours.prompt("")[-1:]
    for text in texts([*ours.special_ids, "<tool>"], seed):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, special=True) == ids, text
        if not ids or (ids[:1] != start and ids[-1:] != end):  # a BOS or EOS that is there is not added again
            assert ours.prompt(text, special=True) == theirs(text)["input_ids"], text
        for special in (True, False):
            assert ours.decode(ids, special=special) == theirs.decode(ids, skip_special_tokens=not special), text
    # A user's text, in which special tokens are text like any other.
    theirs = transformers.AutoTokenizer.from_pretrained(theirs.name_or_path, split_special_tokens=True)
    for text in texts([*ours.special_ids, "<tool>"], seed + 10):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text


def assert_alike(one: Tokenizer, other: Tokenizer) -> None:
    """Ours of the metadata and ours of the files."""
    names = ("kind", "bos_id", "eos_ids", "special_ids", "vocab_size", "longest_token", "chat_template")
    assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]
    for text in texts([*one.special_ids, "<tool>"], 9)[: rounds(200)]:
        assert one.prompt(text) == other.prompt(text), text
        ids = one.encode(text, special=True)
        assert ids == other.encode(text, special=True), text
        assert one.decode(ids) == other.decode(ids), text


@pytest.mark.parametrize("pre", CUTS)
def test_byte_level(tmp_path: Path, pre: str) -> None:
    metadata = byte_level(pre)
    directory = exported(tmp_path, "llama3", metadata)
    ours, theirs = tokenizer_from_gguf(metadata), transformers.AutoTokenizer.from_pretrained(directory)
    assert_same(ours, theirs, 1)
    assert_alike(ours, load_tokenizer(directory))
    assert theirs.chat_template == TEMPLATE
    assert theirs.pad_token_id == 8191


@pytest.fixture(scope="module")
def model() -> Any:
    symbols = {"user_defined_symbols": ["<tool>"], "control_symbols": ["<|im_end|>"]}
    return trained(HELD_OUT.split(), HELD_OUT.split("\n"), **symbols)


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece(tmp_path: Path, name: str, model: Any) -> None:
    metadata = metadata_of(model, unknown_token_id=0, **SENTENCEPIECE[name])
    directory = exported(tmp_path, "llama3", metadata)
    ours, theirs = tokenizer_from_gguf(metadata), transformers.AutoTokenizer.from_pretrained(directory)
    assert_same(ours, theirs, 2)
    assert_alike(ours, load_tokenizer(directory))
    assert theirs.unk_token_id == 0


@pytest.mark.parametrize("by", ["directly", "converted"])
@pytest.mark.parametrize("model", MODELS)
def test_every_model(tmp_path: Path, model: str, by: str) -> None:
    """transformers has tokenizers of its own for some, which take from the file only what they expect."""
    metadata = byte_level("qwen2") | {"general.sampling.temp": 0.75, "general.sampling.top_k": 20}
    directory = exported(tmp_path, model, metadata, by)
    ours, theirs = tokenizer_from_gguf(metadata), transformers.AutoTokenizer.from_pretrained(directory)
    assert_same(ours, theirs, 3)
    settings = transformers.GenerationConfig.from_pretrained(directory)
    assert settings.eos_token_id == list(ours.eos_ids) and settings.bos_token_id == ours.bos_id
    assert (settings.do_sample, settings.temperature, settings.top_k) == (True, 0.75, 20)
