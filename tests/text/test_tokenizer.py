"""Text to ids and back. The expected ids come from tiktoken (tests/data/gpt2_vocab/README.md) and from `tokenizers`."""

import json
import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax.errors import RequestError
from gptjax.text import Tokenizer, load_tokenizer
from tests.text.text_material import DEMO, GPT2, HARMONY, demo_json, with_added, write_json

PAIRS = json.loads((GPT2 / "pairs.json").read_text(encoding="utf-8"))
SPECIALS = ["<|endoftext|>", *HARMONY]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
MARKED_TEXT = st.lists(ANY_TEXT | st.sampled_from([*SPECIALS, "<|", "|>", " ", "end", "\n"])).map("".join)
FUZZ = settings(max_examples=200, deadline=None, database=None, derandomize=True)


def unpack(value: Any) -> Any:
    """A text or list of ids, written out."""
    if not isinstance(value, dict):
        return value
    unit, count = value["repeat"]
    return value.get("head", []) + unit * count + value["tail"] if "tail" in value else unit * count


def hf(directory: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


HF_DEMO = hf(DEMO)


def hf_ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair["name"])
@pytest.mark.parametrize("form", ["gpt2", "gpt2_json"])
def test_pairs_both_ways(pair: dict[str, Any], form: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(form)
    text, ids = unpack(pair["text"]), unpack(pair["ids"])
    assert tokenizer.encode(text, special=pair["special"]) == ids
    assert tokenizer.decode(ids, special=True) == text


def test_pairs_cover_long_texts_and_specials() -> None:
    assert len(PAIRS) >= 40
    assert sum(len(unpack(pair["text"])) > 10_000 for pair in PAIRS) >= 3
    assert any(50256 in unpack(pair["ids"]) for pair in PAIRS)


@FUZZ
@given(text=MARKED_TEXT, special=st.booleans())
def test_both_forms_agree(gpt2: Tokenizer, gpt2_json: Tokenizer, text: str, special: bool) -> None:
    assert gpt2.encode(text, special=special) == gpt2_json.encode(text, special=special)


@FUZZ
@given(text=ANY_TEXT)
def test_ids_are_the_librarys(demo: Tokenizer, text: str) -> None:
    assert demo.encode(text) == hf_ids(HF_DEMO, text)


@FUZZ
@given(text=MARKED_TEXT)
@example("<|end|><|en<|end|>d|>")
def test_specials_in_plain_text_stay_text(gpt2: Tokenizer, harmony: Tokenizer, text: str) -> None:
    for tokenizer in (gpt2, harmony):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special_ids.values())
        assert tokenizer.decode(ids) == text


@FUZZ
@given(text=MARKED_TEXT)
@example("<|end|><|endoftext|><|end|>")
def test_specials_are_found_when_asked(harmony: Tokenizer, hf_harmony: tokenizers.Tokenizer, text: str) -> None:
    ids = harmony.encode(text, special=True)
    assert ids == hf_ids(hf_harmony, text)
    assert harmony.decode(ids, special=True) == text
    assert harmony.decode(ids) == re.sub("|".join(map(re.escape, SPECIALS)), "", text)
    assert all(ids.count(harmony.special_ids[content]) == text.count(content) for content in SPECIALS)


@pytest.fixture(scope="module")
def hf_harmony(harmony_dir: Path) -> tokenizers.Tokenizer:
    return hf(harmony_dir)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
@pytest.mark.parametrize("kind", [True, False], ids=["special", "ordinary"])
def test_flags_of_added_tokens(flag: str, kind: bool, tmp_path: Path) -> None:
    contents = ["<pad>", "<pad>2", "word"]
    write_json(
        tmp_path, "tokenizer.json", with_added(demo_json(), contents, special=kind, normalized=False, **{flag: True})
    )
    tokenizer, theirs = load_tokenizer(tmp_path), hf(tmp_path)
    pick, found = random.Random(3), set()
    for _ in range(500):
        text = "".join(pick.choices([*contents, " ", "  ", "\n", "a", "é", "_", "."], k=pick.randint(1, 12)))
        ids = tokenizer.encode(text, special=True)
        found |= set(ids) & {8192, 8193, 8194}
        assert ids == hf_ids(theirs, text)
        if not kind:
            assert tokenizer.encode(text) == ids
    assert found == {8192, 8193, 8194}
    assert tokenizer.decode([8192, 8193], special=False) == ("" if kind else "<pad><pad>2")


def test_longest_special_wins(tmp_path: Path) -> None:
    write_json(tmp_path, "tokenizer.json", with_added(demo_json(), ["<|a", "<|a|>", "<|"]))
    assert load_tokenizer(tmp_path).encode("<|a|><|a<|", special=True) == [8193, 8192, 8194]


@pytest.mark.parametrize("flag", ["lstrip", "rstrip"])
def test_white_space_around_specials_takes_linear_time(tmp_path: Path, flag: str) -> None:
    """Ten times the text: quadratic code takes a hundred times as long, of the processor: others may keep it busy."""
    write_json(tmp_path, "tokenizer.json", with_added(demo_json(), ["<x>"], **{flag: True}))
    tokenizer = load_tokenizer(tmp_path)

    def seconds(count: int) -> float:
        text, took = " " * 3 * count + "<x>" * count + " " * 3 * count, []
        for _ in range(3):
            start = time.thread_time()
            assert tokenizer.encode(text, special=True).count(8192) == count
            took.append(time.thread_time() - start)
        return min(took)

    assert seconds(100_000) < 25 * seconds(10_000)


def test_attributes(gpt2: Tokenizer, demo: Tokenizer, harmony: Tokenizer) -> None:
    assert (gpt2.kind, gpt2.vocab_size, dict(gpt2.special_ids)) == ("byte-level-bpe", 50257, {"<|endoftext|>": 50256})
    assert (gpt2.bos_id, gpt2.eos_ids, gpt2.context_length) == (50256, (50256,), None)
    assert (demo.bos_id, demo.eos_ids, demo.context_length, demo.vocab_size) == (8191, (8191,), 512, 8192)
    assert list(harmony.special_ids) == SPECIALS
    with pytest.raises(TypeError):
        harmony.special_ids["<|x|>"] = 1  # type: ignore[index]


def test_token_bytes(gpt2: Tokenizer, harmony: Tokenizer) -> None:
    assert gpt2.token_bytes(995) == b" world"
    assert gpt2.token_bytes(50256) == b"<|endoftext|>"
    assert gpt2.token_bytes(50257) == gpt2.token_bytes(2**70) == b""
    assert harmony.token_bytes(harmony.special_ids["<|call|>"]) == b"<|call|>"
    assert sorted(gpt2.token_bytes(n) for n in range(256)) == [bytes([n]) for n in range(256)]


def test_ids_without_a_token_are_nothing(harmony: Tokenizer) -> None:
    ids = harmony.encode("ab")
    assert harmony.decode([9000, *ids, 200_019, 201_087, 2**40]) == "ab"


def test_spaces_before_punctuation_are_kept(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    write_json(tmp_path, "tokenizer_config.json", {"clean_up_tokenization_spaces": True})
    text = 'He said , " do n\'t ! " .'
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["\ud800", "ab\udfffc", "ab\ud83d\ude00"])
def test_lone_surrogates(gpt2: Tokenizer, text: str) -> None:
    position = next(n for n, letter in enumerate(text) if letter not in "abc")
    with pytest.raises(RequestError, match=rf"U\+{ord(text[position]):04X}\) at position {position}\b"):
        gpt2.encode(text)


@pytest.mark.parametrize("text", [None, b"bytes", 5, ["a"], True])
def test_text_of_another_type(gpt2: Tokenizer, text: Any) -> None:
    with pytest.raises(RequestError, match=f"{type(text).__name__}, not str"):
        gpt2.encode(text)


@pytest.mark.parametrize(
    "token_id", [True, False, "5", 1.0, None, [1], b"1", np.float32(1), np.bool_(True), -1, np.int8(-5)]
)
def test_ids_of_another_type(gpt2: Tokenizer, token_id: Any) -> None:
    for use in (
        lambda: gpt2.decode([1, token_id]),
        lambda: gpt2.stream().push(token_id),
        lambda: gpt2.token_bytes(token_id),
    ):
        with pytest.raises(RequestError, match="token id is"):
            use()


@pytest.mark.parametrize("ids", ["12", b"12", 5, None])
def test_ids_that_are_no_sequence(gpt2: Tokenizer, ids: Any) -> None:
    with pytest.raises(RequestError, match="sequence of token ids"):
        gpt2.decode(ids)


def test_ids_of_any_integer_type(gpt2: Tokenizer) -> None:
    assert gpt2.decode(np.array([31373, 995], np.uint16)) == gpt2.decode(iter((31373, 995))) == "hello world"
    assert gpt2.stream().push(np.int64(31373)) == "hello"


def test_one_tokenizer_in_many_threads(harmony: Tokenizer) -> None:
    """Modes alternate, so that a flag switched on a shared object would show."""
    pick = random.Random(5)
    words = [*SPECIALS, "Once", " upon", " a", "time", "é", "🐲", "\n", "  "]
    jobs = [("".join(pick.choices(words, k=30)), bool(n % 2)) for n in range(400)]

    def work(job: tuple[str, bool]) -> tuple[list[int], str, str]:
        text, special = job
        ids = harmony.encode(text, special=special)
        stream = harmony.stream(special=special)
        return ids, harmony.decode(ids, special=special), "".join(map(stream.push, ids)) + stream.finish()

    alone = [work(job) for job in jobs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(work, jobs * 5))
    finally:
        sys.setswitchinterval(interval)
    assert together == alone * 5
    assert all(text == job[0] for (_, text, _), job in zip(alone, jobs, strict=True))
