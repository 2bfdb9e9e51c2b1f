"""The reader of safetensors files: what is there comes out bit for bit, and hostile or damaged files are refused."""

import json
import os
import pickle
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gptjax.checkpoints import safetensors_header as headers
from gptjax.checkpoints.safetensors import open_directory
from gptjax.errors import CheckpointError
from tests.convert import made

RNG = np.random.default_rng(0)
TENSORS = {
    "a": RNG.standard_normal((3, 5), np.float32),
    "b": RNG.standard_normal((4,), np.float32).astype(np.float16),
    "c": RNG.standard_normal((2, 3, 7), np.float32).astype(ml_dtypes.bfloat16),
    "d": np.arange(6, dtype=np.uint8),
    "empty": np.zeros((0, 4), np.float32),
    "scalar": np.array(7, np.float32),
}


def _refused(directory: Path, *parts: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_directory(directory)
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


def _header(tmp_path: Path, **entry: object) -> None:
    """A file of one tensor "a", F32 [2, 2], with changes to its entry."""
    header = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **entry}}
    made.write_raw(tmp_path / "model.safetensors", json.dumps(header).encode(), bytes(16))


@pytest.mark.parametrize("multiple", [8, 64, 1])
def test_reads_what_is_written(tmp_path, multiple):
    made.write(tmp_path / "model.safetensors", TENSORS, multiple=multiple)
    source = open_directory(tmp_path)
    assert list(source.tensors) == list(TENSORS)
    for name, expected in TENSORS.items():
        assert made.same_bits(source.read(name), expected)


def test_reads_what_the_library_writes(tmp_path):
    safetensors.numpy.save_file(TENSORS, tmp_path / "model.safetensors")
    source = open_directory(tmp_path)
    assert all(made.same_bits(source.read(name), expected) for name, expected in TENSORS.items())


def test_reads_shards(tmp_path):
    made.write_sharded(tmp_path, TENSORS, 3)
    source = open_directory(tmp_path)
    assert len(source.headers) == 3
    assert all(made.same_bits(source.read(name), expected) for name, expected in TENSORS.items())


def test_a_single_file_goes_before_an_index(tmp_path):
    made.write_index(tmp_path, {"a": "gone.safetensors"})
    made.write(tmp_path / "model.safetensors", TENSORS)
    assert set(open_directory(tmp_path).tensors) == set(TENSORS)


def test_arrays_are_read_only_and_of_their_own_memory(tmp_path):
    made.write(tmp_path / "model.safetensors", TENSORS)
    source = open_directory(tmp_path)
    array = source.read("a")
    assert not array.flags.writeable
    os.truncate(tmp_path / "model.safetensors", 0)  # a map of the file would now end the process
    assert made.same_bits(array, TENSORS["a"])


def test_slices_are_the_tensor(tmp_path):
    made.write(tmp_path / "model.safetensors", TENSORS)
    source = open_directory(tmp_path)
    slices = list(source.slices("c", 5))
    assert [part.size for part in slices] == [5] * 8 + [2]
    assert np.concatenate(slices).tobytes() == TENSORS["c"].tobytes()


@pytest.mark.parametrize("kind", ["truncated", "grown", "rewritten", "replaced", "gone", "a pipe"])
def test_a_file_that_changes_after_its_header_was_read(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    made.write(path, TENSORS)
    source = open_directory(tmp_path)
    if kind == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif kind == "grown":
        os.truncate(path, path.stat().st_size + 1)
    elif kind == "rewritten":
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    else:
        path.rename(tmp_path / "before")
        if kind == "replaced":
            made.write(path, TENSORS)
            os.utime(path, ns=(0, (tmp_path / "before").stat().st_mtime_ns))
        elif kind == "a pipe":
            os.mkfifo(path)
    said = {"gone": "does not exist", "a pipe": "not a regular file"}.get(kind, "changed while it was being read")
    with pytest.raises(CheckpointError, match=said) as caught:
        source.read("a")
    assert str(path) in str(caught.value)


def test_unsupported_dtypes_are_listed_but_not_read(tmp_path):
    made.write(tmp_path / "model.safetensors", {"x": np.zeros(3, ml_dtypes.float8_e4m3fn)})
    source = open_directory(tmp_path)
    assert source.tensors["x"].dtype == "F8_E4M3"
    with pytest.raises(KeyError):
        source.read("x")


def test_truncated_data_names_expected_and_found_bytes(tmp_path):
    path = tmp_path / "model.safetensors"
    made.write(path, TENSORS)
    size = path.stat().st_size
    os.truncate(path, size - 5)
    _refused(tmp_path, str(path), "truncated", f"{size:,} bytes", f"{size - 5:,}", "download the file again")


def test_truncated_header(tmp_path):
    path = tmp_path / "model.safetensors"
    made.write(path, TENSORS)
    os.truncate(path, 100)
    _refused(tmp_path, "truncated", "found 100")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9])
def test_a_file_of_a_few_bytes(tmp_path, size):
    (tmp_path / "model.safetensors").write_bytes(bytes(size))
    _refused(tmp_path, "truncated", f"found {size}")


def test_bytes_beyond_the_data(tmp_path):
    made.write(tmp_path / "model.safetensors", TENSORS)
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"more")
    _refused(tmp_path, "accounts for", "download the file again")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, headers.MAX_HEADER_BYTES + 1])
def test_hostile_header_length(tmp_path, length):
    made.write_raw(tmp_path / "model.safetensors", b"{}", b"", length=length)
    _refused(tmp_path, f"claims {length:,} bytes")


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
         b'"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}', "'a' occurs twice"),
        (b'{"__metadata__":{"x":NaN},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}', "NaN is not JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, "not valid JSON"),
        (b"[1, 2]  ", "expected an object"),
        (b'{"a": 1, "\xff": 2}', "not valid JSON"),
        (b'{"a": 1}        ', "does not consist of"),
        (b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16],"more":1}}', "does not consist of"),
        (b'{"__metadata__":{"x":1},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}', "safetensors library"),
    ],
)  # fmt: skip
def test_hostile_header_json(tmp_path, header, said):
    made.write_raw(tmp_path / "model.safetensors", header, bytes(16))
    _refused(tmp_path, said, "download the file again")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"shape": [-2, -2]}, "has the invalid shape [-2, -2]"),
        ({"shape": [2.0, 2]}, "has the invalid shape"),
        ({"shape": [True, 4]}, "has the invalid shape"),
        ({"shape": "22"}, "has the invalid shape"),
        ({"shape": [2**62, 2**62, 4]}, "has 16 bytes of data"),  # a product that is 0 in 64 bits
        ({"shape": [2, 3]}, "has 16 bytes of data"),
        ({"dtype": "F99"}, "unknown dtype"),
        ({"dtype": ["F32"]}, "unknown dtype"),
        ({"data_offsets": [16, 0]}, "has the invalid data_offsets"),
        ({"data_offsets": [0, 16, 32]}, "has the invalid data_offsets"),
        ({"data_offsets": [-16, 0]}, "has the invalid data_offsets"),
        ({"data_offsets": [4, 20]}, "leaves a gap"),
    ],
)
def test_hostile_entry(tmp_path, entry, said):
    _header(tmp_path, **entry)
    _refused(tmp_path, said)


def test_overlapping_tensors(tmp_path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": {**entry, "data_offsets": [4, 12]}}).encode()
    made.write_raw(tmp_path / "model.safetensors", header, bytes(12))
    _refused(tmp_path, "'b' overlaps")


@pytest.mark.thorough
def test_200_000_empty_tensors(tmp_path):
    header = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}
    made.write_raw(tmp_path / "model.safetensors", json.dumps(header).encode(), b"")
    _refused(tmp_path, "lists 200,000 tensors")


class _Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickle_is_refused_and_not_opened(tmp_path, protocol, name):
    bomb = tmp_path / "exploded"
    (tmp_path / name).write_bytes(pickle.dumps(_Bomb(bomb), protocol=protocol))
    _refused(tmp_path, name, "pickle", "never opens", "save_pretrained")
    assert not bomb.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.PT", "weights.ckpt"])
def test_pickle_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"whatever is in it")
    _refused(tmp_path, name, "pickle", "judging by its name")


def test_a_zip_called_safetensors_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    _refused(tmp_path, "pickle", "zip archive, as torch.save")


@pytest.mark.parametrize("magic", [b"lmgg", b"ggml", b"tjgg", b"fmgg", b"algg"])
@pytest.mark.parametrize("name", ["ggml-model.bin", "model.safetensors"])
def test_ggml_is_refused(tmp_path, magic, name):
    (tmp_path / name).write_bytes(magic + bytes(100))
    _refused(tmp_path, name, "ggml file", "get the model's safetensors files")


def test_gguf_in_a_directory_is_named(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    _refused(tmp_path, "model.gguf is a GGUF file; name the file itself, not its directory")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>no such page</html>", "web page"),
    ],
)
def test_what_is_there_in_place_of_weights(tmp_path, content, said):
    (tmp_path / "model.safetensors").write_bytes(content)
    _refused(tmp_path, said)


def test_a_header_of_640_bytes_is_not_taken_for_a_pickle(tmp_path):
    header = json.dumps(made.header_of({"a": TENSORS["a"]})).encode().ljust(0x280)
    assert struct.pack("<Q", len(header))[:2] == b"\x80\x02"  # as pickles of protocol 2 begin
    made.write_raw(tmp_path / "model.safetensors", header, TENSORS["a"].tobytes())
    assert made.same_bits(open_directory(tmp_path).read("a"), TENSORS["a"])


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    _refused(tmp_path, "not a regular file")


def test_nothing_there(tmp_path):
    _refused(tmp_path, "neither model.safetensors nor model.safetensors.index.json", "get the model's safetensors")


def test_weights_under_another_name(tmp_path):
    made.write(tmp_path / "consolidated.safetensors", TENSORS)
    _refused(tmp_path, "consolidated.safetensors", "rename")


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", "a\\b.safetensors", "a\0.safetensors"],
)
def test_an_index_names_no_path(tmp_path, name):
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    for place in (tmp_path, directory / "sub"):
        made.write(place / "x.safetensors", TENSORS)
    made.write_index(directory, dict.fromkeys(TENSORS, name))
    _refused(directory, repr(name), "not a plain file name", "download the checkpoint again")


@pytest.mark.parametrize("whole_directory", [False, True])
def test_an_index_names_no_link_that_leads_out(tmp_path, whole_directory):
    directory = tmp_path / "model"
    directory.mkdir()
    made.write(tmp_path / "x.safetensors", TENSORS)
    (directory / "x.safetensors").symlink_to(tmp_path / "x.safetensors")
    made.write_index(directory, dict.fromkeys(TENSORS, "x.safetensors"))
    if whole_directory:  # a link to the directory itself is the user's own, and changes nothing
        (tmp_path / "link").symlink_to(directory)
        directory = tmp_path / "link"
    _refused(directory, "leads out of the directory")


def test_links_within_the_directory_and_the_hub_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--x--y" / "snapshots" / "0123"
    blobs = tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    weight_map = made.write_sharded(blobs, TENSORS)
    for file in set(weight_map.values()):
        (snapshot / file).symlink_to(Path("..", "..", "blobs", file))
    made.write_index(snapshot, weight_map)
    assert set(open_directory(snapshot).tensors) == set(TENSORS)


def test_faults_of_an_index_are_reported_together(tmp_path):
    weight_map = made.write_sharded(tmp_path, {"a": TENSORS["a"], "b": TENSORS["b"], "c": TENSORS["c"]}, 3)
    first, second, third = weight_map["a"], weight_map["b"], weight_map["c"]
    made.write(tmp_path / first, {"a": TENSORS["a"], "b": TENSORS["b"], "extra": TENSORS["d"]})
    os.remove(tmp_path / third)
    made.write_index(tmp_path, {**weight_map, "absent": second, "pickled": "pytorch_model.bin"})
    _refused(
        tmp_path,
        f"{third} does not exist",
        f"says that absent is in {second}, but it is not",
        f"b is in several files: {first}, {second}",
        f"extra is in {first} but not in",
        "'pytorch_model.bin', which is not a safetensors file",
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("{}", "no weight_map"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', "no weight_map"),
        ('{"weight_map": {}}', "lists no tensors"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "occurs twice"),
    ],
)
def test_damaged_index(tmp_path, text, said):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    _refused(tmp_path, said)


def test_an_endless_list_of_faults_is_cut(tmp_path):
    made.write_index(tmp_path, {f"t{i}": f"../{i}.safetensors" for i in range(50)})
    message = _refused(tmp_path, "and 30 more")
    assert message.count("\n") == 21
