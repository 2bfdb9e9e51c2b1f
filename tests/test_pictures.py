"""The pictures of docs/: they are those of the scripts that draw them, and what diagrams name exists."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gptjax.cli import main
from gptjax.config import PUBLISHED, GptOssConfig

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
PAGE = (ROOT / "docs" / "pictures.md").read_text()
DIAGRAMS = re.findall(r"^```mermaid\n(.*?)^```$", PAGE, flags=re.M | re.S)


@pytest.mark.thorough
def test_the_drawings_are_those_of_the_code(tmp_path):
    """They are drawn by running it: masks, what lies where in the cache, and the shapes of every stage of a block."""
    subprocess.run([sys.executable, ROOT / "docs" / "drawings", tmp_path], check=True, cwd=ROOT)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_text() for path in IMAGES.glob("*.svg") if path.name != "speed.svg"}


def test_every_picture_is_small_and_shown():
    pages = "".join(path.read_text() for path in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
    for path in IMAGES.iterdir():
        assert path.stat().st_size < 100_000, path
        assert f"images/{path.name})" in pages


def test_what_diagrams_name_exists():
    code = "\n".join(
        path.read_text()
        for package in ("gptjax", "pallas_kernels", "convert")
        for path in (ROOT / package).rglob("*.py")
    )
    assert len(DIAGRAMS) == 3
    steps, words = set(), set()
    for diagram in DIAGRAMS:
        steps |= set(re.findall(r'\["(\w+)[:.]', diagram))  # as in `["resolve: ...`
        steps |= set(re.findall(r"(\w+)\(\w*(?:, \w+)*\)", diagram))  # as in `submit(request)`
        words |= set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", diagram))
    assert len(steps) > 20 and len(words) > 5
    for name in steps:
        assert re.search(rf"^\s*(?:def|class|async def) {name}\b", code, flags=re.M), name
    for name in words:
        assert re.search(rf"\b{name}\b", code), name


def test_the_table_of_sizes_is_that_of_the_configurations():
    rows = re.findall(r"^\| ((?:GPT|gpt)-\S+(?: 124M)?) \| (.*) \|$", PAGE, flags=re.M)
    assert len(rows) == 3
    for name, cells in rows:
        config = PUBLISHED["gpt2" if name == "GPT-2 124M" else name]
        sizes = [config.num_layers, config.width, config.num_heads, config.num_kv_heads, config.head_width]
        experts = (config.num_experts, config.experts_per_token) if isinstance(config, GptOssConfig) else ("", "")
        sizes += [config.mlp_width, *experts, config.vocab_size]
        assert [cell.strip() for cell in cells.split("|")] == [str(size) for size in sizes]


# The plot of speed


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    """docs/speed.py."""
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("speed", ROOT / "docs" / "speed.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.thorough
def test_the_plot_is_made_from_what_bench_prints(speed, tmp_path, capsys):
    asked = ["gpt2-tales", "--batch", "1", "2", "--prompt-length", "8", "--steps", "2", "--repeats", "2"]
    assert main(["bench", *asked, "--json"]) == 0
    file = tmp_path / "measured.json"
    file.write_text(capsys.readouterr().out)
    points = speed.read([file])
    run = json.loads(file.read_text())
    for point, result in zip(points, run["results"], strict=True):
        expected = run["ceiling_bytes_per_second"] / result["bytes_per_step"] * result["batch"]
        assert speed.ceiling(point) == pytest.approx(expected)
    ((name, engine),) = speed.lines(points)
    assert name == "gpt2-tales, float32, prompt of 8" and engine == "gptjax"
    speed.draw(points, tmp_path / "speed.svg")
    first = (tmp_path / "speed.svg").read_bytes()
    speed.draw(points, tmp_path / "speed.svg")
    assert (tmp_path / "speed.svg").read_bytes() == first
    other = [{**point, "device": "another", "engine": "transformers", "share_of_ceiling": None} for point in points]
    speed.draw([*points, *other], tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": "a", "device": "b", "dtype": "c", "results": [{}]}'])
def test_a_file_of_something_else_is_named(speed, tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(SystemExit, match=r"other\.json is not what"):
        speed.read([tmp_path / "other.json"])
