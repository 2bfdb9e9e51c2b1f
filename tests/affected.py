"""Which test files a change can affect: `python -m tests.affected [BASE]` prints them, the nearest to it first.

The change is what the working tree has and BASE has not; by default BASE is where this branch left `main`. A test file
is affected if it reaches a changed module by imports, of modules and of the material in tests/. Of files that are no
modules:

- data in a package counts as that package's `__init__`;
- what decides how any test runs (`EVERYTHING`) affects all;
- another file affects the tests that name it, or a folder that it is in.

Files that only a command of their own runs (`make oracle`, `make slow`, `make quiet`, `make clients`) are named on
standard error.
"""

import ast
import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from tests import import_graph
from tests.import_graph import PACKAGES, ROOT

# A file marked as a whole, for a make target of that name. pytest would find no test in it and fail.
_OWN_TARGET = re.compile(r"^pytestmark = .*\bpytest\.mark\.(oracle|slow|quiet|clients|installs)\b", re.M)
EVERYTHING = ("pyproject.toml", "constraints.txt", "constraints-3.12.txt", "constraints-3.13.txt")


@cache
def graph(gone: frozenset[str]) -> dict[str, set[str]]:
    """What each module imports, tests and the conftest.py of their folders included. `gone` are modules deleted."""
    files = import_graph.modules(*PACKAGES, "tests")
    known = frozenset({*files, *gone})
    arrows = {}
    for module in files:
        text = import_graph.source(module)
        tree = ast.parse(text)
        if module.endswith(".conftest"):
            found = set()  # counted for each test, by the fixtures that it names
        elif module.startswith("tests."):
            found = import_graph.mentioned(text, tree, known)
            if _is_test(module):
                found |= _of_conftests(module, text, known)
        else:
            found = {name for _, name in import_graph.imports(tree, known) if name in known}
        packages = {module.rsplit(".", depth)[0] for depth in range(1, module.count(".") + 1)} & known
        arrows[module] = (found | packages) - {module}
    return arrows


def affected(changed: Iterable[Path], arrows: Mapping[str, set[str]]) -> list[str]:
    """The test modules that reach what changed, the nearest first; files by their paths from the project's root."""
    tests = sorted(filter(_is_test, arrows))
    distances: dict[str, int] = {}
    for path in changed:
        if path.name in EVERYTHING:
            distances |= {test: distances.get(test, 1) for test in tests}
        elif (module := _module(path)) is not None:
            distances[module] = 0
        else:
            distances |= dict.fromkeys((test for test in tests if _names(test, path)), 0)
    importers: dict[str, set[str]] = {}
    for importer, imported in arrows.items():
        for module in imported:
            importers.setdefault(module, set()).add(importer)
    queue = deque(sorted(distances, key=distances.__getitem__))
    while queue:
        module = queue.popleft()
        for importer in importers.get(module, ()):
            if importer not in distances:
                distances[importer] = distances[module] + 1
                queue.append(importer)
    return sorted((test for test in tests if test in distances), key=lambda test: distances[test])


def changed_files(base: str | None) -> list[Path]:
    """What differs from a commit, uncommitted and new files included."""
    if base is None:
        forked = _git("merge-base", "main", "HEAD", check=False)
        base = forked[0].strip() if forked else "HEAD"
    differing = _git("diff", "--name-only", "--no-renames", base, "--")
    return [Path(name) for name in sorted({*differing, *_git("ls-files", "--others", "--exclude-standard")})]


def _git(*arguments: str, check: bool = True) -> list[str]:
    command = ["git", "-c", "core.quotePath=false", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=check)
    return done.stdout.splitlines()


def _is_test(module: str) -> bool:
    return module.rpartition(".")[2].startswith("test_")


def _module(path: Path) -> str | None:
    """The module that a file is, or whose data it is."""
    if path.parts[0] in PACKAGES:
        return import_graph.module_of(path) if path.suffix == ".py" else _package(path.parent)
    return import_graph.module_of(path) if path.parts[0] == "tests" and path.suffix == ".py" else None


def _package(folder: Path) -> str:
    while not (ROOT / folder / "__init__.py").exists() and len(folder.parts) > 1:
        folder = folder.parent
    return ".".join(folder.parts)


def _names(test: str, path: Path) -> bool:
    """Whether a test's text names a file or a folder that it is in; of tests/data, the folders in it count."""
    parts = path.parts[2:] if path.parts[:2] == ("tests", "data") else path.parts
    return any(re.search(rf"""["'/]{re.escape(part)}["'/]""", import_graph.source(test)) for part in parts)


def _of_conftests(test: str, text: str, known: frozenset[str]) -> set[str]:
    """What the conftest.py of a test's folders bring it: of their fixtures, those that it names count."""
    found = set()
    parts = test.split(".")
    for depth in range(1, len(parts)):
        conftest = ".".join([*parts[:depth], "conftest"])
        if not import_graph.source(conftest):
            continue
        found.add(conftest)
        for fixture, mentioned in _statements(conftest, known):
            if fixture is None or re.search(rf"\b{fixture}\b", text):
                found |= mentioned
    return found


@cache
def _statements(conftest: str, known: frozenset[str]) -> list[tuple[str | None, set[str]]]:
    """The names of functions, None of other statements, and the modules that each reaches."""
    whole = import_graph.source(conftest)
    return [
        (
            node.name if isinstance(node, ast.FunctionDef) else None,
            import_graph.mentioned(ast.get_source_segment(whole, node) or "", node, known),
        )
        for node in ast.parse(whole).body
    ]


def main(base: str | None = None) -> None:
    """Prints the files that pytest is to run; on standard error, the make targets that reach the change as well."""
    files = changed_files(base)
    gone = [_module(path) for path in files if path.suffix == ".py" and not (ROOT / path).exists()]
    targets = set()
    for test in affected(files, graph(frozenset(filter(None, gone)))):
        if (own := _OWN_TARGET.search(import_graph.source(test))) is not None:
            targets.add(own[1])
        else:
            print(import_graph.modules(*PACKAGES, "tests")[test].relative_to(ROOT))
    for target in sorted(targets):
        print(f"make {target} reaches this change, too", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
