"""What the routes share: facts about the model, limits, the worker."""

import asyncio
import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from gptjax.errors import GptjaxError
from gptjax.server.errors import ApiError, as_json, bad_request, unavailable
from gptjax.server.events import AnyWorker, PromptScores, QueueFull
from gptjax.server.mailbox import Mailbox
from gptjax.server.metrics import Metrics
from gptjax.server.response_store import ResponseStore
from gptjax.server.settings import Facts, Limits
from gptjax.text import Tokenizer
from gptjax.text.bounded import Bounds
from gptjax.text.chat_formats import ChatFormat

_RETRY = 5  # seconds
_LOOK = 0.2  # seconds between checks whether the server is shutting down
_BODIES = 4  # of the largest size; a parsed object may be thirty times its body


@dataclasses.dataclass(frozen=True)
class Served(Facts):
    """The served model, and what is done with it here."""

    tokenizer: Tokenizer | None  # None: only token ids can be sent
    chat_format: ChatFormat | GptjaxError  # an error says why it cannot chat
    score: Callable[[Sequence[int], int], PromptScores]  # (prompt ids, number of alternatives); blocks
    memory_in_use: Callable[[], int]  # bytes on the device
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def text(self) -> Tokenizer:
        """The tokenizer. Raises `ApiError` if there is none."""
        if self.tokenizer is None:
            raise bad_request(f"the model {self.name!r} has no tokenizer: send a prompt of token ids", "prompt")
        return self.tokenizer

    def chat(self) -> ChatFormat:
        """How conversations are written. Raises `ApiError` for a model that cannot chat."""
        if isinstance(self.chat_format, GptjaxError):
            message = f"the model {self.name!r} is not a chat model, so use /v1/completions: {self.chat_format}"
            raise bad_request(message, "model", "model_not_chat")
        return self.chat_format

    def check_size(self, texts: object, param: str) -> None:
        """Raises `ApiError` if strings, in lists and objects, cannot fit: megabytes take a minute to encode."""
        characters, least = self.least_tokens(texts)
        if least > self.max_length:
            message = f"the prompt has {characters} characters, at least {least} tokens, but max_length is "
            raise bad_request(f"{message}{self.max_length}: shorten it", param, "context_length_exceeded")

    def least_tokens(self, texts: object) -> tuple[int, int]:
        """The characters of strings, in lists and objects, and the tokens that they have at least."""
        assert self.tokenizer is not None  # the caller has checked
        characters, left = 0, [texts]
        while left:
            value = left.pop()
            if isinstance(value, str):
                characters += len(value)
            elif isinstance(value, list | dict):
                left += value.values() if isinstance(value, dict) else value
        return characters, characters // self.tokenizer.longest_token

    def encode(self, text: str, *, special: bool) -> list[int]:
        """The ids of a prompt. Raises `ApiError` or `CapacityError` if it cannot fit, without encoding all of it."""
        tokenizer = self.text()
        self.check_size(text, "prompt")
        encode = functools.partial(tokenizer.encode, special=special)
        return tokenizer.prompt(Bounds(encode, self.max_length).joined(text), special=special)

    def turn_ends(self) -> tuple[int, ...]:
        """The tokens that end a turn of a conversation."""
        return tuple(dict.fromkeys((*self.eos_ids, *self.chat().stop_ids(self.text()))))

    def check_name(self, name: str | None) -> None:
        """Raises `ApiError` for another model's name; None means this one."""
        if name not in (None, self.name) and not any(_stands_for(alias, name) for alias in self.aliases):
            raise ApiError(
                404,
                f"unknown model {as_json(name)}; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )


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


def _stands_for(alias: str, name: str) -> bool:
    return name.startswith(alias[:-1]) if alias.endswith("*") else name == alias
