"""Small valid checkpoints with random changes: the model comes out, or a named error, soon and in little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import convert
from gptjax.checkpoints import manifest
from tests.convert import made
from tests.fuzz import rounds
from tests.hostile.limits import ONE_THREAD

ROOT = Path(__file__).resolve().parents[2]

# In a process of its own: a crash, an abort and memory beyond the limit end it, and are failures of the test.
WORKER = """
import json, os, random, resource, shutil, signal, sys, time, traceback
from pathlib import Path
import convert, convert.conversion
from gptjax.checkpoints import hub, manifest, weights
from gptjax.checkpoints.checkpoint import open_path
from gptjax.config import read_config
from gptjax.errors import GptjaxError
from gptjax.models.registry import build
from gptjax.models.params import abstract_params

ROOM = 64 << 20  # bytes
VALUES = [0, -1, 1, 7, 1 << 31, 1 << 62, 1 << 63, 10 ** 400, 0.5, 1e308, float("nan"), True, None, "", "x",
          "x" * 100_000, "0000", "../../x", "\\0", "F32", "float32", [], {}, [[]], [0], [1 << 40, 1 << 40], [-1],
          {"a": 1}]

def everywhere(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from everywhere(inner, (*path, key))

def edited(rng, text):
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 3))):
        path = rng.choice(list(everywhere(value)))
        if not path:
            continue
        node = value
        for key in path[:-1]:
            node = node[key]
        kind = rng.randrange(4)
        if kind == 0:
            del node[path[-1]]
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice(["x", "shape", "dtype", "a/b", "\\ud800"])] = rng.choice(VALUES)
        else:
            node[path[-1]] = rng.choice(VALUES)
    text = json.dumps(value)
    if rng.randrange(20) == 0:
        text = text[:-1] + ', "nested": ' + "[" * 50_000 + "]" * 50_000 + text[-1]
    return text.encode()

def bent(rng, data):
    kind = rng.randrange(5)
    if kind == 0:
        return data[: rng.randrange(len(data) + 1)]
    if kind == 1:
        return data + rng.randbytes(rng.randrange(1, 100))
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 40))):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)

def changed(rng, path, data):
    if rng.randrange(3) == 0:
        return bent(rng, data)
    if path.suffix == ".json" or path.name == ".zarray":
        return edited(rng, data)
    if path.suffix == ".safetensors":
        size = int.from_bytes(data[:8], "little")
        header = edited(rng, data[8 : 8 + size])
        return len(header).to_bytes(8, "little") + header + data[8 + size :]
    return bent(rng, data)

def agree(directory, name):  # as an attacker would change the manifest with the file
    path = directory / "manifest.json"
    try:
        raw = json.loads(path.read_text())
        _, piece, file = name.split("/", 2)
        raw["pieces"][piece][file] = (directory / name).stat().st_size
        path.write_text(json.dumps(raw))
    except Exception:
        pass

def read(directory):
    hub.resolve(directory)
    config = read_config(directory)
    targets = abstract_params(build(config))
    if manifest.is_converted(directory):
        found = weights.readers(directory, weights.checked_manifest(directory, targets))
        leaves = [(path, read()) for path, read in found]
    else:
        leaves = [(path, read()) for path, read in convert.open_params(open_path(directory))]
    return {path: array.tobytes() for path, array in leaves}

def stop(*_):
    raise TimeoutError("too slow")

source, scratch, seed, count, files = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]
originals = {name: (Path(source) / name).read_bytes() for name in files}
expected = read(Path(source))
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
signal.signal(signal.SIGALRM, stop)
shutil.copytree(source, scratch)
refused = slowest = 0
for number in range(count):
    rng = random.Random(f"{seed} {number}")
    names = rng.sample(files, rng.choice((1, 1, 2)))
    for name in names:
        (scratch / name).write_bytes(changed(rng, scratch / name, originals[name]))
        if name.startswith("params/") and rng.randrange(2):
            agree(scratch, name)
            names.append("manifest.json") if "manifest.json" not in names else None
    began = time.process_time()
    signal.setitimer(signal.ITIMER_REAL, 10)
    try:
        found = read(scratch)
        # Weights of a converted directory have checksums, so they are right unless the manifest was changed, too.
        assert found == expected or "manifest.json" in names or "manifest.json" not in files, "wrong weights"
    except GptjaxError as error:
        refused += 1
        assert len(str(error)) < 20_000 or "config.json" in names, str(error)[:200]
    except BaseException:
        print("FAILED", seed, number, names)
        traceback.print_exc(limit=-4, file=sys.stdout)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    slowest = max(slowest, time.process_time() - began)
    for name in names:
        (scratch / name).write_bytes(originals[name])
print(json.dumps([refused, round(slowest, 3)]))
"""


@pytest.fixture(scope="module", params=["single", "shards", "converted"])
def directory(request, tmp_path_factory):
    """A tiny checkpoint in a layout, and the files to be changed."""
    base = tmp_path_factory.mktemp("fuzz")
    small = {"n_layer": 1, "n_embd": 12, "n_head": 2, "vocab_size": 17, "n_positions": 8}
    made.gpt2(base / "src", shards=2 if request.param == "shards" else 0, **small)
    if request.param != "converted":
        return base / "src"
    convert.convert(base / "src", base / "dst")
    assert manifest.is_converted(base / "dst")
    return base / "dst"


@pytest.mark.fuzz
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits")
def test_changed_directories(directory, tmp_path):
    files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    count = rounds(250)
    arguments = [directory, tmp_path / "scratch", 15, count, *files]
    result = subprocess.run(
        [sys.executable, "-c", WORKER, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | ONE_THREAD,
        timeout=3600,
    )
    assert result.returncode == 0, (result.returncode, result.stdout[-2000:], result.stderr[-2000:])
    assert "FAILED" not in result.stdout, result.stdout[:5000]
    refused, slowest = json.loads(result.stdout.splitlines()[-1])
    assert refused > count / 4
    assert slowest < 2  # a second, on a machine that does nothing else
