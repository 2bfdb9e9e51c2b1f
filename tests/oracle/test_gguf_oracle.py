"""GGUF files and ggml's packed types against the gguf package, llama.cpp's own."""

import random

import jax
import numpy as np
import pytest

from gptjax.errors import CheckpointError
from gptjax.gguf import open_gguf
from gptjax.gguf.types import BLOCKS, NAMES
from pallas_kernels.formats.ggml import PACKED
from tests.fuzz import rounds
from tests.gguf.made import bent
from tests.pallas_kernels.formats.ggml_blocks import random_blocks

gguf = pytest.importorskip("gguf")

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

RNG = np.random.default_rng(0)
METADATA = {
    "uint8": 200,
    "int8": -100,
    "uint16": 60_000,
    "int16": -30_000,
    "uint32": 4_000_000_000,
    "int32": -2_000_000_000,
    "uint64": 2**63 + 5,
    "int64": -(2**62),
    "float32": 0.1,
    "float64": 0.1,
    "bool": True,
    "string": "naïve ▁ text",
}
OF_ACTIVATIONS = ("Q8_1", "Q8_K")  # in no file
TOKENS = ["<s>", "▁a", "é", "<0x00>", ""]


def _same_bits(got: np.ndarray, want: np.ndarray) -> bool:
    return got.dtype == want.dtype == np.float32 and got.tobytes() == want.tobytes()


@pytest.mark.parametrize("name", PACKED)
def test_packed_types(name):
    blocks = random_blocks(name, (31, 7), seed=1)
    kind = gguf.GGMLQuantizationType[name]
    assert (PACKED[name].size, PACKED[name].nbytes) == gguf.GGML_QUANT_SIZES[kind]
    want = gguf.dequantize(blocks.reshape(31, -1), kind)
    assert _same_bits(PACKED[name].dequantize(blocks), want)
    assert _same_bits(np.asarray(jax.jit(PACKED[name].dequantize)(blocks)), want)


def test_types_have_the_packages_numbers_and_sizes():
    theirs = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    assert theirs.items() <= NAMES.items()
    sizes = {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items() if kind.name not in OF_ACTIVATIONS}
    assert sizes.items() <= BLOCKS.items()


def _write(path, *, types, split_max_tensors=0):
    """A file with a tensor [3, 512] of each type. Returns what the tensors hold."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split_max_tensors)
    for kind, value in METADATA.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0, -1.5, 2.25, 0.0, 1.0])
    writer.add_array("x.flags", [True, False])
    writer.add_array("x.numbers", [1, -2, 300_000])
    written = {}
    for name in types:
        kind = gguf.GGMLQuantizationType[name]
        if name in PACKED:
            data = random_blocks(name, (3, 512 // PACKED[name].size)).reshape(3, -1)
        else:
            data = gguf.quantize(RNG.standard_normal((3, 512), np.float32), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
        written[f"{name}.weight"] = gguf.dequantize(data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _check(source, written):
    for kind, value in METADATA.items():
        expected = float(np.float32(value)) if kind == "float32" else value
        assert source.metadata[f"x.{kind}"] == expected and type(source.metadata[f"x.{kind}"]) is type(value)
    assert source.metadata["tokenizer.ggml.tokens"] == TOKENS
    assert source.metadata["tokenizer.ggml.scores"] == [0.0, -1.5, 2.25, 0.0, 1.0]
    assert (source.metadata["x.flags"], source.metadata["x.numbers"]) == ([True, False], [1, -2, 300_000])
    assert set(source.tensors) == set(written)
    for name, want in written.items():
        assert source.tensors[name].shape == want.shape == (3, 512)
        assert _same_bits(source.read(name).astype(np.float32), want)


def test_files_that_the_package_writes(tmp_path):
    written = _write(tmp_path / "x.gguf", types=["F32", "F16", "BF16", *PACKED])
    source = open_gguf(tmp_path / "x.gguf")
    _check(source, written)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == source.metadata
    for tensor in reader.tensors:
        assert source.tensors[tensor.name].start == tensor.data_offset
        assert source.packed(tensor.name).tobytes() == tensor.data.tobytes()


def test_sets_of_files_that_the_package_writes(tmp_path):
    written = _write(tmp_path / "x.gguf", types=["F32", "Q4_K", "Q8_0", "F16", "Q6_K"], split_max_tensors=2)
    paths = sorted(tmp_path.glob("*.gguf"))
    assert [path.name for path in paths] == [f"x-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    for path in paths:
        _check(open_gguf(path), written)


def test_the_end_of_a_file_that_is_not_padded(tmp_path):
    written = _write(tmp_path / "x.gguf", types=["F16", "Q3_K"])
    data = (tmp_path / "x.gguf").read_bytes()
    source = open_gguf(tmp_path / "x.gguf")
    (tmp_path / "y.gguf").write_bytes(data[: source.tensors["Q3_K.weight"].stop])
    _check(open_gguf(tmp_path / "y.gguf"), written)


@pytest.mark.fuzz
def test_changed_files_are_read_as_the_package_reads_them(tmp_path):
    """Only the few that we accept: on some of the others the package does not end."""
    path = tmp_path / "x.gguf"
    _write(path, types=["F32", "F16", "Q8_0", "Q6_K"])
    data = path.read_bytes()
    # Most changes would otherwise be in the tensors.
    header, rest = (
        data[: open_gguf(path).tensors["F32.weight"].start],
        data[open_gguf(path).tensors["F32.weight"].start :],
    )
    count, both = rounds(5000), 0
    for number in range(count):
        rng = random.Random(number)
        path.write_bytes(_padded(bent(rng, header.rstrip(b"\0"))) + rest)
        try:
            source = open_gguf(path)
            reader = gguf.GGUFReader(path)
        except (CheckpointError, ValueError, KeyError):  # the latter two the package's
            continue
        both += 1
        fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        assert repr(fields) == repr(source.metadata), number  # NaN equals NaN
        for tensor in reader.tensors:
            ours = source.tensors[tensor.name]
            assert (ours.type, ours.shape) == (tensor.tensor_type.name, tuple(map(int, tensor.shape[::-1]))), number
            if ours.type in PACKED:
                assert source.packed(tensor.name).tobytes() == tensor.data.tobytes(), number
    assert both > count / 50


def _padded(header):
    return header + bytes(-len(header) % 32)
