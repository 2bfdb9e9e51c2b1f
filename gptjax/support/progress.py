"""A progress bar in the terminal for work that takes longer than a second."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Final

Advance = Callable[[int], None]  # takes the units (bytes by default) done since the last call
Progress = Callable[[str, int | None], AbstractContextManager[Advance]]  # takes a description and a total

PATIENCE_SECONDS: Final = 1.0  # work shorter than this shows nothing


def silent(description: str, total: int | None) -> AbstractContextManager[Advance]:
    """A `Progress` that shows nothing."""
    return contextlib.nullcontext(lambda count: None)


@contextlib.contextmanager
def progress(description: str, total: int | None, unit: str = "B") -> Iterator[Advance]:
    """Shows a bar on stderr while the body runs, after the first second, and removes it at the end.

    Nothing is shown if stderr is not a terminal or the environment variable GPTJAX_NO_PROGRESS is set. Never writes to
    stdout.

        with progress("loading", total=6_230_000_000) as advance:
            advance(4096)

    Args:
      description: what is being done, in a word or two.
      total: the number of units; if None (unknown), only the time is shown.
      unit: "B" for bytes, shown as MB and MB/s; otherwise a plural noun.

    Yields:
      A callable that takes the units done since the last call.
    """
    if os.environ.get("GPTJAX_NO_PROGRESS") or not sys.stderr.isatty():
        yield lambda count: None
        return
    bar = _Bar(description, total, unit)
    try:
        yield bar.advance
    finally:
        bar.close()


class _Bar:
    """A `rich.progress.Progress` that appears late, so that quick work does not pay for its import."""

    def __init__(self, description: str, total: int | None, unit: str):
        self._description, self._total, self._unit = description, total, unit
        self._done = 0
        self._lock = threading.Lock()
        self._rich: Any = None
        self._task: Any = None
        self._closed = False
        # A timer rather than a check in `advance`, because a single long step (a compilation) must show too.
        self._timer = threading.Timer(PATIENCE_SECONDS, self._show)
        self._timer.daemon = True
        self._timer.start()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._rich is not None:
                self._rich.update(self._task, completed=self._done)

    def close(self) -> None:
        self._timer.cancel()
        with self._lock:
            self._closed = True
            if self._rich is not None:
                self._rich.stop()

    def _show(self) -> None:
        from rich import progress as rich
        from rich.console import Console

        counts: tuple[rich.ProgressColumn, ...]
        if self._total is None:
            counts = ()
        elif self._unit == "B":
            counts = (rich.DownloadColumn(), rich.TransferSpeedColumn())
        else:
            counts = (rich.MofNCompleteColumn(), rich.TextColumn(self._unit))
        with self._lock:
            if self._closed:
                return
            columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), *counts, rich.TimeElapsedColumn())
            self._rich = rich.Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._rich.add_task(self._description, total=self._total, completed=self._done)
            self._rich.start()
