"""Imports go one way: a module imports from its own room or from those below it, never in a circle."""

import ast
import graphlib
import re
import subprocess
import sys

import pytest

from tests.import_graph import PACKAGES, ROOT, imports, modules

# Lowest first. A module belongs to the room whose name is the longest package of it.
ROOMS = [
    "pallas_kernels",
    "gptjax._version",
    "gptjax.errors",
    "gptjax.axes",
    "gptjax.support",
    "gptjax.gguf",
    "gptjax.config",
    "gptjax.text",
    "gptjax.structured",
    "gptjax.checkpoints",
    "gptjax.layers",
    "gptjax.sharding",
    "gptjax.models",
    "convert",
    "gptjax.scheduling",
    "gptjax.engine",
    "gptjax.chat",
    "gptjax.language_model",
    "gptjax.api",
    "gptjax.diagnostics",
    "gptjax.bench",
    "gptjax.server.ipc",
    "gptjax.server",  # errors and the log
    "gptjax.server.worker",
    "gptjax.server.http",
    "gptjax.server.generation",
    "gptjax.server.openai",
    "gptjax.server.openai.responses",
    "gptjax.server.anthropic",
    "gptjax.server.front",
    "gptjax.cli",
    "gptjax.__main__",
    "gptjax",  # the face: its names are looked up when first used, and nothing of the project imports it
]


def _rank(module: str) -> int:
    name = module
    while name and (name not in ROOMS or (name == "gptjax" and module != name)):
        name = name.rpartition(".")[0]
    assert name, f"{module} has no room"
    return ROOMS.index(name)


MODULES = modules(*PACKAGES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_goes_up(module):
    tree = ast.parse(MODULES[module].read_text())
    for line, name in imports(tree, set(MODULES)):
        assert _rank(name) <= _rank(module), f"{MODULES[module]}:{line} imports {name}, which is above it"


def test_every_module_has_a_room():
    assert {ROOMS[_rank(module)] for module in MODULES} == set(ROOMS)


def test_the_rooms_are_those_of_the_documentation():
    page = (ROOT / "docs" / "how-it-is-built.md").read_text()
    assert re.findall(r"^\| `([\w.]+)` \|", page, flags=re.M) == ROOMS


def test_no_module_imports_itself_by_way_of_others():
    arrows = {
        module: {name for _, name in imports(ast.parse(path.read_text()), set(MODULES)) if name in MODULES}
        for module, path in MODULES.items()
    }
    try:
        tuple(graphlib.TopologicalSorter(arrows).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_the_servers_two_processes_import_nothing_of_each_other():
    """The worker's knows no HTTP, and what speaks HTTP knows the worker by its messages only."""
    front = {"http", "generation", "openai", "anthropic", "front"}
    for module, path in MODULES.items():
        if (room := _room_of_server(module)) is not None:
            apart = {"worker"} if room in front else front if room == "worker" else set()
            for line, name in imports(ast.parse(path.read_text()), set(MODULES)):
                assert _room_of_server(name) not in apart, f"{path}:{line} imports {name}"


def _room_of_server(module: str) -> str | None:
    whole = re.match(r"gptjax\.server\.(\w+)", module)
    return whole and whole[1]


def test_tests_import_each_other_by_full_names():
    """pytest would load a file once more under its bare name, and `make affected` would not see the import."""
    files = list((ROOT / "tests").rglob("*.py"))
    own = {file.stem for file in files}
    bare = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            bare += [f"{file.name}:{node.lineno}: {name}" for name in names if name.partition(".")[0] in own]
    assert not bare


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("gptjax", ["jax", "numpy", "tokenizers", "gptjax.api"]),
        ("gptjax.errors", ["jax", "gptjax.config"]),
        ("gptjax.gguf", ["jax", "flax", "gptjax.config"]),
        ("gptjax.config", ["jax", "flax", "gptjax.layers"]),
        ("gptjax.text", ["jax", "flax", "gptjax.config"]),
        ("gptjax.scheduling.scheduler", ["jax", "flax", "gptjax.config"]),
        # It starts soon, and stays small.
        ("gptjax.server.front.__main__", ["jax", "flax", "orbax", "gptjax.engine.engine"]),
        ("gptjax.cli", ["jax", "gptjax.api"]),
        ("pallas_kernels", ["flax", "gptjax"]),
    ],
)
def test_importing_a_module_brings_nothing_from_above(module, absent):
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


def test_pallas_kernels_import_jax_and_numpy_only():
    for module, path in MODULES.items():
        if module.partition(".")[0] == "pallas_kernels":
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                for name in names:
                    top = name.partition(".")[0]
                    allowed = {"jax", "jaxlib", "numpy", "pallas_kernels"} | set(sys.stdlib_module_names)
                    assert top in allowed, f"{module} imports {name}"
