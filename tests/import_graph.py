"""The project's modules and what each imports, read from their text without importing anything."""

import ast
import re
from collections.abc import Set
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("gptjax", "convert", "pallas_kernels")
_DOTTED = re.compile(rf"\b(?:{'|'.join((*PACKAGES, 'tests'))})(?:\.\w+)+")
_FROM = re.compile(rf"\bfrom ((?:{'|'.join((*PACKAGES, 'tests'))})(?:\.\w+)*) import (?:\(([^)]*)\)|([\w, ]+))")
_COMMAND = re.compile(rf"""-m["']?,? ["']?({"|".join((*PACKAGES, "tests"))})\b""")


@cache
def modules(*packages: str) -> dict[str, Path]:
    """The files of these packages by the names of their modules."""
    files = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    return {module_of(path.relative_to(ROOT)): path for path in files}


def module_of(path: Path) -> str:
    """The name of the module in a file, whose path is relative to the project's root."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST, known: Set[str]) -> list[tuple[int, str]]:
    """The project's modules that a file imports, with the lines. Imports for type checkers only do not count."""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.append((node.lineno, full if full in known else str(node.module)))
        elif not isinstance(node, ast.expr):  # which holds no statement
            waiting += ast.iter_child_nodes(node)
    return [(line, name) for line, name in found if name.partition(".")[0] in (*PACKAGES, "tests")]


def mentioned(text: str, tree: ast.AST, known: Set[str]) -> set[str]:
    """The modules that a test reaches: imports, `gptjax.load` of a package that looks names up, names in strings.

    A test may name a module to patch it, or run code in another process.
    """
    found = {name for _, name in imports(tree, known)} | set(_DOTTED.findall(text))
    found |= {f"{package}.__main__" for package in _COMMAND.findall(text)}
    for package, *names in _FROM.findall(text):  # `from gptjax import load`, in code or in a string
        found |= {f"{package}.{name.split()[0]}" for name in "".join(names).split(",") if name.strip()}
    return {module for name in found for module in _reached(name, known)}


def _reached(name: str, known: Set[str]) -> set[str]:
    """The modules of a dotted name, which may go on to a name in a module."""
    module = name
    while module and module not in known:
        module = module.rpartition(".")[0]
    if not module:
        return set()
    return {module} | (looked_up(module, known) if module != name else set())


def looked_up(module: str, known: Set[str]) -> set[str]:
    """Of a package that looks its names up when they are first used: the modules where it does."""
    text = source(module) if module in known else ""
    return set(re.findall(r'"([\w.]+)"', text)) & known if "def __getattr__" in text else set()


@cache
def source(module: str) -> str:
    """The text of a module, empty if its file is gone."""
    path = modules(*PACKAGES, "tests").get(module)
    return path.read_text(encoding="utf-8") if path else ""
