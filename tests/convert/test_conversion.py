"""Whole conversions: what comes out, that bad input writes nothing, and what is printed."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from convert import convert, open_params
from gptjax.checkpoints import saving, weights
from gptjax.checkpoints.checkpoint import open_path
from gptjax.config import read_config
from gptjax.errors import CheckpointError, ConfigError
from gptjax.models.params import abstract_params
from gptjax.models.registry import build
from tests.convert import made
from tests.convert.conversion_material import assert_holds, restored, start
from tests.oracles import gpt2_ours


@pytest.mark.parametrize("shards", [0, 3])
def test_converts_bit_for_bit(tmp_path, shards):
    _, tensors = made.gpt2(tmp_path / "src", prefix="transformer.", shards=shards)
    summary = convert(tmp_path / "src", tmp_path / "dst")
    assert (summary.num_weights, summary.dtypes) == (len(tensors), ("float32",))
    assert summary.num_params == sum(array.size for array in tensors.values())
    assert_holds(tmp_path / "dst", tensors)


@pytest.mark.parametrize("source", [np.float32, np.float16, made.BFLOAT16])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", None])
def test_casts_all_weights(tmp_path, source, dtype):
    _, tensors = made.gpt2(tmp_path / "src", dtype=source)
    summary = convert(tmp_path / "src", tmp_path / "dst", dtype=dtype)
    stored = np.dtype(dtype or source)
    assert summary.dtypes == (stored.name,)
    assert summary.bytes == stored.itemsize * summary.num_params
    assert_holds(tmp_path / "dst", {name: array.astype(stored) for name, array in tensors.items()}, stored)


def test_what_a_converted_directory_holds(tmp_path):
    made.gpt2(tmp_path / "src")
    for name in ("generation_config.json", "tokenizer_config.json", "vocab.json", "merges.txt", "README.md", "x.bin"):
        (tmp_path / "src" / name).write_text(f"{{}} {name}")
    convert(tmp_path / "src", tmp_path / "dst")
    copied = [
        "config.json",
        "generation_config.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    assert sorted(os.listdir(tmp_path / "dst")) == sorted([*copied, "manifest.json", "params"])
    for name in copied:
        assert (tmp_path / "dst" / name).read_bytes() == (tmp_path / "src" / name).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]


def test_the_manifest_tells_where_all_came_from_and_went(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "PIECE_BYTES", 50_000)
    _, tensors = made.gpt2(tmp_path / "src", shards=2)
    convert(tmp_path / "src", tmp_path / "dst")
    raw = json.loads((tmp_path / "dst" / "manifest.json").read_text())
    assert raw["source"]["name"] == "src"
    for file in raw["source"]["files"]:
        content = (tmp_path / "src" / file["name"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    leaves = {leaf["path"]: leaf for leaf in raw["leaves"]}
    assert leaves.keys() == {gpt2_ours.target(name) for name in tensors}
    for name, array in tensors.items():
        leaf = leaves[gpt2_ours.target(name)]
        assert (leaf["shape"], leaf["dtype"]) == (list(array.shape), "float32")
        assert (tmp_path / "dst" / "params" / leaf["piece"]).is_dir()
    sizes = [sum(4 * np.prod(leaf["shape"]) for leaf in leaves.values() if leaf["piece"] == p) for p in raw["pieces"]]
    assert len(sizes) > 3 and max(sizes) <= 50_000
    assert sorted(os.listdir(tmp_path / "dst" / "params")) == sorted(raw["pieces"])


def test_values_beyond_float16_are_refused(tmp_path):
    _, tensors = made.gpt2(tmp_path / "src")
    tensors["wpe.weight"][3, 4] = 70_000
    made.write_gpt2(tmp_path / "src", tensors)
    with pytest.raises(CheckpointError, match=r"position_embedding has values beyond float16's 65504; use bfloat16"):
        convert(tmp_path / "src", tmp_path / "dst", dtype="float16")
    assert os.listdir(tmp_path) == ["src"]


def test_other_dtypes_are_refused(tmp_path):
    made.gpt2(tmp_path / "src")
    with pytest.raises(CheckpointError, match="to int8; use float32, bfloat16, float16"):
        convert(tmp_path / "src", tmp_path / "dst", dtype="int8")


def _replaced(directory: Path, name: str, array: np.ndarray | None) -> None:
    _, tensors = made.gpt2(directory)
    tensors = {key: value for key, value in {**tensors, name: array}.items() if value is not None}
    made.write_gpt2(directory, tensors)


def _indexed(directory: Path, name: str) -> None:
    weight_map = made.write_sharded(directory, made.gpt2(directory)[1])
    os.remove(directory / "model.safetensors")
    if name == "link.safetensors":
        shutil.move(directory / weight_map["wte.weight"], directory.parent / "outside.safetensors")
        (directory / name).symlink_to(directory.parent / "outside.safetensors")
    made.write_index(directory, weight_map | {"wte.weight": name})


def _instead(directory: Path, name: str, content: bytes) -> None:
    os.remove(directory / "model.safetensors")
    (directory / name).write_bytes(content)


def _tensor(name: str, *shape: int, dtype=np.float32, value: float = 0):
    """Adds a tensor, or changes one."""
    return lambda directory: _replaced(directory, name, np.full(shape, value, dtype))


BAD = {  # what is done to a directory; the error, and what it says of the fault and of the way out
    "no such path": (shutil.rmtree, CheckpointError, "does not exist", "name a GGUF file, or a directory"),
    "no config": (lambda d: os.remove(d / "config.json"), CheckpointError, "has no config.json", "expected"),
    "no weights": (lambda d: os.remove(d / "model.safetensors"), CheckpointError, "has neither", "get the model's"),
    "truncated": (
        *(lambda d: os.truncate(d / "model.safetensors", 5000), CheckpointError),
        *("model.safetensors is truncated", "found 5,000", "download the file again"),
    ),
    "missing": (
        *(lambda d: _replaced(d, "h.1.ln_2.bias", None), CheckpointError),
        *("1 tensor missing:\n    h.1.ln_2.bias", "download the checkpoint again"),
    ),
    "extra": (_tensor("h.0.attn.rotary", 3), CheckpointError, "1 tensor unknown:\n    h.0.attn.rotary", "config.json"),
    "misshapen": (_tensor("ln_f.bias", 61), CheckpointError, "ln_f.bias is [61], expected [60]", "correct config.json"),
    "integers": (_tensor("ln_f.bias", 60, dtype=np.int32), CheckpointError, "ln_f.bias is I32, expected F32 or F16"),
    "float8": (_tensor("ln_f.bias", 60, dtype=ml_dtypes.float8_e4m3fn), CheckpointError, "F8_E4M3, expected F32 or"),
    "nan": (_tensor("ln_f.bias", 60, value=np.nan), CheckpointError, "ln_f.bias contains NaN", "download it again"),
    "tied head differs": (
        *(_tensor("lm_head.weight", 101, 60), CheckpointError),
        *("lm_head.weight differs from wte.weight", "set tie_word_embeddings to false"),
    ),
    "index outside": (
        *(lambda d: _indexed(d, "../outside.safetensors"), CheckpointError),
        *("'../outside.safetensors', which is not a plain file name", "download the checkpoint again"),
    ),
    "index absolute": (
        *(lambda d: _indexed(d, "/outside.safetensors"), CheckpointError),
        *("'/outside.safetensors', which is not a plain file name", "download the checkpoint again"),
    ),
    "index link": (
        *(lambda d: _indexed(d, "link.safetensors"), CheckpointError),
        *("'link.safetensors', a link that leads out", "download the checkpoint again"),
    ),
    "pickle": (
        *(lambda d: _instead(d, "pytorch_model.bin", b"\x80\x02}q\0."), CheckpointError),
        *("pytorch_model.bin is a PyTorch pickle", "save_pretrained"),
    ),
    "disguised pickle": (
        *(lambda d: _instead(d, "model.safetensors", b"\x80\x04}q\0." * 9), CheckpointError),
        *("model.safetensors is a PyTorch pickle", "save_pretrained"),
    ),
    "ggml": (
        *(lambda d: _instead(d, "ggml-model.bin", b"lmgg" + bytes(50)), CheckpointError),
        *("ggml-model.bin is a ggml file", "get the model's safetensors files"),
    ),
    "model type": (lambda d: made.change_config(d, model_type="bert"), ConfigError, "'bert'", "supports gpt2"),
    "activation": (lambda d: made.change_config(d, activation_function="swoosh"), ConfigError, "'swoosh'", "supports"),
    "unknown key": (lambda d: made.change_config(d, rotary_dim=8), ConfigError, "unknown key rotary_dim"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("overwrite", [False, True])
def test_bad_input_is_told_and_writes_nothing(tmp_path, kind, overwrite):
    damage, error, *parts = BAD[kind]
    made.gpt2(tmp_path / "src")
    if overwrite:
        convert(tmp_path / "src", tmp_path / "dst")
    damage(tmp_path / "src")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(error) as caught:
        convert(tmp_path / "src", tmp_path / "dst", overwrite=overwrite)
    for part in parts:
        assert part in str(caught.value)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", None, "name its directory: "),
        ("model.gguf", b"GGUF" + bytes(50), "GGUF version 0"),
        ("ggml-model.bin", b"lmgg" + bytes(50), "ggml file"),
        ("pytorch_model.bin", b"\x80\x02}q\0.", "pickle"),
        ("notes.txt", b"notes", "name its directory: "),
    ],
)
def test_a_file_as_source(tmp_path, name, content, said):
    made.gpt2(tmp_path / "src")
    if content is not None:
        (tmp_path / "src" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        convert(tmp_path / "src" / name, tmp_path / "dst")
    assert os.listdir(tmp_path) == ["src"]


def test_source_and_destination_must_lie_apart(tmp_path):
    made.gpt2(tmp_path / "a" / "src")
    before = made.listing(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for destination in ("a/src", "a/src/.", "a/src/dst", "a/src/../src", "a", "link/src/dst"):
        for overwrite in (False, True):
            with pytest.raises(CheckpointError, match=r"the same directory|is inside the other"):
                convert(tmp_path / "a" / "src", tmp_path / destination, overwrite=overwrite)
    os.remove(tmp_path / "link")
    assert made.listing(tmp_path) == before


def test_a_converted_source_is_refused(tmp_path):
    made.gpt2(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst")
    with pytest.raises(CheckpointError, match="is already converted"):
        convert(tmp_path / "dst", tmp_path / "again")


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

    summary = convert(tmp_path / "src", tmp_path / "dst", dtype="bfloat16", progress=Bar)
    assert told[0] == summary.bytes == sum(told[1:])


def test_conversion_prints_nothing(tmp_path):
    made.gpt2(tmp_path / "src")
    process = start(tmp_path / "src", tmp_path / "dst")
    assert process.communicate() == (b"", b"")
    assert process.returncode == 0


def test_the_logging_of_others_is_as_it_was(tmp_path):
    made.gpt2(tmp_path / "src")
    logger = logging.getLogger("absl")
    before = (logger.level, list(logger.filters), list(logger.handlers), logger.disabled)
    convert(tmp_path / "src", tmp_path / "dst")
    restored(tmp_path / "dst")
    assert (logger.level, list(logger.filters), list(logger.handlers), logger.disabled) == before


def test_converted_and_direct_loading_agree(tmp_path, demo):
    convert(demo, tmp_path / "dst")
    targets = abstract_params(build(read_config(demo)))
    direct = weights.place(open_params(open_path(demo)), targets)
    restored = weights.restore(tmp_path / "dst", targets)
    assert jax.tree.structure(direct) == jax.tree.structure(restored) == jax.tree.structure(targets)
    assert all(map(np.array_equal, jax.tree.leaves(direct), jax.tree.leaves(restored)))
