"""The prompts of one request, through the worker and back as text."""

import asyncio
import dataclasses
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

from gptjax.engine.output import Chunk, Decoder, Output
from gptjax.engine.request import Request
from gptjax.errors import GptjaxError
from gptjax.server.errors import ApiError, internal, of_failure, of_gptjax
from gptjax.server.generation.service import Service
from gptjax.server.ipc.events import Deliver, Event, Failed, Finished, QueueFull, Ticket, Tokens

_RETRY_SECONDS = 0.2
_MOST_BEHIND = 10_000  # tokens that a client may be behind; with 20 alternatives each, some 30 MB


Read = TypeVar("Read")


@dataclasses.dataclass(frozen=True)
class Row(Generic[Read]):
    """One prompt, and how its tokens are read."""

    request: Request
    decoder: Decoder | None  # turns them into text
    read: Callable[[Chunk], Read]  # called with what each token added, before the decoder gets the next


class Generation(Generic[Read]):
    """Rows on their way through the worker. `results` yields what is read; `close` must be called at the end.

    Rows for which the queue has no room wait, so that a large batch takes no more than a queue's worth at a time. If
    there is no room even for the first, the request is refused.
    """

    def __init__(self, service: Service, rows: Sequence[Row[Read]]) -> None:
        self._service = service
        self._rows = rows
        self._waiting = deque(range(len(rows)))
        self._tickets: dict[int, Ticket] = {}
        self._outputs: dict[int, Output] = {}
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._mailbox = service.mailbox()
        self._cached: dict[int, int] = {}
        self._delivered = self._taken = 0  # tokens; counted by the worker's thread and by the event loop

    def start(self) -> None:
        """Checks all rows and submits as many as there is room for. Raises `ApiError`."""
        served = self._service.served
        for row in self._rows:
            try:
                row.request.check(vocab_size=served.vocab_size, max_length=served.max_length)
            except GptjaxError as error:
                raise of_gptjax(error) from None
        try:
            self._submit()
        except GptjaxError as error:
            self.close()
            raise of_gptjax(error) from None

    def cached_tokens(self, choices: int = 1) -> int:
        """Prompt tokens that were not read again, counted for the first choice of each prompt only."""
        return sum(tokens for row, tokens in self._cached.items() if row % choices == 0)

    async def results(self) -> AsyncGenerator[tuple[int, list[Read]], None]:
        """Yields (row, what was read of each of its tokens that came together). Raises `ApiError` if a row fails."""
        while self._tickets or self._waiting:
            event = await self._next()
            if event is not None and (found := self._read(*event)) is not None:
                yield found

    def close(self) -> None:
        """Cancels unfinished rows. (A generator's own `finally` does not run if it was never started.)"""
        self._waiting.clear()
        while self._tickets:
            self._service.worker.cancel(self._tickets.popitem()[1])

    async def _next(self) -> tuple[int, Event] | None:
        """The next event; None if rows are waiting for the queue and none came for a while."""
        if not self._waiting:
            return await self._events.get()
        try:
            async with asyncio.timeout(_RETRY_SECONDS):
                return await self._events.get()
        except TimeoutError:
            self._submit_some()
            return None

    def _submit(self) -> None:
        """Submits waiting rows. Raises `Unavailable`, and `QueueFull` if none of this request is running."""
        while self._waiting:
            row = self._waiting[0]
            request = self._rows[row].request
            try:
                self._tickets[row] = self._service.worker.submit(request, self._deliver(row))
            except QueueFull:
                if self._tickets:
                    return
                raise
            self._waiting.popleft()
            self._outputs[row] = Output(
                request, max_length=self._service.served.max_length, detokenizer=self._rows[row].decoder
            )

    def _submit_some(self) -> None:
        """Submits as many waiting rows as there is room for."""
        try:
            self._submit()
        except QueueFull:
            return  # others took the room; it is tried again
        except GptjaxError as error:
            raise of_gptjax(error) from None

    def _deliver(self, row: int) -> Deliver:
        def deliver(event: Event) -> Callable[[], None]:
            if isinstance(event, Tokens):
                self._delivered += len(event.tokens)
                if self._delivered - self._taken > _MOST_BEHIND:
                    raise OverflowError("the client reads more slowly than tokens arrive")  # the worker cancels the row
            self._mailbox.put(partial(self._events.put_nowait, (row, event)))
            return self._mailbox.wake

        return deliver

    def _read(self, row: int, event: Event) -> tuple[int, list[Read]] | None:
        ended = row not in self._outputs  # its text is complete; this was already on its way
        match event:
            case Tokens():
                self._taken += len(event.tokens)
                return None if ended else (row, self._push(row, event))
            case Failed():
                del self._tickets[row]
                if not ended:
                    raise of_failure(event)
            case Finished():
                del self._tickets[row]
                if not ended:
                    raise _of_early_end(event)
                self._cached[row] = event.cached_tokens
                self._service.metrics.cached_tokens.inc(event.cached_tokens)
                self._submit_some()
        return None

    def _push(self, row: int, event: Tokens) -> list[Read]:
        """Reads tokens up to the one that completes the text: the worker does not know stop strings."""
        output, read, found = self._outputs[row], self._rows[row].read, []
        for token in event.tokens:
            chunk = output.push(token)
            found.append(read(chunk))
            if chunk.completion is not None:
                del self._outputs[row]
                self._service.metrics.completed(chunk.completion)
                self._service.worker.cancel(self._tickets[row])  # does nothing if the worker ended the row itself
                break
        self._service.metrics.tokens.inc(len(found))
        return found


def _of_early_end(finished: Finished) -> ApiError:
    if finished.reason == "cancelled":
        return ApiError(400, f"the client was {_MOST_BEHIND} tokens behind", code="too_slow")
    return internal()  # the worker disagrees about the end
