"""The pages of docs/ and the README: what they show runs, what they state is what the code says."""

import ast
import builtins
import importlib
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gptjax
import gptjax.api
from gptjax.axes import GLOSSARY
from gptjax.checkpoints.checkpoint import open_checkpoint
from gptjax.cli import _parser, main
from gptjax.config import PUBLISHED, GptOssConfig
from gptjax.engine import cost
from gptjax.models import registry
from gptjax.models.stages import stages
from gptjax.support.runtime import compute_dtype
from tests.pages import PAGES, ROOT, each_page, each_page_to_run, fences, prose, squeezed
from tests.thinned import thinned

NOT_RUN = {
    ("README.md", "needs a download"),
    ("README.md", "needs a server"),
    ("README.md", "needs torch"),
    ("README.md", "serves until it is told to end"),
    ("docs/gguf.md", "needs a download"),
    ("docs/deployment.md", "needs several hosts"),
    ("docs/more-than-one-device.md", "needs several devices"),
    ("docs/gpt-oss.md", "needs a download"),
    ("docs/gpt-oss.md", "needs torch"),
    ("docs/precision-and-cost.md", "needs torch"),
    ("docs/profiling.md", "prints to the log"),
    ("docs/profiling.md", "takes minutes"),
    ("docs/serving.md", "needs a server"),
    ("docs/serving.md", "serves until it is told to end"),
    ("docs/troubleshooting.md", "needs a download"),
    ("docs/troubleshooting.md", "needs a pickle file and transformers"),
    ("docs/troubleshooting.md", "needs another checkpoint"),
    ("docs/troubleshooting.md", "installs packages"),
}


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def loaded(lm) -> dict[tuple[Any, ...], gptjax.LanguageModel]:
    """Models by the arguments they were loaded with: the pages share them."""
    return {("gpt2-tales", "float32", ()): lm}


@pytest.fixture(scope="module")
def demos(lm, loaded) -> dict[str, gptjax.LanguageModel]:
    """The demo that each page with a table of stages follows, by the page's name."""
    key = ("gpt-oss-tales", "float32", (("max_length", 512),))
    if key not in loaded:
        loaded[key] = gptjax.load("gpt-oss-tales", dtype="float32", max_length=512)
    return {"forward-pass.md": lm, "gpt-oss.md": loaded[key]}


@pytest.fixture
def shared(monkeypatch, loaded, tmp_path):
    """Loading that keeps the demos, and a directory of its own to run in."""
    real = gptjax.api.load_checkpoint

    def load_checkpoint(checkpoint, *, dtype=None, **settings):
        name = checkpoint.path.name
        if name not in ("gpt2-tales", "gpt-oss-tales") or checkpoint != open_checkpoint(name):
            return real(checkpoint, dtype=dtype, **settings)
        given = tuple(sorted((key, value) for key, value in settings.items() if value not in (None, "auto")))
        key = (name, compute_dtype(dtype).name, given)
        if key not in loaded:
            loaded[key] = real(checkpoint, dtype=dtype, **settings)
        return loaded[key]

    monkeypatch.setattr(gptjax.api, "load_checkpoint", load_checkpoint)
    monkeypatch.chdir(tmp_path)


# Python


@each_page_to_run
def test_python_blocks_run(page, shared, capsys):
    namespace: dict[str, Any] = {"__name__": page.stem}
    for fence in fences(page):
        if fence.language == "python" and fence.skipped is None:
            code = "\n" * (fence.line - 1) + fence.text  # so that a traceback has the line of the page
            exec(compile(code, str(page), "exec"), namespace)


def test_every_block_has_a_language_and_few_are_not_run():
    seen = set()
    for page in PAGES:
        for fence in fences(page):
            assert fence.language in {"python", "sh", "text", "mermaid"}, f"{page}:{fence.line}"
            if fence.skipped is not None:
                seen.add((_name(page), fence.skipped))
            if fence.language == "python":
                compile(fence.text, str(page), "exec")
    assert seen == NOT_RUN


# Commands


def _commands(text: str) -> Iterator[tuple[list[str], str | None]]:
    """The arguments of each `gptjax` in shell lines, and what is piped into it."""
    for line in text.splitlines():
        words, piped = shlex.split(line, comments=True), None
        if "|" in words:
            before, words = words[: words.index("|")], words[words.index("|") + 1 :]
            assert before[0] == "echo", line
            piped = " ".join(before[1:]) + "\n"
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words and words[0] == "gptjax":
            yield words[1:], piped


def _known() -> dict[str, Any]:
    """The parser of each command."""
    (actions,) = (action for action in _parser()._actions if action.dest == "command")
    assert isinstance(actions.choices, dict)
    return actions.choices


@each_page
def test_commands_are_understood(page):
    for fence in fences(page):
        for argv, _ in _commands(fence.text) if fence.language == "sh" else ():
            _parser().parse_args(argv)


@each_page_to_run
def test_commands_that_are_cheap_run(page, shared, monkeypatch, capsys):
    for fence in fences(page):
        for argv, piped in _commands(fence.text) if fence.language == "sh" else ():
            args = _parser().parse_args(argv)
            if fence.skipped is None and "./" not in " ".join(argv):
                monkeypatch.setattr(sys, "stdin", io.StringIO(piped or ""))
                status, out = main(argv), capsys.readouterr().out
                assert out, argv
                # These two end with 1 also where they did their work, and found what is not as it should be.
                found = args.command == "doctor" or (args.command == "validate-quant" and "\nFAIL " in out)
                assert status == 0 or (status == 1 and found), argv


@each_page
def test_commands_named_in_sentences_exist(page):
    for named in re.findall(r"`gptjax ([a-z]+)[^`]*`", prose(page)):
        assert named in _known(), f"gptjax {named}"


# What is pointed at


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file), target
    if page.parent.name == "docs" and page.name != "README.md":
        assert f"({page.name})" in (ROOT / "docs" / "README.md").read_text()
        assert f"(docs/{page.name})" in (ROOT / "README.md").read_text()


def _defined(path: Path) -> set[str]:
    """The functions and classes of a file, and methods as `Class.method`."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


@each_page
def test_what_stands_in_a_file_stands_there(page, lm):
    text = squeezed(prose(page))
    for names, path in re.findall(r"((?:`[\w.]+`(?: and )?)+) in \[([\w./]+\.py)\]", text):
        for name in re.findall(r"`([\w.]+)`", names):
            assert name in _defined(ROOT / path), f"{name} in {path}"
    for name in re.findall(r"`lm\.(\w+)", text):
        assert hasattr(lm, name), f"lm.{name}"
    for dotted in re.findall(r"`((?:gptjax|jax)(?:\.\w+)+)", text):
        module, *rest = dotted.split(".")
        thing = importlib.import_module(module)
        for part in rest:
            module += f".{part}"
            if not hasattr(thing, part):
                importlib.import_module(module)
            thing = getattr(thing, part)


# Numbers


@each_page
def test_large_numbers_and_measures_are_asserted(page):
    """In sentences and tables: each stands in a Python block of the page as well, where it is computed or given."""
    code = "\n".join(fence.text for fence in fences(page) if fence.language == "python")
    literals = {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
    powers = {f"{value:g}" for value in literals if isinstance(value, int | float)}
    # What was measured on a machine cannot be computed; it stands between marks, with its date.
    text = re.sub(r"<!-- measured \d{4}-\d\d-\d\d -->.*?<!-- end -->", "", prose(page), flags=re.DOTALL)
    for number in re.findall(r"(?<![\d,])\d{1,3}(?:,\d{3})+(?![\d,])", text):
        assert int(number.replace(",", "")) in literals, number
    units = {"ms": 1.0, "GB/s": 1e9, "TB/s": 1e12, "TFLOP/s": 1e12, "tokens/s": 1.0, "MB": 1e6, "GB": 1e9}
    for number, unit in re.findall(r"(?<![\w.])(\d+(?:\.\d+)?) (ms|GB/s|TB/s|TFLOP/s|tokens/s|MB|GB)\b", text):
        assert f"{float(number) * units[unit]:g}" in powers, f"{number} {unit}"


def test_the_formulas_are_those_of_the_code():
    code = "\n".join(
        fence.text for fence in fences(ROOT / "docs" / "precision-and-cost.md") if fence.language == "python"
    )
    functions = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
    page: dict[str, Any] = {}
    exec(compile(ast.Module(functions, []), "precision-and-cost.md", "exec"), page)
    for config in (PUBLISHED["gpt2"], PUBLISHED["gpt2-medium"]):
        for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
            model = registry.build(config, dtype=dtype)
            assert page["weights_read"](config, itemsize) == cost.weight_bytes_per_step(model)
            read = page["weights_read"](config, itemsize) + page["cache_read"](config, 3, 500, itemsize)
            assert read == cost.decode_bytes(model, batch=3, length=500)
        assert page["decode_flops"](config, 777) == cost.token_flops(model, length=777)
    for config in (PUBLISHED["gpt-oss-20b"], PUBLISHED["gpt-oss-120b"]):
        for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
            model = registry.build(config, dtype=dtype)
            for rows in (1, 3, 40):
                weights = page["gpt_oss_weights_read"](config, itemsize, rows)
                assert weights == cost.weight_bytes_per_step(model, batch=rows)
                read = weights + page["gpt_oss_cache_read"](config, rows, 500, itemsize)
                assert read == cost.decode_bytes(model, batch=rows, length=500)
        for length in (77, 777):
            assert page["gpt_oss_decode_flops"](config, length) == cost.token_flops(model, length=length)


def test_the_glossary_is_that_of_the_code():
    rows = re.findall(r"^\| ([A-Z]) \| (.*) \|$", (ROOT / "docs" / "glossary.md").read_text(), flags=re.M)
    assert dict(rows) == GLOSSARY
    assert [letter for letter, _ in rows] == list(GLOSSARY)


def test_the_words_of_the_glossary_are_in_order():
    words = re.findall(r"^\*\*([^*]*)\.\*\*", (ROOT / "docs" / "glossary.md").read_text(), flags=re.M)
    assert len(words) > 40
    assert words == sorted(words, key=lambda word: re.sub(r"[^a-z]", "", word.lower()))


def _sizes(lm: gptjax.LanguageModel) -> dict[str, int]:
    """What each letter is on a page that follows this model, with 8 tokens in one row."""
    c = lm.config
    N, K = c.num_heads, c.num_kv_heads
    sizes = {"B": 1, "T": 8, "S": 512, "D": c.width, "N": N, "K": K, "G": N // K, "H": c.head_width}
    sizes |= {"F": c.mlp_width, "V": c.vocab_size, "P": c.context_length, "L": c.num_layers}
    if isinstance(c, GptOssConfig):
        sizes |= {"E": c.num_experts, "X": c.experts_per_token}
    return sizes


@pytest.mark.parametrize("page", thinned(["forward-pass.md", "gpt-oss.md"], "forward-pass.md"))
def test_the_table_of_stages_has_every_stage_and_its_shape(page, demos):
    text, lm = (ROOT / "docs" / page).read_text(), demos[page]
    rows = re.findall(r"^\| `([\w/]+)` \| \[([^]]*)\] \| \[([^]]*)\] \|", text, flags=re.M)
    values = lm.activations(lm.tokenizer.encode("The king and the queen had a son"))
    assert [name for name, _, _ in rows] == stages(lm.config.with_one_layer())
    sizes = _sizes(lm)
    for name, axes, shape in rows:
        assert [sizes[axis] for axis in axes.split(", ")] == json.loads(f"[{shape}]") == list(values[name].shape)


@pytest.mark.parametrize("page", ["forward-pass.md", "gpt-oss.md"])
def test_every_shape_with_axes_is_true(page, demos):
    """Wherever axes and sizes stand side by side, as in `[B, T, D] = [1, 8, 256]`."""
    sizes = _sizes(demos[page])
    text = squeezed(prose(ROOT / "docs" / page))
    found = re.findall(r"\[([A-Z][^]]*)\] = \[([\d, ]+)\]", text)
    assert len(found) > 15
    for axes, shape in found:
        actual = [
            eval(re.sub(r"(?<=\d)(?=[A-Z])", "*", axis).replace("·", "*"), {}, sizes) for axis in axes.split(", ")
        ]
        expected = json.loads(f"[{shape}]")
        if "S" in axes and expected[-1] == 8:
            actual[-1] = 8  # without a cache, the keys are those of the call's tokens
        assert actual == expected, axes


@pytest.mark.parametrize(
    ("quoted", "file", "code"),
    [
        ("128 · 2⁻²³ of the largest value", "tests/models/test_gpt2.py", "FLOAT32_TOLERANCE = 128 * float(jnp.finfo"),
        ("2e-4 of the largest value", "tests/models/test_golden_gpt2.py", "LOGITS_TOLERANCE = 2e-4, 1e-3"),
        ("1e-3 for logits", "tests/models/test_golden_gpt2.py", "LOGITS_TOLERANCE = 2e-4, 1e-3"),
        ("the same 128 · 2⁻²³", "tests/models/test_gpt_oss.py", "FLOAT32_TOLERANCE = 128 * float(jnp.finfo"),
        ("a difference of 1e-3 in", "tests/models/test_golden_gpt_oss.py", "LOGITS_TOLERANCE = 2e-4, 1e-3"),
        ("at 97 percent of the positions", "tests/models/test_precision.py", ".mean() >= 0.97"),
        ("within 1 percent", "tests/models/test_precision.py", "rel=0.01"),
    ],
)
def test_tolerances_are_those_of_the_tests(quoted, file, code):
    assert quoted in squeezed((ROOT / "docs" / "precision-and-cost.md").read_text())
    assert code in (ROOT / file).read_text()


def test_options_and_variables_of_the_pages_exist():
    source = "\n".join(path.read_text() for path in (ROOT / "gptjax").rglob("*.py"))
    serve = _known()["serve"]._option_string_actions
    for page in PAGES:
        for name in re.findall(r"\bGPTJAX_[A-Z_]+\b", page.read_text()):
            option = "--" + name.removeprefix("GPTJAX_SERVE_").lower().replace("_", "-")
            assert option in serve if name.startswith("GPTJAX_SERVE_") else name in source, name
        for name in re.findall(r"`(\w*Error)`", prose(page)):
            assert hasattr(gptjax, name) or hasattr(builtins, name), name
