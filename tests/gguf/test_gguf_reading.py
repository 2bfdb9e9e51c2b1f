"""The reader of GGUF files: what is there comes out bit for bit, from one file and from several."""

import os
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gptjax.errors import CheckpointError
from gptjax.gguf import open_gguf
from tests.gguf import made
from tests.gguf.made import Entry

RNG = np.random.default_rng(0)
MATRIX = RNG.standard_normal((3, 5), np.float32)
HALVES = RNG.standard_normal((2, 3, 7), np.float32).astype(np.float16)
BRAINS = RNG.standard_normal(11, np.float32).astype(ml_dtypes.bfloat16)
SCALES = np.array([[0.5, -2.0, 0.0], [2**-24, 1.0, 65504.0]], np.float16)  # of Q8_0's blocks [2, 3]
INTEGERS = RNG.integers(-128, 128, (2, 3, 32), dtype=np.int8)
EIGHTS = np.concatenate([SCALES[..., None].view(np.uint8), INTEGERS.view(np.uint8)], axis=-1)
EIGHTS_EXPANDED = (SCALES.astype(np.float64)[..., None] * INTEGERS).astype(np.float32).reshape(2, 96)
ENTRIES = {
    "matrix": Entry(0, [5, 3], MATRIX.tobytes()),
    "halves": Entry(1, [7, 3, 2], HALVES.tobytes()),
    "brains": Entry(30, [11], BRAINS.tobytes()),
    "eights": Entry(8, [96, 2], EIGHTS.tobytes()),
}
WANTED = {"matrix": MATRIX, "halves": HALVES, "brains": BRAINS, "eights": EIGHTS_EXPANDED}
METADATA = {
    "general.architecture": made.string("llama"),
    **{f"a.{kind}": made.number(kind, 1) for kind in made.PACKING},
    "a.negative": made.number(made.I64, -(2**63)),
    "a.large": made.number(made.U64, 2**64 - 1),
    "a.third": made.number(made.F32, 1 / 3),
    "a.yes": made.array(made.BOOL, [1, 0]),
    "a.bytes": made.array(made.I8, [-128, 0, 127]),
    "a.scores": made.array(made.F32, [0.5, -1.5]),
    "a.tokens": made.array(made.STRING, ["", "é", "a\0b", "▁"]),
    "a.none": made.array(made.STRING, []),
}


def _written(path: Path, *arguments, **changes) -> Path:
    path.write_bytes(made.file(*arguments, **changes))
    return path


def _same_bits(got: np.ndarray, want: np.ndarray) -> bool:
    return got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()


@pytest.fixture
def path(tmp_path):
    return _written(tmp_path / "model.gguf", METADATA, ENTRIES)


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_are_plain_values(tmp_path, version):
    metadata = open_gguf(_written(tmp_path / "model.gguf", METADATA, ENTRIES, version=version)).metadata
    assert metadata["general.architecture"] == "llama"
    for kind in made.PACKING:
        expected = {made.BOOL: bool, made.F32: float, made.F64: float}.get(kind, int)
        assert metadata[f"a.{kind}"] == 1 and type(metadata[f"a.{kind}"]) is expected
    assert (metadata["a.negative"], metadata["a.large"]) == (-(2**63), 2**64 - 1)
    assert metadata["a.third"] == struct.unpack("<f", struct.pack("<f", 1 / 3))[0]
    assert (metadata["a.yes"], metadata["a.bytes"]) == ([True, False], [-128, 0, 127])
    assert metadata["a.scores"] == [0.5, -1.5]
    assert (metadata["a.tokens"], metadata["a.none"]) == (["", "é", "a\0b", "▁"], [])


def test_tensors_have_numpys_shape_and_the_types_name(path):
    tensors = open_gguf(str(path)).tensors
    assert {name: (each.type, each.dtype, each.shape) for name, each in tensors.items()} == {
        "matrix": ("F32", "F32", (3, 5)),
        "halves": ("F16", "F16", (2, 3, 7)),
        "brains": ("BF16", "BF16", (11,)),
        "eights": ("Q8_0", "F32", (2, 96)),
    }
    assert {name: each.nbytes for name, each in tensors.items()} == {
        name: len(entry.data) for name, entry in ENTRIES.items()
    }


@pytest.mark.parametrize("alignment", [1, 8, 32, 4096])
def test_tensors_are_read_as_written(tmp_path, alignment):
    metadata = METADATA | {"general.alignment": made.number(made.U32, alignment)}
    source = open_gguf(_written(tmp_path / "model.gguf", metadata, ENTRIES, alignment=alignment))
    for name, expected in WANTED.items():
        array = source.read(name)
        assert _same_bits(array, expected)
        assert not array.flags.writeable


def test_packed_blocks_are_the_files_bytes(path):
    source = open_gguf(path)
    blocks = source.packed("eights")
    assert blocks.shape == (2, 3, 34) and not blocks.flags.writeable
    assert blocks.tobytes() == EIGHTS.tobytes()
    assert source.packed("halves").shape == (2, 3, 7, 2)


@pytest.mark.parametrize(
    ("name", "most", "sizes"),
    [
        ("halves", 5, [5] * 8 + [2]),
        ("halves", 100, [42]),
        ("eights", 64, [64] * 3),
        ("eights", 130, [128, 64]),  # whole blocks
        ("eights", 1, [32] * 6),  # at least one
    ],
)
def test_slices_are_the_tensor(path, name, most, sizes):
    slices = list(open_gguf(path).slices(name, most))
    assert [part.size for part in slices] == sizes
    assert np.concatenate(slices).tobytes() == WANTED[name].tobytes()


def test_checksums_are_of_the_data_in_the_file(path):
    source = open_gguf(path)
    source.checksums = {}
    list(source.slices("eights", 32))
    source.packed("halves")
    assert source.checksums == {name: zlib.crc32(ENTRIES[name].data) for name in ("eights", "halves")}
    ((_, header),) = source.headers.items()
    assert header.crc32 == zlib.crc32(path.read_bytes()[: header.data_start])


def test_expanding_needs_little_more_than_the_result(tmp_path):
    rows = 4 << 20
    entry = Entry(8, [32, rows // 32], bytes(34) * (rows // 32))
    source = open_gguf(_written(tmp_path / "model.gguf", {}, {"large": entry}))
    tracemalloc.start()
    array = source.read("large")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert array.nbytes == 16 << 20
    assert peak < array.nbytes + (14 << 20)


def test_a_file_may_have_no_tensors_and_no_keys(tmp_path):
    source = open_gguf(_written(tmp_path / "model.gguf"))
    assert (dict(source.metadata), source.tensors) == ({}, {})
    tmp_path.joinpath("unpadded.gguf").write_bytes(made.header(METADATA))  # as llama.cpp's files of vocabularies
    assert len(open_gguf(tmp_path / "unpadded.gguf").metadata) == len(METADATA)


def test_padding_at_the_end_may_be_missing(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(made.file({}, ENTRIES)[: -(-EIGHTS.nbytes % 32) or None])
    assert _same_bits(open_gguf(path).read("eights"), EIGHTS_EXPANDED)


def test_tensors_come_in_the_order_of_their_data(tmp_path):
    entries = {"b": Entry(0, [2], bytes(8), offset=32), "a": Entry(0, [2], bytes(8), offset=0)}
    assert list(open_gguf(_written(tmp_path / "model.gguf", {}, entries)).tensors) == ["a", "b"]


@pytest.mark.parametrize(
    ("number", "name", "nbytes"), [(99, "type 99", 160), (31, "Q4_0_4_4", 160), (16, "IQ2_XXS", 132), (28, "F64", 4096)]
)
def test_other_types_are_listed_but_not_read(tmp_path, number, name, nbytes):
    entries = {"x": Entry(number, [256, 2], bytes(nbytes)), "y": Entry(0, [1], bytes(4))}
    source = open_gguf(_written(tmp_path / "model.gguf", {}, entries))
    tensor = source.tensors["x"]
    assert (tensor.type, tensor.nbytes) == (name, nbytes)  # of an unknown type: up to the next tensor
    for read in (source.read, source.packed, lambda name: next(source.slices(name, 1))):
        with pytest.raises(CheckpointError, match=f"x in .*model.gguf is stored as {name}, which gptjax does not read"):
            read("x")


def test_an_unknown_type_may_have_any_shape(tmp_path):
    source = open_gguf(_written(tmp_path / "model.gguf", {}, {"x": Entry(99, [2**31, 2**31], bytes(8))}))
    assert source.tensors["x"].shape == (2**31, 2**31)
    with pytest.raises(CheckpointError, match="is stored as type 99"):
        source.read("x")


@pytest.mark.parametrize("kind", ["truncated", "grown", "rewritten", "replaced", "gone", "a pipe"])
def test_a_file_that_changes_after_its_header_was_read(path, tmp_path, kind):
    source = open_gguf(path)
    if kind in ("truncated", "grown"):
        os.truncate(path, path.stat().st_size + (1 if kind == "grown" else -1))
    elif kind == "rewritten":
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    else:
        path.rename(tmp_path / "before")
        if kind == "replaced":
            shutil.copy2(tmp_path / "before", path)
        elif kind == "a pipe":
            os.mkfifo(path)
    said = {"gone": "does not exist", "a pipe": "not a regular file"}.get(kind, "changed while it was being read")
    with pytest.raises(CheckpointError, match=said) as caught:
        source.read("eights")
    assert str(path) in str(caught.value)


def split(directory: Path, count: int = 3, name: str = "model", **changes: bytes) -> list[Path]:
    """A set of files, as llama.cpp splits them: the metadata in the first, the tensors one after another."""
    directory.mkdir(exist_ok=True, parents=True)
    paths = [directory / f"{name}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        own = {
            "split.no": made.number(made.U16, number),
            "split.count": made.number(made.U16, count),
            "split.tensors.count": made.number(made.I32, len(ENTRIES)),
        } | changes
        names = list(ENTRIES)[number::count]
        _written(path, (METADATA if number == 0 else {}) | own, {name: ENTRIES[name] for name in names})
    return paths


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_any_part_opens_the_set(tmp_path, opened):
    paths = split(tmp_path)
    source = open_gguf(paths[opened])
    assert list(source.headers) == paths
    assert source.metadata["general.architecture"] == "llama"
    assert all(_same_bits(source.read(name), expected) for name, expected in WANTED.items())


def test_parts_may_be_links_as_in_the_hub_cache(tmp_path):
    paths = split(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for number, path in enumerate(paths):
        path.rename(tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / path.name).symlink_to(Path("..", "blobs", str(number)))
    assert len(open_gguf(tmp_path / "snapshot" / paths[1].name).tensors) == len(ENTRIES)


@pytest.mark.parametrize("count", [0, 1])
def test_a_set_of_one_file_may_have_any_name(tmp_path, count):
    path = _written(tmp_path / "x.gguf", {"split.count": made.number(made.U16, count)}, ENTRIES)
    assert len(open_gguf(path).tensors) == len(ENTRIES)


def test_missing_parts_are_named(tmp_path):
    paths = split(tmp_path)
    paths[0].unlink()
    paths[2].unlink()
    with pytest.raises(CheckpointError, match=f"lacks {paths[0].name}, {paths[2].name}; download them too"):
        open_gguf(paths[1])
