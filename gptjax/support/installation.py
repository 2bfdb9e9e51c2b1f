"""Commands that reinstall gptjax, or install one of its extras, from wherever this installation came from.

gptjax is not in any package registry, so `pip install gptjax` would fail or install something else.
"""

import json
import re
import shlex
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

_CHECKOUT: Final = Path(__file__).resolve().parent.parent.parent


def with_extra(extra: str) -> str:
    """The shell command that installs an extra of pyproject.toml, such as "serve"."""
    source = _source(f"[{extra}]")
    if source is None:  # then just the extra's packages
        source = [requirement for requirement, wanted_by in requirements() if wanted_by == extra]
    return _pip(source)


def again() -> str:
    """How to reinstall gptjax, for the end of a message."""
    source = _source("")
    if source is None:
        return "reinstall gptjax the way you installed it"
    return f"reinstall gptjax: {_pip(['--force-reinstall', *source])}"


def _pip(arguments: list[str]) -> str:
    return shlex.join(["pip", "install", *arguments])


def _source(extra: str) -> list[str] | None:
    """pip's arguments for gptjax's origin (PEP 610); None if that is unknown or gone."""
    origin = _origin()
    url, vcs = str(origin.get("url", "")), origin.get("vcs_info")
    if isinstance(vcs, dict):
        at = f"@{vcs['requested_revision']}" if vcs.get("requested_revision") else ""
        return [f"gptjax{extra} @ {vcs.get('vcs', 'git')}+{url}{at}"]
    if url.startswith(("https:", "http:")):
        return [f"gptjax{extra} @ {url}"]
    if url.startswith("file:"):
        path = Path(unquote(urlsplit(url).path))
        editable = bool(origin.get("dir_info", {}).get("editable"))
    else:  # run from a clone without being installed
        path, editable = _CHECKOUT, True
    if not path.exists() or (path.is_dir() and not (path / "pyproject.toml").is_file()):
        return None
    return [*(["-e"] if editable else []), f"{path}{extra}"]


def _origin() -> dict[str, Any]:
    """The installer's record of where the package came from."""
    try:
        text = metadata.distribution("gptjax").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return {}
    return json.loads(text) if text else {}


def requirements() -> list[tuple[str, str]]:
    """Pairs of a requirement and its extra or "": from pyproject.toml in a checkout, else from the installation."""
    project = _CHECKOUT / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        extras = table["optional-dependencies"].items()
        own = [(line, "") for line in table["dependencies"]]
        return own + [(line, extra) for extra, lines in extras for line in lines]
    split = [line.partition(";") for line in metadata.requires("gptjax") or ()]
    marks = [(line, re.search(r"""extra == ["']([\w-]+)""", marker)) for line, _, marker in split]
    return [(line.strip(), "" if mark is None else mark[1]) for line, mark in marks]
