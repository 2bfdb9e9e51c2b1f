"""Whatever takes the place of a file, and whatever a checkpoint's name is: a named error, at once, in little memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import convert
from gptjax.checkpoints.safetensors import open_directory
from tests.convert import made
from tests.hostile.limits import ONE_THREAD

ROOT = Path(__file__).resolve().parents[2]

# In a process of its own: what hangs is killed, what takes memory without end dies of it, and both are failures here.
WORKER = """
import json, os, resource, shutil, signal, socket, sys
from pathlib import Path
import convert, convert.conversion, gptjax
from gptjax.checkpoints import hub
from gptjax.checkpoints.manifest import is_converted
from gptjax.diagnostics import info, perplexity
from gptjax.config import read_config
from gptjax.errors import GptjaxError

ROOM, SECONDS = 1 << 30, 5
os.environ["HF_HUB_CACHE"] = sys.argv[2]

def special(path, kind):
    if path.is_symlink() or path.exists():
        path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "circle":
        path.symlink_to(path.name)
    elif kind == "link to nothing":
        path.symlink_to("nowhere")
    elif kind == "terabyte":
        path.touch()
        os.truncate(path, 1 << 40)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket may have 108 bytes
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
        os.chdir(here)

def attempt(task):
    def stop(*_):
        raise TimeoutError("it hung")
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        task()
        return "done"
    except GptjaxError as error:
        return "refused: " + str(error)
    except BaseException as error:
        return f"{type(error).__name__}: {error!r}"[:300]
    finally:
        signal.alarm(0)

def limit():
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
"""

FILES = (
    WORKER
    + """
base = Path(sys.argv[1])
out = base / "out"
gptjax.load(base / "json")  # what JAX takes for itself
limit()
for layout, name, kind in json.load(sys.stdin):
    directory = base / "case"
    shutil.copytree(base / layout, directory, copy_function=os.link)
    special(directory / name, kind)
    tasks = {
        "load": lambda: gptjax.load(directory),
        "info": lambda: info.describe(directory),
        "convert": lambda: convert.convert(directory, out),
        "is_converted": lambda: is_converted(directory),
    }
    results = {task: attempt(run) for task, run in tasks.items()}
    print(json.dumps([layout, name, kind, results, out.exists()]), flush=True)
    shutil.rmtree(directory)
    shutil.rmtree(out, ignore_errors=True)
"""
)
KINDS = ["pipe", "endless", "circle", "link to nothing", "terabyte", "directory", "socket"]
NAMES = {
    "json": [
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"),
        *("special_tokens_map.json", "added_tokens.json", "manifest.json"),
    ],
    "pair": ["vocab.json", "merges.txt"],
    "shards": ["model.safetensors.index.json", "model-00001-of-00002.safetensors"],
    "adapter": ["adapter_config.json", "adapter_model.safetensors"],
    "converted": [
        "manifest.json",
        "config.json",
        "params/0000/final_norm.bias/.zarray",
        "params/0000/final_norm.bias/0",
    ],
}


def _run(code: str, arguments: list[Path], given: object) -> list:
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | ONE_THREAD,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def layouts(demo, tmp_path_factory):
    """A checkpoint in each layout whose files are read."""
    base = tmp_path_factory.mktemp("layouts")
    shutil.copytree(demo, base / "json")
    shutil.copytree(demo, base / "pair", ignore=shutil.ignore_patterns("tokenizer*"))
    model = json.loads((demo / "tokenizer.json").read_text())["model"]
    (base / "pair" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    (base / "pair" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    shutil.copytree(demo, base / "shards", ignore=shutil.ignore_patterns("*.safetensors"))
    source = open_directory(demo)
    made.write_sharded(base / "shards", {name: source.read(name) for name in source.tensors})
    convert.convert(demo, base / "converted")
    (base / "adapter").mkdir()
    for name in NAMES["adapter"]:
        (base / "adapter" / name).write_text("{}")
    return base


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's files")
def test_special_files_are_named_at_once(layouts, tmp_path):
    cases = [(layout, name, kind) for layout, names in NAMES.items() for name in names for kind in KINDS]
    found = _run(FILES, [layouts, tmp_path], cases)
    assert len(found) == len(cases)
    for layout, name, kind, results, written in found:
        case = f"{layout}/{name} as {kind}: {results}"
        for task, result in results.items():
            assert result == "done" or result.startswith("refused: "), f"{task}, {case}"
            assert len(result) < 2000, case
            if result.startswith("refused: ") and task != "load":
                assert Path(name).name in result or layout in ("converted", "adapter"), f"{task}, {case}"
        assert results["convert"].startswith("refused: "), case  # it reads all of them
        assert not written, case
        if name not in ("special_tokens_map.json", "added_tokens.json"):
            assert results["load"].startswith("refused: "), case


USABLE = ("\x1b[2J", "x@../../y")  # as the name of a new directory

NAMED = (
    WORKER
    + """
base = Path(sys.argv[1])
tasks = {
    "load": gptjax.load,
    "load, as a path": lambda name: gptjax.load(Path(name)),
    "tokenizer": lambda name: gptjax.load("gpt2-tales", tokenizer=name),
    "info": info.describe,
    "is_converted": lambda name: is_converted(Path(name)),
    "convert from": lambda name: convert.convert(name, base / "out"),
    "convert to": lambda name: convert.convert(hub.DEMOS / "gpt2-tales", name),
    "replace": lambda name: convert.convert(hub.DEMOS / "gpt2-tales", name, overwrite=True),
    "text": perplexity.read,
}
gptjax.load()
limit()
os.chdir(base)
for name in json.load(sys.stdin):
    print(json.dumps([name[:50], {task: attempt(lambda: run(name)) for task, run in tasks.items()}]))
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's files")
def test_names_that_cannot_be_used_are_told(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "circle").symlink_to("circle")
    (base / "a").symlink_to("b")
    (base / "b").symlink_to("a")
    names = [
        *("", "x" * 5000, "x/" * 2500, "x" * 1_000_000, "\ud800", "a/\udfff/b", "\udc80", "\0", "a\0b", "circle"),
        *("circle/x", "a", "~no-such-user/x", "/dev/zero", "/dev/null", "/dev/null/x", "/proc/self/mem", "\x1b[2J"),
        *("owner/" + "n" * 300, "..", "/", "x@" + "r" * 300, "x@../../y"),
    ]
    found = _run(NAMED, [base, tmp_path / "cache"], names)
    assert len(found) == len(names)
    for name, results in found:
        for task, result in results.items():
            fine = result.startswith("refused: ") or (task == "is_converted" and result == "done")
            fine = fine or (task in ("convert to", "replace") and name in USABLE)
            assert fine, f"{task} {name!r}: {result}"
            assert len(result) < 2000 and "\x1b" not in result, f"{task} {name!r}: {result}"
