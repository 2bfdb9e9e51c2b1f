"""Added tokens, in every file that may have them, against the `tokenizers` library and transformers' layouts."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from gptjax.errors import CheckpointError, ConfigError
from gptjax.text import load_tokenizer
from tests.fuzz import rounds
from tests.oracles.older_tokenizer import ADDED, DIALOGUE, NAMED, SPEAKERS, old_layout
from tests.text.text_material import DEMO, GPT2, demo_json, with_added, write_json

# White space to some and not to others: Python's includes U+001C to U+001F, Rust's does not.
SPACES = [*" \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0", "\u1680", "\u180e", "\u2003", "\u2028", "\u2029", "\u202f"]
SPACES += ["\u205f", "\u3000", "\u200b", "\u200d", "\u2060", "\ufeff"]
LETTERS = [
    "a",
    "Z",
    "é",
    "e\u0301",
    "ß",
    "İ",
    "ǅ",
    "_",
    "0",
    "²",
    "٣",
    ".",
    "<",
    ">",
    "|",
    "🐲",
    "\u0301",
    "中",
    "\u200c",
]
NORMALIZERS: list[Any] = [
    None,
    {"type": "Lowercase"},
    {"type": "NFC"},
    {"type": "NFKC"},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Replace", "pattern": {"String": "a"}, "content": "b"},
    {"type": "Prepend", "prepend": "x"},
    {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}, {"type": "Lowercase"}]},
]


def word(pick: random.Random) -> str:
    return "".join(pick.choices([*LETTERS, *SPACES[:8]], k=pick.randint(1, 4)))


def random_file(pick: random.Random) -> tuple[dict[str, Any], list[str]]:
    """A tokenizer.json with random added tokens, and their contents."""
    file = demo_json()
    file["normalizer"] = pick.choice(NORMALIZERS)
    frame = {**file, "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [], "post_processor": None}
    ours = tokenizers.Tokenizer.from_str(json.dumps(frame)).normalizer
    contents, forms = [], set()
    for _ in range(pick.randint(1, 6)):
        content = pick.choice(["<X>", "<x y>", "Wort", word(pick), word(pick) + "|>"])
        # Of two tokens of the same normal form, which one is found is up to the library's hashes.
        form = content if ours is None else ours.normalize_str(content)
        if not form or form in forms or content in file["model"]["vocab"]:
            continue
        forms.add(form)
        contents.append(content)
        flags = {flag: pick.random() < 0.3 for flag in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        file = with_added(file, [content], **flags)
    return file, contents


@pytest.mark.fuzz
def test_random_added_tokens_are_found_as_the_library_finds_them(tmp_path: Path) -> None:
    pick = random.Random(7)
    found = 0
    for _ in range(rounds(8)):
        file, contents = random_file(pick)
        tokenizer = load_tokenizer(write_json(tmp_path, "tokenizer.json", file))
        theirs = tokenizers.Tokenizer.from_str(json.dumps(file))
        ordinary = {**file, "added_tokens": [token for token in file["added_tokens"] if not token["special"]]}
        plain = tokenizers.Tokenizer.from_str(json.dumps(ordinary))
        for token in ordinary["added_tokens"]:
            assert plain.token_to_id(token["content"]) is not None
        ids = {plain.token_to_id(token["content"]): token["id"] for token in ordinary["added_tokens"]}
        for _ in range(20):
            text = "".join(
                pick.choices([*contents, *LETTERS, *SPACES, *map(str.upper, contents)], k=pick.randint(1, 14))
            )
            wanted = theirs.encode(text, add_special_tokens=False).ids
            assert tokenizer.encode(text, special=True) == wanted, (file["added_tokens"], file["normalizer"], text)
            found += len(set(wanted) - set(range(8192)))
            if "<|endoftext|>" not in text:
                wanted = [ids.get(number, number) for number in plain.encode(text, add_special_tokens=False).ids]
                assert tokenizer.encode(text) == wanted
    assert found > rounds(8)


@pytest.mark.parametrize("space", ["\x1c", "\x1f", "\x85", "\u2028", "\u200b"])
def test_odd_white_space_beside_a_token_that_strips(tmp_path: Path, space: str) -> None:
    file = with_added(demo_json(), ["<x>"], lstrip=True, rstrip=True)
    tokenizer = load_tokenizer(write_json(tmp_path, "tokenizer.json", file))
    text = f"a{space}<x>{space}b"
    assert tokenizer.encode(text, special=True) == tokenizers.Tokenizer.from_str(json.dumps(file)).encode(text).ids


def test_a_normalized_token_is_found_in_any_case(tmp_path: Path) -> None:
    file = with_added(demo_json(), ["<Tool>"], normalized=True, special=False) | {"normalizer": {"type": "Lowercase"}}
    tokenizer = load_tokenizer(write_json(tmp_path, "tokenizer.json", file))
    assert tokenizer.encode("<TOOL>") == tokenizer.encode("<tool>") == [8192]


IDS = [50257, 50260, 17250, 50261, 15496, 50258]


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"added_tokens": ADDED, "special_tokens_map": NAMED | SPEAKERS}, (50257, 50258)),
        ({"added_tokens": ADDED}, (50256, 50256)),
        ({"special_tokens_map": NAMED | SPEAKERS}, (50257, 50258)),
        ({"added_tokens": ADDED, "tokenizer_config": NAMED | SPEAKERS}, (50257, 50258)),
        (
            {"added_tokens": ADDED, "special_tokens_map": {"eos_token": {"content": "<eos>", "lstrip": True}}},
            (50256, 50258),
        ),
    ],
)
def test_files_of_older_versions(tmp_path: Path, files: dict[str, Any], ends: tuple[int, int]) -> None:
    """The ids are the issue's, and what transformers 5.23 gives for the same directories (see tests/oracle)."""
    tokenizer = load_tokenizer(old_layout(tmp_path, **files))
    assert tokenizer.encode(DIALOGUE, special=True) == IDS
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (ends[0], (ends[1],))
    assert tokenizer.decode(IDS, special=True) == DIALOGUE
    for content in tokenizer.special_ids.keys() & ADDED:
        assert ADDED[content] not in tokenizer.encode(DIALOGUE), "special tokens in plain text stay text"


def test_deepseeks_tokens_are_special_whatever_the_file_says(tmp_path: Path) -> None:
    """Flagged as in the tokenizer.json of DeepSeek-R1-Distill-Qwen-1.5B. GGUF's converter makes them control tokens."""
    file = with_added(demo_json(), ["<｜begin▁of▁sentence｜>"])
    file = with_added(file, ["<｜User｜>", "<｜Assistant｜>", "<｜｜>", "<think>"], special=False)
    tokenizer = load_tokenizer(write_json(tmp_path, "tokenizer.json", file))
    assert set(tokenizer.special_ids) == {
        *("<|endoftext|>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    }
    text = "<｜User｜>Hi<｜Assistant｜><think>\n"
    written = tokenizers.Tokenizer.from_str(json.dumps(file)).encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, special=True) == written
    user, assistant, _, think = range(written[0], written[0] + 4)
    plain = tokenizer.encode(text)
    assert think in plain and not {user, assistant} & set(plain)
    assert tokenizer.decode(written) == "Hi<think>\n"


def test_a_token_of_the_vocabulary_with_a_purpose_is_special(tmp_path: Path) -> None:
    """As a vocabulary that was trained with "<s>" in it has it."""
    vocab = json.loads((GPT2 / "vocab.json").read_text(encoding="utf-8")) | {"<s>": 50257}
    old_layout(tmp_path, vocab=vocab, special_tokens_map={"bos_token": "<s>"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<s>Hello", special=True) == [50257, 15496]
    assert 50257 not in tokenizer.encode("<s>Hello") and tokenizer.bos_id == 50257


@pytest.mark.parametrize(
    ("unknown", "ids"), [({}, [50256]), ({"unk_token": "<unk>"}, [27, 91, 437, 1659, 5239, 91, 29])]
)
def test_end_of_text_is_special_unless_other_tokens_have_all_its_purposes(
    tmp_path: Path, unknown: dict[str, str], ids: list[int]
) -> None:
    old_layout(tmp_path, special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"} | unknown)
    assert load_tokenizer(tmp_path).encode("<|endoftext|>", special=True) == ids


def test_tokenizer_config_that_has_all_added_tokens_is_complete(tmp_path: Path) -> None:
    token = {"content": "<bos>", "special": True}
    config = {"added_tokens_decoder": {"50257": token}}
    old_layout(tmp_path, added_tokens=ADDED, special_tokens_map=NAMED, tokenizer_config=config)
    tokenizer = load_tokenizer(tmp_path)
    assert dict(tokenizer.special_ids) == {"<bos>": 50257, "<|endoftext|>": 50256}
    assert tokenizer.eos_ids == (50256,)


def test_added_tokens_beside_tokenizer_json(tmp_path: Path) -> None:
    write_json(tmp_path, "tokenizer.json", demo_json())
    write_json(tmp_path, "special_tokens_map.json", {"eos_token": "<|endoftext|>", "bos_token": "<x>"})
    tokenizer = load_tokenizer(write_json(tmp_path, "added_tokens.json", {"<x>": 8192, "<|endoftext|>": 8191}))
    assert tokenizer.encode("a<x>b", special=True) == [64, 8192, 65]
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (8192, (8191,))


@pytest.mark.parametrize(
    "wrong", [{"<x>": "8192"}, {"<x>": True}, {"<x>": -1}, {"<x>": 5}, {"<x>": 50257, "<y>": 50257}]
)
def test_added_tokens_that_cannot_be(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="is damaged"):
        load_tokenizer(old_layout(tmp_path, added_tokens=wrong))


def template(*single: str) -> dict[str, Any]:
    parts = [
        {"Sequence": {"id": "A", "type_id": 0}} if part == "A" else {"SpecialToken": {"id": part, "type_id": 0}}
        for part in single
    ]
    special = {part: {"id": part, "ids": [8191], "tokens": [part]} for part in single if part != "A"}
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": parts, "pair": pair, "special_tokens": special}


END = "<|endoftext|>"


@pytest.mark.parametrize(
    "processor",
    [
        None,
        template("A"),
        template(END, "A"),
        template("A", END),
        template(END, END, "A", END),
        {"type": "Sequence", "processors": [demo_json()["post_processor"], template(END, "A")]},
        {
            "type": "RobertaProcessing",
            "sep": [END, 8191],
            "cls": [END, 8191],
            "trim_offsets": True,
            "add_prefix_space": True,
        },
    ],
)
@pytest.mark.parametrize("prefix_space", [False, True])
def test_a_prompt_is_what_transformers_makes_of_a_text(tmp_path: Path, processor: Any, prefix_space: bool) -> None:
    """`tokenizer(text)` there is the library's `encode`."""
    file = demo_json() | {"post_processor": processor}
    file["pre_tokenizer"]["add_prefix_space"] = prefix_space
    tokenizer = load_tokenizer(write_json(tmp_path, "tokenizer.json", file))
    theirs = tokenizers.Tokenizer.from_str(json.dumps(file))
    for text in ("Hello there", "", " é", "a" + END + "b"):
        assert tokenizer.prompt(text, special=True) == theirs.encode(text).ids
        assert tokenizer.encode(text, special=True) == theirs.encode(text, add_special_tokens=False).ids


def test_what_a_text_has_already_is_not_added_again(tmp_path: Path) -> None:
    file = demo_json() | {"post_processor": template(END, "A", END)}
    tokenizer = load_tokenizer(write_json(tmp_path, "tokenizer.json", file))
    once = [8191, *load_tokenizer(DEMO).encode("Hello"), 8191]
    for text in ("Hello", END + "Hello", "Hello" + END, END + "Hello" + END):
        assert tokenizer.prompt(text, special=True) == once
    assert tokenizer.prompt(END + "Hello").count(8191) == 2, "in plain text it is text"


def test_a_post_processor_that_repeats_the_text_is_refused(tmp_path: Path) -> None:
    file = demo_json() | {"post_processor": template("A", "A")}
    with pytest.raises(ConfigError, match="post_processor that repeats"):
        load_tokenizer(write_json(tmp_path, "tokenizer.json", file))


@pytest.mark.parametrize(("flags", "ids"), [({"add_bos_token": True}, [50256, 15496]), ({}, [15496])])
def test_add_bos_token_of_the_older_layout(tmp_path: Path, flags: dict[str, bool], ids: list[int]) -> None:
    assert load_tokenizer(old_layout(tmp_path, tokenizer_config=flags)).prompt("Hello") == ids
