"""Converted directories that are damaged, forged or of another model: the fault is named, and little memory taken."""

import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from gptjax.checkpoints import weights
from gptjax.checkpoints.manifest import read_manifest
from gptjax.errors import CheckpointError
from tests.checkpoints.weights_material import ROOT, assert_equal, targets_of


def test_mismatches_with_the_model_are_reported_together(saved):
    targets = targets_of(bias=jnp.int32, packed=jnp.float32)
    targets["zeros"] = jax.ShapeDtypeStruct((6,), jnp.float32)
    targets["more"] = {"weights": jax.ShapeDtypeStruct((6,), jnp.float32)}
    del targets["embedding"]
    with pytest.raises(CheckpointError) as caught:
        weights.restore(saved, targets)
    for part in (
        "block_0/mlp/bias is float16, expected int32",
        "block_1/packed is uint8, expected float32",
        "embedding is not a weight of the model",
        "more/weights is missing",
        "zeros is [5], expected [6]",
        "convert the checkpoint again",
    ):
        assert part in str(caught.value)


def _chunk(directory: Path) -> Path:
    return next(path for path in (directory / "params").rglob("*") if path.is_file() and path.stat().st_size == 96)


DAMAGE = {
    "a missing piece": (lambda d: shutil.rmtree(d / "params" / "0001"), "0001 is missing"),
    "no pieces at all": (lambda d: shutil.rmtree(d / "params"), "0000 is missing"),
    "a missing file": (lambda d: os.remove(_chunk(d)), "is missing"),
    "a truncated file": (lambda d: os.truncate(_chunk(d), 50), "has 50 bytes, expected 96"),
    "a changed byte": (lambda d: _chunk(d).write_bytes(_chunk(d).read_bytes()[:-1] + b"\x7f"), "have changed"),
    "pieces exchanged": (lambda d: _exchange(d / "params" / "0000", d / "params" / "0001"), "is damaged"),
}


def _exchange(a: Path, b: Path) -> None:
    a.rename(a.with_name("x"))
    b.rename(a)
    a.with_name("x").rename(b)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_pieces_are_named(saved, capfd, kind):
    damage, said = DAMAGE[kind]
    damage(saved)
    with pytest.raises(CheckpointError, match=said) as caught:
        weights.restore(saved, targets_of())
    assert str(saved / "params") in str(caught.value) and "convert the checkpoint again" in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_damaged_metadata_is_told(saved):
    """In a process of its own: TensorStore's threads may fail once more, later."""
    path = next((saved / "params").rglob(".zarray"))
    path.write_text(path.read_text().replace('"order":"C"', '"order":"X"'))
    code = (
        "import sys; from pathlib import Path; from gptjax import errors; from gptjax.checkpoints import weights\n"
        "from gptjax.checkpoints.manifest import read_manifest\n"
        "path = Path(sys.argv[1])\n"
        "try: [read() for _, read in weights.readers(path, read_manifest(path))]\n"
        "except errors.CheckpointError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, cwd=ROOT)
    assert str(saved / "params") in result.stdout and "is damaged" in result.stdout


def _described(directory: Path, weight: str, text: str | bytes, chunk: bytes | None = None) -> None:
    """Another description of a weight, and another chunk, with a manifest that agrees."""
    manifest = json.loads((directory / "manifest.json").read_text())
    path = next((directory / "params").glob(f"*/{weight}"))
    (path / ".zarray").write_bytes(text.encode() if isinstance(text, str) else text)
    files = manifest["pieces"][path.parent.name]
    files[f"{weight}/.zarray"] = (path / ".zarray").stat().st_size
    if chunk is not None:
        (path / "0.0").write_bytes(chunk)
        files[f"{weight}/0.0"] = len(chunk)
    (directory / "manifest.json").write_text(json.dumps(manifest))


ZARRAY = {"chunks": [6, 4], "compressor": None, "dimension_separator": ".", "dtype": "<f4", "fill_value": None}
ZARRAY |= {"filters": None, "order": "C", "shape": [6, 4], "zarr_format": 2}
HOSTILE = {  # what a library is not asked to make sense of
    "an enormous shape": json.dumps(ZARRAY | {"shape": [1 << 40, 1 << 20]}),
    "an enormous shape and chunk": json.dumps(ZARRAY | {"shape": [1 << 62, 4], "chunks": [1 << 62, 4]}),
    "a negative shape": json.dumps(ZARRAY | {"shape": [-6, -4]}),
    "many axes": json.dumps(ZARRAY | {"shape": [6, 4] + [1] * 100, "chunks": [6, 4] + [1] * 100}),
    "nested": json.dumps(ZARRAY)[:-1] + ', "attributes": ' + "[" * 200_000 + "]" * 200_000 + "}",
    "nested in few bytes": json.dumps(ZARRAY)[:-1] + ', "attributes": ' + "[" * 1500 + "]" * 1500 + "}",
    "not JSON": "{",
    "not text": b"\xff\xfe{}",
    "a list": "[]",
    "empty": "",
    "long": json.dumps(ZARRAY) + " " * 5000,
    "no key": json.dumps({key: value for key, value in ZARRAY.items() if key != "filters"}),
    "one more key": json.dumps(ZARRAY | {"more": 1}),
    **{
        f"{key} {value!r}": json.dumps(ZARRAY | {key: value})
        for key, values in {
            "compressor": [{"id": "zlib", "level": 1}, {"id": "blosc", "cname": "zstd"}, {"id": "zstd"}, "gzip"],
            "filters": [[{"id": "delta", "dtype": "<f4"}], {}],
            "order": ["F", "X"],
            "dtype": [">f4", "<f8", "|O", "|S1000000", [["x", "<f4"]]],
            "chunks": [[1, 1], [3, 4], [6, 4, 1], [0, 0], 6],
            "fill_value": ["NaN", 1e400],
            "dimension_separator": ["/", None],
            "zarr_format": [3, "2"],
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_pieces_that_are_not_as_orbax_wrote_them_are_refused_before_anything_is_made_of_them(saved, kind):
    _described(saved, "block_0.mlp.kernel", HOSTILE[kind])
    with pytest.raises(CheckpointError, match=r"block_0\.mlp\.kernel/\.zarray") as caught:
        weights.restore(saved, targets_of())
    assert "copy the directory or convert the checkpoint again" in str(caught.value) or "is larger than" in str(
        caught.value
    )
    assert len(str(caught.value)) < 600


BOMB = """
import resource, sys
from pathlib import Path
from gptjax import errors
from gptjax.checkpoints import manifest, weights
path = Path(sys.argv[1])
read = manifest.read_manifest(path)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    for _, leaf in weights.readers(path, read):
        leaf()
except errors.CheckpointError as error:
    print("refused:", error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("compressed", [False, True])
def test_a_large_chunk_in_few_bytes(saved, compressed):
    """256 MB of zeros, compressed or in a sparse file."""
    shape = [1 << 13, 1 << 13]
    text = json.dumps(ZARRAY | {"shape": shape, "chunks": shape, "compressor": {"id": "zlib", "level": 9}})
    _described(saved, "block_0.mlp.kernel", text, zlib.compress(bytes(1 << 28), 9) if compressed else b"")
    if not compressed:
        os.truncate(next((saved / "params").glob("*/block_0.mlp.kernel/0.0")), 1 << 28)
    manifest = (saved / "manifest.json").read_text()
    for text in (manifest, manifest.replace("[6, 4]", str(shape))):
        (saved / "manifest.json").write_text(text)
        result = subprocess.run([sys.executable, "-c", BOMB, str(saved)], capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stderr
        said, megabytes = result.stdout.splitlines()
        assert said.startswith("refused: ") and "is damaged" in said
        assert int(megabytes) < 50


def test_reads_what_orbax_alone_wrote(saved):
    """As gptjax's earlier versions left it, with its times and places."""
    for piece in (saved / "params").iterdir():
        tree = ocp.PyTreeCheckpointer().restore(piece)
        shutil.rmtree(piece)
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
        ocp.Checkpointer(handler).save(piece, tree)
    raw = json.loads((saved / "manifest.json").read_text())
    for piece, files in raw["pieces"].items():
        for name in files:
            files[name] = (saved / "params" / piece / name).stat().st_size
    (saved / "manifest.json").write_text(json.dumps(raw))
    assert_equal(weights.restore(saved, targets_of()))


@pytest.mark.parametrize("name", ["../../x", "a/../b", "", "a//b", "/a", "a\0b", "é", "x" * 101, "/".join("a" * 17)])
def test_the_name_of_a_weight_in_a_manifest_leads_nowhere(saved, name):
    path = saved / "manifest.json"
    path.write_text(path.read_text().replace('"block_0/mlp/kernel"', json.dumps(name)))
    with pytest.raises(CheckpointError, match="is damaged"):
        read_manifest(saved)


MANIFESTS = {
    "a piece that is not there": (lambda raw: json.dumps(raw | {"pieces": {}}), "the piece 0000 is not listed"),
    "nested": (lambda raw: json.dumps(raw)[:-1] + ', "more": ' + "[" * 200_000 + "]" * 200_000 + "}", "too deeply"),
    "an enormous number": (lambda raw: json.dumps(raw).replace("[6, 4]", f"[{'9' * 4000}, 4]"), "is not a count"),
    "many axes": (lambda raw: json.dumps(raw).replace("[6, 4]", str([1] * 1000)), "is not a shape"),
    "not JSON": (lambda raw: "{", "not valid JSON"),
    "another file": (lambda raw: "{}", "not a gptjax manifest"),
    "a later version": (lambda raw: json.dumps(raw | {"version": 2}), "has version 2, but this gptjax reads version 1"),
    "no leaves": (lambda raw: json.dumps({k: v for k, v in raw.items() if k != "leaves"}), "is damaged"),
    "leaves of another kind": (lambda raw: json.dumps(raw | {"leaves": 3}), "is damaged"),
    "a piece elsewhere": (lambda raw: json.dumps(raw | {"pieces": {"../../x": {}}}), "'../../x' is not a number"),
    "a negative size": (lambda raw: json.dumps(raw).replace("[6, 4]", "[-6, 4]"), "-6 is not a count"),
    "a doubled leaf": (lambda raw: json.dumps(raw | {"leaves": raw["leaves"] + raw["leaves"][:1]}), "listed twice"),
    "an unknown dtype": (
        lambda raw: json.dumps(raw).replace('"float16"', '"float99"'),
        "the dtype 'float99' is unknown",
    ),
    "a dtype of another kind": (lambda raw: json.dumps(raw).replace('"float16"', "[16]"), "is damaged"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_damaged_manifests_are_named(saved, kind):
    change, said = MANIFESTS[kind]
    path = saved / "manifest.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(CheckpointError) as caught:
        weights.restore(saved, targets_of())
    assert said in str(caught.value) and str(saved) in str(caught.value)
