"""Measures what loading a model takes: seconds and host memory."""

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil


@dataclasses.dataclass(frozen=True)
class Loading:
    """What loading took."""

    seconds: float
    host_bytes: int  # the most that the process's anonymous memory grew; on a CPU this includes the weights


def measure_loading(load: Callable[[], Any]) -> tuple[Any, Loading]:
    """Calls `load` and waits for the device. Returns the result and its cost, not counting the device's start-up."""
    jax.block_until_ready(jnp.zeros(1))
    done = threading.Event()
    before = peak = _anonymous()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    try:
        loaded = load()
        jax.block_until_ready(getattr(loaded, "params", loaded))
        seconds = time.perf_counter() - start
    finally:
        done.set()
        watcher.join()
    return loaded, Loading(seconds, max(peak, _anonymous()) - before)


def _anonymous() -> int:
    """Bytes of the process's memory that no file backs, if the system reports that; else of all its memory."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        status = ""
    found = [1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")]
    return found[0] if found else int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """The most bytes that the default device (on a CPU, the process) has held so far."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
