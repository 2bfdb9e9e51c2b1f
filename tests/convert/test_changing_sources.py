"""Sources that change while they are being converted, and destinations with neighbours of similar names."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import convert
from convert import hashing
from gptjax.checkpoints import atomic_directory, saving
from gptjax.errors import CheckpointError
from tests.convert import made
from tests.thinned import thorough

ROOT = Path(__file__).resolve().parents[2]


def _flip(path: Path, offset: int) -> None:
    """Changes a byte in place, and nothing else: neither the size nor, by the clock, the time."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _replaced(path: Path) -> None:
    shutil.copy2(path, path.with_name("copy"))
    os.replace(path.with_name("copy"), path)


CHANGED = "changed while it was being read"
CHANGES = {  # a file, the change made to it half-way, and the error about it
    "truncated": ("model.safetensors", lambda path: os.truncate(path, 20_000), CHANGED),
    "emptied": ("model.safetensors", lambda path: os.truncate(path, 0), CHANGED),
    "gone": ("model.safetensors", os.remove, "does not exist"),
    "replaced by the same": ("model.safetensors", _replaced, CHANGED),
    "touched": ("model.safetensors", os.utime, CHANGED),
    "a byte of the data that was read": ("model.safetensors", lambda path: _flip(path, 20_000), CHANGED),
    "a byte of the header": ("model.safetensors", lambda path: _flip(path, 40), CHANGED),
    "the configuration": ("config.json", lambda path: path.write_text(path.read_text() + "\n"), CHANGED),
    "a byte of the tokenizer": ("tokenizer.json", lambda path: path.write_text("[]"), CHANGED),
    "a tokenizer that goes": ("tokenizer.json", os.remove, CHANGED),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_source_that_changes_is_named_and_nothing_is_left(tmp_path, monkeypatch, kind):
    """Between two tensors; the hashing thread, which reads everything again, comes after that."""
    name, change, said = CHANGES[kind]
    made.gpt2(tmp_path / "src")
    real_hash = hashing.Hashes._hash
    monkeypatch.setattr(saving, "PIECE_BYTES", 50_000)
    pieces = saving.write_piece
    done = []

    def write(*arguments):
        if not done:
            change(tmp_path / "src" / name)
            done.append(name)
        return pieces(*arguments)

    def hash_later(self, path, header):
        while not done and not self._cancelled.is_set():
            time.sleep(0.001)
        return real_hash(self, path, header)

    monkeypatch.setattr(saving, "write_piece", write)
    monkeypatch.setattr(hashing.Hashes, "_hash", hash_later)
    with pytest.raises(CheckpointError, match=said) as caught:
        convert.convert(tmp_path / "src", tmp_path / "dst")
    assert str(tmp_path / "src" / name) in str(caught.value)
    assert os.listdir(tmp_path) == ["src"]
    assert done


TRUNCATING = """
import os, sys, threading, time
import convert, gptjax.api
from gptjax.checkpoints.checkpoint import open_path
from gptjax.errors import CheckpointError
from gptjax.models.registry import build
source, out, task = sys.argv[1:]
path = source + "/model.safetensors"
def truncate():
    time.sleep(float(os.environ["AFTER"]))
    os.truncate(path, 4096)
threading.Thread(target=truncate).start()
try:
    if task == "convert":
        convert.convert(source, out)
    else:
        from pathlib import Path
        checkpoint = open_path(Path(source))
        gptjax.api.load_params(checkpoint, build(checkpoint.config))
except CheckpointError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("task", ["convert", thorough("load")])
def test_a_source_that_is_truncated_does_not_end_the_process(tmp_path, task):
    """With a map of the file in memory it was SIGBUS."""
    made.stream_gpt2(tmp_path / "src", vocab_size=5000, n_positions=64, n_embd=640, n_layer=2, n_head=10)
    whole = (tmp_path / "src" / "model.safetensors").read_bytes()
    for after in ("0.01", "0.05", "0.1"):
        (tmp_path / "src" / "model.safetensors").write_bytes(whole)
        command = [sys.executable, "-c", TRUNCATING, str(tmp_path / "src"), str(tmp_path / "dst"), task]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"AFTER": after})
        assert result.returncode == 0, (result.returncode, result.stderr)
        if (tmp_path / "dst").exists():  # it was quicker
            shutil.rmtree(tmp_path / "dst")
        else:
            assert task == "load" or f"refused: {tmp_path}/src" in result.stdout, result.stdout
        assert os.listdir(tmp_path) == ["src"]


def test_two_conversions_are_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "PIECE_BYTES", 50_000)
    made.gpt2(tmp_path / "src")
    convert.convert(tmp_path / "src", tmp_path / "one")
    (tmp_path / "elsewhere").mkdir()
    convert.convert(tmp_path / "src", tmp_path / "elsewhere" / "another", quantize=None)
    one, another = tmp_path / "one", tmp_path / "elsewhere" / "another"
    assert made.listing(one) == made.listing(another)
    for path in one.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (another / path.relative_to(one)).read_bytes(), path


def _tree(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.is_file() and path.read_bytes() for path in directory.rglob("*")
    }


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_merely_has_the_names_of_staging_is_left_alone(tmp_path, overwrite):
    made.gpt2(tmp_path / "src")
    if overwrite:
        convert.convert(tmp_path / "src", tmp_path / "dst")
    for name in (".dst.partial-1", ".dst.old-1", f".dst.partial-{os.getpid()}", ".dst.partial-abcdefgh", ".dst.old-7"):
        (tmp_path / name / "new").mkdir(parents=True)
        (tmp_path / name / "old").mkdir()
        (tmp_path / name / "thesis.tex").write_text("mine")
    (tmp_path / ".dst.partial-12345678").mkdir()
    (tmp_path / ".dst.partial-mark1234").mkdir()
    (tmp_path / ".dst.partial-mark1234" / atomic_directory._MARK).write_text("mine")
    (tmp_path / ".dst.partial-pipe1234").mkdir()
    os.mkfifo(tmp_path / ".dst.partial-pipe1234" / atomic_directory._MARK)
    (tmp_path / ".dst.partial-file1234").write_text("mine")
    (tmp_path / ".dst.partial-link1234").symlink_to(tmp_path / "src")
    (tmp_path / ".dst.partially").mkdir()
    before = {name: content for name, content in _tree(tmp_path).items() if not name.startswith("dst")}
    convert.convert(tmp_path / "src", tmp_path / "dst", overwrite=overwrite)
    assert {name: content for name, content in _tree(tmp_path).items() if not name.startswith("dst")} == before


def test_an_old_checkpoint_that_cannot_be_put_back_is_kept(tmp_path, monkeypatch):
    made.gpt2(tmp_path / "src")
    convert.convert(tmp_path / "src", tmp_path / "dst")
    before = _tree(tmp_path / "dst")
    real = os.rename

    def rename(source, destination):
        if Path(destination) == tmp_path / "dst":
            raise OSError(5, "Input/output error")
        real(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(atomic_directory.os, "rename", rename)
        with pytest.raises(CheckpointError, match="cannot be written"):
            convert.convert(tmp_path / "src", tmp_path / "dst", overwrite=True)
    assert not (tmp_path / "dst").exists()
    with pytest.raises(CheckpointError, match="exists"):  # the next run puts it back first
        convert.convert(tmp_path / "src", tmp_path / "dst")
    assert _tree(tmp_path / "dst") == before
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]


def test_the_hashes_are_of_the_bytes_that_were_converted(tmp_path):
    made.gpt2(tmp_path / "src", shards=3)
    convert.convert(tmp_path / "src", tmp_path / "dst")
    files = json.loads((tmp_path / "dst" / "manifest.json").read_text())["source"]["files"]
    found = {file["name"]: (file["bytes"], file["sha256"]) for file in files}
    expected = {
        path.name: path.read_bytes() for path in (tmp_path / "src").iterdir() if path.name != "model.safetensors"
    }
    assert found == {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in expected.items()}
