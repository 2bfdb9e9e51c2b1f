"""`convert.verify` and `gptjax convert --verify`: every damaged file of a converted directory is named."""

import json
import os
import shutil
from pathlib import Path

import pytest

import convert
from gptjax.checkpoints import saving
from gptjax.cli import main
from gptjax.errors import CheckpointError
from tests.convert import made


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("sound")
    made.gpt2(base / "src")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "PIECE_BYTES", 50_000)
        convert.convert(base / "src", base / "dst")
    return base / "dst"


@pytest.fixture
def converted(sound, tmp_path) -> Path:
    shutil.copytree(sound, tmp_path / "dst")
    return tmp_path / "dst"


def test_a_sound_directory(converted):
    before = made.contents(converted)
    found = convert.verify(converted)
    manifest = json.loads((converted / "manifest.json").read_text())
    assert (found.num_weights, found.faults) == (len(manifest["leaves"]), ())
    assert found.bytes == 4 * 72_096
    assert made.contents(converted) == before


def test_the_manifest_has_a_checksum_of_every_file(converted):
    """Of a weight's numbers, of its description word for word, or of the whole file."""
    manifest = json.loads((converted / "manifest.json").read_text())
    weights = {f"params/{leaf['piece']}/{leaf['path'].replace('/', '.')}" for leaf in manifest["leaves"]}
    files = {path.relative_to(converted).as_posix() for path in converted.rglob("*") if path.is_file()}
    rest = {name for name in files if name.rpartition("/")[0] not in weights}
    assert rest == {*manifest["others"], "manifest.json"}


def test_every_file_that_is_changed_is_named(converted):
    """A byte of each file in turn, at its end."""
    for path in sorted(path for path in converted.rglob("*") if path.is_file() and path.name != "manifest.json"):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        faults = convert.verify(converted).faults
        assert len(faults) == 1 and str(converted) in faults[0], path
        assert path.relative_to(converted).as_posix().partition("params/0")[2].partition("/")[2] in faults[0], path
        assert path.name in faults[0]
        path.write_bytes(data)


CHANGES = {  # what is done to one file; what is said of it
    "gone": (os.remove, "is missing"),
    "cut": (lambda path: os.truncate(path, 3), "3 bytes, expected"),
    "grown": (lambda path: os.truncate(path, 1 << 40), "expected"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_all_damage_is_reported_together(converted, kind):
    change, said = CHANGES[kind]
    chunks = sorted((converted / "params").rglob("0.0"))[:3]
    for path in chunks:
        change(path)
    (converted / "tokenizer.json").write_text("[]")
    faults = convert.verify(converted).faults
    assert len(faults) == 4
    for path in chunks:
        (fault,) = [fault for fault in faults if f"{path.parent.name}/0.0" in fault]
        assert said in fault
    assert any("tokenizer.json have changed" in fault for fault in faults)


def test_a_missing_piece_and_special_files(converted):
    shutil.rmtree(converted / "params" / "0001")
    os.remove(converted / "config.json")
    os.mkfifo(converted / "config.json")
    faults = convert.verify(converted).faults
    assert any("not a regular file" in fault for fault in faults)
    files = json.loads((converted / "manifest.json").read_text())["pieces"]["0001"]
    assert sum("params/0001" in fault for fault in faults) == len(files)


def test_directories_of_older_versions_have_fewer_checksums(converted):
    manifest = json.loads((converted / "manifest.json").read_text())
    del manifest["others"]
    (converted / "manifest.json").write_text(json.dumps(manifest))
    assert convert.verify(converted).faults == ()
    made.change_config(converted, n_layer=2)
    (fault,) = convert.verify(converted).faults
    assert "do not match the model that its config.json describes" in fault


def test_what_has_no_checksums_is_refused(tmp_path, converted):
    with pytest.raises(CheckpointError, match=r"src has no manifest\.json; only a directory that `gptjax"):
        convert.verify(tmp_path / "src")
    (converted / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        convert.verify(converted)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "params/../x", "params/0000/../../x", "a/b/c", "", "..", 3])
def test_the_names_in_a_manifest_lead_nowhere(converted, name):
    path = converted / "manifest.json"
    path.write_text(path.read_text().replace('"tokenizer.json": "', f'{json.dumps(str(name))}: "'))
    if name == 3:
        path.write_text(path.read_text().replace('"others": {', '"others": [').replace("}\n}", "]\n}"))
    with pytest.raises(CheckpointError, match=r"is damaged|not valid JSON"):
        convert.verify(converted)


def test_the_command_says_what_it_found(converted, capsys):
    assert main(["convert", "--verify", str(converted)]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (f"{converted}: 40 weights, 0.3 MB, all sound\n", "")
    chunk = max((converted / "params").rglob("0.0"), key=lambda path: path.stat().st_size)
    chunk.write_bytes(bytes(chunk.stat().st_size))
    assert main(["convert", "--verify", str(converted)]) == 1
    out, err = capsys.readouterr()
    assert out == f"{converted}: 40 weights, 0.3 MB, 1 damaged; copy the directory or convert again\n"
    assert f"{chunk.parent.name}/0.0 have changed" in err
