"""What the routes share: the served model, limits, the worker, and who is being answered."""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from gptjax.server.errors import ApiError, unavailable
from gptjax.server.generation.mailbox import Mailbox
from gptjax.server.generation.response_store import ResponseStore
from gptjax.server.generation.served import Served
from gptjax.server.http.metrics import Metrics
from gptjax.server.ipc.events import AnyWorker, PromptScores, QueueFull
from gptjax.server.ipc.settings import Limits

_RETRY = 5  # seconds
_LOOK = 0.2  # seconds between checks whether the server is shutting down
_BODIES = 4  # of the largest size; a parsed object may be thirty times its body


@dataclasses.dataclass(frozen=True)
class Service:
    """Everything that a route needs."""

    worker: AnyWorker
    served: Served
    limits: Limits
    metrics: Metrics
    scorer: ThreadPoolExecutor = dataclasses.field(default_factory=lambda: ThreadPoolExecutor(1, "gptjax-scorer"))
    # One large body at a time: the JSON parser does not let other threads run.
    parser: ThreadPoolExecutor = dataclasses.field(default_factory=lambda: ThreadPoolExecutor(1, "gptjax-parser"))
    draining: threading.Event = dataclasses.field(default_factory=threading.Event)  # set when shutdown begins
    drained: threading.Event = dataclasses.field(default_factory=threading.Event)  # set when its time is up
    began: float = dataclasses.field(default_factory=time.monotonic)
    stored: ResponseStore = dataclasses.field(init=False)
    _places: set[object] = dataclasses.field(default_factory=set)  # reserved for requests being read
    _bodies: dict[object, int] = dataclasses.field(default_factory=dict)  # sizes of the large ones being read
    _scoring: set[object] = dataclasses.field(default_factory=set)  # answers that need scores
    _mailboxes: list[Mailbox] = dataclasses.field(default_factory=list)  # of the loop that runs, if any

    def __post_init__(self) -> None:
        limits = self.limits
        store = ResponseStore(limits.stored_responses, limits.stored_bytes, limits.stored_conversation)
        object.__setattr__(self, "stored", store)  # the service is frozen

    @contextlib.contextmanager
    def body(self) -> Iterator[Callable[[int], None]]:
        """Yields a function to call with a growing body's size; it raises `ApiError` if all together are too large."""
        key = object()

        def grow(size: int) -> None:
            self._bodies[key] = size
            if sum(self._bodies.values()) > _BODIES * self.limits.body_bytes:
                message = "too many large bodies are being read; try again later"
                headers = {"Retry-After": str(_RETRY), "Connection": "close"}
                raise ApiError(429, message, kind="rate_limit_error", code="queue_full", headers=headers)

        try:
            yield grow
        finally:
            self._bodies.pop(key, None)

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Reserves a place in the worker's queue while a request is read. Raises `QueueFull` and `Unavailable`."""
        self.worker.check_room(len(self._places))
        place = object()
        self._places.add(place)
        try:
            yield
        finally:
            self._places.remove(place)

    def mailbox(self) -> Mailbox:
        """What wakes the running event loop."""
        if not self._mailboxes or self._mailboxes[0].loop is not asyncio.get_running_loop():
            self._mailboxes[:] = [Mailbox()]
        return self._mailboxes[0]

    def enter_scoring(self, answer: object) -> None:
        """Registers an answer that needs scores of its prompts. Raises `QueueFull` if there are too many."""
        if len(self._scoring) >= self.limits.scoring:
            raise QueueFull(len(self._scoring), _RETRY)
        self._scoring.add(answer)

    def leave_scoring(self, answer: object) -> None:
        """Unregisters the answer, if it was registered."""
        self._scoring.discard(answer)

    async def score(self, prompt_ids: Sequence[int], num_top: int) -> PromptScores:
        """Scores a prompt. Only one is scored at a time, since each takes device memory in addition to the worker's.

        A score that has begun is completed, even if nobody waits for it any more, before the next begins.

        Raises:
          ApiError: 503, the server is shutting down and had no time left for it.
        """
        loop = asyncio.get_running_loop()
        scoring = loop.run_in_executor(self.scorer, self.served.score, prompt_ids, num_top)
        while not (await asyncio.wait({scoring}, timeout=_LOOK))[0]:
            if self.drained.is_set():
                scoring.cancel()
                raise unavailable("the server is shutting down and had no time left to score the prompt", "drained")
        return scoring.result()

    def drain(self, seconds: float) -> None:
        """Refuses new requests. Open ones fail if they have not finished within `seconds`."""
        until = time.monotonic() + seconds
        self.worker.drain(seconds)
        while self._scoring and time.monotonic() < until:
            time.sleep(_LOOK)
        self.drained.set()
