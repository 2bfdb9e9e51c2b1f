"""Starts the process that speaks HTTP, and waits for its end."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from types import TracebackType

from gptjax.server.ipc.channel import Channel
from gptjax.server.ipc.messages import Text

_log = logging.getLogger(__name__)
# -P: a file in the current directory must not take the place of a module.
COMMAND = (sys.executable, "-P", "-m", "gptjax.server.front")


class FrontProcess:
    """The process that runs `gptjax.server.front`. It ends with this one, whatever happens to either."""

    def __init__(self, text: Text) -> None:
        """Starts it; it reads `text` and waits for `Setup`."""
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(each or os.getcwd() for each in sys.path)
        with theirs, _signals_blocked():
            self._process = subprocess.Popen(
                [*COMMAND, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": path},
            )
        self.channel = Channel(ours)
        self.channel.send(text)

    def __enter__(self) -> "FrontProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        self.channel.close()

    def wait(self) -> int:
        """Waits for its end. Returns the server's exit status, 0 or 1; what else went wrong is logged."""
        status = self._process.wait()
        if status < 0:
            _log.error("the process that speaks HTTP was ended by %s", signal.Signals(-status).name)
        elif status > 1:
            _log.error("the process that speaks HTTP ended with status %d", status)
        return min(abs(status), 1)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """A process that is started meanwhile gets no SIGINT and SIGTERM, unless it unblocks them.

    Ctrl-C goes to all processes of a terminal, and some supervisors signal all of a service. But only this process
    knows what a signal means before the server runs, and which Ctrl-C is the second.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
