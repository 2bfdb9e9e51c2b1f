"""From the worker's thread to the event loop."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any


class Mailbox:
    """Calls functions in the running event loop for other threads."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._calls: deque[Callable[[], Any]] = deque()
        self._woken = False

    def put(self, function: Callable[[], Any]) -> None:
        """Has a function called once the loop was woken; calls keep their order."""
        self._calls.append(function)

    def wake(self) -> None:
        """Wakes the loop, unless it is about to look; returns at once.

        Raises:
          RuntimeError: the loop was closed.
        """
        if self._woken and not self.loop.is_closed():  # `_empty` has not begun, so it will find all calls
            return
        self._woken = True
        self.loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        self._woken = False
        for _ in range(len(self._calls)):  # those that come meanwhile wake the loop again, after other work
            self._calls.popleft()()
