"""Imports go one way. The order of the rooms is that of the design; a module may import only what stands below it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Lowest first; a module belongs to the room whose name is its own or the longest package of it.
ROOMS = [
    ["pallas_kernels"],
    # gptjax/__init__ is lazy.
    ["gptjax", "gptjax.axes", "gptjax.errors", "gptjax.files", "gptjax.installation"],
    ["gptjax.progress", "gptjax.quoting", "gptjax.units"],
    ["gptjax.config"],
    ["gptjax.cache"],
    ["gptjax.layers"],
    ["gptjax.models"],
    ["gptjax.sampling", "gptjax.runtime", "gptjax.activations", "gptjax.cost"],
    ["gptjax.manifest", "gptjax.staging", "gptjax.pieces"],
    ["gptjax.checkpoint"],
    ["convert"],
    ["gptjax.hub"],
    ["gptjax.text"],
    ["gptjax.engine"],
    ["gptjax.memory", "gptjax.chat"],
    ["gptjax.language_model"],
    ["gptjax.api", "gptjax.info"],
    ["gptjax.evaluate", "gptjax.compare"],
    ["gptjax.bench", "gptjax.quantization", "gptjax.verify", "gptjax.doctor", "gptjax.kernel_cases"],
    ["gptjax.kernel_bench"],
    ["gptjax.server"],
    ["gptjax.cli", "gptjax.__main__"],
]
# Console scripts stand above the packages they are in.
ENTRY_POINTS = {"convert.__main__": "gptjax.cli"}


def _rank(module: str) -> int:
    module = ENTRY_POINTS.get(module, module)
    ranks = {name: rank for rank, names in enumerate(ROOMS) for name in names}
    while module:
        if module in ranks:
            return ranks[module]
        module = module.rpartition(".")[0]
    raise AssertionError("a module without a room")


def _modules() -> dict[str, Path]:
    files = [path for package in ("gptjax", "convert", "pallas_kernels") for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def _imports(tree: ast.AST, known: set[str]) -> list[tuple[int, str]]:
    """The project's modules that a file imports, with the lines. Imports for type checkers only do not count."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.append((node.lineno, full if full in known else node.module))
    return [(line, name) for line, name in found if name.partition(".")[0] in {"gptjax", "convert", "pallas_kernels"}]


MODULES = _modules()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_goes_up(module):
    tree = ast.parse(MODULES[module].read_text())
    for line, name in _imports(tree, set(MODULES)):
        assert _rank(name) <= _rank(module), f"{MODULES[module]}:{line} imports {name}, which stands above it"


def test_every_module_has_a_room():
    for module in MODULES:
        _rank(module)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("gptjax", ["jax", "numpy", "tokenizers", "gptjax.api"]),
        ("gptjax.errors", ["jax", "gptjax.config"]),
        ("gptjax.config", ["jax", "flax", "gptjax.layers"]),
        ("gptjax.text", ["jax", "flax", "gptjax.config"]),
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
