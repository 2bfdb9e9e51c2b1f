"""From a name to a checkpoint directory. Nothing here may reach the network."""

import fnmatch
import json
import os
import shutil
import socket
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import convert
import gptjax
from gptjax.checkpoints import hub
from gptjax.diagnostics import info
from gptjax.errors import CheckpointError
from gptjax.support import installation
from tests.convert import made


@pytest.fixture(autouse=True)
def _environment(tmp_path, monkeypatch):
    """No network, an empty cache, and no settings of the machine's."""

    def refuse(*_):
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture
def library(monkeypatch):
    """A stand-in for huggingface_hub. `library.answer` is the directory it gives or the exception it raises."""
    fake = types.ModuleType("huggingface_hub")
    fake.calls = []

    def snapshot_download(repo, **options):
        fake.calls.append((repo, options))
        if isinstance(fake.answer, Exception):
            raise fake.answer
        return str(fake.answer)

    fake.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


@pytest.fixture
def _without_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it raises ImportError


def _cached(cache: Path, repo: str, *, commit: str = "0a1b", revision: str = "main", sharded: bool = False) -> Path:
    """Puts a tiny GPT-2 into a Hub cache, in the Hub's own layout."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot, blobs = root / "snapshots" / commit, root / "blobs"
    snapshot.mkdir(parents=True)
    made.gpt2(blobs, shards=2 if sharded else 0)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    return snapshot


def _refused(name, *parts: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        hub.resolve(name)
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


def test_demos_go_first(demo):
    Path("gpt2-tales").mkdir()
    assert hub.resolve("gpt2-tales") == demo
    assert (demo / "config.json").is_file()


@pytest.mark.parametrize("kind", [str, Path])
def test_a_directory(tmp_path, kind):
    Path("some", "model").mkdir(parents=True)
    assert hub.resolve(kind("some/model")) == Path("some/model")
    assert hub.resolve(kind(tmp_path / "cwd" / "some")) == tmp_path / "cwd" / "some"


def test_a_directory_goes_before_the_hub(library):
    Path("gpt2").mkdir()
    assert hub.resolve("gpt2") == Path("gpt2")
    assert not library.calls


def test_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/cwd") == tmp_path / "cwd"


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("ggml-model.bin", b"lmgg" + bytes(50), ["ggml file", "safetensors files"]),
        ("pytorch_model.bin", b"PK\x03\x04" + bytes(50), ["pickle", "never opens", "save_pretrained"]),
        ("model.pt", b"\x80\x02}q\0.", ["pickle", "save_pretrained"]),
        ("notes.txt", b"notes", ["name a checkpoint's directory"]),
    ],
)
def test_a_file(name, content, parts):
    Path(name).write_bytes(content)
    _refused(name, name, *parts)


def test_a_gguf_file_is_a_checkpoint():
    Path("model").write_bytes(b"GGUF" + bytes(50))
    assert hub.resolve("model") == Path("model")


def test_a_safetensors_file_leads_to_its_directory(tmp_path):
    made.write(Path("model.safetensors"), {"a": np.zeros(3, np.float32)})
    _refused("model.safetensors", f"name its directory: {tmp_path / 'cwd'}")


@pytest.mark.parametrize("offline", ["1", "true", "ON", "yes"])
@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2", "openai/gpt-oss-20b@main"])
def test_an_id_that_is_not_there_offline(library, monkeypatch, name, offline):
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    repo = name.partition("@")[0]
    _refused(
        name,
        repr(name),
        f"https://huggingface.co/{repo} to a new directory",
        "config.json",
        "model.safetensors (or model.safetensors.index.json",
        "tokenizer.json",
        "HF_HUB_OFFLINE is set",
    )
    assert not library.calls


@pytest.mark.usefixtures("_without_library")
def test_an_id_that_is_not_there_without_the_library():
    _refused("gpt2", "https://huggingface.co/gpt2", "model.safetensors", installation.with_extra("hub"))


@pytest.mark.usefixtures("_without_library")
@pytest.mark.parametrize("sharded", [False, True])
def test_the_cache_is_found_without_library_and_network(tmp_path, sharded):
    snapshot = _cached(tmp_path / "home" / "hub", "owner/name", sharded=sharded)
    assert hub.resolve("owner/name") == snapshot
    assert hub.resolve("owner/name@0a1b") == snapshot


@pytest.mark.usefixtures("_without_library")
def test_the_cache_is_where_the_environment_says_at_the_time_of_the_call(tmp_path, monkeypatch):
    places = {}
    for commit, name in enumerate(["one", "two", "three", "four"]):
        cache = tmp_path / "home" / ".cache" / "huggingface" / "hub" if name == "four" else tmp_path / name / "hub"
        places[name] = _cached(cache, "gpt2", commit=f"c{commit}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "one"))
    assert hub.resolve("gpt2") == places["one"]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "two" / "hub"))
    assert hub.resolve("gpt2") == places["two"]
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "three"))
    assert hub.resolve("gpt2") == places["three"]
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert hub.resolve("gpt2") == places["four"]


@pytest.mark.usefixtures("_without_library")
def test_revisions_are_told_apart(tmp_path):
    cache = tmp_path / "home" / "hub"
    main = _cached(cache, "gpt2", commit="aaaa")
    other = cache / "models--gpt2" / "snapshots" / "bbbb"
    other.mkdir()
    for path in main.iterdir():
        os.link(path.resolve(), other / path.name)
    (cache / "models--gpt2" / "refs" / "v1.0").write_text("bbbb")
    assert hub.resolve("gpt2") == hub.resolve("gpt2@main") == main
    assert hub.resolve("gpt2@v1.0") == other
    _refused("gpt2@v2.0", "gpt2 at revision v2.0")


def _without(pattern: str):
    def remove(snapshot: Path) -> None:
        for path in snapshot.glob(pattern):
            os.remove(path)

    return remove


@pytest.mark.usefixtures("_without_library")
@pytest.mark.parametrize(
    "damage",
    [
        _without("config.json"),
        _without("*.safetensors"),
        _without("model-00002-*"),
        _without("*.index.json"),
        lambda snapshot: os.remove((snapshot / "config.json").resolve()),  # the link is there, the file is not
        lambda snapshot: (snapshot.parents[1] / "refs" / "main").write_text("../../elsewhere"),  # which is there
        lambda snapshot: (snapshot.parents[1] / "refs" / "main").write_bytes(b"\xff"),
    ],
)
def test_an_unfinished_download_is_not_taken(tmp_path, damage):
    snapshot = _cached(tmp_path / "home" / "hub", "gpt2", sharded=True)
    assert hub.resolve("gpt2") == snapshot
    made.gpt2(tmp_path / "home" / "hub" / "elsewhere")
    damage(snapshot)
    _refused("gpt2", "no repository with this id that has a config and weights")


def test_downloads_only_what_is_needed(tmp_path, library):
    library.answer = tmp_path / "downloaded"
    assert hub.resolve("owner/name@v1") == tmp_path / "downloaded"
    ((repo, options),) = library.calls
    assert (repo, options["revision"]) == ("owner/name", "v1")
    assert options["cache_dir"] == tmp_path / "home" / "hub"
    offered = ["config.json", "merges.txt", "model-00001-of-00002.safetensors", "tokenizer.model", "model.bin", "a.md"]
    offered += ["original/model.safetensors", "onnx/config.json", "pytorch_model.bin", "model.gguf", "tf_model.h5"]
    taken = [
        name
        for name in offered
        if any(fnmatch.fnmatch(name, pattern) for pattern in options["allow_patterns"])
        and not any(fnmatch.fnmatch(name, pattern) for pattern in options["ignore_patterns"])
    ]
    assert taken == ["config.json", "merges.txt", "model-00001-of-00002.safetensors", "tokenizer.model"]


def test_the_cache_goes_before_a_download(tmp_path, library):
    snapshot = _cached(tmp_path / "home" / "hub", "gpt2")
    assert hub.resolve("gpt2") == snapshot
    assert not library.calls


@pytest.mark.parametrize("error", [OSError("no route to host\nand more"), ValueError("bad id"), RuntimeError("gated")])
def test_what_goes_wrong_with_a_download_is_told(library, error):
    library.answer = error
    message = _refused("gpt2", "could not be downloaded", type(error).__name__, "https://huggingface.co/gpt2")
    assert str(error).partition("\n")[0] in message and "and more" not in message


@pytest.mark.parametrize(
    "name",
    ["./gpt2", "/no/such/path", "a/b/c", "../gpt2", "owner/..", "gpt 2", "models/", "-gpt2", "gpt2@", "x\ny", "é"],
)
def test_what_is_neither_a_path_nor_an_id(library, name):
    _refused(name, repr(name), "nor a directory", "Hub id", "`owner/name`", "gpt2-tales")
    assert not library.calls


def test_a_path_object_is_never_an_id(library):
    _refused(Path("gpt2"), "nor a directory", "check the path")
    assert not library.calls


def test_the_empty_name(library):
    _refused("", "empty", "gpt2-tales")


@pytest.mark.usefixtures("_without_library")
@pytest.mark.parametrize("name", ["gpt2-tale", "gpt2_tales", "gtp2-tales"])
def test_a_demo_of_a_close_name_is_offered(name):
    _refused(name, "did you mean 'gpt2-tales'?")


@pytest.mark.usefixtures("_without_library")
@pytest.mark.parametrize("name", ["smolm2", "smollm", "smol-lm2", "SmolLM2"])
def test_smollm2_is_offered_for_a_close_name(name):
    _refused(name, "did you mean 'smollm2'?")


@pytest.mark.parametrize("name", ["model.gguf", "owner/model.gguf", "/nowhere/MODEL.GGUF", Path("model.gguf")])
def test_a_missing_gguf_file_is_a_missing_file_and_not_a_repository(library, name):
    _refused(name, f"{name} does not exist; check the path")
    assert not library.calls


def test_a_directory_of_gguf_files(tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    (files / "b.gguf").write_bytes(b"GGUF")
    _refused(files, f"name the file itself: {files / 'b.gguf'}")
    (files / "a.GGUF").write_bytes(b"GGUF")
    _refused(files, f"name the file itself, such as {files / 'a.GGUF'}")
    (files / "config.json").write_text("{}")  # weights may be next to it, as in some repositories
    assert hub.resolve(files) == files


@pytest.mark.parametrize("name", ["~nosuchuser/x", "a" * 5000, "a/" * 3000, "x\0y", 5, None])
def test_names_that_no_file_system_takes(name):
    with pytest.raises(CheckpointError):
        hub.resolve(name)


def _adapter(directory: Path, base: str = "openai-community/gpt2") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 8, "target_modules": ["c_attn"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    made.write(directory / "adapter_model.safetensors", {name: np.zeros((8, 60), np.float32)})


@pytest.mark.parametrize("where", ["directory", "with a tokenizer and a config", "cache", "download", "pickle"])
def test_an_adapter_is_named_as_one(tmp_path, library, where):
    name, directory = "someone/gpt2-lora", tmp_path / "lora"
    if where == "cache":
        root = tmp_path / "home" / "hub" / "models--someone--gpt2-lora"
        directory = root / "snapshots" / "0a1b"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("0a1b")
    _adapter(directory)
    library.answer = directory
    if where == "with a tokenizer and a config":
        made.gpt2(tmp_path / "base")
        for file in ("config.json", "tokenizer.json"):
            shutil.copy(tmp_path / "base" / file, directory)
    if where == "pickle":
        (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    tasks = [gptjax.load, info.describe]
    if where not in ("cache", "download"):
        name = str(directory)
        tasks.append(lambda name: convert.convert(name, tmp_path / "dst"))
    for task in tasks:
        with pytest.raises(CheckpointError) as caught:
            task(name)
        for part in (
            "an adapter of openai-community/gpt2 (such as LoRA)",
            "merge it into its base model first",
            "peft.",
        ):
            assert part in str(caught.value)
    assert bool(library.calls) == (where == "download")


def test_an_adapter_beside_a_model_is_not_left_out_silently(tmp_path):
    made.gpt2(tmp_path / "both")
    (tmp_path / "both" / "adapter_config.json").write_text("{}")
    assert hub.resolve(tmp_path / "both") == tmp_path / "both"  # left behind by a merge
    _adapter(tmp_path / "both", "\x1b[2J" + "x" * 1000)
    with pytest.raises(
        CheckpointError, match=r"has a model and an adapter of '.{290,300}… \(adapter_model\.safetensors\)"
    ):
        hub.resolve(tmp_path / "both")
