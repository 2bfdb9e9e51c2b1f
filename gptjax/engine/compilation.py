"""Compiles programs ahead of their first call, in threads, as XLA works without Python's lock."""

import logging
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any, Self

from jax.errors import JaxRuntimeError

from gptjax.engine.executables import Lowered

_log = logging.getLogger(__name__)
_MOST_COMPILED = 16  # programs at a time; on a GPU, XLA tries out products for each


class Compilation:
    """Compiles programs, several at a time."""

    def __init__(self, threads: int = _MOST_COMPILED) -> None:
        self._threads = ThreadPoolExecutor(min(threads, os.cpu_count() or 1), "gptjax-compilation")
        self.compiled: list[Future[Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        """Waits for all programs. One that failed is left to the call, which compiles it alone, with all the memory."""
        if failed is None:
            wait(self.compiled)
        self._threads.shutdown(cancel_futures=True)

    def __call__(self, lowered: Lowered) -> Any:
        """Begins to compile a program. Returns the shapes and dtypes of what it returns."""
        self.compiled.append(self._threads.submit(lowered.compile))
        return lowered.out_info

    def cancel(self) -> None:
        """Drops what is not being compiled yet, and waits for nothing."""
        self._threads.shutdown(cancel_futures=True, wait=False)


class Later:
    """Compiles parts of what there is in threads, while the rest is in use.

    Each part is traced and lowered in its turn, and compiled beside the others.
    """

    def __init__(self, parts: Iterable[tuple[Callable[[Compilation], None], Callable[[], None]]]) -> None:
        """Begins.

        Args:
          parts: of each, what calls its programs with the `Compilation` that compiles them, and what to do once all of
            them have been compiled. If one of them fails, that is not done.
        """
        self._stopped = False
        # Half of the processors are left to what runs meanwhile.
        self._compilation = Compilation(max(1, (os.cpu_count() or 1) // 2))
        self._thread = threading.Thread(target=self._run, args=(list(parts),), name="gptjax-lowering")
        self._thread.start()

    def stop(self) -> None:
        """Begins nothing more. What XLA is compiling cannot be stopped."""
        self._stopped = True
        self._compilation.cancel()

    def wait(self) -> bool:
        """Waits until all is compiled. Returns whether it is: not if it was stopped, or something failed."""
        self._thread.join()
        return not self._stopped and all(map(_succeeds, self._compilation.compiled))

    def _run(self, parts: list[tuple[Callable[[Compilation], None], Callable[[], None]]]) -> None:
        try:
            for lower, done in parts:
                if self._stopped:
                    return
                before = len(self._compilation.compiled)
                lower(self._compilation)
                _when_all_are_done(self._compilation.compiled[before:], done)
            for each in self._compilation.compiled:
                _succeeds(each)
        except JaxRuntimeError as error:  # such as no memory for the arrays that a program is lowered for
            self._stopped = True
            _log.warning(
                "nothing more is compiled ahead, so larger programs stay in use: %s", str(error).partition("\n")[0]
            )
        except RuntimeError:  # nothing can be submitted any more
            if not self._stopped:
                raise
        finally:
            self._compilation.cancel()


def _succeeds(compiled: Future[Any]) -> bool:
    """Waits for a program, and returns whether it is there. (`futures.wait` never returns if one is cancelled.)"""
    try:
        return compiled.exception() is None
    except CancelledError:
        return False


def _when_all_are_done(compiled: list[Future[Any]], then: Callable[[], None]) -> None:
    """Calls `then` in the thread of the last one, unless one fails."""
    lock, left = threading.Lock(), len(compiled)

    def one_is(done: Future[Any]) -> None:
        nonlocal left
        if not _succeeds(done):
            return
        with lock:
            left -= 1
            last = not left
        if last:
            then()

    for each in compiled:
        each.add_done_callback(one_is)
