"""How long the host may put off a dispatch before the device has nothing to do."""

import time
from collections.abc import Callable
from typing import Final

_SHARE: Final = 0.8  # of the last step: if it took longer than the device needed, the next ones take less


class Pace:
    """The times of steps, as the host sees them."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._read = clock()  # when the last step's tokens were
        self._step = 0.0  # seconds from the read before to that
        self._began = 0.0
        self._dispatch = 0.0  # seconds that the last dispatch took the host

    def begin(self) -> None:
        """A dispatch begins."""
        self._began = self._clock()

    def dispatched(self) -> None:
        """It has been made."""
        self._dispatch = self._clock() - self._began

    def read(self) -> None:
        """A step's tokens are there, so the device works on what follows them."""
        now = self._clock()
        self._read, self._step = now, now - self._read

    @property
    def has_time(self) -> bool:
        """Whether a dispatch that began a little later would still be in time."""
        return self._clock() < self._read + _SHARE * self._step - self._dispatch
