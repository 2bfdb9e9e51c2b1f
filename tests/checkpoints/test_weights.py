"""Weights in and out of Orbax, and onto devices: bit for bit, of their own memory, or an error that says what to do."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

import convert
from gptjax.checkpoints import atomic_directory, weights
from gptjax.checkpoints.safetensors import open_directory
from gptjax.errors import CheckpointError
from tests.convert import made

ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)
LEAVES = {
    ("block_0", "mlp", "kernel"): RNG.standard_normal((6, 4), np.float32),
    ("block_0", "mlp", "bias"): RNG.standard_normal((4,), np.float32).astype(np.float16),
    ("block_1", "packed"): RNG.integers(0, 256, (8, 3), np.uint8),
    ("embedding",): RNG.standard_normal((10, 6), np.float32).astype(ml_dtypes.bfloat16),
    ("zeros",): np.zeros((5,), np.float32),
}


def _targets(**dtypes):
    """What LEAVES are, with other dtypes for some, named by the path's last part."""
    return weights.nest(
        {path: jax.ShapeDtypeStruct(array.shape, dtypes.get(path[-1], array.dtype)) for path, array in LEAVES.items()}
    )


def _save(destination: Path, leaves=LEAVES, **options) -> weights.Manifest:
    items: Iterable = leaves.items() if isinstance(leaves, dict) else leaves
    options = {"total_bytes": 1000, "source": "test", "source_files": tuple, **options}
    return weights.save(destination, _parts(items), **options)


def _parts(items):
    return (weights.Part(array.nbytes, lambda path=path, array=array: {path: array}) for path, array in items)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A directory of several pieces."""
    monkeypatch.setattr(weights, "PIECE_BYTES", 110)
    _save(tmp_path / "dst")
    return tmp_path / "dst"


def _assert_equal(params, leaves=LEAVES):
    found = weights.flatten(params)
    assert found.keys() == leaves.keys()
    for path, array in leaves.items():
        assert isinstance(found[path], jax.Array)
        assert made.same_bits(np.asarray(found[path]), array)


def test_flatten_and_nest_are_inverse():
    assert weights.flatten(weights.nest(LEAVES)) == LEAVES
    assert weights.nest({("a", "b"): 1, ("a", "c"): 2, ("d",): 3}) == {"a": {"b": 1, "c": 2}, "d": 3}


def test_restores_bit_for_bit(saved):
    _assert_equal(weights.restore(saved, _targets()))
    assert len(os.listdir(saved / "params")) == 4


def test_each_piece_can_be_read_with_orbax_alone(saved):
    found = {}
    for piece in (saved / "params").iterdir():
        found |= weights.flatten(ocp.PyTreeCheckpointer().restore(piece))
    assert all(made.same_bits(found[path], array) for path, array in LEAVES.items())


def test_params_keep_the_order_of_the_targets(saved):
    params = weights.place(reversed(LEAVES.items()), _targets())
    assert list(params) == ["block_0", "block_1", "embedding", "zeros"]


def test_is_converted(tmp_path, saved):
    assert weights.is_converted(saved)
    assert not weights.is_converted(tmp_path)
    assert not weights.is_converted(tmp_path / "nowhere")


# Casts: halves between neighbours go to the even one, what lies a bit beyond goes up.
BITS = np.array([0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF, 0x00000001, 0x80000000], np.uint32)
TO_BF16 = np.array([0x3F80, 0x3F80, 0x3F82, 0x3F81, 0x3F81, 0x0000, 0x8000], np.uint16)


def test_float32_to_bfloat16_rounds_to_nearest_even():
    cast = weights.cast(BITS.view(np.float32), jnp.bfloat16, "x")
    assert cast.view(np.uint16).tolist() == TO_BF16.tolist()


def test_float32_to_float16_rounds_to_nearest_even():
    values = np.array([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-20, 65504, 2**-24, 2**-25, 65519], np.float32)
    cast = weights.cast(values, np.float16, "x")
    assert cast.view(np.uint16).tolist() == [0x3C00, 0x3C02, 0x3C01, 0x7BFF, 0x0001, 0x0000, 0x7BFF]


def test_bfloat16_to_float32_is_exact():
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[(bits & 0x7F80) != 0x7F80]
    cast = weights.cast(bits.view(ml_dtypes.bfloat16), np.float32, "x")
    assert (cast.view(np.uint32) == bits.astype(np.uint32) << 16).all()


@pytest.mark.parametrize("kind", ["place", "restore"])
def test_casts_to_the_wanted_dtype(saved, kind):
    targets = _targets(kernel=jnp.bfloat16, bias=jnp.float32, embedding=jnp.float16)
    params = weights.restore(saved, targets) if kind == "restore" else weights.place(LEAVES.items(), targets)
    wanted = weights.flatten(targets)
    _assert_equal(params, {path: array.astype(wanted[path].dtype) for path, array in LEAVES.items()})


@pytest.mark.parametrize("source", [np.float32, ml_dtypes.bfloat16])
def test_values_beyond_float16_are_refused(source):
    with pytest.raises(CheckpointError, match="a/b has values beyond float16's 65504; use bfloat16 or float32"):
        weights.place([(("a", "b"), np.full(3, 1e5, source))], {"a": {"b": jax.ShapeDtypeStruct((3,), np.float16)}})


@pytest.mark.parametrize(("found", "wanted"), [(np.uint8, np.float32), (np.float32, np.uint8), (np.float32, np.int32)])
def test_only_floats_are_cast(found, wanted):
    with pytest.raises(CheckpointError, match="only floating-point weights can"):
        weights.place([(("a",), np.zeros(3, found))], {"a": jax.ShapeDtypeStruct((3,), wanted)})


@pytest.mark.parametrize(
    ("leaves", "said"),
    [
        ([("kernel", (2, 3))], "weights are missing: bias"),
        ([("kernel", (2, 3)), ("bias", (3,)), ("bias", (3,))], "bias is duplicated"),
        ([("kernel", (2, 3)), ("scale", (3,))], "scale is not in the model"),
        ([("kernel", (3, 2)), ("bias", (3,))], r"kernel is \[3, 2\], expected \[2, 3\]"),
    ],
)
def test_place_checks_what_it_is_given(leaves, said):
    targets = {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32), "bias": jax.ShapeDtypeStruct((3,), jnp.float32)}
    with pytest.raises(CheckpointError, match=said):
        weights.place([((name,), np.zeros(shape, np.float32)) for name, shape in leaves], targets)


def test_place_takes_one_weight_at_a_time():
    """The one before is on the device, and gone from the host, when the next one is asked for."""
    import weakref

    alive = []

    def leaves():
        for name in "abc":
            assert not any(reference() is not None for reference in alive)
            array = np.ones(1000, np.float32)
            alive.append(weakref.ref(array))
            yield (name,), array
            del array

    weights.place(leaves(), {name: jax.ShapeDtypeStruct((1000,), jnp.bfloat16) for name in "abc"})
    assert len(alive) == 3


def _read(tmp_path):
    """A weight as it is read from a file, aligned such that the CPU backend takes it without copying."""
    array = np.arange(1 << 16, dtype=np.float32)
    made.write(tmp_path / "model.safetensors", {"x": array})
    return array, open_directory(tmp_path).read("x")


def test_params_do_not_change_with_the_array_that_they_were_made_of():
    array = np.arange((1 << 16) + 16, dtype=np.float32)
    array = array[-array.ctypes.data % 64 // 4 :][: 1 << 16]
    assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data  # the danger is real
    before = array.copy()
    params = weights.place([(("x",), array)], {"x": jax.ShapeDtypeStruct(array.shape, array.dtype)})
    array[:] = 7
    assert np.array_equal(params["x"], before)


@pytest.mark.parametrize("kind", ["place", "restore"])
def test_params_can_be_donated(tmp_path, kind):
    array, view = _read(tmp_path)
    targets = {"x": jax.ShapeDtypeStruct(array.shape, array.dtype)}
    _save(tmp_path / "dst", {("x",): array})
    params = (
        weights.restore(tmp_path / "dst", targets) if kind == "restore" else weights.place([(("x",), view)], targets)
    )
    before = params["x"].unsafe_buffer_pointer()
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(params["x"])
    assert params["x"].is_deleted()
    assert after.unsafe_buffer_pointer() == before  # used in place
    assert np.array_equal(view, array)


SHARDED = """
import sys, jax, numpy as np
from pathlib import Path
from gptjax.checkpoints import weights
mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
array = np.arange(8 * 64, dtype=np.float32).reshape(8, 64)
def target(*spec):
    return jax.ShapeDtypeStruct((8, 64), jax.numpy.bfloat16, sharding=jax.NamedSharding(mesh, jax.P(*spec)))
targets = {"rows": target("tensor"), "columns": target(None, "tensor"), "all": target()}
targets["both"] = target("data", "tensor")
leaves = [((name,), array) for name in targets]
parts = [weights.Part(array.nbytes, lambda path=path, array=array: {path: array}) for path, array in leaves]
weights.save(Path(sys.argv[1]), parts, total_bytes=1, source="", source_files=tuple)
for params in (weights.place(leaves, targets), weights.restore(Path(sys.argv[1]), targets)):
    for name, target in targets.items():
        x = params[name]
        assert x.sharding == target.sharding and x.dtype == target.dtype, (x.sharding, x.dtype)
        assert np.array_equal(np.asarray(x).astype(np.float32), array.astype(x.dtype).astype(np.float32))
        places = {shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards}
        assert len(places) == 8, name  # no two devices share memory
print("done")
"""


def test_shardings_of_the_targets(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "dst")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert (result.stdout, result.stderr) == ("done\n", "")


def test_mismatches_with_the_model_are_reported_together(saved):
    targets = _targets(bias=jnp.int32, packed=jnp.float32)
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
        weights.restore(saved, _targets())
    assert str(saved / "params") in str(caught.value) and "convert the checkpoint again" in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_damaged_metadata_is_told(saved):
    """In a process of its own: TensorStore's threads may fail once more, later."""
    path = next((saved / "params").rglob(".zarray"))
    path.write_text(path.read_text().replace('"order":"C"', '"order":"X"'))
    code = (
        "import sys; from pathlib import Path; from gptjax import errors; from gptjax.checkpoints import weights\n"
        "path = Path(sys.argv[1])\n"
        "try: list(weights.read_leaves(path, weights.read_manifest(path)))\n"
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
        weights.restore(saved, _targets())
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
read = weights.read_manifest(path)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    list(weights.read_leaves(path, read))
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
    _assert_equal(weights.restore(saved, _targets()))


@pytest.mark.parametrize("name", ["../../x", "a/../b", "", "a//b", "/a", "a\0b", "é", "x" * 101, "/".join("a" * 17)])
def test_the_name_of_a_weight_in_a_manifest_leads_nowhere(saved, name):
    path = saved / "manifest.json"
    path.write_text(path.read_text().replace('"block_0/mlp/kernel"', json.dumps(name)))
    with pytest.raises(CheckpointError, match="is damaged"):
        weights.read_manifest(saved)


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
        weights.restore(saved, _targets())
    assert said in str(caught.value) and str(saved) in str(caught.value)


def test_orbax_is_silent_and_the_logging_of_others_is_as_it_was(tmp_path, capfd):
    logger = logging.getLogger("absl")
    before = (logger.level, list(logger.filters), list(logger.handlers))
    _save(tmp_path / "dst")
    weights.restore(tmp_path / "dst", _targets())
    assert capfd.readouterr() == ("", "")
    assert (logger.level, list(logger.filters), list(logger.handlers)) == before


def test_a_piece_is_of_bounded_size_or_a_single_weight(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "PIECE_BYTES", 100)
    leaves = {(str(i),): np.zeros(size, np.uint8) for i, size in enumerate([40, 60, 1, 500, 99, 2, 98])}
    manifest = _save(tmp_path / "dst", leaves)
    assert [leaf.piece for leaf in manifest.leaves] == ["0000", "0000", "0001", "0002", "0003", "0004", "0004"]


def test_an_existing_destination_is_refused(saved):
    before = made.listing(saved.parent)
    with pytest.raises(CheckpointError, match="exists; name another directory, or pass overwrite=True"):
        _save(saved)
    assert made.listing(saved.parent) == before


@pytest.mark.parametrize("kind", ["directory", "empty directory", "file"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_gptjax_did_not_write_is_never_overwritten(tmp_path, kind, overwrite):
    if kind == "file":
        (tmp_path / "dst").write_text("mine")
    else:
        (tmp_path / "dst").mkdir()
        if kind == "directory":
            (tmp_path / "dst" / "thesis.tex").write_text("mine")
    before = made.listing(tmp_path)
    with pytest.raises(CheckpointError, match="was not written by gptjax" if overwrite else "overwrite=True"):
        _save(tmp_path / "dst", overwrite=overwrite)
    assert made.listing(tmp_path) == before


def test_overwriting_replaces_the_whole(saved):
    (saved / "config.json").write_text("{}")
    new = {("only",): np.arange(3, dtype=np.float32)}
    _save(saved, new, overwrite=True)
    assert sorted(os.listdir(saved)) == ["manifest.json", "params"]
    _assert_equal(weights.restore(saved, {"only": jax.ShapeDtypeStruct((3,), jnp.float32)}), new)
    assert os.listdir(saved.parent) == ["dst"]


def test_overwriting_through_a_link_replaces_what_it_points_to(saved):
    link = saved.parent / "link"
    link.symlink_to(saved)
    _save(link, {("only",): np.zeros(3, np.float32)}, overwrite=True)
    assert link.is_symlink()
    assert [leaf.path for leaf in weights.read_manifest(saved).leaves] == [("only",)]


def test_a_missing_parent_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=f"mkdir -p {tmp_path}/no/such"):
        _save(tmp_path / "no" / "such" / "dst")
    assert os.listdir(tmp_path) == []


def _failing(error: BaseException, after: int = 0):
    for number, item in enumerate(LEAVES.items()):
        if number == after:
            raise error
        yield item


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: free some space"),
        (
            OSError(errno.EACCES, "Permission denied"),
            "change its permissions or name a directory that you may write to",
        ),
        (OSError(errno.EROFS, "Read-only file system"), "change its permissions"),
        (OSError(errno.EIO, "Input/output error"), "check the disk"),
    ],
)
@pytest.mark.parametrize("where", ["piece", "copy", "manifest", "sync"])
def test_failing_writes_leave_nothing(saved, monkeypatch, error, said, where, overwrite):
    def fail(*_):
        raise error

    if not overwrite:
        shutil.rmtree(saved)
    before = {path: path.is_file() and path.read_bytes() for path in saved.parent.rglob("*")}
    name = {"piece": "write_piece", "manifest": "write_manifest"}
    if where == "sync":
        monkeypatch.setattr(atomic_directory, "_sync", fail)
    elif where == "copy":
        real = Path.write_bytes
        monkeypatch.setattr(Path, "write_bytes", lambda path, data: fail() if path.name == "copy" else real(path, data))
    else:
        monkeypatch.setattr(weights, name[where], fail)
    with pytest.raises(CheckpointError) as caught:
        _save(saved, overwrite=overwrite, copies={"copy": b"x"})
    assert str(saved) in str(caught.value) and said in str(caught.value)
    assert {path: path.is_file() and path.read_bytes() for path in saved.parent.rglob("*")} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), CheckpointError("damaged"), ZeroDivisionError()])
def test_failing_sources_leave_nothing(saved, error):
    before = made.listing(saved.parent)
    with pytest.raises(type(error)):
        _save(saved, _failing(error, after=4), overwrite=True)
    assert made.listing(saved.parent) == before


def test_a_failing_exchange_puts_the_old_one_back(saved, monkeypatch):
    real = os.rename

    def rename(source, destination):
        if Path(source).name == "new":  # the second of the two renames
            raise OSError(errno.EIO, "Input/output error")
        real(source, destination)

    before = made.listing(saved.parent)
    monkeypatch.setattr(atomic_directory.os, "rename", rename)
    with pytest.raises(CheckpointError, match="cannot be written"):
        _save(saved, {("only",): np.zeros(3, np.float32)}, overwrite=True)
    assert made.listing(saved.parent) == before
    _assert_equal(weights.restore(saved, _targets()))


def test_a_destination_that_appears_meanwhile_is_kept(tmp_path):
    def leaves():
        yield from LEAVES.items()
        (tmp_path / "dst").mkdir()
        (tmp_path / "dst" / "thesis.tex").write_text("mine")

    with pytest.raises(CheckpointError, match="being written by another process"):
        _save(tmp_path / "dst", leaves())
    assert made.listing(tmp_path) == ["dst", "dst/thesis.tex"]


def test_a_disk_that_is_too_full_is_refused_before_writing(tmp_path):
    with pytest.raises(CheckpointError, match=r"needs 1,000,000,000,000 MB, but its disk has [\d,]+ MB free"):
        _save(tmp_path / "dst", _failing(AssertionError()), total_bytes=10**18)
    assert os.listdir(tmp_path) == []


LIMITED = """
import resource, signal, sys
import numpy as np
from pathlib import Path
from gptjax import errors
from gptjax.checkpoints import weights
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    part = weights.Part(400_000, lambda: {("x",): np.ones(100_000, np.float32)})
    weights.save(Path(sys.argv[1]), [part], total_bytes=1, source="", source_files=tuple)
except errors.CheckpointError as error:
    print("refused:", error)
"""


def test_a_write_that_fails_within_orbax(tmp_path):
    """A file of 400 kB where the system allows 100."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "dst")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.startswith(f"refused: {tmp_path}/dst cannot be written"), result.stderr
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written():
    with pytest.raises(CheckpointError, match="/proc/gptjax cannot be written"):
        _save(Path("/proc/gptjax"))


def test_overwriting_never_deletes_what_is_not_ours(demo, tmp_path):
    """A manifest.json by somebody else, or the remains of one of ours, is no licence to delete."""
    for content in ('{"a": 1}', '{"format": "gptjax-checkpoint"}', "{"):
        other = tmp_path / "other"
        (other / "params").mkdir(parents=True)
        (other / "manifest.json").write_text(content)
        (other / "params" / "thesis.txt").write_text("years of work")
        with pytest.raises(CheckpointError):
            convert.convert(demo, other, overwrite=True)
        assert (other / "params" / "thesis.txt").read_text() == "years of work"
        shutil.rmtree(other)


def test_a_foreign_manifest_beside_a_checkpoint_is_no_matter(demo, tmp_path):
    shutil.copytree(demo, tmp_path / "hf")
    (tmp_path / "hf" / "manifest.json").write_text('{"short_name": "an app"}')
    assert not weights.is_converted(tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "converted")
    assert weights.is_converted(tmp_path / "converted")
    names = {file.name for file in weights.read_manifest(tmp_path / "converted").files}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names


def test_a_slow_weight_holds_up_none_of_the_others():
    others, taken = threading.Semaphore(0), []

    def slow():
        assert all(others.acquire(timeout=20) for _ in range(5))
        return "slow"

    def quick():
        others.release()
        return "quick"

    def jobs():
        for job in (slow, *[quick] * 5):
            taken.append(job)
            yield job

    results = weights._in_threads(jobs(), workers=2)
    assert next(results) == "quick"
    assert len(taken) == 2  # one for each worker
    rest = [*results]
    assert rest[:3] == ["quick"] * 3
    assert sorted(rest[3:]) == ["quick", "slow"]  # may be ready at the same time


def test_a_weight_that_cannot_be_read_is_an_error_in_threads_too():
    def broken():
        raise CheckpointError("broken")

    with pytest.raises(CheckpointError, match="broken"):
        list(weights._in_threads(iter([lambda: 1, broken, lambda: 2]), workers=2))
