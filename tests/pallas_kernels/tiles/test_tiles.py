"""Tile tables: what is found for a shape, what is written, and what a damaged file says."""

import json

import pytest

from pallas_kernels import tiles
from pallas_kernels.tiles import Entry

SHAPE = {"in": 2880, "out": 5120, "dtype": "bfloat16"}
DEVICE = "NVIDIA H200"


def _entry(rows: int, block: int, **changes) -> Entry:
    facts = {
        "operation": "matvec/mosaic",
        "shape": {"rows": rows, **SHAPE},
        "settings": {"block": block, "layout": "tiled"},
        "microseconds": 9.5,
        "date": "2026-11-21",
        "jax": "0.11.2",
    }
    return Entry(**{**facts, **changes})


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The table of DEVICE, where this test's are."""
    monkeypatch.setattr(tiles, "__file__", str(tmp_path / "__init__.py"))
    return tiles.path(DEVICE)


def _found(rows: int, operation: str = "matvec/mosaic", device: str = DEVICE, **changes):
    found = tiles.lookup(device, operation, {"rows": rows, **SHAPE, **changes})
    return found and found["block"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H200", "nvidia-h200.json"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb.json"),
        ("cpu", "cpu.json"),
        ("../../etc/passwd", "etc-passwd.json"),
    ],
)
def test_a_devices_file_lies_in_the_package(kind, name):
    assert tiles.path(kind).name == name
    assert tiles.path(kind).parent.name == "tiles"


def test_without_a_table_the_heuristic_decides(file):
    assert _found(1) is None


def test_the_exact_shape_comes_first_and_then_the_nearest_rows(file):
    tiles.update(file, [_entry(1, 10), _entry(8, 80), _entry(32, 320)])
    assert [_found(rows) for rows in (1, 8, 32)] == [10, 80, 320]
    assert [_found(rows) for rows in (2, 4, 15, 16, 17, 1000)] == [10, 80, 80, 320, 320, 320]
    assert _found(8, "matvec/triton") is None
    assert _found(8, device="NVIDIA H100") is None
    assert _found(8, out=5121) is None
    assert _found(8, dtype="float32") is None
    assert tiles.lookup(DEVICE, "matvec/mosaic", {"rows": 8, "in": 2880}) is None


def test_what_is_found_can_be_changed_without_harm(file):
    tiles.update(file, [_entry(1, 10)])
    tiles.lookup(DEVICE, "matvec/mosaic", {"rows": 1, **SHAPE})["block"] = 0
    assert _found(1) == 10


def test_writing_replaces_the_same_key_and_keeps_the_others(file):
    tiles.update(file, [_entry(8, 80), _entry(1, 10)])
    assert _found(1) == 10
    tiles.update(file, [_entry(1, 11), _entry(1, 5, operation="attention/mosaic"), _entry(10, 100)])
    assert [_found(rows) for rows in (1, 8, 10)] == [11, 80, 100]
    lines = file.read_text().splitlines()
    entries = [json.loads(line.rstrip(",")) for line in lines[1:-1]]
    assert (lines[0], lines[-1]) == ("[", "]")
    assert [(entry["operation"], entry["shape"]["rows"]) for entry in entries] == [
        ("attention/mosaic", 1),
        ("matvec/mosaic", 1),
        ("matvec/mosaic", 8),
        ("matvec/mosaic", 10),
    ]
    assert sorted(each.name for each in file.parent.iterdir()) == [file.name]
    assert tiles.text(tiles.read(file)) == file.read_text()


def test_a_trial_answers_first_and_notes_what_is_asked(file):
    tiles.update(file, [_entry(1, 10)])
    given = {tiles.key("matvec/mosaic", {**SHAPE, "rows": 8}): {"block": 7}}
    with tiles.trial(given) as asked:
        assert (_found(8), _found(1), _found(8), _found(8, "matvec/triton")) == (7, 10, 7, None)
    assert asked == [
        tiles.key("matvec/mosaic", {"rows": 8, **SHAPE}),
        tiles.key("matvec/mosaic", {"rows": 1, **SHAPE}),
        tiles.key("matvec/triton", {"rows": 8, **SHAPE}),
    ]
    assert _found(8) == 10


def _raw(**changes) -> str:
    sound = json.loads(tiles.text([_entry(1, 10)]))[0]
    return json.dumps([sound, {**sound, "shape": {"rows": 2}, **changes}])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("{}", "must be a list, found dict"),
        ("[3]", "entry 1: it must have operation, shape, .* found int"),
        ('[{"operation": "matvec/mosaic"}]', r"entry 1: .* found \['operation'\]"),
        (_raw(tile=1), "entry 2: .* 'tile'"),
        (_raw(operation=3), "entry 2: operation must be a text"),
        (_raw(shape={"rows": 0}), "entry 2: shape must be names with sizes from 1"),
        (_raw(shape={"rows": True}), "entry 2: shape"),
        (_raw(shape={"rows": "8"}), "entry 2: rows must be a number"),
        (_raw(shape=[1, 2]), "entry 2: shape"),
        (_raw(settings={}), "entry 2: settings"),
        (_raw(settings={"block": 1.5}), "entry 2: settings"),
        (_raw(settings={"block": None}), "entry 2: settings"),
        (_raw(microseconds=0), "entry 2: microseconds must be a number above 0"),
        (_raw(microseconds=float("nan")), "entry 2: microseconds"),
        (_raw(microseconds=float("inf")), "entry 2: microseconds"),
        (_raw(microseconds="9"), "entry 2: microseconds"),
        (_raw(date=20261121), "entry 2: date"),
        (_raw(shape={"rows": 1, **SHAPE}), "entry 2: the same as entry 1"),
    ],
)
def test_a_malformed_table_is_told_with_its_file_and_entry(file, text, says):
    file.write_text(text)
    with pytest.raises(ValueError, match=says) as raised:
        _found(1)
    assert str(file) in str(raised.value) and "gptjax bench --tune" in str(raised.value)
    with pytest.raises(ValueError, match=says):
        tiles.update(file, [_entry(1, 10)])
    assert file.read_text() == text


def test_the_packages_own_tables_are_sound_and_as_the_writer_leaves_them():
    for file in tiles.path("cpu").parent.glob("*.json"):
        assert tiles.text(tiles.read(file)) == file.read_text()
