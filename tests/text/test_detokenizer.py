"""Incremental decoding, against decoding in one go and against `tokenizers`."""

import json
import random
import time
from typing import Any

import pytest
import tokenizers

from gptjax.text import Tokenizer
from gptjax.text.detokenizer import Detokenizer
from tests.text.text_material import CONTINUATION_BYTE, GPT2

LENGTHS = (0, 1, 2, 3, 5, 8, 20)


def sequences(tokenizer: Tokenizer, count: int, seed: int) -> list[list[int]]:
    """Half of the tokens are single bytes, most of them of characters of several bytes; some are special or unknown."""
    pick = random.Random(seed)
    size = tokenizer.vocab_size
    lone = {tokenizer.token_bytes(n): n for n in range(size) if len(tokenizer.token_bytes(n)) == 1}
    leads = [lone[bytes([n])] for n in (0xC3, 0xE2, 0xED, 0xE0, 0xF0, 0xF4, 0xC0, 0xFF, 0x41)]
    follows = [lone[bytes([n])] for n in (0x80, 0x8F, 0x9F, 0xA0, 0xBF)]
    specials = list(tokenizer.special_ids.values())
    unknown = [size, size + 7, 200_019, 201_087]
    kinds = [range(size), leads, follows, specials, unknown]
    return [
        [pick.choice(pick.choices(kinds, (8, 4, 8, 1, 1))[0]) for _ in range(pick.choice(LENGTHS))]
        for _ in range(count)
    ]


def pieces(tokenizer: Tokenizer, ids: list[int], special: bool) -> list[str]:
    stream = tokenizer.stream(special=special)
    return [stream.push(token_id) for token_id in ids] + [stream.finish()]


@pytest.mark.parametrize("special", [False, True])
def test_random_ids(harmony: Tokenizer, harmony_dir: Any, special: bool) -> None:
    """Joined pieces = decode = the bytes, decoded = the library's text; and every piece is final when it comes."""
    theirs = tokenizers.Tokenizer.from_file(str(harmony_dir / "tokenizer.json"))
    hidden = set() if special else set(harmony.special_ids.values())
    replaced = 0
    for ids in sequences(harmony, 5_000, seed=11):
        text = harmony.decode(ids, special=special)
        data = b"".join(harmony.token_bytes(n) for n in ids if n not in hidden)
        assert text == data.decode("utf-8", "replace")
        assert text == theirs.decode(ids, skip_special_tokens=not special)
        got, seen = pieces(harmony, ids, special), ""
        for piece in got:
            seen += piece
            assert text.startswith(seen)
        assert seen == text
        replaced += "\ufffd" in text
    assert replaced > 1_000


def test_random_ids_of_gpt2(gpt2: Tokenizer) -> None:
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(GPT2 / "vocab.json"), str(GPT2 / "merges.txt")))
    theirs.decoder = tokenizers.decoders.ByteLevel()
    for ids in sequences(gpt2, 3_000, seed=12):
        known = [n for n in ids if n < 50256]
        assert "".join(pieces(gpt2, known, special=False)) == theirs.decode(known) == gpt2.decode(ids)


def test_texts_of_the_pairs(gpt2: Tokenizer) -> None:
    for pair in json.loads((GPT2 / "pairs.json").read_text(encoding="utf-8")):
        if isinstance(pair["text"], str):
            assert "".join(pieces(gpt2, pair["ids"], special=True)) == pair["text"]


def test_a_character_comes_whole_and_at_once(gpt2: Tokenizer) -> None:
    ids = gpt2.encode("🐲") + gpt2.encode("!")
    assert len(ids) > 3
    assert pieces(gpt2, ids, special=False) == [""] * (len(ids) - 2) + ["🐲", "!", ""]


def test_plain_tokens_come_at_once(gpt2: Tokenizer) -> None:
    assert pieces(gpt2, [31373, 995], special=False) == ["hello", " world", ""]


def test_an_unfinished_tail_is_not_lost(gpt2: Tokenizer) -> None:
    cut = gpt2.encode("a🐲")[:-1]
    assert pieces(gpt2, cut, special=False)[-1] == "\ufffd"
    assert "".join(pieces(gpt2, cut, special=False)) == "a\ufffd" == gpt2.decode(cut)


def test_bytes_that_cannot_go_on_come_out_with_the_next_token(gpt2: Tokenizer) -> None:
    lead = gpt2.encode("🐲")[:1]
    assert pieces(gpt2, [*lead, 995], special=False) == ["", "\ufffd world", ""]


def test_finish_begins_a_new_text(gpt2: Tokenizer) -> None:
    stream = gpt2.stream()
    assert stream.push(gpt2.encode("🐲")[0]) == ""
    assert [stream.finish(), stream.finish(), stream.push(31373)] == ["\ufffd", "", "hello"]


def test_specials_within_a_character(gpt2: Tokenizer) -> None:
    """Hidden, a special token is nothing at all; shown, it breaks the character."""
    first, *rest = gpt2.encode("🐲")
    ids = [first, 50256, *rest]
    assert "".join(pieces(gpt2, ids, special=False)) == "🐲"
    assert "".join(pieces(gpt2, ids, special=True)).startswith("\ufffd<|endoftext|>\ufffd")


def test_streams_do_not_share_bytes(gpt2: Tokenizer) -> None:
    one, other = gpt2.stream(), gpt2.stream()
    for token_id in gpt2.encode("🐲")[:-1]:
        assert one.push(token_id) == ""
    assert other.push(gpt2.encode("🐲")[-1]) == "\ufffd"
    assert one.push(gpt2.encode("🐲")[-1]) == "🐲"


@pytest.mark.parametrize("cycle", [b"\x80", b"\xf0\x9f\x90"], ids=["continuation bytes", "unfinished characters"])
def test_time_is_linear(gpt2: Tokenizer, cycle: bytes) -> None:
    """A method that reads back grows tenfold here; the bound leaves room for noise.

    The time is the processor's, as others may keep the machine busy; that ids are not asked for again is counted.
    """
    lone = {gpt2.token_bytes(n): n for n in range(256)}
    assert gpt2.token_bytes(json.loads((GPT2 / "vocab.json").read_text("utf-8"))[CONTINUATION_BYTE]) == b"\x80"
    ids = [lone[bytes([byte])] for byte in cycle] * (20_000 // len(cycle))

    def seconds_a_token(count: int) -> float:
        took = []
        for _ in range(5):
            stream = gpt2.stream()
            start = time.thread_time()
            for token_id in ids[:count]:
                stream.push(token_id)
            stream.finish()
            took.append(time.thread_time() - start)
        return min(took) / count

    assert seconds_a_token(len(ids)) < 3 * seconds_a_token(2_000)

    asked: list[int] = []

    def bytes_of(token_id: int) -> bytes:
        asked.append(token_id)
        return gpt2.token_bytes(token_id)

    stream = Detokenizer(bytes_of)
    assert "".join(map(stream.push, ids)) + stream.finish() == gpt2.decode(ids)
    assert asked == ids
