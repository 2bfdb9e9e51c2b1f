"""A conversion that is killed, at any time: nothing that looks finished, and the old directory is never lost."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from convert import convert, export
from gptjax.checkpoints import manifest
from gptjax.errors import CheckpointError
from tests.convert import made
from tests.convert.conversion_material import assert_holds, restored, start, streamed
from tests.oracles import gpt2_ours
from tests.thinned import thinned, thorough

SMALL = "gptjax.checkpoints.saving.PIECE_BYTES = 3_000_000"


@pytest.mark.parametrize("count", [thorough(4), pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_time_leaves_nothing_that_looks_finished(tmp_path, count):
    """100 MB in some 30 pieces, killed at random moments; each run continues where the one before was."""
    made.stream_gpt2(tmp_path / "src", vocab_size=9000, n_positions=64, n_embd=640, n_layer=4, n_head=10)
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    start(tmp_path / "src", tmp_path / "undisturbed", before=SMALL).communicate()
    kills = 0
    for delay in (0, *(rng.uniform(0, 0.4) for _ in range(count))):
        process = start(tmp_path / "src", tmp_path / "dst", before=SMALL)
        time.sleep(delay)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        assert {*os.listdir(tmp_path)} <= {"src", "undisturbed", "dst", ".dst.partial"}, seed
        if (tmp_path / "dst").exists():  # it was quicker
            assert made.contents(tmp_path / "dst") == made.contents(tmp_path / "undisturbed"), seed
            shutil.rmtree(tmp_path / "dst")
        else:
            assert not manifest.is_converted(tmp_path / ".dst.partial")
    assert kills, seed
    process = start(tmp_path / "src", tmp_path / "dst", before=SMALL)
    assert process.communicate() == (b"", b"")
    assert sorted(os.listdir(tmp_path)) == ["dst", "src", "undisturbed"], seed
    assert made.contents(tmp_path / "dst") == made.contents(tmp_path / "undisturbed"), seed
    found, source = restored(tmp_path / "dst"), streamed(tmp_path / "src")
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
gptjax.checkpoints.saving.PIECE_BYTES = 50_000
"""
MOMENTS = {  # function, call, whether it is done before the kill
    "before the first piece": ("gptjax.checkpoints.saving.write_piece", 1, False),
    "between pieces": ("gptjax.checkpoints.saving.write_piece", 3, True),
    "before the manifest": ("gptjax.checkpoints.saving.write_manifest", 1, False),
    "after the manifest": ("gptjax.checkpoints.saving.write_manifest", 1, True),
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
    process = start(tmp_path / "src", tmp_path / "dst", before=before, overwrite=overwrite)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()


@pytest.mark.parametrize("moment", thinned(MOMENTS, "before publishing"))
def test_killed_while_writing(tmp_path, moment):
    _, tensors = made.gpt2(tmp_path / "src")
    _killed(tmp_path, *MOMENTS[moment], overwrite=False)
    assert not (tmp_path / "dst").exists()
    assert len(os.listdir(tmp_path)) == 2  # the leftover
    convert(tmp_path / "src", tmp_path / "dst")
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]
    assert_holds(tmp_path / "dst", tensors)


@pytest.mark.parametrize("moment", thinned(SWAP, "after the old one was moved aside"))
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
    assert_holds(tmp_path / "dst", new if expected == "new" else old)
    convert(tmp_path / "src", tmp_path / "dst", overwrite=True)
    assert_holds(tmp_path / "dst", new)
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]


def test_killed_while_deleting_the_old_one_does_not_bring_half_of_it_back(tmp_path):
    _, tensors = made.gpt2(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst")
    half = """
import shutil, types
def kill(path, **_):
    if path.name == "discarded":
        shutil.rmtree(path / "params")
        os.kill(os.getpid(), signal.SIGKILL)
    shutil.rmtree(path)
gptjax.checkpoints.atomic_directory.shutil = types.SimpleNamespace(**{**vars(shutil), "rmtree": kill})
"""
    process = start(tmp_path / "src", tmp_path / "dst", before=half, overwrite=True)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert_holds(tmp_path / "dst", tensors)
    shutil.rmtree(tmp_path / "dst")
    convert(tmp_path / "src", tmp_path / "dst")
    assert_holds(tmp_path / "dst", tensors)
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]


def test_two_conversions_to_one_destination(tmp_path):
    """The second says so, and disturbs neither the first one nor what it has written."""
    made.gpt2(tmp_path / "src")
    slow = "import time\ngptjax.checkpoints.saving.write_piece = lambda *args: time.sleep(60)"
    process = start(tmp_path / "src", tmp_path / "dst", before=slow)
    try:
        deadline = time.monotonic() + 20
        while not (tmp_path / ".dst.partial" / "new" / "params").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        before = made.contents(tmp_path)
        for write in (convert, export):
            with pytest.raises(CheckpointError, match="dst is being written by another process; wait for it or name"):
                write(tmp_path / "src", tmp_path / "dst")
        assert made.contents(tmp_path) == before
        convert(tmp_path / "src", tmp_path / "dst2")
    finally:
        process.kill()
        process.communicate()
    convert(tmp_path / "src", tmp_path / "dst")
    assert sorted(os.listdir(tmp_path)) == ["dst", "dst2", "src"]


def test_a_killed_export_is_started_anew(tmp_path):
    _, tensors = made.gpt2(tmp_path / "src")
    process = start(tmp_path / "src", tmp_path / "dst", before=EXPORT)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == [".dst.partial", "src"]
    export(tmp_path / "src", tmp_path / "dst")
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]
    assert streamed(tmp_path / "dst").keys() == {gpt2_ours.target(name) for name in tensors}


EXPORT = """
import convert.exporting, gptjax.checkpoints.safetensors_writer
real, calls = gptjax.checkpoints.safetensors_writer.SafetensorsWriter.write, []
def kill(*args):
    calls.append(1)
    real(*args)
    if len(calls) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
gptjax.checkpoints.safetensors_writer.SafetensorsWriter.write = kill
convert.convert = convert.export
"""
