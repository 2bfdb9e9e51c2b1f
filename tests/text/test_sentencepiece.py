"""Tokenizers of Llama 2's kind, from tokenizer.json, against the tokenizers library."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from gptjax.errors import CheckpointError, ConfigError
from gptjax.text import Tokenizer, load_tokenizer
from tests.fuzz import rounds
from tests.text.sentencepiece_material import CONTROL, DECODERS, PREFIX, SPACES, llama2_json, mistral_json, template
from tests.text.text_material import with_added, write_json

FORMS = {
    "Llama 2": llama2_json(),
    "Mistral": mistral_json(),
    "always": mistral_json("always"),
    "never": mistral_json("never"),
    "no prefix": llama2_json() | {"normalizer": SPACES, "decoder": {"type": "Sequence", "decoders": DECODERS[:3]}},
    "old Metaspace": mistral_json()
    | {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}},
    "added": with_added(llama2_json(), ["<|im_start|>", "  <x>"], special=False),
}
ODD = [
    "",
    " ",
    "  ",
    "\n",
    "\t",
    "▁",
    "é",
    "日本",
    "🐲",
    "\u0301",
    "\xa0",
    "\x00",
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "the",
]


def texts(count: int, seed: int) -> list[str]:
    pick = random.Random(seed)
    words = ["king", "queen", "and", "once", "upon", "The", ".", ",", "12", "naïve", "<|im_start|>", "  <x>", *ODD]
    return ODD + [" ".join(pick.choices(words, k=pick.randint(1, 9)))[: pick.randint(1, 80)] for _ in range(count)]


def both(directory: Path, file: dict[str, Any]) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    write_json(directory, "tokenizer.json", file)
    return load_tokenizer(directory), tokenizers.Tokenizer.from_str(json.dumps(file))


@pytest.fixture(params=FORMS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    return both(tmp_path, FORMS[request.param])


def test_ids_are_the_librarys(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, theirs = pair
    assert ours.kind == "sentencepiece-bpe"
    for text in texts(rounds(2_000), seed=1):
        assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False).ids
        if not any(token in text for token in CONTROL):
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
            assert ours.prompt(text) == theirs.encode(text).ids


def test_special_tokens_of_a_user_are_text(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, _ = pair
    for text in texts(rounds(1_000), seed=2):
        ids = ours.encode(text)
        assert not set(ids) & set(ours.special_ids.values())
        if "▁" not in text and "  <x>" not in text:  # "▁" is a space to these tokenizers
            decoded = ours.decode(ids)
            assert decoded.replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("form", ["Llama 2", "Mistral", "always", "no prefix"])
def test_a_text_comes_back(form: str, tmp_path: Path) -> None:
    """Except for "▁", which is a space to these tokenizers, and a first space, to which Metaspace adds no other."""
    ours, _ = both(tmp_path, FORMS[form])
    for text in texts(rounds(1_000), seed=3):
        if "▁" not in text and not (text.startswith(" ") and form in ("Mistral", "always")):
            assert ours.decode(ours.encode(text)) == text


def pieces(stream: Any, ids: list[int]) -> list[str]:
    return [stream.push(token_id) for token_id in ids] + [stream.finish()]


@pytest.mark.parametrize("special", [False, True])
def test_decoding_is_the_librarys(pair: tuple[Tokenizer, tokenizers.Tokenizer], special: bool) -> None:
    """On any ids whose bytes are valid; the library writes U+FFFD for each byte of an invalid run, we as UTF-8 does."""
    ours, theirs = pair
    pick, same = random.Random(4), 0
    drawn = ours.encode("日本 é 🐲 once upon a time", special=True)
    for _ in range(rounds(3_000)):
        ids = pick.choices(range(300, ours.vocab_size), k=pick.randint(0, 6)) + drawn[: pick.randint(0, len(drawn))]
        ids = pick.choices([0, 1, 2, 35, 35], k=pick.randint(0, 2)) + ids  # 35 is the byte of a space
        text = ours.decode(ids, special=special)
        got = pieces(ours.stream(special=special), ids)
        assert "".join(got) == text
        assert "".join(pieces(ours.stream(special=special, start=False), ids)) == ours.decode(
            ids, special=special, start=False
        )
        if "\ufffd" not in text:
            same += 1
            assert text == theirs.decode(ids, skip_special_tokens=not special)
    assert same > rounds(1_000)


def test_the_first_space_of_a_text_is_left_out(tmp_path: Path) -> None:
    ours, _ = both(tmp_path, FORMS["Llama 2"])
    ids = ours.encode("once upon")
    assert ours.decode(ids) == "once upon"
    assert ours.decode(ids, start=False) == " once upon"
    stream = ours.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == "once upon"
    assert "".join(map(stream.push, ids)) + stream.finish() == "once upon"  # a new text


def test_bytes_join_into_characters(tmp_path: Path) -> None:
    ours, _ = both(tmp_path, FORMS["Llama 2"])
    ids = ours.encode("🐲!")
    assert [ours.token_bytes(n) for n in ids[1:5]] == [bytes([byte]) for byte in "🐲".encode()]
    assert [piece for piece in pieces(ours.stream(), ids) if piece] == ["🐲", "!"]
    assert ours.token_bytes(3 + 0xE2) == b"\xe2"
    assert ours.token_bytes(1) == b"<s>"


def test_text_after_a_special_token(tmp_path: Path) -> None:
    """A chat format encodes piece by piece what the library encodes whole."""
    for form in ("Llama 2", "Mistral", "always", "never"):
        ours, theirs = both(tmp_path, FORMS[form])
        for text in ("once upon", "\nking", "é"):
            whole = theirs.encode(f"{text}</s>{text}", add_special_tokens=False).ids
            assert [*ours.encode(text), 2, *ours.encode(text, start=False)] == whole


def test_a_bos_that_is_there_is_not_added(tmp_path: Path) -> None:
    ours, _ = both(tmp_path, FORMS["Llama 2"])
    assert ours.prompt("<s>once", special=True) == ours.encode("<s>once", special=True)
    assert ours.prompt("<s>once")[0] == 1
    assert ours.prompt("") == [1]


def test_first_and_last_tokens(tmp_path: Path) -> None:
    """tokenizer.json says what a prompt begins with, whatever flags are beside it, as in transformers 5."""
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False, "add_eos_token": True}
    write_json(tmp_path, "tokenizer_config.json", settings)
    tokenizer = load_tokenizer(write_json(tmp_path, "tokenizer.json", llama2_json()))
    assert tokenizer.prompt("once") == [1, *tokenizer.encode("once")]
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"normalizer": {"type": "NFKC"}}, "NFKC"),
        ({"normalizer": {"type": "Sequence", "normalizers": [PREFIX, {"type": "Lowercase"}]}}, "Lowercase"),
        ({"normalizer": PREFIX}, "nothing replaces its spaces"),
        ({"normalizer": None}, "nothing replaces its spaces"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first"}}, "'_'"),
        ({"decoder": None}, "its decoder is None"),
        ({"decoder": {"type": "Metaspace", "replacement": "▁"}}, "Metaspace"),
        ({"decoder": {"type": "Sequence", "decoders": DECODERS[:2]}}, "its decoder is"),
        (
            {"decoder": {"type": "Sequence", "decoders": [*DECODERS[:3], {**DECODERS[3], "start": 2}]}},
            "its decoder is",
        ),
    ],
)
def test_other_structures_are_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"tokenizer\.json is not a SentencePiece BPE .*{named}"):
        load_tokenizer(write_json(tmp_path, "tokenizer.json", llama2_json() | change))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ignore_merges": True}, "ignore_merges"),
        ({"end_of_word_suffix": "</w>"}, "</w>"),
        ({"type": "Unigram"}, "its model is Unigram"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    file = llama2_json()
    file["model"] |= change
    with pytest.raises(ConfigError, match=rf"tokenizer\.json is not a SentencePiece BPE .*{named}"):
        load_tokenizer(write_json(tmp_path, "tokenizer.json", file))


def test_tokenizer_model_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json there \(transformers makes one from tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_a_missing_byte_is_refused(tmp_path: Path) -> None:
    file = llama2_json()
    del file["model"]["vocab"]["<0x00>"]
    with pytest.raises(ConfigError, match=r"no token for the bytes \[0\]"):
        load_tokenizer(write_json(tmp_path, "tokenizer.json", file))


def test_a_prefix_that_the_files_disagree_about(tmp_path: Path) -> None:
    write_json(tmp_path, "tokenizer.json", llama2_json())
    assert load_tokenizer(write_json(tmp_path, "tokenizer_config.json", {"add_prefix_space": True}))
    with pytest.raises(ConfigError, match=r"add_prefix_space False, but tokenizer\.json says the opposite"):
        load_tokenizer(write_json(tmp_path, "tokenizer_config.json", {"add_prefix_space": False}))


def test_a_template_that_divides_the_text_is_refused(tmp_path: Path) -> None:
    twice = template("<s>")
    twice["single"] *= 2
    with pytest.raises(ConfigError, match="post_processor that repeats"):
        load_tokenizer(write_json(tmp_path, "tokenizer.json", llama2_json() | {"post_processor": twice}))


@pytest.mark.parametrize("damage", [{"vocab": []}, {"merges": [["zz", "q"]]}, {"merges": None}])
def test_damaged_files(tmp_path: Path, damage: dict[str, Any]) -> None:
    file = llama2_json()
    file["model"] |= damage
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(write_json(tmp_path, "tokenizer.json", file))


@pytest.mark.fuzz
def test_mutations_raise_only_the_named_errors(tmp_path: Path) -> None:
    pick = random.Random(6)
    values = [
        None,
        True,
        0,
        -1,
        0.5,
        "",
        "▁",
        "first",
        "Sequence",
        [],
        {},
        [{}],
        [[]],
        {"type": "Sequence"},
        "\ud800",
        ["a", "b"],
    ]
    for _ in range(rounds(1_000)):
        file = pick.choice([llama2_json, mistral_json])()
        for _ in range(pick.randint(1, 2)):
            node: Any = file
            while True:
                place = pick.choice(list(node) if isinstance(node, dict) else range(len(node)))
                inner = node[place]
                if isinstance(inner, dict | list) and inner and pick.random() < 0.8:
                    node = inner
                    continue
                node[place] = copy.deepcopy(pick.choice(values))
                break
        write_json(tmp_path, "tokenizer.json", file)
        try:
            tokenizer = load_tokenizer(tmp_path)
            tokenizer.decode(tokenizer.prompt("once upon é", special=True))
        except (CheckpointError, ConfigError) as error:
            assert "tokenizer.json" in str(error)
