"""Hostile and damaged GGUF files: each is refused with an error that says what is wrong, at once, in little memory."""

import os
import shutil
import struct
import time
import tracemalloc
from pathlib import Path

import pytest

from gptjax.errors import CheckpointError
from gptjax.gguf import cursor, open_gguf
from tests.gguf import made
from tests.gguf.made import Entry
from tests.gguf.test_gguf_reading import ENTRIES, METADATA, split

ROOM = 64 << 20
SECONDS = 1
FULL = made.file(METADATA, ENTRIES)
PADDING = bytes(64)  # so that a count is not refused for the bytes that a minimal file lacks


def _key(value: bytes, key: str | bytes = "k") -> bytes:
    """A file with one key."""
    return made.header([(key, value)]) + PADDING


def _tensor(name: str | bytes = "t", kind: int = 0, dims: tuple[int, ...] = (2,), offset: int = 0) -> bytes:
    """A file with one tensor of 8 bytes, at 0."""
    return made.file({}, [(name, Entry(kind, dims, bytes(8), offset))])


def _two(first: Entry, second: Entry) -> bytes:
    return made.header({}, {"a": first, "b": second}) + bytes(1024)


def _aligned(value: bytes) -> bytes:
    return made.file({"general.alignment": value}, {"t": Entry(0, [2], bytes(8))})


HUGE = 2**64 - 1
NESTED = struct.pack("<I", made.ARRAY) + struct.pack("<IQ", made.ARRAY, 1) * 10_000 + struct.pack("<IQ", made.U8, 0)
HOSTILE = {
    # The beginning.
    "an empty file": (b"", "is empty; download the file again"),
    "three bytes": (b"GGU", "is not a GGUF file: it begins with b'GGU'"),
    "another magic": (made.header(magic=b"GGML"), "is not a GGUF file: it begins with b'GGML'"),
    "a swapped magic": (made.header(magic=b"FUGG"), "is not a GGUF file: it begins with b'FUGG'"),
    "no version": (b"GGUF\3\0", "the version would need 4 more bytes, but the file has only 2"),
    "version 0": (made.header(version=0), "is GGUF version 0, and gptjax reads 2 and 3; make it again"),
    "version 1": (made.header(version=1), "is GGUF version 1, and gptjax reads 2 and 3; make it again"),
    "version 4": (made.header(version=4), "is GGUF version 4, and gptjax reads 2 and 3; update gptjax"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian; make it again in little-endian order"),
    "no counts": (made.header()[:20], "the number of keys would need 8 more bytes, but the file has only 4"),
    # Counts.
    "2^64 tensors": (made.header(tensors=HUGE) + PADDING, f"claims {HUGE:,} tensors, but has only 64 bytes after"),
    "2^64 keys": (made.header(keys=HUGE) + PADDING, f"claims {HUGE:,} keys, but has only 64 bytes after"),
    "2^59 tensors, 0 in 64 bits": (made.header(tensors=2**59) + PADDING, f"claims {2**59:,} tensors"),
    "more tensors than are accepted": (
        made.header(tensors=65_537) + bytes(33 * 65_537),
        "claims 65,537 tensors; at most 65,536 are accepted",
    ),
    "more keys than are accepted": (made.header(keys=65_537) + bytes(14 * 65_537), "claims 65,537 keys; at most"),
    "one key too few": (made.header(METADATA, keys=len(METADATA) + 1) + PADDING, "is '', which is not a name"),
    # Keys.
    "a key of 2^64 bytes": (
        made.header(keys=1) + made.text(b"", HUGE) + PADDING,
        f"the name of key 1 of 1 would need {HUGE:,} more bytes, but the file has only 64",
    ),
    "a key without a name": (_key(made.number(made.U8, 1), ""), "the name of key 1 of 1 is '', which is not a name"),
    "a NUL in a key": (_key(made.number(made.U8, 1), "a\0b"), r"is 'a\x00b', which is not a name"),
    "an escape in a key": (_key(made.number(made.U8, 1), "\x1b[2J"), r"is '\x1b[2J', which is not a name"),
    "a key of 100,000 characters": (_key(made.number(made.U8, 1), "k" * 100_000), "kkk…, which is not a name"),
    "a key that is not UTF-8": (_key(made.number(made.U8, 1), b"a\xff"), "key 1 of 1 is not UTF-8 (invalid start byte"),
    "a key twice": (
        made.header([("k", made.number(made.U8, 1)), ("k", made.number(made.U8, 2))]) + PADDING,
        "the key 'k' occurs twice",
    ),
    # Values.
    "an unknown type of value": (_key(struct.pack("<IQ", 13, 0)), "the value of 'k' has values of the unknown type 13"),
    "the type 2^32 - 1": (_key(struct.pack("<IQ", 2**32 - 1, 0)), "has values of the unknown type 4294967295"),
    "an array of an unknown type": (_key(struct.pack("<IIQ", made.ARRAY, 99, 1)), "values of the unknown type 99"),
    "an empty array of an unknown type": (_key(struct.pack("<IIQ", made.ARRAY, 99, 0)), "the unknown type 99"),
    "a string of 2^64 bytes": (
        _key(struct.pack("<IQ", made.STRING, HUGE)),
        f"the value of 'k' would need {HUGE:,} more bytes, but the file has only 64",
    ),
    "a string that is not UTF-8": (
        _key(made.string(b"ab\xc3")),
        "the value of 'k' is not UTF-8 (unexpected end of data",
    ),
    "2^64 strings": (_key(made.array(made.STRING, [], HUGE)), f"claims {HUGE:,} values, but the file has only 64"),
    "2^61 numbers, 0 bytes in 64 bits": (_key(made.array(made.U64, [], 2**61)), f"claims {2**61:,} values"),
    "one string too few": (
        made.header({"k": made.array(made.STRING, ["a" * 40], 2)}),
        "the value of 'k' would need 8 more bytes, but the file has only 0",
    ),
    "a string in an array that is not UTF-8": (_key(made.array(made.STRING, [b"a", b"\xed\xa0\x80"])), "is not UTF-8"),
    "an array of arrays": (
        _key(struct.pack("<IIQ", made.ARRAY, made.ARRAY, 1)),
        "the value of 'k' is an array of arrays, which llama.cpp refuses, too",
    ),
    "arrays in each other, 10,000 deep": (_key(NESTED), "the value of 'k' is an array of arrays"),
    "a truth value of 2": (_key(made.number(made.BOOL, 2)), "has a truth value that is neither 0 nor 1"),
    "truth values of 255": (_key(made.array(made.BOOL, [0, 255])), "has a truth value that is neither 0 nor 1"),
    "49 bytes with which the gguf package does not end": (
        made.header({"k": made.array(made.U8, [], 2**63)}),
        f"the value of 'k' claims {2**63:,} values, but the file has only 0 bytes after it",
    ),
    # Alignment.
    "alignment 0": (_aligned(made.number(made.U32, 0)), "general.alignment is 0, expected a power of two"),
    "alignment 48": (_aligned(made.number(made.U32, 48)), "general.alignment is 48, expected a power of two"),
    "alignment -32": (_aligned(made.number(made.I32, -32)), "general.alignment is -32, expected a power of two"),
    "alignment 2^31": (_aligned(made.number(made.U32, 2**31)), "general.alignment is 2147483648, expected a power of"),
    "alignment 2^63": (_aligned(made.number(made.U64, 2**63)), "general.alignment is 9223372036854775808, expected"),
    "alignment true": (_aligned(made.number(made.BOOL, 1)), "general.alignment is True, expected a power of two"),
    "alignment in words": (_aligned(made.string("x" * 10_000)), "xxx', expected a power of two up to 1,048,576"),
    "alignment beyond the file": (
        _aligned(made.number(made.U32, 1 << 20)),
        "the padding before the tensors would need 1,048,",
    ),
    # Tensors.
    "a tensor's name of 2^63 bytes": (
        made.header(tensors=1) + made.text(b"", 2**63) + PADDING,
        f"the name of tensor 1 of 1 would need {2**63:,} more bytes",
    ),
    "a tensor without a name": (_tensor(""), "the name of tensor 1 of 1 is '', which is not a name"),
    "a NUL in a tensor's name": (_tensor("a\0"), r"is 'a\x00', which is not a name"),
    "a tensor's name that is not UTF-8": (_tensor(b"\xff"), "the name of tensor 1 of 1 is not UTF-8"),
    "a tensor twice": (made.file({}, [("t", ENTRIES["matrix"])] * 2), "it has two tensors called 't'"),
    "no dimensions": (_tensor(dims=()), "'t' has 0 dimensions, expected 1 to 4"),
    "five dimensions": (_tensor(dims=(1, 1, 1, 1, 2)), "'t' has 5 dimensions, expected 1 to 4"),
    "2^32 dimensions": (
        made.header(tensors=1) + made.text("t") + struct.pack("<I", 2**32 - 1) + PADDING,
        "'t' has 4,294,967,295 dimensions, expected 1 to 4",
    ),
    "a dimension of 0": (_tensor(dims=(2, 0)), "'t' has the invalid shape [0, 2]"),
    "a dimension of 2^63": (_tensor(dims=(2, 2**63)), f"'t' has the invalid shape [{2**63}, 2]"),
    "a product that is 0 in 64 bits": (
        _tensor(dims=(2**32, 2**32, 4)),
        f"'t' has the invalid shape [4, {2**32}, {2**32}]",
    ),
    "a product of 252 bits": (_tensor(dims=(2**63 - 1,) * 4), "'t' has the invalid shape [9223372036854775807, "),
    "a tensor of 2^60 numbers": (_tensor(dims=(2**30, 2**30)), f"the data of 't' ends at byte {2**62 + 96:,}"),
    "rows that are not whole blocks": (
        _tensor(kind=8, dims=(33, 32)),
        "'t', Q8_0 [32, 33], has rows that are not whole blocks of 32",
    ),
    "rows that are not whole blocks of 256": (_tensor(kind=12, dims=(128, 2)), "rows that are not whole blocks of 256"),
    "an offset between": (_tensor(offset=8), "the data of 't' begins at 8, not at a multiple of 32"),
    "an offset beyond the end": (_tensor(offset=1 << 20), "the data of 't' ends at byte 1,048,648, but the file has"),
    "an offset that wraps around": (
        _tensor(offset=2**64 - 32),
        f"'t' ends at byte {2**64 - 32 + 64 + 8:,}, but the file",
    ),
    "an unknown type beyond the end": (_tensor(kind=99, offset=64), "'t' ends at byte 129, but the file has 96"),
    "tensors that overlap": (
        _two(Entry(0, [9], offset=0), Entry(0, [1], offset=32)),
        "the data of 'a' overlaps another tensor's",
    ),
    "tensors in one place": (_two(Entry(0, [1], offset=0), Entry(0, [1], offset=0)), "overlaps another tensor's"),
    "an unknown type in one place with another": (
        _two(Entry(99, [1], offset=32), Entry(0, [1], offset=32)),
        "overlaps another tensor's",
    ),
    "two unknown types in one place": (_two(Entry(99, [1], offset=0), Entry(98, [1], offset=0)), "overlaps another"),
    "data that are cut off": (FULL[:-64], "the data of 'eights' ends at byte"),
    "a tensor of which nothing follows": (made.header({}, ENTRIES)[:-8], "'eights' would need 8 more bytes"),
}


def _refused(path: Path) -> str:
    """The error, without the path. Fails if it takes too long or too much memory."""
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(CheckpointError) as caught:
            open_gguf(path)
        assert time.process_time() - began < SECONDS
        assert tracemalloc.get_traced_memory()[1] < ROOM
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 5000
    return str(caught.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path, name):
    data, expected = HOSTILE[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    said = _refused(path)
    assert expected in said and str(path) in said
    assert any(
        fix in said for fix in ("download the file again", "make it again", "choose another file", "update gptjax")
    )


def test_the_hanging_file_has_49_bytes():
    assert len(HOSTILE["49 bytes with which the gguf package does not end"][0]) == 49


def test_every_beginning_of_a_file_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(FULL)
    end = max(tensor.stop for tensor in open_gguf(path).tensors.values())
    for size in reversed(range(end)):
        os.truncate(path, size)
        with pytest.raises(CheckpointError):
            open_gguf(path)


def test_the_number_of_values_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(cursor, "MAX_ITEMS", 1000)
    (tmp_path / "x.gguf").write_bytes(_key(made.array(made.U8, bytes(999))))
    assert open_gguf(tmp_path / "x.gguf").metadata["k"] == [0] * 999
    path = tmp_path / "y.gguf"
    path.write_bytes(made.header({"a": made.array(made.U8, bytes(999)), "b": made.array(made.U8, bytes(2))}))
    assert "its metadata has more than 1,000 values" in _refused(path)


def test_the_header_is_bounded(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(_key(struct.pack("<IQ", made.STRING, cursor.MAX_HEADER_BYTES)))
    os.truncate(path, 1 << 40)  # a sparse file
    assert "the value of 'k' ends beyond the 67,108,864 bytes that a header may have" in _refused(path)


@pytest.mark.parametrize(
    ("kind", "one", "value"), [(made.I8, b"\x9c", -100), (made.STRING, made.text("\u0430"), "\u0430")]
)
def test_a_large_header_needs_little_more_than_its_values(tmp_path, kind, one, value):
    count = 1_000_000 // len(one)
    path = tmp_path / "x.gguf"
    path.write_bytes(made.header({"k": made.array(kind, [], count) + one * count}))
    tracemalloc.start()
    metadata = open_gguf(path).metadata
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert metadata["k"] == [value] * count
    assert peak < ROOM


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        ("directory", "not a regular file"),
        ("pipe", "not a regular file"),
        ("circle", "symbolic links form a loop"),
        ("nowhere", "links to a file that does not exist"),
    ],
)
def test_what_is_there_in_place_of_a_file(tmp_path, content, said):
    path = tmp_path / "model.gguf"
    _special(path, content)
    assert said in _refused(path)


def _special(path: Path, kind: str | None) -> None:
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "circle":
        path.symlink_to(path.name)
    elif kind == "nowhere":
        path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (made.number(made.U16, 2), "is one of 2 parts, but its name does not say which; rename the parts to"),
        (made.number(made.U16, 65_535), "split.count is 65,535; at most 4,096 parts are accepted"),
        (made.number(made.U64, 2**64 - 1), "at most 4,096 parts are accepted"),
        (made.number(made.I32, -1), "split.count is -1, expected a number"),
        (made.string("3"), "split.count is '3', expected a number"),
        (made.array(made.U8, [3]), "split.count is [3], expected a number"),
    ],
)
@pytest.mark.parametrize("name", ["model.gguf", "model-00001-of-00003.gguf", "model-00000-of-00002.gguf"])
def test_hostile_counts_of_parts(tmp_path, name, count, said):
    (tmp_path / name).write_bytes(made.file({"split.count": count}, ENTRIES))
    assert said in _refused(tmp_path / name)


def test_a_set_of_which_most_is_missing(tmp_path):
    path = tmp_path / "model-00001-of-04096.gguf"
    path.write_bytes(made.file({"split.count": made.number(made.U16, 4096)}, ENTRIES))
    assert "lacks model-00002-of-04096.gguf" in (said := _refused(path)) and "and 4085 more" in said


@pytest.mark.parametrize("kind", ["directory", "pipe", "circle", "nowhere"])
def test_what_is_there_in_place_of_a_part(tmp_path, kind):
    paths = split(tmp_path)
    paths[1].unlink()
    _special(paths[1], kind)
    assert f"the 3 parts of {paths[0]} cannot be read:\n  {paths[1]} " in _refused(paths[0])


def test_the_same_part_twice(tmp_path):
    paths = split(tmp_path)
    paths[2].unlink()
    paths[2].symlink_to(paths[1])
    said = _refused(paths[0])
    assert f"{paths[2]} has split.no 1, expected 2; download the parts again, all from one place" in said


def test_parts_of_different_sets(tmp_path):
    paths = split(tmp_path)
    others = split(tmp_path / "others", 2)
    shutil.copy(others[0], paths[0])
    said = _refused(paths[1])
    assert f"{paths[0]} has split.count 2, expected 3" in said
    assert "is in" in said and "download the parts again" in said


def test_parts_with_one_tensor_in_both(tmp_path):
    paths = split(tmp_path, 2)
    own = {"split.no": made.number(made.U16, 1), "split.count": made.number(made.U16, 2)}
    paths[1].write_bytes(made.file(own, {"matrix": ENTRIES["matrix"]}))
    assert f"'matrix' is in {paths[0]} and in {paths[1]}" in _refused(paths[0])


def test_parts_with_other_metadata(tmp_path):
    paths = split(tmp_path)
    own = {"split.no": made.number(made.U16, 1), "split.count": made.number(made.U16, 3)}
    paths[1].write_bytes(made.file(own | {"general.architecture": made.string("gpt2")}, {}))
    said = _refused(paths[0])
    assert f"{paths[1]} has another 'general.architecture' than the first part" in said
    assert "the parts have 3 tensors, but split.tensors.count of the first is 4" in said


def test_a_damaged_part(tmp_path):
    paths = split(tmp_path)
    os.truncate(paths[0], paths[0].stat().st_size - 64)
    os.truncate(paths[2], 20)
    said = _refused(paths[1])
    assert f"{paths[0]} is not a valid GGUF file" in said and f"{paths[2]} is not a valid GGUF file" in said
