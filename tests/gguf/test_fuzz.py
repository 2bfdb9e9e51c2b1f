"""Small valid GGUF files with random changes: tensors come out, or a named error, soon and in little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pallas_kernels.formats.ggml import PACKED
from tests.fuzz import rounds
from tests.gguf import made
from tests.gguf.made import Entry
from tests.gguf.test_gguf_reading import ENTRIES, METADATA, split
from tests.hostile.limits import ONE_THREAD

ROOT = Path(__file__).resolve().parents[2]

# In a process of its own: a crash, an abort and memory beyond the limit end it, and are failures of the test.
WORKER = """
import json, os, random, resource, signal, sys, time, traceback
from pathlib import Path
import numpy as np
from gptjax.errors import CheckpointError
from gptjax.gguf import open_gguf
from tests.gguf.made import bent

ROOM = 64 << 20  # bytes
SECONDS = 1
def read(path, rng):
    source = open_gguf(path)
    if not source.tensors:
        return
    tensor = rng.choice(list(source.tensors.values()))
    with np.errstate(all="ignore"):
        array = source.read(tensor.name)
        assert array.shape == tensor.shape
        parts = list(source.slices(tensor.name, 1 + array.size // 2))
    assert b"".join(part.tobytes() for part in parts) == array.tobytes()
    assert source.packed(tensor.name).nbytes == tensor.nbytes

def write(descriptor, data):
    os.pwrite(descriptor, data, 0)
    os.truncate(descriptor, len(data))

def stop(*_):
    raise TimeoutError("too slow")

directory, seed, count, files = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]
originals = {name: (directory / name).read_bytes() for name in files}
for name in files:
    read(directory / name, random.Random(0))
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
signal.signal(signal.SIGALRM, stop)
refused, slowest = 0, 0.0
descriptors = {name: os.open(directory / name, os.O_WRONLY) for name in files}
for number in range(count):
    rng = random.Random(f"{seed} {number}")
    name = files[number // 50 % len(files)]  # in runs, because the others must be whole
    write(descriptors[name], bent(rng, originals[name]))
    began = time.process_time()
    signal.setitimer(signal.ITIMER_REAL, 10)
    try:
        read(directory / name, rng)
    except CheckpointError as error:
        refused += 1
        assert len(str(error)) < 20_000, str(error)[:200]
    except BaseException:
        print("FAILED", seed, number, name)
        traceback.print_exc(limit=-4, file=sys.stdout)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    slowest = max(slowest, time.process_time() - began)
    if number % 50 == 49:
        write(descriptors[name], originals[name])
print(json.dumps([refused, round(slowest, 3)]))
"""


@pytest.mark.fuzz
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits")
def test_changed_files(tmp_path):
    rng = np.random.default_rng(0)
    packed = {
        name: Entry(
            number, [512, 2], rng.integers(0, 120, 1024 // PACKED[name].size * PACKED[name].nbytes, np.uint8).tobytes()
        )
        for number, name in ((2, "Q4_0"), (6, "Q5_0"), (11, "Q3_K"), (12, "Q4_K"), (14, "Q6_K"), (39, "MXFP4"))
    }
    (tmp_path / "plain.gguf").write_bytes(made.file(METADATA, ENTRIES))
    (tmp_path / "packed.gguf").write_bytes(
        made.file({"general.alignment": made.number(made.U32, 64)}, packed, alignment=64)
    )
    (tmp_path / "keys.gguf").write_bytes(made.file(METADATA))
    split(tmp_path, 2)
    files = sorted(path.name for path in tmp_path.iterdir())
    count = rounds(200_000)
    result = subprocess.run(
        [sys.executable, "-c", WORKER, str(tmp_path), "17", str(count), *files],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | ONE_THREAD,
        timeout=3600,
    )
    assert result.returncode == 0, (result.returncode, result.stdout[-2000:], result.stderr[-2000:])
    assert "FAILED" not in result.stdout, result.stdout[:5000]
    refused, slowest = json.loads(result.stdout.splitlines()[-1])
    assert refused > count / 3
    assert slowest < 1
