"""Reading small files: limits, and JSON whose nesting is bounded before a parser sees it."""

import json
import os
import random

import pytest

from gptjax.errors import CheckpointError
from gptjax.support import files, quoting
from tests.fuzz import rounds


def _depth(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def _value(rng, depth):
    text = "".join(rng.choice('[]{}"\\a\n/uй') for _ in range(rng.randrange(5)))
    kind = rng.random()
    if depth == 0 or kind < 0.3:
        return rng.choice([text, 1, None])
    inner = [_value(rng, depth - 1) for _ in range(rng.randrange(3))]
    return inner if kind < 0.6 else {f"{text}{number}": value for number, value in enumerate(inner)}


@pytest.mark.fuzz
def test_nesting_is_measured_as_the_parser_sees_it(monkeypatch):
    for number in range(rounds(2000)):
        rng = random.Random(number)
        value = _value(rng, 6)
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
        monkeypatch.setattr(files, "MAX_DEPTH", _depth(value))
        assert files.parse_json(text) == value
        if _depth(value):
            monkeypatch.setattr(files, "MAX_DEPTH", _depth(value) - 1)
            with pytest.raises(ValueError, match="nested too deeply"):
                files.parse_json(text)


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"a":' * 200_000 + "1" + "}" * 200_000, '[{"a":' * 100_000 + "]", "[" * 65 + "]" * 65],
    ids=["open", "objects", "both", "just too deep"],
)
def test_deep_nesting_is_a_fault_of_the_text(text):
    with pytest.raises(ValueError, match="nested too deeply, more than 64 levels"):
        files.parse_json(text)


def test_nesting_within_the_limit_and_brackets_in_strings_are_fine():
    assert _depth(files.parse_json("[" * 64 + "]" * 64)) == 64
    assert files.parse_json(json.dumps("[" * 1000 + '\\"{' * 1000)) == "[" * 1000 + '\\"{' * 1000
    assert files.parse_json(json.dumps([[]] * 1000)) == [[]] * 1000


def test_the_number_of_arrays_is_bounded(monkeypatch):
    monkeypatch.setattr(files, "MAX_CONTAINERS", 1000)
    with pytest.raises(ValueError, match="more than 1,000 arrays and objects"):
        files.parse_json(json.dumps([{}] * 1000))


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "[NaN]", "[Infinity]"])
def test_strictly_there_are_no_doubled_keys_and_no_nan(text):
    files.parse_json(text)
    with pytest.raises(ValueError, match=r"occurs twice|is not JSON"):
        files.parse_json(text, strict=True)


def test_limits(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b" " * files.LIMITS["config.json"])
    assert len(files.read_bytes(path)) == files.LIMITS["config.json"]
    with path.open("ab") as file:
        file.write(b" ")
    with pytest.raises(CheckpointError, match=r"config\.json is larger than the limit of 4,194,304 bytes"):
        files.read_bytes(path)
    os.truncate(path, 1 << 40)
    with pytest.raises(CheckpointError, match="is larger than"):
        files.read_json(path)


def test_a_file_that_grows_while_it_is_read(tmp_path, monkeypatch):
    path, real = tmp_path / "x", os.read
    path.write_bytes(b"x")

    def grow(descriptor, count):
        with path.open("ab") as file:
            file.write(b"x" * 10)
        return real(descriptor, count)

    monkeypatch.setattr(files.os, "read", grow)
    with pytest.raises(CheckpointError, match="larger than the limit of 100 bytes"):
        files.read_bytes(path, 100)


def test_what_is_not_there_is_none(tmp_path):
    assert files.read_bytes(tmp_path / "x") is None
    assert files.read_json(tmp_path / "x" / "y") is None
    (tmp_path / "x").write_text("text")
    assert files.read_text(tmp_path / "x" / "y") is None  # in a file, not a directory


@pytest.mark.parametrize("name", ["\x1b[2J", "x" * 10_000, "\ud800", ""])
def test_names_are_shown_in_a_line_that_can_be_printed(name):
    shown = quoting.shown(name)
    assert shown.isprintable() and 0 < len(shown) <= 301
    shown.encode()
