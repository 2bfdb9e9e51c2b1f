"""A worker's client, and requests for it."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from gptjax.config import GenerationDefaults
from gptjax.engine.engine import Engine
from gptjax.engine.request import Request, SamplingParams, Token
from gptjax.server.front.remote_worker import RemoteWorker
from gptjax.server.ipc.channel import Channel
from gptjax.server.ipc.events import AnyWorker, Failed, Finished, QueueFull, Tokens
from gptjax.server.ipc.messages import Setup
from gptjax.server.ipc.settings import Facts, Limits
from gptjax.server.worker import hosting
from gptjax.server.worker.worker_host import WorkerHost
from tests.engine.generated import generate

SLOTS, MAX_LENGTH, CHUNK = 4, 300, 64
PATIENCE = 120  # seconds until a test gives up
FACTS = Facts("a", GenerationDefaults(), (), 8192, 400, "F32", None)


class Reader:
    """What a client sees of one request: its tokens, one by one, and its end."""

    def __init__(self, worker: AnyWorker, request: Request, on_token=None):
        self.events = []
        self.together = []  # how many tokens came with each event
        self.ended = threading.Event()
        self.begun = threading.Event()  # the first token is there
        self._on_token = on_token
        self.worker = worker
        self.threads = set()
        self.ticket = worker.submit(request, self._deliver)

    def _deliver(self, event) -> None:
        self.threads.add(threading.current_thread().name)
        if isinstance(event, Tokens):
            self.events += event.tokens
            self.together.append(len(event.tokens))
            self.begun.set()
            if self._on_token is not None:
                self._on_token(self)
        else:
            self.events.append(event)
            self.ended.set()

    def wait(self) -> list:
        """All events, when the last has come."""
        assert self.ended.wait(PATIENCE), "the request has no end"
        return self.events

    @property
    def tokens(self) -> list[tuple]:
        return [(token.token_id, token.logprob, token.top) for token in self.events if isinstance(token, Token)]

    @property
    def end(self) -> Finished | Failed:
        return self.wait()[-1]


def until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.002)


def ids_of(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 8000, length).tolist())


def request_of(number: int, length: int, max_tokens: int = 12, stop_ids=(), **params) -> Request:
    return Request(ids_of(number, length), max_tokens, SamplingParams(**{"seed": number} | params), tuple(stop_ids))


REQUESTS = [  # all kinds of sampling, one chunk and several, short and long outputs
    request_of(1, 5, 30),
    request_of(2, 150, 40, temperature=1.0),
    request_of(3, 1, 7, temperature=0.7, top_k=9, top_p=0.9),
    request_of(4, 280, 40, temperature=1.3, min_p=0.02),  # fills its row
    request_of(5, 64, 3, repetition_penalty=1.4, presence_penalty=0.5),
    request_of(6, 65, 20, temperature=2.0, logit_bias={7: 5.0, 3: -100.0}),
    request_of(7, 300, top_logprobs=2),  # room for one token
    request_of(8, 200, 60, temperature=1.0),
    request_of(9, 128, 25, top_logprobs=5),
    request_of(10, 33, 1),
]


class Alone:
    """What requests give by themselves."""

    def __init__(self, model) -> None:
        self._model = model
        self._found = {}

    def __call__(self, request: Request) -> list[tuple]:
        """Tokens, log-probabilities and alternatives from an engine that has nothing else to do."""
        key = repr(request)
        if key not in self._found:
            engine = Engine(self._model.model, self._model.params, batch=SLOTS, max_length=MAX_LENGTH, chunk=CHUNK)
            chunks = [chunk for _, chunk in generate(engine, [request], None)]
            self._found[key] = [(chunk.token_id, chunk.logprob, tuple(chunk.top_logprobs.items())) for chunk in chunks]
        return self._found[key]


def submit(worker: AnyWorker, request: Request) -> Reader:
    """Submits, and again as long as the queue is full."""
    while True:
        try:
            return Reader(worker, request)
        except QueueFull:
            time.sleep(0.005)


@contextlib.contextmanager
def remote(
    worker: AnyWorker,
    facts,
    *,
    max_queue: int,
    score: Callable = lambda *_: [],
    prepare: Callable = lambda _: None,
) -> Iterator[RemoteWorker]:
    """A started worker as another process sees it, though it is in this one."""
    near, far = map(Channel, socket.socketpair())
    WorkerHost(worker, far, score=score, memory_in_use=lambda: 7, prepare=prepare).start()
    found = RemoteWorker(near, Setup(facts, max_queue, worker.state, 7, Limits(), {}))
    try:
        yield found
    finally:
        near.close()
        if found._thread.ident is not None:
            found._thread.join(PATIENCE)
        far.close()


@contextlib.contextmanager
def remote_of(worker: AnyWorker, model, *, max_queue: int) -> Iterator[RemoteWorker]:
    """`remote`, for the worker of a model; it reads in a thread."""
    with remote(worker, hosting.facts_of(model, "the model"), max_queue=max_queue) as found:
        found.start()
        yield found
