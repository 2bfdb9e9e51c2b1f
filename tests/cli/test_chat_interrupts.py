"""Ctrl-C in `gptjax chat`: within the process, and as a key in a terminal of its own."""

import contextlib
import io
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from gptjax.cli import chat
from gptjax.cli.chat_session import Piece
from tests.cli.chat_material import ROOT


class Typist:
    """The program in a terminal of its own, where Ctrl-C is a key."""

    def __init__(self, *argv: str) -> None:
        self._end, terminal = os.openpty()
        # The session's leader makes the terminal its own. Forking this process, with JAX's threads, is not safe.
        code = (
            "import fcntl, runpy, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            "runpy.run_module('gptjax', run_name='__main__', alter_sys=True)"
        )
        environment = {**os.environ, "TERM": "xterm", "GPTJAX_NO_PROGRESS": "1"}
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *argv],
            **dict.fromkeys(("stdin", "stdout", "stderr"), terminal),
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        os.close(terminal)
        self._seen = b""

    def __enter__(self) -> "Typist":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)

    def until(self, text: str, seconds: float = 120) -> str:
        """What is shown, up to and with a text."""
        end = time.monotonic() + seconds
        while text.encode() not in self._seen:
            assert time.monotonic() < end, f"no {text!r} in {self._seen!r}"
            assert self.process.poll() is None, f"ended: {self._seen!r}"
            if select.select([self._end], [], [], 0.2)[0]:
                self._seen += os.read(self._end, 4096)
        before, found, self._seen = self._seen.partition(text.encode())
        return (before + found).decode()

    def type(self, keys: str) -> None:
        time.sleep(0.2)  # a key in the moment before the line editor waits is seen with the next one
        os.write(self._end, keys.encode())


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where the tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("lost", [True, False])
def test_an_interrupt_ends_the_turn_even_where_its_exception_is_lost(lost, interruptible):
    """As in JAX's callback of the garbage collector, where Python ignores exceptions."""
    told = []

    def pieces() -> Iterator[Piece]:
        try:
            yield Piece("answer", "one")
            with contextlib.suppress(KeyboardInterrupt) if lost else contextlib.nullcontext():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            for word in (" two", " three"):
                yield Piece("answer", word)
        except KeyboardInterrupt:
            told.append(True)
            yield Piece("note", "Stopped.")

    out = io.StringIO()
    chat._show_all(pieces(), chat.Terminal(out))
    assert told == [True]
    assert out.getvalue().splitlines() == ["one", "Stopped."]
    with pytest.raises(KeyboardInterrupt):  # outside of a turn all is as it was
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_the_program_in_a_terminal(interruptible):  # whose children do not ignore Ctrl-C either
    # The most likely tale has no end, so that there is time to stop it.
    with Typist("chat", "--temperature", "0", "--max-length", "4096", "--hide-reasoning") as typist:
        assert "gpt-oss-tales, with room for 4096 tokens" in typist.until("\n> ")
        typist.type("In the morning the old king went down to the sea.\n")
        assert "\x1b[2mthinking...\x1b[0m" in typist.until("thought for")
        typist.type("\x03")
        assert "Stopped; the partial answer stays." in typist.until("\n> ")
        typist.type("/stats\n")
        assert "tokens/s" in typist.until("\n> ")
        typist.type("\x03")
        typist.until("Ctrl-C again")
        typist.until("> ")
        typist.type("/effort low\n")
        typist.until("The effort is low.")
        typist.until("> ")
        typist.type("\x04")
        assert typist.process.wait(60) == 0
