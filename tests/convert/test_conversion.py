"""Whole conversions: what comes out, that bad input writes nothing, and what a process killed half-way leaves."""

import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from convert import convert, stream_params
from gptjax.checkpoints import weights
from gptjax.config import read_config
from gptjax.errors import CheckpointError, ConfigError
from gptjax.models.params import abstract_params
from gptjax.models.registry import build
from tests.convert import made
from tests.oracles import gpt2_ours

ROOT = Path(__file__).resolve().parents[2]


def _restored(directory: Path, dtype=np.float32) -> dict[str, np.ndarray]:
    return made.flat(weights.restore(directory, abstract_params(build(read_config(directory), dtype=dtype))))


def _streamed(directory: Path) -> dict[str, np.ndarray]:
    return {"/".join(path): array for path, array in stream_params(directory, read_config(directory))}


def _assert_holds(directory: Path, tensors, dtype=np.float32) -> None:
    found = _restored(directory, dtype)
    assert len(found) == len(tensors)
    for name, array in tensors.items():
        assert made.same_bits(found[gpt2_ours.target(name)], array.astype(dtype))


@pytest.mark.parametrize("shards", [0, 3])
def test_converts_bit_for_bit(tmp_path, shards):
    _, tensors = made.gpt2(tmp_path / "src", prefix="transformer.", shards=shards)
    summary = convert(tmp_path / "src", tmp_path / "dst")
    assert (summary.num_weights, summary.dtypes) == (len(tensors), ("float32",))
    assert summary.num_params == sum(array.size for array in tensors.values())
    _assert_holds(tmp_path / "dst", tensors)


@pytest.mark.parametrize("source", [np.float32, np.float16, made.BFLOAT16])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", None])
def test_casts_all_weights(tmp_path, source, dtype):
    _, tensors = made.gpt2(tmp_path / "src", dtype=source)
    summary = convert(tmp_path / "src", tmp_path / "dst", dtype=dtype)
    stored = np.dtype(dtype or source)
    assert summary.dtypes == (stored.name,)
    assert summary.bytes == stored.itemsize * summary.num_params
    _assert_holds(tmp_path / "dst", {name: array.astype(stored) for name, array in tensors.items()}, stored)


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
    monkeypatch.setattr(weights, "PIECE_BYTES", 50_000)
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


def _config(directory: Path, **changes) -> None:
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | changes))


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
    "no such path": (shutil.rmtree, CheckpointError, "does not exist", "name a directory"),
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
    "model type": (lambda d: _config(d, model_type="bert"), ConfigError, "'bert'", "supports gpt2"),
    "activation": (lambda d: _config(d, activation_function="swoosh"), ConfigError, "'swoosh'", "supports"),
    "unknown key": (lambda d: _config(d, rotary_dim=8), ConfigError, "unknown key rotary_dim"),
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
        ("model.gguf", b"GGUF" + bytes(50), "GGUF file"),
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


CONVERT = """
import os, signal, sys
import convert.conversion, gptjax.checkpoints.atomic_directory, gptjax.checkpoints.weights, orbax.checkpoint
{before}
print("ready", flush=True)
convert.convert({source!r}, {destination!r}, overwrite={overwrite})
"""


def _start(source: Path, destination: Path, *, before: str = "", overwrite: bool = False) -> subprocess.Popen:
    code = CONVERT.format(before=before, source=str(source), destination=str(destination), overwrite=overwrite)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n", process.stderr.read().decode()
    return process


def test_killed_at_any_time_leaves_nothing_that_looks_finished(tmp_path):
    """100 MB, killed at random moments; the last run goes through and is bit-equal."""
    made.stream_gpt2(tmp_path / "src", vocab_size=9000, n_positions=64, n_embd=640, n_layer=4, n_head=10)
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    kills = 0
    for delay in (0, *(rng.uniform(0, 0.4) for _ in range(4))):
        process = _start(tmp_path / "src", tmp_path / "dst")
        time.sleep(delay)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if (tmp_path / "dst").exists():  # it was quicker
            weights.read_manifest(tmp_path / "dst")
            shutil.rmtree(tmp_path / "dst")
    assert kills, seed
    convert(tmp_path / "src", tmp_path / "dst")
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"], seed
    found = _restored(tmp_path / "dst")
    source = _streamed(tmp_path / "src")
    assert found.keys() == source.keys()
    assert all(made.same_bits(found[path], array) for path, array in source.items()), seed


# A process that kills itself at the given call of a function, or after it.
KILL = """
real, calls = {module}.{function}, []
def kill(*args, **kwargs):
    calls.append(1)
    if len(calls) == {call}:
        {last}
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
{module}.{function} = kill
gptjax.checkpoints.weights.PIECE_BYTES = 50_000
"""
MOMENTS = {  # function, call, whether it is done before the kill
    "before the first piece": ("gptjax.checkpoints.weights.write_piece", 1, False),
    "between pieces": ("gptjax.checkpoints.weights.write_piece", 3, True),
    "before the manifest": ("gptjax.checkpoints.weights.write_manifest", 1, False),
    "after the manifest": ("gptjax.checkpoints.weights.write_manifest", 1, True),
    "before publishing": ("gptjax.checkpoints.atomic_directory._publish", 1, False),
}
SWAP = {  # call of os.rename; what the destination then holds is None where the next run must put it back
    "before the old one is moved aside": ("os.rename", 1, False, "old"),
    "after the old one was moved aside": ("os.rename", 1, True, None),
    "after the new one was moved in": ("os.rename", 2, True, "new"),
    "before the old one is deleted": ("shutil.rmtree", 1, False, "new"),
}


def _killed(tmp_path: Path, function: str, call: int, done: bool, *, overwrite: bool) -> None:
    module, _, name = function.rpartition(".")
    before = KILL.format(module=module, function=name, call=call, last="real(*args, **kwargs)" if done else "pass")
    if module in ("os", "shutil"):  # Orbax uses them too: only the conversion's own count
        place = f"gptjax.checkpoints.atomic_directory.{module}"
        own = f"import types, {module}\nown = {place} = types.SimpleNamespace(**vars({module}))\n"
        before = own + before.replace(f"{module}.{name}", f"own.{name}")
    process = _start(tmp_path / "src", tmp_path / "dst", before=before, overwrite=overwrite)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_writing(tmp_path, moment):
    _, tensors = made.gpt2(tmp_path / "src")
    _killed(tmp_path, *MOMENTS[moment], overwrite=False)
    assert not (tmp_path / "dst").exists()
    assert len(os.listdir(tmp_path)) == 2  # the leftover
    convert(tmp_path / "src", tmp_path / "dst")
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]
    _assert_holds(tmp_path / "dst", tensors)


@pytest.mark.parametrize("moment", SWAP)
def test_killed_while_replacing_never_loses_the_old_one(tmp_path, moment):
    *when, expected = SWAP[moment]
    _, old = made.gpt2(tmp_path / "src", seed=1)
    convert(tmp_path / "src", tmp_path / "dst")
    _, new = made.gpt2(tmp_path / "src", seed=2)
    _killed(tmp_path, *when, overwrite=True)
    if expected is None:
        assert not (tmp_path / "dst").exists()
        with pytest.raises(CheckpointError, match="exists"):  # the next run puts it back first
            convert(tmp_path / "src", tmp_path / "dst")
    _assert_holds(tmp_path / "dst", new if expected == "new" else old)
    convert(tmp_path / "src", tmp_path / "dst", overwrite=True)
    _assert_holds(tmp_path / "dst", new)
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]


def test_killed_while_deleting_the_old_one_does_not_bring_half_of_it_back(tmp_path):
    _, tensors = made.gpt2(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst")
    half = (
        "import shutil, types\n"
        "def kill(path, **_):\n"
        "    shutil.rmtree(path / 'params')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "gptjax.checkpoints.atomic_directory.shutil = types.SimpleNamespace(rmtree=kill)"
    )
    process = _start(tmp_path / "src", tmp_path / "dst", before=half, overwrite=True)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    _assert_holds(tmp_path / "dst", tensors)
    shutil.rmtree(tmp_path / "dst")
    convert(tmp_path / "src", tmp_path / "dst")
    _assert_holds(tmp_path / "dst", tensors)
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]


def test_leftovers_of_a_living_process_are_left_alone(tmp_path):
    made.gpt2(tmp_path / "src")
    slow = "import time\ngptjax.checkpoints.weights.write_piece = lambda *args: time.sleep(60)"
    process = _start(tmp_path / "src", tmp_path / "dst", before=slow)
    try:
        deadline = time.monotonic() + 20
        while not any("partial" in name for name in os.listdir(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)  # it locks what it has made
        convert(tmp_path / "src", tmp_path / "dst")
        assert len([name for name in os.listdir(tmp_path) if "partial" in name]) == 1
    finally:
        process.kill()
        process.communicate()
    convert(tmp_path / "src", tmp_path / "dst", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]


MEMORY = """
import sys, threading, time
import convert.conversion, orbax.checkpoint

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

peaks, over = [], threading.Event()
def sample():
    while not over.is_set():
        peaks.append(resident())
        time.sleep(0.002)

baseline = resident()
thread = threading.Thread(target=sample)
thread.start()
convert.convert({source!r}, {destination!r}, dtype={dtype!r})
over.set()
thread.join()
print(max(peaks) - baseline)
"""


def _peak(source: Path, destination: Path, dtype: str | None = None) -> int:
    """The anonymous memory that a conversion takes at its highest, in bytes, in a process of its own."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    code = MEMORY.format(source=str(source), destination=str(destination), dtype=dtype)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_memory_is_bounded(tmp_path, dtype):
    """390 MB, of which the largest tensor is 61: a piece and a tensor may be held, the whole may not."""
    made.stream_gpt2(tmp_path / "src", vocab_size=12000, n_positions=64, n_embd=1280, n_layer=4, n_head=10)
    total = (tmp_path / "src" / "model.safetensors").stat().st_size
    limit = weights.PIECE_BYTES + 12000 * 1280 * 4 + 100_000_000
    assert limit < 0.8 * total
    assert _peak(tmp_path / "src", tmp_path / "dst", dtype) <= limit
    shutil.rmtree(tmp_path / "dst")
    shutil.rmtree(tmp_path / "src")


@pytest.mark.slow
def test_memory_is_bounded_for_gpt2_xl(tmp_path):
    """6.2 GB, twice: peak within the largest tensor (322 MB) and 500 MB, and the result bit-equal."""
    count = made.stream_gpt2(tmp_path / "src", vocab_size=50257, n_positions=1024, n_embd=1600, n_layer=48, n_head=25)
    assert count == 1_557_611_200
    try:
        peak = _peak(tmp_path / "src", tmp_path / "dst")
        print(f"peak over baseline: {peak / 1e6:.0f} MB")
        assert peak <= 50257 * 1600 * 4 + 500_000_000
        stored = weights.read_leaves(tmp_path / "dst", weights.read_manifest(tmp_path / "dst"))
        source = _streamed(tmp_path / "src")
        for path, array in stored:
            assert np.array_equal(source.pop("/".join(path)), array)
        assert not source
    finally:
        shutil.rmtree(tmp_path / "src")
        shutil.rmtree(tmp_path / "dst", ignore_errors=True)


def test_conversion_prints_nothing(tmp_path):
    made.gpt2(tmp_path / "src")
    process = _start(tmp_path / "src", tmp_path / "dst")
    assert process.communicate() == (b"", b"")
    assert process.returncode == 0


def test_the_logging_of_others_is_as_it_was(tmp_path):
    made.gpt2(tmp_path / "src")
    logger = logging.getLogger("absl")
    before = (logger.level, list(logger.filters), list(logger.handlers), logger.disabled)
    convert(tmp_path / "src", tmp_path / "dst")
    _restored(tmp_path / "dst")
    assert (logger.level, list(logger.filters), list(logger.handlers), logger.disabled) == before


def test_converted_and_direct_loading_agree(tmp_path, demo):
    convert(demo, tmp_path / "dst")
    config = read_config(demo)
    targets = abstract_params(build(config))
    direct = weights.place(stream_params(demo, config), targets)
    restored = weights.restore(tmp_path / "dst", targets)
    assert jax.tree.structure(direct) == jax.tree.structure(restored) == jax.tree.structure(targets)
    assert all(map(np.array_equal, jax.tree.leaves(direct), jax.tree.leaves(restored)))
