"""Reads of hostile files within limits, in a process of their own: what crashes, hangs or takes much memory is seen."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
ROOM = 64 << 20  # bytes of memory beyond what the process has
SECONDS = 1  # of computing
HANGS = 10  # seconds, on a machine that is busy with something else
# A limit on addresses counts what a thread's malloc reserves (64 MB each) as if it were used.
ONE_THREAD = {"MALLOC_ARENA_MAX": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Outcome(NamedTuple):
    """What came of a read."""

    kind: str  # "read", the class of gptjax's error, or "crashed"
    said: str  # the error
    seconds: float


def attempt(read: Callable[..., object], *arguments: object) -> Outcome:
    from gptjax.errors import GptjaxError

    began = time.process_time()
    kind, said = "read", ""
    signal.setitimer(signal.ITIMER_REAL, HANGS)
    try:
        read(*arguments)
    except GptjaxError as error:
        kind, said = type(error).__name__, str(error)
    except BaseException:  # a panic of Rust's is not an Exception
        kind, said = "crashed", traceback.format_exc(limit=-4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return Outcome(kind, said, time.process_time() - began)


def limit_memory() -> None:
    """From now on, `ROOM` more than the process has."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, resource.RLIM_INFINITY))


def unlimit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def watch() -> None:
    def stop(*_: object) -> None:
        raise TimeoutError("it hangs")

    signal.signal(signal.SIGALRM, stop)


def in_a_process(module: str, *arguments: object, seconds: float = 3600) -> Any:
    """What `python -m module` prints last, as JSON."""
    quiet = {"RUST_BACKTRACE": "0"}  # of panics, which are among the outcomes
    result = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="replace",
        cwd=ROOT,
        env=os.environ | ONE_THREAD | quiet,
        timeout=seconds,
    )
    assert result.returncode == 0, (result.returncode, result.stdout[-2000:], result.stderr[-3000:])
    return json.loads(result.stdout.splitlines()[-1])
