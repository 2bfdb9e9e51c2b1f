"""Stops, ends and texts of a request, with no model."""

import random

import pytest

from gptjax.engine.output import Output, StopFinder
from gptjax.engine.request import Request, SamplingParams, Token
from gptjax.text import Detokenizer


def _cut(text: str, stops: list[str]) -> str:
    """The definition: the text before the stop that is complete first; of those that end together, the longest."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)]
    return text


def _pieces(text: str, rng: random.Random) -> list[str]:
    pieces = []
    while text:
        size = rng.randint(0, 4)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def _streamed(pieces: list[str], stops: list[str]) -> str:
    finder, out = StopFinder(stops), ""
    for piece in pieces:
        text, stopped = finder.push(piece)
        out += text
        if stopped:
            return out
    return out + finder.finish()


def test_stops_cut_the_same_however_the_text_is_split():
    rng = random.Random(0)
    for _ in range(5000):
        text = "".join(rng.choice("ab\n") for _ in range(rng.randint(0, 14)))
        stops = ["".join(rng.choice("ab\n") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        assert _streamed(_pieces(text, rng), stops) == _cut(text, stops), (text, stops)


def test_nothing_of_a_possible_stop_is_shown_early():
    finder = StopFinder(["User:"])
    assert finder.push("Hi\nUs") == ("Hi\n", False)
    assert finder.push("ually") == ("Usually", False)
    assert finder.push(" User") == (" ", False)
    assert finder.push(":") == ("", True)


def _output(stop=(), stop_ids=(), max_tokens=100, max_length=1000, prompt=3):
    table = {n: bytes([n]) for n in range(256)}
    request = Request(tuple(range(prompt)), max_tokens, SamplingParams(seed=1), frozenset(stop_ids), tuple(stop))
    return Output(request, max_length=max_length, detokenizer=Detokenizer(lambda n: table.get(n, b"")))


def _feed(output: Output, tokens) -> list:
    chunks = []
    for token in tokens:
        chunks.append(output.push(Token(0, token, -0.5, ())))
        if chunks[-1].completion is not None:
            break
    return chunks


def test_length_ends_a_text_and_keeps_its_tail():
    chunks = _feed(_output(max_tokens=4), "né!".encode()[:2] + b"\xc3" + b"z" * 10)
    completion = chunks[-1].completion
    assert completion.finish_reason == "length"
    assert len(completion.token_ids) == completion.usage.completion_tokens == 4
    assert (
        completion.text
        == "".join(chunk.text for chunk in chunks)
        == "n" + bytes([0xC3, 0xC3]).decode(errors="replace") + "z"
    )


def test_the_end_of_text_token_ends_it_and_is_not_shown():
    chunks = _feed(_output(stop_ids=[0]), b"ab\xe2\x82\0cd")
    assert chunks[-1].completion.text == "ab\ufffd"
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].completion.token_ids == tuple(b"ab\xe2\x82\0")


def test_a_held_back_beginning_of_a_stop_is_not_lost():
    assert _feed(_output(stop=["abc"], max_tokens=2), b"ab")[-1].completion.text == "ab"
    assert _feed(_output(stop=["abc"], stop_ids=[0]), b"ab\0")[-1].completion.text == "ab"


def test_a_stop_ends_the_text_before_it():
    chunks = _feed(_output(stop=["\n\n", "END"]), b"one\ntwo\n\nthree")
    assert chunks[-1].completion.text == "one\ntwo"
    assert chunks[-1].finish_reason == "stop"


@pytest.mark.parametrize(("prompt", "max_length", "room"), [(3, 10, 8), (10, 10, 1), (9, 10, 2)])
def test_a_text_ends_where_the_context_is_full(prompt, max_length, room):
    chunks = _feed(_output(prompt=prompt, max_length=max_length), b"x" * 50)
    assert chunks[-1].finish_reason == "length"
    assert chunks[-1].completion.usage.completion_tokens == room


def test_a_token_of_minus_one_ends_a_row_with_an_error():
    chunks = _feed(_output(), [65, 66, -1])
    completion = chunks[-1].completion
    assert (completion.finish_reason, completion.text, completion.token_ids) == ("error", "AB", (65, 66))
    assert "not finite" in completion.error
    assert "float32" in completion.error
