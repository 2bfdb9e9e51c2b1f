"""A write that fails, is refused or is repeated leaves the old directory or the new one; other files are never lost."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from gptjax.checkpoints import atomic_directory, saving, weights
from gptjax.checkpoints.manifest import is_converted, read_manifest
from gptjax.errors import CheckpointError
from tests.checkpoints.weights_material import LEAVES, ROOT, assert_equal, save, targets_of
from tests.convert import made


def test_an_existing_destination_is_refused(saved):
    before = made.listing(saved.parent)
    with pytest.raises(CheckpointError, match="exists; name another directory, or pass overwrite=True"):
        save(saved)
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
        save(tmp_path / "dst", overwrite=overwrite)
    assert made.listing(tmp_path) == before


def test_overwriting_replaces_the_whole(saved):
    (saved / "config.json").write_text("{}")
    new = {("only",): np.arange(3, dtype=np.float32)}
    save(saved, new, overwrite=True)
    assert sorted(os.listdir(saved)) == ["manifest.json", "params"]
    assert_equal(weights.restore(saved, {"only": jax.ShapeDtypeStruct((3,), jnp.float32)}), new)
    assert os.listdir(saved.parent) == ["dst"]


def test_overwriting_through_a_link_replaces_what_it_points_to(saved):
    link = saved.parent / "link"
    link.symlink_to(saved)
    save(link, {("only",): np.zeros(3, np.float32)}, overwrite=True)
    assert link.is_symlink()
    assert [leaf.path for leaf in read_manifest(saved).leaves] == [("only",)]


def test_a_missing_parent_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=f"mkdir -p {tmp_path}/no/such"):
        save(tmp_path / "no" / "such" / "dst")
    assert os.listdir(tmp_path) == []


def _failing(error: BaseException, after: int = 0):
    def fail(number):
        if number == after:
            raise error

    return fail


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
        monkeypatch.setattr(saving, name[where], fail)
    with pytest.raises(CheckpointError) as caught:
        save(saved, overwrite=overwrite, copies={"copy": b"x"})
    assert str(saved) in str(caught.value) and said in str(caught.value)
    assert {path: path.is_file() and path.read_bytes() for path in saved.parent.rglob("*")} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), CheckpointError("damaged"), ZeroDivisionError()])
def test_failing_sources_leave_nothing(saved, error):
    before = made.listing(saved.parent)
    with pytest.raises(type(error)):
        save(saved, fail=_failing(error, after=4), overwrite=True)
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
        save(saved, {("only",): np.zeros(3, np.float32)}, overwrite=True)
    assert made.listing(saved.parent) == before
    assert_equal(weights.restore(saved, targets_of()))


def test_a_destination_that_appears_meanwhile_is_kept(tmp_path):
    def appear(number):
        if number == len(LEAVES) - 1:
            (tmp_path / "dst").mkdir()
            (tmp_path / "dst" / "thesis.tex").write_text("mine")

    with pytest.raises(CheckpointError, match="being written by another process"):
        save(tmp_path / "dst", fail=appear)
    assert made.listing(tmp_path) == ["dst", "dst/thesis.tex"]


def test_a_disk_that_is_too_full_is_refused_before_writing(tmp_path):
    huge = np.broadcast_to(np.uint8(0), (10**9, 10**9))
    with pytest.raises(CheckpointError, match=r"needs 1,000,000,000,000 MB, but its disk has [\d,]+ MB free"):
        save(tmp_path / "dst", {("x",): huge}, fail=_failing(AssertionError()))
    assert os.listdir(tmp_path) == []


LIMITED = """
import resource, signal, sys
import numpy as np
from pathlib import Path
from gptjax import errors
from tests.checkpoints.weights_material import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(Path(sys.argv[1]), {("x",): np.ones(100_000, np.float32)})
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
        save(Path("/proc/gptjax"))


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
    assert not is_converted(tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "converted")
    assert is_converted(tmp_path / "converted")
    names = {file.name for file in read_manifest(tmp_path / "converted").files}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
