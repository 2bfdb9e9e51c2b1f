"""The commands that messages and pages give for installing: true for each way of having installed gptjax, and run.

Those marked `installs` take the way of a newcomer: a clone, a fresh environment, the lines of the README.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from gptjax.cli import _parser
from gptjax.support import installation

ROOT = Path(__file__).resolve().parents[2]
LINES = re.findall(r"pip install [^&`\n]*[^&`\s]", (ROOT / "README.md").read_text())
LINES = list(dict.fromkeys(" ".join(shlex.split(line, comments=True)) for line in LINES))
# Gigabytes: that pip finds all of it is enough.
LARGE = ("cuda13", "oracle")


@pytest.fixture
def origin(monkeypatch):
    """Sets what the installer wrote down; None for nothing."""

    class Distribution:
        url: dict | None = None

        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return self.url and json.dumps(self.url)

    found = Distribution()
    monkeypatch.setattr(metadata, "distribution", lambda name: found)
    return found


@pytest.fixture
def clone(tmp_path):
    path = tmp_path / "a clone"
    path.mkdir()
    (path / "pyproject.toml").touch()
    return path


def test_from_a_clone(origin, clone):
    origin.url = {"url": clone.as_uri(), "dir_info": {}}
    assert shlex.split(installation.with_extra("serve")) == ["pip", "install", f"{clone}[serve]"]
    assert shlex.split(installation.again())[-4:] == ["pip", "install", "--force-reinstall", str(clone)]


def test_from_a_clone_as_it_is(origin, clone):
    origin.url = {"url": clone.as_uri(), "dir_info": {"editable": True}}
    assert shlex.split(installation.with_extra("hub")) == ["pip", "install", "-e", f"{clone}[hub]"]


@pytest.mark.parametrize(("asked", "at"), [(None, ""), ("v0.2", "@v0.2")])
def test_from_a_repository(origin, asked, at):
    origin.url = {"url": "https://example.org/gptjax.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
    if asked:
        origin.url["vcs_info"]["requested_revision"] = asked
    wanted = f"gptjax[plot] @ git+https://example.org/gptjax.git{at}"
    assert shlex.split(installation.with_extra("plot")) == ["pip", "install", wanted]


def test_from_a_wheel(origin, tmp_path):
    origin.url = {"url": "https://example.org/gptjax-0.1.0-py3-none-any.whl", "archive_info": {}}
    assert shlex.split(installation.with_extra("plot"))[2] == f"gptjax[plot] @ {origin.url['url']}"
    wheel = tmp_path / "gptjax-0.1.0-py3-none-any.whl"
    wheel.touch()
    origin.url = {"url": wheel.as_uri(), "archive_info": {}}
    assert shlex.split(installation.with_extra("plot"))[2] == f"{wheel}[plot]"


@pytest.mark.parametrize("url", ["file:///no/such/clone", "", None])
def test_from_what_is_gone_or_not_known(origin, url, monkeypatch, tmp_path):
    """The packages themselves, which registries have."""
    monkeypatch.setattr(installation, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(metadata, "requires", lambda name: ["jax>=0.10", 'uvicorn>=0.35; extra == "serve"'])
    origin.url = None if url is None else {"url": url, "dir_info": {}}
    assert shlex.split(installation.with_extra("serve")) == ["pip", "install", "uvicorn>=0.35"]
    assert "pip" not in installation.again()


def test_run_from_a_clone_without_being_installed(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert shlex.split(installation.with_extra("hub")) == ["pip", "install", "-e", f"{ROOT}[hub]"]


def test_messages_ask_how_gptjax_was_installed():
    """No text of the code names an extra by itself: no registry has a package of this name."""
    for path in [*(ROOT / "gptjax").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and path.name != "installation.py":
                assert "gptjax[" not in node.value, path
                assert not re.search(r"pip install\s+(?!-)['\"]?gptjax", node.value), path


def test_commands_in_messages_exist():
    """With all their options."""
    (actions,) = (action for action in _parser()._actions if action.dest == "command")
    commands = actions.choices
    options = {option for parser in commands.values() for action in parser._actions for option in action.option_strings}
    for package in ("gptjax", "convert", "pallas_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    assert set(re.findall(r"`gptjax ([a-z-]+)", node.value)) <= commands.keys(), path
                    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", node.value))
                    assert named <= options | {"--version", "--force-reinstall"}, path


def test_pages_install_from_a_clone():
    for path in [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), *(ROOT / "examples").iterdir()]:
        if path.is_file() and path.name != "CHANGELOG.md":
            assert not re.search(r"pip install\s+['\"]?gptjax(?!.*@ git)", path.read_text()), path


# As a newcomer


@pytest.fixture(scope="module")
def fresh_clone(tmp_path_factory):
    """What git has, without what lies about here."""
    path = tmp_path_factory.mktemp("newcomer") / "clone"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", ROOT.as_uri(), path], check=True)
    return path


@pytest.fixture
def environment(tmp_path):
    """A fresh virtual environment's folder of programs."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    yield tmp_path / "venv" / "bin"
    shutil.rmtree(tmp_path / "venv")  # half a gigabyte


def _run(command: str, programs: Path, where: Path, *, fails: bool = False) -> str:
    words = shlex.split(command, comments=True)
    ended = subprocess.run(
        [programs / words[0], *words[1:]],
        cwd=where,
        env=os.environ | {"PIP_COMPILE": "0"},  # a sixth of the time is for bytecode of what nobody imports
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert (ended.returncode != 0) == fails, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


@pytest.mark.installs
def test_the_readmes_lines_install(fresh_clone, environment):
    """In their order, as one who reads it types them."""
    assert LINES[0] == "pip install ."
    for line in LINES:
        if line.endswith(tuple(f"[{extra}]" for extra in LARGE)):
            assert "Would install" in _run(f"{line} --dry-run", environment, fresh_clone)
        else:
            _run(line, environment, fresh_clone)
            assert "gptjax" in _run("gptjax --help", environment, fresh_clone)


@pytest.mark.installs
def test_the_first_minutes(fresh_clone, environment, tmp_path):
    """Text in an empty folder; then a command that lacks an extra, and what its message says to type."""
    _run("pip install .", environment, fresh_clone)
    folder = tmp_path / "empty"
    folder.mkdir()
    assert _run('gptjax generate "Once upon a time" --max-tokens 8', environment, folder).strip()
    said = _run("gptjax serve -m gpt-oss-tales", environment, folder, fails=True)
    advice = re.search(r"pip install .*", said)
    assert advice is not None, said
    _run(advice[0], environment, folder)
    code = "import gptjax.server.front.serving"
    subprocess.run([environment / "python", "-c", code], cwd=folder, check=True)
