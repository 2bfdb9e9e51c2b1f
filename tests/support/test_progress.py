"""The progress bar: on a terminal, after a second, on stderr; otherwise nothing at all."""

import io
import re
import sys
import threading
import time
from collections.abc import Callable

import pytest

from gptjax.support import progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    monkeypatch.delenv("GPTJAX_NO_PROGRESS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0.05)


@pytest.fixture
def terminal(monkeypatch):
    """Puts a terminal in the place of stderr. Called in the test, since pytest puts its own there before each."""

    def put() -> _Terminal:
        stream = _Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return put


def _until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def _work(seconds: float = 0.0) -> None:
    with progress.progress("loading", 100) as advance:
        advance(100)
        time.sleep(seconds)


@pytest.mark.parametrize(
    ("total", "unit", "shown"), [(100, "B", "100/100 bytes"), (100, "layers", "100/100 layers"), (None, "B", "0:00:0")]
)
def test_long_work_on_a_terminal_shows(terminal, capsys, total, unit, shown):
    stderr = terminal()

    def text() -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", stderr.getvalue())  # without colours

    with progress.progress("loading", total, unit) as advance:
        advance(30)
        _until(lambda: "loading" in text())
        advance(70)
        _until(lambda: shown in text())
    assert capsys.readouterr().out == ""


def test_short_work_shows_nothing(terminal, monkeypatch):
    stderr = terminal()
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 600)
    _work()
    _until(lambda: not any(isinstance(thread, threading.Timer) for thread in threading.enumerate()))
    assert stderr.getvalue() == ""


def test_nothing_where_the_environment_says_so(terminal, monkeypatch):
    stderr = terminal()
    monkeypatch.setenv("GPTJAX_NO_PROGRESS", "1")
    _work(0.15)
    assert stderr.getvalue() == ""


def test_nothing_where_there_is_no_terminal(terminal, monkeypatch):
    stderr = terminal()
    monkeypatch.setattr(stderr, "isatty", lambda: False)
    _work(0.15)
    assert stderr.getvalue() == ""


def test_the_bar_ends_with_an_error(terminal):
    stderr = terminal()
    with pytest.raises(ZeroDivisionError), progress.progress("loading", 5) as advance:
        advance(1)
        _until(stderr.getvalue)
        raise ZeroDivisionError
    shown = stderr.getvalue()
    time.sleep(0.3)
    assert stderr.getvalue() == shown != ""
