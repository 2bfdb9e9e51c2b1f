"""The progress bar: on a terminal, after a second, on stderr; otherwise nothing at all."""

import io
import re
import sys
import time

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


def _work(seconds: float, total: int | None = 100, unit: str = "B") -> None:
    with progress.progress("loading", total, unit) as advance:
        advance(30)
        time.sleep(seconds)
        advance(70)
        time.sleep(seconds and 0.15)


@pytest.mark.parametrize(
    ("total", "unit", "shown"), [(100, "B", "100/100 bytes"), (100, "layers", "100/100 layers"), (None, "B", "0:00:0")]
)
def test_long_work_on_a_terminal_shows(terminal, capsys, total, unit, shown):
    stderr = terminal()
    _work(0.25, total, unit)
    text = re.sub(r"\x1b\[[0-9;]*m", "", stderr.getvalue())  # without colours
    assert "loading" in text and shown in text
    assert capsys.readouterr().out == ""


def test_short_work_shows_nothing(terminal, monkeypatch):
    stderr = terminal()
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0.5)
    _work(0)
    time.sleep(0.7)
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
        time.sleep(0.15)
        raise ZeroDivisionError
    shown = stderr.getvalue()
    time.sleep(0.3)
    assert stderr.getvalue() == shown != ""
