"""A conversion that continues what a killed one left: complete pieces are used, and nothing there is trusted."""

import json
import os
import random
import shutil
import signal
import stat
from pathlib import Path

import pytest

from convert import convert
from gptjax.checkpoints import saving
from gptjax.errors import CheckpointError
from tests.convert import made
from tests.convert.conversion_material import start
from tests.fuzz import rounds

KILL = """
real, calls = gptjax.checkpoints.saving.write_piece, []
def kill(*args):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
gptjax.checkpoints.saving.write_piece = kill
gptjax.checkpoints.saving.PIECE_BYTES = 50_000
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A source, what a conversion of it left that was killed with three pieces complete, and one left undisturbed."""
    base = tmp_path_factory.mktemp("killed")
    made.gpt2(base / "src")
    process = start(base / "src", base / "dst", before=KILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "PIECE_BYTES", 50_000)
        convert(base / "src", base / "undisturbed")
    return base


@pytest.fixture
def left(killed, tmp_path, monkeypatch) -> Path:
    """A copy of it, times included."""
    monkeypatch.setattr(saving, "PIECE_BYTES", 50_000)
    shutil.copytree(killed, tmp_path / "left", copy_function=shutil.copy2)
    return tmp_path / "left"


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """The names of the pieces that are written from now on."""
    names: list[str] = []
    real = saving.write_piece

    def write(path, tree):
        names.append(path.name)
        return real(path, tree)

    monkeypatch.setattr(saving, "write_piece", write)
    return names


def _partial(left: Path) -> Path:
    return left / ".dst.partial"


def _pieces(left: Path) -> list[str]:
    return sorted(json.loads((left / "undisturbed" / "manifest.json").read_text())["pieces"])


def _assert_as_undisturbed(left: Path) -> None:
    assert sorted(os.listdir(left)) == ["dst", "src", "undisturbed"]
    assert made.contents(left / "dst") == made.contents(left / "undisturbed")


def test_complete_pieces_are_used_and_the_result_is_the_same(left, written):
    told = []

    class Bar:
        def __init__(self, description, total):
            told.append(total)

        def __enter__(self):
            return told.append

        def __exit__(self, *_):
            pass

    summary = convert(left / "src", left / "dst", progress=Bar)
    assert written == _pieces(left)[3:]
    assert told[0] == summary.bytes == sum(told[1:])
    _assert_as_undisturbed(left)


def test_the_journal_and_the_pieces_are_not_of_others_to_write(left):
    assert stat.S_IMODE(_partial(left).stat().st_mode) == 0o700
    assert sorted(os.listdir(_partial(left))) == ["gptjax-staging", "journal", "new"]
    assert len((_partial(left) / "journal").read_text().splitlines()) == 3


def _touch(left: Path) -> None:
    os.utime(left / "src" / "model.safetensors")


def _other_numbers(left: Path) -> None:
    made.gpt2(left / "src", seed=3)


OTHERS = {  # another conversion: what is done to the source first, and the arguments
    "another dtype": (lambda left: None, {"dtype": "bfloat16"}),
    "a source that was touched": (_touch, {}),
    "a source with other numbers": (_other_numbers, {}),
    "another tokenizer": (lambda left: (left / "src" / "tokenizer.json").write_text("[]"), {}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_conversion_starts_anew(left, written, kind):
    change, arguments = OTHERS[kind]
    change(left)
    convert(left / "src", left / "dst", **arguments)
    assert written[0] == "0000"
    shutil.rmtree(left / "undisturbed")
    convert(left / "src", left / "undisturbed", **arguments)
    _assert_as_undisturbed(left)


def test_another_size_of_pieces_starts_anew(left, written, monkeypatch):
    monkeypatch.setattr(saving, "PIECE_BYTES", 40_000)
    convert(left / "src", left / "dst")
    assert written[0] == "0000"


def test_a_source_whose_bytes_changed_in_secret_is_an_error_and_nothing_is_left(left):
    """With the size and the times that it had: only the checksums of what the killed process read say so."""
    path = left / "src" / "model.safetensors"
    status, data = path.stat(), bytearray(path.read_bytes())
    data[int.from_bytes(data[:8], "little") + 8 + 40] ^= 1  # in the first tensor, of a piece that is complete
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        convert(left / "src", left / "dst")
    assert sorted(os.listdir(left)) == ["src", "undisturbed"]


def _chunk(left: Path) -> Path:
    return max((_partial(left) / "new" / "params" / "0001").rglob("0*"), key=lambda path: path.stat().st_size)


def _flip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


def _linked(left: Path, path: Path) -> None:
    """The same bytes, by a link to elsewhere."""
    outside = left.parent / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)


def _piped(path: Path) -> None:
    os.remove(path)
    os.mkfifo(path)


def _line(left: Path, number: int, change) -> None:
    lines = (_partial(left) / "journal").read_text().splitlines()
    lines[number] = change(lines[number])
    (_partial(left) / "journal").write_text("\n".join(lines) + "\n")


def _forged(line: str) -> str:
    """A piece that claims to have other weights, in JSON as large as is read."""
    raw = json.loads(line)
    raw["manifest"]["leaves"][0]["shape"] = [1 << 40, 1 << 20]
    return json.dumps(raw)


def _lines(left: Path) -> Path:
    return _partial(left) / "journal"


DAMAGE = {  # what is done to the remains; the first piece that is written again
    "a changed byte": (lambda left: _flip(_chunk(left)), 1),
    "a changed byte of metadata": (lambda left: _flip(_partial(left) / "new/params/0001/_METADATA"), 1),
    "a cut file": (lambda left: os.truncate(_chunk(left), 10), 1),
    "a grown file": (lambda left: os.truncate(_chunk(left), 1 << 40), 1),
    "a missing file": (lambda left: os.remove(_chunk(left)), 1),
    "one file more": (lambda left: (_chunk(left).parent / "x").write_text("mine"), 1),
    "one directory more": (lambda left: (_partial(left) / "new/params/0001/x").symlink_to("/"), 1),
    "a link to the same bytes": (lambda left: _linked(left, _chunk(left)), 1),
    "a missing piece": (lambda left: shutil.rmtree(_partial(left) / "new/params/0000"), 0),
    "a piece that is a link": (lambda left: _linked(left, _partial(left) / "new/params/0002"), 2),
    "pieces that are a link": (lambda left: _linked(left, _partial(left) / "new/params"), 0),
    "all of it a link": (lambda left: _linked(left, _partial(left) / "new"), 0),
    "a pipe": (lambda left: _piped(_chunk(left)), 1),
    "no journal": (lambda left: os.remove(_lines(left)), 0),
    "an empty journal": (lambda left: os.truncate(_lines(left), 0), 0),
    "an endless journal": (lambda left: (os.remove(_lines(left)), _lines(left).symlink_to("/dev/zero")), 0),
    "an enormous journal": (lambda left: os.truncate(_lines(left), 1 << 40), 0),
    "a last line cut short": (lambda left: os.truncate(_lines(left), _lines(left).stat().st_size - 40), 2),
    "a line that is not JSON": (lambda left: _line(left, 1, lambda line: "{"), 1),
    "a line of another form": (lambda left: _line(left, 1, lambda line: "[1]"), 1),
    "a nested line": (lambda left: _line(left, 1, lambda line: "[" * 100_000 + "]" * 100_000), 1),
    "a line of another job": (lambda left: _line(left, 1, lambda line: line.replace('"job": "', '"job": "x')), 1),
    "a forged shape": (lambda left: _line(left, 1, _forged), 1),
    "a piece elsewhere": (lambda left: _line(left, 1, lambda line: line.replace('"0001"', '"../x"')), 1),
    "lines exchanged": (lambda left: _lines(left).write_text("\n".join(_lines(left).read_text().split("\n")[::-1])), 0),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_or_forged_is_written_again(left, written, kind):
    change, first = DAMAGE[kind]
    change(left)
    before = _tree(left.parent / "outside")
    convert(left / "src", left / "dst")
    assert written == _pieces(left)[first:]
    _assert_as_undisturbed(left)
    assert _tree(left.parent / "outside") == before


def _tree(path: Path) -> object:
    return made.contents(path) if path.is_dir() else path.exists() and path.read_bytes()


@pytest.mark.fuzz
def test_remains_with_random_changes(killed, tmp_path, monkeypatch):
    """Whatever was done to them, the result is as if they had never been."""
    monkeypatch.setattr(saving, "PIECE_BYTES", 50_000)
    for number in range(rounds(30)):
        rng = random.Random(number)
        left = tmp_path / str(number)
        shutil.copytree(killed, left, copy_function=shutil.copy2)
        files = sorted(path for path in (_partial(left)).rglob("*") if path.is_file() and path.name != "gptjax-staging")
        for path in [*rng.sample(files, rng.randrange(3)), _lines(left)][rng.randrange(2) :]:
            data = bytearray(path.read_bytes())
            for _ in range(rng.choice((1, 1, 4, 40))):
                data[rng.randrange(len(data))] = rng.choice((rng.randrange(256), *b'0{}[]",:'))
            path.write_bytes(data[: rng.choice((len(data), rng.randrange(len(data))))])
        convert(left / "src", left / "dst")
        _assert_as_undisturbed(left)
        shutil.rmtree(left)


FOREIGN = {  # what may lie at the staging directory's name without being ours
    "a directory": lambda path: (path.mkdir(), (path / "thesis.tex").write_text("mine")),
    "a directory with another mark": lambda path: (path.mkdir(), (path / "gptjax-staging").write_text("mine")),
    "a file": lambda path: path.write_text("mine"),
    "a link": lambda path: (path.parent / "elsewhere").mkdir() or path.symlink_to(path.parent / "elsewhere"),
    "a directory for all to write to": lambda path: (path.mkdir(), path.chmod(0o777)),
    "a pipe in it": lambda path: (path.mkdir(), os.mkfifo(path / "gptjax-staging")),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_ours_is_named_and_left_alone(tmp_path, kind):
    made.gpt2(tmp_path / "src")
    FOREIGN[kind](tmp_path / ".dst.partial")
    before = made.contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"\.dst\.partial is in the way.*move it elsewhere or name another"):
        convert(tmp_path / "src", tmp_path / "dst")
    assert made.contents(tmp_path) == before


def test_a_staging_directory_without_a_mark_yet_is_used(tmp_path):
    """Its process was killed in between."""
    made.gpt2(tmp_path / "src")
    (tmp_path / ".dst.partial").mkdir()
    convert(tmp_path / "src", tmp_path / "dst")
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]


def test_refusing_a_destination_keeps_what_can_be_continued(left, written):
    (left / "dst").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        convert(left / "src", left / "dst")
    os.rmdir(left / "dst")
    convert(left / "src", left / "dst")
    assert written == _pieces(left)[3:]
    _assert_as_undisturbed(left)


def test_rounded_weights_continue_too(tmp_path, monkeypatch, written):
    made.gpt2(tmp_path / "src", n_embd=64, n_head=4, n_inner=96)
    monkeypatch.setattr(saving, "PIECE_BYTES", 20_000)
    convert(tmp_path / "src", tmp_path / "undisturbed", quantize="all")
    code = KILL.replace("50_000", "20_000")
    process = start(tmp_path / "src", tmp_path / "dst", before=code + QUANTIZED)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    written.clear()
    convert(tmp_path / "src", tmp_path / "dst", quantize="all")
    assert written == _pieces(tmp_path)[3:]
    _assert_as_undisturbed(tmp_path)


QUANTIZED = """
import functools
convert.convert = functools.partial(convert.conversion.convert, quantize="all")
"""
