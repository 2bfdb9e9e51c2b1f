"""The pages of docs/ and the README: what they show runs, what they quote is what the code says."""

import ast
import builtins
import dataclasses
import importlib
import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
import gptjax
import gptjax.api
from gptjax.axes import GLOSSARY
from gptjax.bench import cost
from gptjax.checkpoints import weights
from gptjax.checkpoints.atomic_directory import staged
from gptjax.checkpoints.checkpoint import open_checkpoint
from gptjax.checkpoints.safetensors import open_directory
from gptjax.cli import _parser, main
from gptjax.config import PUBLISHED, GptOssConfig
from gptjax.engine import memory
from gptjax.models import registry
from gptjax.models.stages import stages
from gptjax.support.runtime import compute_dtype

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
DEMO = ROOT / "gptjax" / "demo" / "gpt2-tales"
GPT_OSS_DEMO = ROOT / "gptjax" / "demo" / "gpt-oss-tales"

NOT_RUN = {
    ("README.md", "needs a download"),
    ("README.md", "needs a server"),
    ("README.md", "needs torch"),
    ("README.md", "serves until it is told to end"),
    ("docs/gguf.md", "needs a download"),
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

each_page = pytest.mark.parametrize("page", PAGES, ids=[page.name if page.parent != ROOT else "root" for page in PAGES])


@dataclasses.dataclass(frozen=True)
class Fence:
    """A fenced part of a page."""

    language: str
    comment: str  # of the HTML comment right above it
    line: int  # where its text begins, from 1
    text: str

    @property
    def skipped(self) -> str | None:
        return self.comment.removeprefix("not run: ") if self.comment.startswith("not run: ") else None


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _fences(page: Path) -> Iterator[Fence]:
    lines = page.read_text().splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if line.startswith("```") and start is None:
            start = number
        elif line == "```" and start is not None:
            above = re.fullmatch(r"<!-- (.*) -->", lines[start - 1])
            text = "\n".join(lines[start + 1 : number])
            yield Fence(lines[start][3:], above[1] if above else "", start + 2, text)
            start = None
    assert start is None, f"{page} has a fence without an end"


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def _squeezed(text: str) -> str:
    return " ".join(text.split())


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


@each_page
def test_python_blocks_run(page, shared, capsys):
    namespace: dict[str, Any] = {"__name__": page.stem}
    for fence in _fences(page):
        if fence.language == "python" and fence.skipped is None:
            code = "\n" * (fence.line - 1) + fence.text  # so that a traceback has the line of the page
            exec(compile(code, str(page), "exec"), namespace)


def test_every_block_has_a_language_and_few_are_not_run():
    seen = set()
    for page in PAGES:
        for fence in _fences(page):
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
def test_commands_are_understood_and_the_cheap_ones_run(page, shared, monkeypatch, capsys):
    for fence in _fences(page):
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
    for named in re.findall(r"`gptjax ([a-z]+)[^`]*`", _prose(page)):
        assert named in _known(), f"gptjax {named}"


# What is pointed at


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", _prose(page)):
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
    text = _squeezed(_prose(page))
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
    code = "\n".join(fence.text for fence in _fences(page) if fence.language == "python")
    literals = {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
    powers = {f"{value:g}" for value in literals if isinstance(value, int | float)}
    # What was measured on a machine cannot be computed; it stands between marks, with its date.
    text = re.sub(r"<!-- measured \d{4}-\d\d-\d\d -->.*?<!-- end -->", "", _prose(page), flags=re.DOTALL)
    for number in re.findall(r"(?<![\d,])\d{1,3}(?:,\d{3})+(?![\d,])", text):
        assert int(number.replace(",", "")) in literals, number
    units = {"ms": 1.0, "GB/s": 1e9, "TB/s": 1e12, "TFLOP/s": 1e12, "tokens/s": 1.0, "MB": 1e6, "GB": 1e9}
    for number, unit in re.findall(r"(?<![\w.])(\d+(?:\.\d+)?) (ms|GB/s|TB/s|TFLOP/s|tokens/s|MB|GB)\b", text):
        assert f"{float(number) * units[unit]:g}" in powers, f"{number} {unit}"


def test_the_formulas_are_those_of_the_code():
    code = "\n".join(
        fence.text for fence in _fences(ROOT / "docs" / "precision-and-cost.md") if fence.language == "python"
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


@pytest.mark.parametrize("page", ["forward-pass.md", "gpt-oss.md"])
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
    text = _squeezed(_prose(ROOT / "docs" / page))
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
    assert quoted in _squeezed((ROOT / "docs" / "precision-and-cost.md").read_text())
    assert code in (ROOT / file).read_text()


# Messages


def _raised(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:
        return str(error)
    raise AssertionError("nothing was raised")


def _copy(tmp_path: Path, without: str = "", demo: Path = DEMO, **changes: Any) -> Path:
    """A demo with another configuration, where None takes a key out, or without a file."""
    directory = tmp_path / "copy"
    shutil.copytree(demo, directory)
    config = json.loads((directory / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None or key not in changes}
    (directory / "config.json").write_text(json.dumps(config))
    if without:
        (directory / without).unlink()
    return directory


def _pickle(tmp_path: Path) -> Path:
    directory = _copy(tmp_path, without="model.safetensors")
    (directory / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    return directory


def _truncated(tmp_path: Path) -> Path:
    directory = _copy(tmp_path)
    os.truncate(directory / "model.safetensors", 1_000_000)
    return directory


def _changed(tmp_path: Path) -> None:
    source = open_directory(_copy(tmp_path))
    os.utime(tmp_path / "copy" / "model.safetensors")
    source.read(next(iter(source.tensors)))


def _busy(tmp_path: Path) -> str:
    with staged(tmp_path / "dst", overwrite=False, ours=lambda _: False):
        return _raised(lambda: convert.convert(DEMO, tmp_path / "dst"))


def _adapter(tmp_path: Path) -> Path:
    config = {"base_model_name_or_path": "openai-community/gpt2"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def _pipe(tmp_path: Path) -> Path:
    directory = _copy(tmp_path, without="tokenizer.json")
    os.mkfifo(directory / "tokenizer.json")
    return directory


def _quantized(tmp_path: Path, config: dict[str, str] | None) -> str:
    """What is said of the small GPT-OSS with this `quantization_config`."""
    directory = _copy(tmp_path, demo=GPT_OSS_DEMO, quantization_config=config)
    return _raised(lambda: gptjax.load(directory, max_length=128))


def _not_a_number(tmp_path: Path) -> str:
    """What is said of the small GPT-OSS with a scale of 255."""
    directory = _copy(tmp_path, demo=GPT_OSS_DEMO)
    name = "model.layers.0.mlp.experts.down_proj_scales"
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    file = directory / index["weight_map"][name]
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    data[8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]] = 255
    file.write_bytes(data)
    return _raised(lambda: gptjax.load(directory, max_length=128))


def _chat_command(monkeypatch: pytest.MonkeyPatch) -> str:
    """What `gptjax chat` says of a model without harmony."""
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    assert main(["chat", "Hello", "-m", "gpt2-tales"]) == 1
    return said.getvalue().removeprefix("gptjax: ")


def _used_state(lm: gptjax.LanguageModel) -> None:
    state = lm.init_state()
    lm.prefill(state, [1, 2])
    jax.block_until_ready(lm.prefill(state, [1, 2]))


def _with_beams(tmp_path: Path) -> gptjax.LanguageModel:
    directory = _copy(tmp_path)
    (directory / "generation_config.json").write_text('{"num_beams": 5}')
    return gptjax.load(directory)


def _forked(monkeypatch: pytest.MonkeyPatch) -> str:
    with monkeypatch.context() as patch:
        patch.setattr("gptjax.support.runtime._process", 1)
        return _raised(gptjax.load)


def _not_finite(lm: gptjax.LanguageModel) -> str:
    poisoned = jax.tree.map(lambda leaf: leaf, lm.params)
    poisoned["final_norm"] = {"scale": jnp.full_like(lm.params["final_norm"]["scale"], np.nan)} | {
        "bias": lm.params["final_norm"]["bias"]
    }
    broken = gptjax.LanguageModel(
        lm.model, poisoned, tokenizer=lm.tokenizer, defaults=lm.defaults, max_length=lm.max_length
    )
    completion = broken.generate("The king")
    assert completion.finish_reason == "error"
    return str(completion.error)


def _does_not_fit() -> str:
    model = registry.build(PUBLISHED["gpt2"])
    device = memory.device_memory()
    return str(memory.shortfall(model, batch=32, max_length=1024, has=2_000_000_000, device=device))


def _unknown_template(tmp_path: Path) -> gptjax.LanguageModel:
    copy = _copy(tmp_path)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    return gptjax.load(copy)


def _ran_out(lm: gptjax.LanguageModel) -> None:
    with memory.explained(lm.model, batch=1, max_length=512):
        raise MemoryError


def _hub_without_client(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    return _raised(lambda: gptjax.load("openai-community/gpt2"))


MESSAGES: dict[str, Callable[..., str]] = {
    "no such checkpoint": lambda **_: _raised(lambda: gptjax.load("gpt2-tails")),
    "no such path": lambda **_: _raised(lambda: gptjax.load("./checkpoints/gpt2")),
    "hub offline": lambda **_: _raised(lambda: gptjax.load("openai-community/gpt2")),
    "hub not installed": lambda monkeypatch, **_: _hub_without_client(monkeypatch),
    "unknown config key": lambda tmp_path, **_: _raised(lambda: gptjax.load(_copy(tmp_path, rope_theta=10000.0))),
    "settings of generation": lambda tmp_path, **_: _raised(lambda: _with_beams(tmp_path).generate("The king")),
    "unknown model type": lambda tmp_path, **_: _raised(lambda: gptjax.load(_copy(tmp_path, model_type="bert"))),
    "pickle": lambda tmp_path, **_: _raised(lambda: gptjax.load(_pickle(tmp_path))),
    "tensors missing": lambda tmp_path, **_: _raised(lambda: gptjax.load(_copy(tmp_path, n_layer=7))),
    "quantization mismatch": lambda tmp_path, **_: _quantized(tmp_path, None),
    "unknown quantization": lambda tmp_path, **_: _quantized(tmp_path, {"quant_method": "gptq"}),
    "scale 255": lambda tmp_path, **_: _not_a_number(tmp_path),
    "cannot chat": lambda lm, **_: _raised(lambda: lm.chat([{"role": "user", "content": "Hello"}])),
    "cannot chat on the command line": lambda monkeypatch, **_: _chat_command(monkeypatch),
    "unknown chat template": lambda tmp_path, **_: _raised(lambda: _unknown_template(tmp_path).chat([])),
    "truncated": lambda tmp_path, **_: _raised(lambda: gptjax.load(_truncated(tmp_path))),
    "changed": lambda tmp_path, **_: _raised(lambda: _changed(tmp_path)),
    "being written": lambda tmp_path, **_: _busy(tmp_path),
    "adapter": lambda tmp_path, **_: _raised(lambda: gptjax.load(_adapter(tmp_path))),
    "not a file": lambda tmp_path, **_: _raised(lambda: gptjax.load(_pipe(tmp_path))),
    "no tokenizer": lambda tmp_path, **_: _raised(
        lambda: gptjax.load(_copy(tmp_path, without="tokenizer.json")).generate("The king")
    ),
    "prompt too long": lambda lm, **_: _raised(lambda: lm.generate(list(range(600)))),
    "max_length too large": lambda **_: _raised(lambda: gptjax.load("gpt2-tales", max_length=1024)),
    "empty prompt": lambda lm, **_: _raised(lambda: lm.generate("")),
    "unknown option": lambda lm, **_: _raised(lambda: lm.generate("A", temprature=1)),
    "unknown dtype": lambda **_: _raised(lambda: gptjax.load("gpt2-tales", dtype="int8")),
    "not finite": lambda lm, **_: _not_finite(lm),
    "beyond float16": lambda **_: _raised(lambda: weights.cast(np.float32([1e6]), np.float16, "a weight")),
    "does not fit": lambda **_: _does_not_fit(),
    "out of memory while running": lambda lm, **_: _raised(lambda: _ran_out(lm)),
    "out of memory in JAX": lambda **_: _raised(lambda: jax.block_until_ready(jnp.zeros((1 << 50,), jnp.uint8))),
    "no GPU": lambda **_: _raised(lambda: jax.devices("gpu")),
    "forked": lambda monkeypatch, **_: _forked(monkeypatch),
    "donated": lambda lm, **_: _raised(lambda: _used_state(lm)),
}

QUOTED = {
    fence.comment.removeprefix("error: "): fence.text
    for page in PAGES
    for fence in _fences(page)
    if fence.comment.startswith("error: ")
}


def test_every_quoted_message_is_triggered():
    assert set(QUOTED) == set(MESSAGES)


@pytest.mark.parametrize("name", QUOTED)
def test_a_quoted_message_is_what_the_code_says(name, lm, tmp_path, monkeypatch):
    if name == "no GPU" and jax.default_backend() == "gpu":
        pytest.skip("there is one")
    said = _squeezed(MESSAGES[name](lm=lm, tmp_path=tmp_path, monkeypatch=monkeypatch))
    pattern = ".*".join(re.escape(_squeezed(part)) for part in QUOTED[name].split("…"))
    # A space beside a "…" may stand for nothing.
    assert re.fullmatch(pattern.replace(r"\ .*", ".*").replace(r".*\ ", ".*"), said), said


def test_options_and_variables_of_the_pages_exist():
    source = "\n".join(path.read_text() for path in (ROOT / "gptjax").rglob("*.py"))
    serve = _known()["serve"]._option_string_actions
    for page in PAGES:
        for name in re.findall(r"\bGPTJAX_[A-Z_]+\b", page.read_text()):
            option = "--" + name.removeprefix("GPTJAX_SERVE_").lower().replace("_", "-")
            assert option in serve if name.startswith("GPTJAX_SERVE_") else name in source, name
        for name in re.findall(r"`(\w*Error)`", _prose(page)):
            assert hasattr(gptjax, name) or hasattr(builtins, name), name
