"""Which tokens the rows of a step may draw, found by threads while the device works."""

import os
import queue
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from gptjax.structured.matching import MOST_AT_ONCE, Matcher, words_of

_PATIENCE: Final = 0.0003  # seconds between looks at whether the device is still busy


class _Text:
    """What a request has drawn, as a place in its grammar, and what may follow.

    While `is_found` is false, the matcher and the words belong to the threads.
    """

    def __init__(self, matcher: Matcher, vocab_size: int) -> None:
        self.matcher = matcher
        self.words_W = np.empty(words_of(vocab_size), np.int32)
        self.is_found = False
        self.is_wanted = True
        self.error: BaseException | None = None


class Masks:
    """The masks of all open requests with a grammar. Belongs to one thread at a time.

    A mask is looked for as soon as the token before it is known, and it is asked for when the next plan is made. Most
    take some microseconds, and some a thousand times as long. Those that are not there in time are late: their rows
    wait for the plan after.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._texts: dict[int, _Text] = {}  # by request
        self._jobs: deque[_Text] = deque()  # which no thread has begun yet; the threads take them from the left
        self._found: queue.SimpleQueue[_Text] = queue.SimpleQueue()  # which the threads are done with
        self._most = max(2, min(MOST_AT_ONCE, (os.cpu_count() or 1) // 2))  # 2: none is in the way of all others
        self._threads = ThreadPoolExecutor(self._most, "gptjax-masks")

    def __len__(self) -> int:
        return len(self._texts)

    def __contains__(self, request: int) -> bool:
        return request in self._texts

    def add(self, request: int, matcher: Matcher) -> None:
        """Takes a request, and begins to look for its first mask."""
        self._texts[request] = _Text(matcher, self._vocab_size)
        self._look_for([request])

    def end(self, request: int) -> None:
        """Forgets a request, if it is known. A thread that is looking for its mask goes on, for nobody."""
        text = self._texts.pop(request, None)
        if text is not None:
            text.is_wanted = False

    def take(self, drawn: Iterable[tuple[int, Sequence[int]]]) -> frozenset[int]:
        """Goes on after what requests drew with their `words`, and begins to look for what may follow.

        Args:
          drawn: requests, with their tokens. Those that are not known are left out.

        Returns:
          Those that cannot go on, as their grammar did not say what they might draw.
        """
        known = [(request, token_ids) for request, token_ids in drawn if token_ids and request in self._texts]
        for request, token_ids in known:
            for token_id in token_ids:
                if token_id >= 0:
                    self._texts[request].matcher.take(token_id)
        failed = frozenset(request for request, _ in known if self._texts[request].matcher.failure is not None)
        self._look_for([request for request, _ in known])
        return failed

    def late(self, ready: Collection[int], has_time: Callable[[], bool]) -> frozenset[int]:
        """The requests whose masks are not there yet.

        It waits for those of `ready` while there is time, and as long as most of `ready` would have to wait otherwise.

        Args:
          ready: requests that decode next: also those without a grammar, whom nothing keeps.
          has_time: whether waiting costs nobody anything, as the device is busy.
        """
        self._receive()
        while late := self._missing(ready):
            if 2 * len(late) <= len(ready) and not has_time():
                break
            self._receive(_PATIENCE)
        return self._missing(self._texts)

    def words(self, request: int) -> np.ndarray:
        """What a request that is not late may draw next, int32 [W]; `take` changes it."""
        return self._texts[request].words_W

    def _missing(self, requests: Iterable[int]) -> frozenset[int]:
        texts = ((request, self._texts.get(request)) for request in requests)
        return frozenset(request for request, text in texts if text is not None and not text.is_found)

    def _look_for(self, requests: Collection[int]) -> None:
        for request in requests:
            text = self._texts[request]
            text.is_found = False
            self._jobs.append(text)
        for _ in range(min(len(requests), self._most)):
            self._threads.submit(_work, self._jobs, self._found)

    def _receive(self, patience: float = 0.0) -> None:
        """Marks the masks that have arrived. If none has, waits up to `patience` seconds for one."""
        try:
            text = self._found.get(timeout=patience) if patience else self._found.get_nowait()
            while True:
                if text.error is not None and text.is_wanted:
                    raise text.error
                text.is_found = True
                text = self._found.get_nowait()
        except queue.Empty:
            return


def _work(jobs: deque[_Text], found: "queue.SimpleQueue[_Text]") -> None:
    """Finds masks until none is left to look for."""
    while True:
        try:
            text = jobs.popleft()
        except IndexError:
            return
        try:
            text.matcher.fill(text.words_W)
        except BaseException as error:  # a panic of llguidance's is no `Exception`; the engine's thread raises it
            text.error = error
        found.put(text)
