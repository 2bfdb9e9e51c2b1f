"""From the worker's thread to the event loop."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any


class Mailbox:
    """Calls functions in the running event loop for other threads. Calls that come together wake the loop once."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._calls: deque[Callable[[], Any]] = deque()
        self._woken = False

    def call(self, function: Callable[[], Any]) -> None:
        """Calls a function soon; returns at once. Calls keep their order.

        Raises:
          RuntimeError: the loop was closed.
        """
        self._calls.append(function)
        if self._woken and not self.loop.is_closed():  # `_empty` has not begun, so it will find this call
            return
        self._woken = True
        self.loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        self._woken = False
        for _ in range(len(self._calls)):  # those that come meanwhile wake the loop again, after other work
            self._calls.popleft()()
