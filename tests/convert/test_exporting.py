"""`convert.export`: the tensors that a checkpoint was made from, under transformers' names, bit for bit."""

import json
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import convert
from convert import tables
from convert.matching import names_of
from convert.rules import TRANSPOSED, Transform, stacked, stacked_transposed
from gptjax import api
from gptjax.checkpoints.checkpoint import open_path
from gptjax.checkpoints.safetensors_writer import Outline, SafetensorsWriter
from gptjax.checkpoints.weights import flatten
from gptjax.config import PUBLISHED, read_config
from gptjax.errors import CheckpointError, ConfigError, RequestError
from gptjax.models import registry
from gptjax.models.params import abstract_params
from tests.convert import made
from tests.gguf import made as made_gguf
from tests.oracles import gguf_from_hf, gpt2_random, gpt_oss_random, llama_random


def _tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory, as the safetensors library reads them."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors = safetensors.numpy.load_file(path)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def _assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert made.same_bits(found[name], array), name


def _exported(base: Path, source: Path, by: str, **arguments) -> Path:
    """The export of a Hugging Face directory as it is, or by way of a converted one."""
    if by == "converted":
        convert.convert(source, base / "converted")
        source = base / "converted"
    convert.export(source, base / "dst", **arguments)
    return base / "dst"


WAYS = pytest.mark.parametrize("by", ["directly", "converted"])


@WAYS
@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize(("dtype", "tied", "shards"), [(np.float32, True, 0), (made.BFLOAT16, False, 3)])
def test_gpt2_comes_back(tmp_path, by, prefix, dtype, tied, shards):
    config, tensors = made.gpt2(tmp_path / "src", prefix=prefix, dtype=dtype, shards=shards, tie_word_embeddings=tied)
    dst = _exported(tmp_path, tmp_path / "src", by)
    named = {name if name == "lm_head.weight" else f"transformer.{name}": array for name, array in tensors.items()}
    _assert_same(_tensors(dst), named)
    assert json.loads((dst / "config.json").read_text()) == config
    assert sorted(os.listdir(dst)) == ["config.json", "model.safetensors", "tokenizer.json"]


@WAYS
@pytest.mark.parametrize("layout", gpt_oss_random.LAYOUTS)
def test_gpt_oss_comes_back(tmp_path, by, layout):
    model = gpt_oss_random.checkpoint(dtype=made.BFLOAT16)
    source = gpt_oss_random.write(tmp_path / "src", model, layout=layout, shards=2)
    dst = _exported(tmp_path, source, by)
    tensors = model.dense if layout == "dequantised" else model.packed
    expected = {name: x if x.dtype == np.uint8 else x.astype(made.BFLOAT16) for name, x in tensors.items()}
    _assert_same(_tensors(dst), expected)
    raw = json.loads((dst / "config.json").read_text())
    if layout == "original":
        assert raw["model_type"] == "gpt_oss"
        assert raw["quantization_config"]["modules_to_not_convert"]
    else:
        assert (dst / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert read_config(dst) == read_config(source)


@pytest.mark.parametrize("variant", ["llama3.1", "llama biases", "mistral", "qwen2", "qwen3"])
def test_llama_and_its_relatives_come_back(tmp_path, variant):
    model = llama_random.checkpoint(dtype=made.BFLOAT16, **llama_random.VARIANTS[variant])
    source = llama_random.write(tmp_path / "src", model, shards=2)
    dst = _exported(tmp_path, source, "converted")
    _assert_same(_tensors(dst), _tensors(source))
    assert (dst / "config.json").read_bytes() == (source / "config.json").read_bytes()


@WAYS
@pytest.mark.parametrize("kind", ["gpt2", "gpt_oss", "llama3", "qwen3"])
def test_a_gguf_file_becomes_what_it_was_made_from(tmp_path, by, kind):
    """Rows back in order, gate and up together, nibbles in pairs: each tensor has its bits again."""
    if kind == "gpt2":
        config, tensors = gpt2_random.checkpoint(4)
    elif kind == "gpt_oss":
        config, tensors, _ = gpt_oss_random.checkpoint(5)
    else:
        config, tensors = llama_random.checkpoint(3, **llama_random.VARIANTS[kind])
    source = gguf_from_hf.write(tmp_path / "model.gguf", config, tensors)
    dst = _exported(tmp_path, source, by)
    prefix = "transformer." if kind == "gpt2" else ""
    _assert_same(_tensors(dst), {f"{prefix}{name}": array for name, array in tensors.items()})
    assert read_config(dst) == open_path(source).config


Q4_0, Q8_0 = gguf_from_hf.Q4_0, gguf_from_hf.Q8_0
PACKED = {  # which of a file's tensors are packed, and what is said about it
    "one type": ({"attn_output.weight": Q8_0, "ffn_down.weight": Q8_0, "token_embd.weight": Q8_0}, "Q8_0"),
    "parts of one type": ({f"attn_{part}.weight": Q4_0 for part in "qkv"} | {"ffn_gate.weight": Q4_0}, "Q4_0"),
    "parts of two": ({"attn_q.weight": Q4_0, "attn_k.weight": Q4_0, "attn_v.weight": Q8_0}, "Q4_0, Q8_0"),
}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("kind", PACKED)
def test_packed_types_are_expanded(tmp_path, kind, dtype):
    """By way of a converted directory, where they stay packed, and directly, where the file's reader expands them."""
    types, named = PACKED[kind]
    config, tensors = llama_random.checkpoint(3, **llama_random.VARIANTS["llama3"] | {"intermediate_size": 160})
    source = gguf_from_hf.write(tmp_path / "model.gguf", config, tensors, types)
    convert.convert(source, tmp_path / "converted")
    assert open_path(tmp_path / "converted").config.types
    notes = []
    for name, path in (("direct", source), ("dst", tmp_path / "converted")):
        notes.append(convert.export(path, tmp_path / name, dtype=dtype).notes[0])
    assert notes == [f"weights in {named} were expanded to {dtype or 'float32'}"] * 2
    found = _tensors(tmp_path / "dst")
    _assert_same(found, _tensors(tmp_path / "direct"))
    assert {x.dtype for x in found.values()} == {np.dtype(dtype or "float32")}
    assert found.keys() == tensors.keys()
    for x, original in ((found[name].astype(np.float32), tensors[name]) for name in tensors):
        assert np.abs(x - original).max() <= 0.1 * np.abs(original).max()
    raw = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert "quantization_config" not in raw
    assert raw == json.loads((tmp_path / "direct" / "config.json").read_text())


@WAYS
def test_packed_attention_beside_packed_experts(tmp_path, by):
    """Experts keep their MXFP4, which transformers reads."""
    config, tensors, _ = gpt_oss_random.checkpoint(5)
    source = gguf_from_hf.write(tmp_path / "model.gguf", config, tensors, {"attn_output.weight": Q8_0})
    dst = _exported(tmp_path, source, by)
    found = _tensors(dst)
    packed = {name for name, x in found.items() if x.dtype == np.uint8}
    assert packed and packed == {name for name, x in tensors.items() if x.dtype == np.uint8}
    assert all(made.same_bits(found[name], tensors[name]) for name in packed)
    assert read_config(dst).mxfp4 == "experts" and read_config(dst).types == ()


def _with_tokenizer(path: Path, **changes: bytes) -> Path:
    """A GGUF file with a tokenizer of a few letters."""
    return gguf_from_hf.write(path, *llama_random.checkpoint(3), metadata=made_gguf.tokenizer(**changes))


@WAYS
def test_a_gguf_files_tokenizer(tmp_path, by):
    source = _with_tokenizer(tmp_path / "model.gguf")
    dst = _exported(tmp_path, source, by)
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert set(os.listdir(dst)) == files
    for path in (source, dst):
        tokenizer = open_path(path).tokenizer()
        assert tokenizer.encode("abba") == [2, 1, 0]
        assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.context_length) == (None, (), 512)
    convert.export(source, dst, overwrite=True)


@WAYS
def test_a_tokenizer_of_an_unknown_kind_stays_in_metadata(tmp_path, by):
    source = _with_tokenizer(tmp_path / "model.gguf", pre=made_gguf.string("dbrx"))
    if by == "converted":
        convert.convert(source, tmp_path / "converted")
        source = tmp_path / "converted"
    (note,) = convert.export(source, tmp_path / "dst").notes
    assert re.match(r"there is no tokenizer.json: .* has tokenizer.ggml.pre 'dbrx'", note)
    assert set(os.listdir(tmp_path / "dst")) == {"config.json", "model.safetensors", "metadata.gguf"}


@WAYS
def test_a_damaged_tokenizer_is_an_error(tmp_path, by):
    source = _with_tokenizer(tmp_path / "model.gguf", merges=made_gguf.array(made_gguf.STRING, ["b z"]))
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.merges has 'b z'"):
        _exported(tmp_path, source, by)
    assert not (tmp_path / "dst").exists()


def test_what_is_exported_loads_as_what_it_came_from(tmp_path):
    source = gpt_oss_random.write(tmp_path / "src", gpt_oss_random.checkpoint())
    dst = _exported(tmp_path, source, "converted")
    one, other = (
        flatten(api.load_params(open_path(path), registry.build(read_config(path)))) for path in (source, dst)
    )
    assert one.keys() == other.keys()
    assert all(made.same_bits(np.asarray(one[path]), np.asarray(other[path])) for path in one)


def test_a_demo_comes_back_byte_for_byte(tmp_path, demo):
    dst = _exported(tmp_path, demo, "converted")
    copied = {path.name for path in demo.iterdir()} - {"model.safetensors", "README.md"}
    assert {path.name for path in dst.iterdir()} == copied | {"model.safetensors"}
    assert all((dst / name).read_bytes() == (demo / name).read_bytes() for name in copied)
    _assert_same(_tensors(dst), _tensors(demo))


@pytest.mark.parametrize("most", [1, 20_000, 100_000])
def test_shards_are_of_bounded_size(tmp_path, most):
    _, tensors = made.gpt2(tmp_path / "src")
    summary = convert.export(tmp_path / "src", tmp_path / "dst", max_shard_bytes=most)
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    total = sum(array.nbytes for array in tensors.values())
    assert index["metadata"]["total_size"] == summary.bytes == total
    files = sorted((tmp_path / "dst").glob("*.safetensors"))
    assert {path.name for path in files} == set(index["weight_map"].values())
    for number, path in enumerate(files, 1):
        assert path.name == f"model-{number:05}-of-{len(files):05}.safetensors"
        held = safetensors.numpy.load_file(path)
        assert {index["weight_map"][name] for name in held} == {path.name}
        assert len(held) == 1 or sum(array.nbytes for array in held.values()) <= most
    assert index["weight_map"].keys() == {f"transformer.{name}" for name in tensors}


@pytest.mark.parametrize("most", [0, -1])
def test_a_shard_has_room_for_something(tmp_path, most):
    made.gpt2(tmp_path / "src")
    with pytest.raises(RequestError, match="at least 1 byte"):
        convert.export(tmp_path / "src", tmp_path / "dst", max_shard_bytes=most)


def test_every_tensor_is_aligned(tmp_path):
    """An odd number of bytes before numbers of two would make torch copy, or fail."""
    tensors = {"odd": Outline(np.dtype(np.uint8), (3,)), "wide": Outline(np.dtype(np.float32), (2, 2))}
    tensors["half"] = Outline(made.BFLOAT16, (5,))
    writer = SafetensorsWriter(tmp_path, tensors, most=1000)
    arrays = {name: np.arange(np.prod(x.shape)).reshape(x.shape).astype(x.dtype) for name, x in tensors.items()}
    for name in ("half", "odd", "wide"):
        writer.write(name, arrays[name])
    data = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + size]).items():
        assert name == "__metadata__" or (8 + size + entry["data_offsets"][0]) % tensors[name].dtype.itemsize == 0
    _assert_same(_tensors(tmp_path), arrays)


@pytest.mark.parametrize("wrong", [np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float64), np.zeros(6, np.float32)])
def test_a_tensor_that_was_not_announced_is_an_error(tmp_path, wrong):
    writer = SafetensorsWriter(tmp_path, {"x": Outline(np.dtype(np.float32), (3, 2))}, most=1000)
    with pytest.raises(ValueError, match="x is "):
        writer.write("x", wrong)


TRANSFORMS = {
    "transposed": (TRANSPOSED, [(5, 3)]),
    "stacked": (stacked((4, 2, 1)), [(4, 3), (2, 3), (1, 3)]),
    "stacked biases": (stacked((4, 2, 1)), [(4,), (2,), (1,)]),
    "stacked and transposed": (stacked_transposed((4, 2, 1)), [(4, 3), (2, 3), (1, 3)]),
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transforms_have_inverses(kind):
    transform, shapes = TRANSFORMS[kind]
    rng = np.random.default_rng(0)
    sources = [rng.standard_normal(shape, np.float32) for shape in shapes]
    target = transform.apply(*sources)
    assert transform.source_shapes(target.shape) == tuple(shapes)
    assert all(map(made.same_bits, transform.invert(target), sources))


def test_a_format_that_is_only_read_has_none():
    transform = Transform("halved", lambda shape: (shape,), lambda array: array / 2)
    with pytest.raises(NotImplementedError, match="only read"):
        transform.invert(np.zeros(3))


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_weight_of_published_models_has_a_name_and_an_inverse(name):
    """By shapes only: sources have the shapes that the transform says, and no two weights the same name."""
    config = PUBLISHED[name]
    table, seen = tables.table(config), set()
    for path, leaf in flatten(abstract_params(registry.build(config))).items():
        names, transform = names_of(table, path)
        shapes = transform.source_shapes(leaf.shape)
        found = transform.invert(np.broadcast_to(np.zeros((), np.uint8), leaf.shape))
        assert tuple(array.shape for array in found) == shapes and len(names) == len(shapes)
        assert not seen & {*names}
        seen |= {*names}


@WAYS
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_casts_and_says_so_in_the_config(tmp_path, by, dtype):
    config, tensors = made.gpt2(tmp_path / "src", torch_dtype="float16", dtype=np.float16)
    dst = _exported(tmp_path, tmp_path / "src", by, dtype=dtype)
    expected = {f"transformer.{name}": array.astype(np.dtype(dtype)) for name, array in tensors.items()}
    _assert_same(_tensors(dst), expected)
    assert json.loads((dst / "config.json").read_text()) == config | {"torch_dtype": dtype}


@WAYS
def test_experts_are_rounded_as_by_a_conversion(tmp_path, by):
    source = gpt_oss_random.write(tmp_path / "src", gpt_oss_random.checkpoint(), layout="dequantised", shards=2)
    dst = _exported(tmp_path, source, by, quantize="experts")
    convert.convert(source, tmp_path / "rounded", quantize="experts")
    convert.export(tmp_path / "rounded", tmp_path / "another")
    found = _tensors(dst)
    _assert_same(found, _tensors(tmp_path / "another"))
    assert {name.rsplit("_", 1)[1] for name, array in found.items() if array.dtype == np.uint8} == {"blocks", "scales"}
    raw = json.loads((dst / "config.json").read_text())
    assert raw["quantization_config"] == {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    assert raw == json.loads((tmp_path / "another" / "config.json").read_text())


@pytest.mark.parametrize("targets", ["experts", "linear", "all", "some"])
def test_gpt2_is_not_packed_for_transformers(tmp_path, targets):
    made.gpt2(tmp_path / "src", n_embd=64, n_head=4, n_inner=96)
    with pytest.raises(ConfigError, match="experts of GPT-OSS and nowhere else; do not quantize"):
        convert.export(tmp_path / "src", tmp_path / "dst", quantize=targets)
    assert os.listdir(tmp_path) == ["src"]


def test_only_experts_are_packed_for_transformers(tmp_path):
    source = gpt_oss_random.write(tmp_path / "src", gpt_oss_random.checkpoint())
    with pytest.raises(ConfigError, match="nowhere else; choose mxfp4=experts"):
        convert.export(source, tmp_path / "dst", quantize="all")
    convert.convert(source, tmp_path / "packed", quantize="all")
    with pytest.raises(ConfigError, match="export the checkpoint that this one was made from"):
        convert.export(tmp_path / "packed", tmp_path / "dst")


def test_ignored_keys_are_left_out(tmp_path):
    config, _ = made.gpt2(tmp_path / "src", rotary_dim=8)
    convert.export(tmp_path / "src", tmp_path / "dst", ignore_config=["rotary_dim"])
    assert json.loads((tmp_path / "dst" / "config.json").read_text()) == {
        key: value for key, value in config.items() if key != "rotary_dim"
    }


def _damage_converted(directory: Path) -> None:
    path = max((directory / "params").rglob("0.0"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


BAD = {  # what is done to a converted directory; the error
    "a changed byte": (_damage_converted, "have changed"),
    "a missing piece": (lambda d: shutil.rmtree(d / "params" / "0000"), "is missing"),
    "another model": (lambda d: made.change_config(d, n_layer=2), "is not a weight of the model"),
    "no manifest": (lambda d: os.remove(d / "manifest.json"), "its manifest.json is missing"),
    "no config": (lambda d: os.remove(d / "config.json"), "has no config.json"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_damaged_source_writes_nothing(tmp_path, kind):
    damage, said = BAD[kind]
    made.gpt2(tmp_path / "src")
    convert.convert(tmp_path / "src", tmp_path / "converted")
    damage(tmp_path / "converted")
    with pytest.raises(CheckpointError, match=said):
        convert.export(tmp_path / "converted", tmp_path / "dst")
    assert sorted(os.listdir(tmp_path)) == ["converted", "src"]


def test_overwriting_replaces_only_what_was_exported(tmp_path):
    made.gpt2(tmp_path / "src", shards=2)
    convert.export(tmp_path / "src", tmp_path / "dst", max_shard_bytes=50_000)
    with pytest.raises(CheckpointError, match="exists; name another directory"):
        convert.export(tmp_path / "src", tmp_path / "dst")
    _, tensors = made.gpt2(tmp_path / "src2", seed=2)
    convert.export(tmp_path / "src2", tmp_path / "dst", overwrite=True)
    assert sorted(os.listdir(tmp_path / "dst")) == ["config.json", "model.safetensors", "tokenizer.json"]
    _assert_same(_tensors(tmp_path / "dst"), {f"transformer.{name}": array for name, array in tensors.items()})
    convert.convert(tmp_path / "src", tmp_path / "converted")
    (tmp_path / "dst" / "thesis.tex").write_text("mine")
    for theirs in ("src", "converted", "dst"):  # a download, the other format, and more than was written
        before = made.contents(tmp_path)
        with pytest.raises(CheckpointError, match="was not written by gptjax"):
            convert.export(tmp_path / "src2", tmp_path / theirs, overwrite=True)
        assert made.contents(tmp_path) == before
    with pytest.raises(CheckpointError, match="was not written by gptjax"):
        convert.convert(tmp_path / "src", tmp_path / "dst", overwrite=True)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    made.gpt2(tmp_path / "src")
    real, calls = SafetensorsWriter.write, []

    def write(self, name, array):
        calls.append(name)
        if len(calls) == 20:
            raise OSError(28, "No space left on device")
        real(self, name, array)

    monkeypatch.setattr(SafetensorsWriter, "write", write)
    with pytest.raises(CheckpointError, match=r"dst cannot be written .*the disk is full"):
        convert.export(tmp_path / "src", tmp_path / "dst")
    assert os.listdir(tmp_path) == ["src"]


def test_progress_is_told_of_every_byte(tmp_path):
    made.gpt2(tmp_path / "src")
    told = []

    class Bar:
        def __init__(self, description, total):
            told.append(total)

        def __enter__(self):
            return told.append

        def __exit__(self, *_):
            pass

    summary = convert.export(tmp_path / "src", tmp_path / "dst", dtype="bfloat16", progress=Bar)
    assert told[0] == summary.bytes == sum(told[1:])
    assert jax.numpy.dtype("bfloat16").name == summary.dtypes[0]
