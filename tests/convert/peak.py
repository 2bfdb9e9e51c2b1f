"""The memory that a conversion takes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MEMORY = """
import sys, threading, time
import convert.conversion, convert.exporting, orbax.checkpoint
{before}
def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

peaks, over = [], threading.Event()
def sample():
    while not over.is_set():
        peaks.append(resident())
        time.sleep(0.002)

baseline = resident()
thread = threading.Thread(target=sample)
thread.start()
convert.{function}({source!r}, {destination!r}, **{options!r})
over.set()
thread.join()
print(max(peaks) - baseline)
"""


def peak(source: Path, destination: Path, *, function: str = "convert", before: str = "", **options: str | None) -> int:
    """The anonymous memory that a conversion takes at its highest, in bytes, in a process of its own.

    `before` is code whose memory does not count; `options` are those of the package's `function`.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    arguments = {"source": str(source), "destination": str(destination), "function": function, "options": options}
    code = MEMORY.format(before=before, **arguments)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)
