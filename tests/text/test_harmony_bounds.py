"""The cost of a prompt is bounded by the context, not by the request."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.errors import CapacityError, RequestError
from gptjax.text.harmony import Function, render
from gptjax.text.writer import Writer
from tests.fuzz import TIMES, rounds
from tests.hostile.limits import ONE_THREAD
from tests.text.harmony_material import TALES, USER, function

ROOT = Path(__file__).resolve().parents[2]


def _cost(count: int, largest: int, seed: int) -> dict[str, float]:
    """Of random tools, in a process with 1.5 GB of addresses."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.text.hostile_tools", str(count), str(largest), str(seed)],
        env=os.environ | ONE_THREAD,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found: dict[str, float] = json.loads(run.stdout)
    return found


@pytest.mark.fuzz
def test_random_tools_cost_little() -> None:
    """10,000 of them under `make fuzz`, and larger ones. JSON of 100,000 values is about 1 MB."""
    found = _cost(rounds(500), 10_000 if TIMES <= 1 else 100_000, 1)
    assert found["seconds"] < 2
    assert found["megabytes"] < 200
    assert found["fitted"] > rounds(500) / 20  # otherwise only the checks would be measured


def test_nested_alternatives_are_refused_early() -> None:
    """Each level indents all lines below it: 30 MB of text, and millions of tokens, from 0.7 MB."""
    schema: dict = {}
    for _ in range(28):
        schema = {"oneOf": [*[{}] * 8000, schema]}
    with pytest.raises(CapacityError, match="more than 4096 tokens, but max_length is 4096"):
        render([USER], TALES, [function(parameters=schema)], max_length=4096)


@pytest.mark.parametrize("max_length", [60, 100, 1000])
def test_the_limit_is_exact(max_length: int) -> None:
    for count in range(max(max_length - 120, 0), max_length):
        messages = [{"role": "user", "content": " a" * count}]
        ids = render(messages, TALES)
        if len(ids) <= max_length:
            assert render(messages, TALES, max_length=max_length) == ids
        else:
            with pytest.raises(CapacityError, match=f"more than {max_length} tokens, but max_length is {max_length}"):
                render(messages, TALES, max_length=max_length)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "word ", "é", '{"a": [1, 2]}\n'])
def test_a_long_text_in_pieces_is_the_same(unit: str) -> None:
    text = unit * (200_000 // len(unit))
    ids = TALES.encode(text)
    whole, pieces = Writer(TALES, len(ids)), Writer(TALES, len(ids))
    whole.text(text)
    pieces.text(text[start : start + 777] for start in range(0, len(text), 777))
    assert whole.ids == pieces.ids == ids
    with pytest.raises(CapacityError):
        Writer(TALES, len(ids) - 1).text(text)


def test_pieces_that_cannot_fit_are_not_taken() -> None:
    taken = 0

    def forever():
        nonlocal taken
        while True:
            taken += 1
            yield "a b c d "

    with pytest.raises(CapacityError):
        Writer(TALES, 1000).text(forever())
    assert taken < 20_000


def test_values_are_counted() -> None:
    for tools in ([function(parameters={"x": [1] * 300_000})], [[]] * 300_000):
        with pytest.raises(RequestError, match="tools hold more than 250,000 values"):
            render([USER], TALES, tools)
    shared: dict = {}
    for _ in range(20):
        shared = {"oneOf": [shared, shared]}
    with pytest.raises(RequestError, match="the parameters of f hold more than 250,000 values"):
        Function("f", "", shared)


def test_errors_are_short() -> None:
    long = "n" * 1_000_000
    nested: dict = {"type": 3}
    for _ in range(25):
        nested = {"type": "object", "properties": {long: nested}}
    for parameters in ({"properties": {long: 3}}, {"type": long, "items": 3}, {long: {1}}, {long: {1: 2}}, nested):
        with pytest.raises(RequestError) as caught:
            render([USER], TALES, [function(parameters=parameters)])
        assert len(str(caught.value)) < 1500
    for tools in ([function(long)], [function([long] * 100)], [{"type": long}], [function("f<"), long]):
        with pytest.raises(RequestError) as caught:
            render([USER], TALES, tools)
        assert len(str(caught.value)) < 300
    for message in ({"role": long}, {**USER, "name": long}, {"role": "tool", "content": "", "tool_call_id": long}):
        with pytest.raises(RequestError) as caught:
            render([USER, message], TALES)
        assert len(str(caught.value)) < 300
