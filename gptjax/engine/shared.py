"""One engine for all generations of a model, from any threads, that is kept from one to the next."""

import dataclasses
import threading
from collections.abc import Callable, Generator, Sequence

from gptjax.engine.engine import Engine, free_locals
from gptjax.engine.limits import MemoryLimit
from gptjax.engine.memory import explained
from gptjax.engine.output import Chunk, Decoder, Output
from gptjax.engine.pool_sizes import pools
from gptjax.engine.pools import default_policy
from gptjax.engine.request import Request, Token
from gptjax.errors import CapacityError
from gptjax.models.params import Params
from gptjax.models.registry import Model
from gptjax.scheduling.policy import Policy
from gptjax.structured.matching import Compiler

_MOST_ROWS = 32  # of one generation, and of all together, if `max_batch` is not given
_AHEAD = 4  # tokens that a request gets before anybody waits for them
_PATIENCE = 1.0  # seconds after which a thread that waits for another one looks again


@dataclasses.dataclass(eq=False)
class _Asked:
    """A request of a generation."""

    generation: "Generation"
    index: int
    request: Request
    tokens: list[Token] = dataclasses.field(default_factory=list)  # so far
    taken: int = 0  # of these, by the generation
    ended: bool = False
    fits: bool = False  # the engine was made large enough for it
    number: int | None = None  # in the engine, if it is there
    held: bool = False  # in the engine

    def is_complete(self, max_length: int) -> bool:
        """Whether the engine has no more tokens for it."""
        drawn = len(self.tokens)
        return drawn == self.request.room(max_length) or (drawn > 0 and self.tokens[-1].token_id < 0)


class Generation:
    """Requests that somebody waits for together. Belongs to one thread at a time."""

    def __init__(self, rows: int):
        self.rows = rows  # of its decode calls, and the most of its requests that run at once
        self.waits = False
        self.error: CapacityError | None = None  # why it cannot run
        self._asked: dict[int, _Asked] = {}

    def add(self, index: int, request: Request) -> _Asked:
        """Adds a request. To run it, use `SharedEngine.add`."""
        self._asked[index] = asked = _Asked(self, index, request)
        return asked

    def end(self, index: int) -> None:
        """The caller wants no more tokens of a request. Also works while Python collects garbage in any thread."""
        self._asked.pop(index).ended = True

    def close(self) -> None:
        """The caller wants no more tokens."""
        for index in list(self._asked):
            self.end(index)

    def next(self) -> tuple[int, Token] | None:
        """The next token of any of its requests, if one is there."""
        if self.error is not None:
            raise self.error
        for asked in self._asked.values():
            if asked.taken < len(asked.tokens):
                asked.taken += 1
                return asked.index, asked.tokens[asked.taken - 1]
        return None


class SharedEngine:
    """Runs any number of generations on one engine, which is made by the first and kept, with the prefixes it holds.

    Whoever waits for a token makes the engine step, for all that wait: one thread at a time, while the others wait for
    it. A request that nobody waits for gets `_AHEAD` tokens and is then held, so a stream that was left takes nothing
    from others, not even slots and pages.

    With `max_batch`, each decode call computes as many rows, rounded up to a multiple of the mesh's axis `data`.
    Otherwise a generation's decode calls have as many rows as it has prompts, rounded up to a power of two (for each
    part of that axis), whatever else runs. So results do not depend on other generations. The engine then has slots and
    pages for all open generations. If they need more than it has, it is freed, and replaced by a larger one. If that
    does not fit, they take turns, and no larger one is tried until `release`.

    An engine that failed, was interrupted or replaced loses its pages. What is open goes on in the next one: prompts
    are read again, and tokens drawn so far are decoded again.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_length: int,
        max_batch: int | None,
        exact: bool = True,
        memory_limit: MemoryLimit | None = None,
        compiler: Compiler | None = None,
    ):
        """Allocates nothing yet. For `exact` and `memory_limit` see `load`, for `compiler` `Engine`."""
        self._model = model
        self._max_length = max_length
        self._max_batch = max_batch and self._whole(max_batch)
        self._exact = exact
        self._memory_limit = memory_limit
        self._compiler = compiler
        self._changed = threading.Condition()  # guards the next two, and is notified of tokens
        self._leader: Generation | None = None  # whose thread makes the engine step
        self._closed = False
        self._open: list[_Asked] = []  # oldest first; any thread may append to it
        # Only the leader uses these, or who has the condition while there is none.
        self._engine: Engine | None = None
        self._most_rows = self._all_rows  # so far, an engine of more did not fit
        self._numbers: dict[int, _Asked] = {}

    @property
    def _all_rows(self) -> int:
        """The most rows of an engine, if memory allows them."""
        return self._max_batch or self._rows_for(_MOST_ROWS)

    def _whole(self, rows: int) -> int:
        """The least number of rows that is not less and divides into parts of a mesh."""
        return self._model.own.rows_parts * self._model.own.rows_of(rows)

    def _rows_for(self, rows: int) -> int:
        """The same for parts that are powers of two."""
        return self._model.own.rows_parts * _power(self._model.own.rows_of(rows))

    def begin(self, prompts: int) -> Generation:
        """A generation of a number of prompts."""
        return Generation(self._max_batch or min(self._rows_for(prompts), self._all_rows))

    def add(self, generation: Generation, index: int, request: Request) -> None:
        """Adds a checked request with a seed to a generation."""
        self._open.append(generation.add(index, request))

    def take(self, generation: Generation, params: Callable[[], Params]) -> tuple[int, Token]:
        """Waits for the next token of a generation that has open requests. Returns the request's index, too.

        Args:
          params: gives the weights, or raises an error if the model was closed.

        Raises:
          CapacityError: it does not fit into memory.
        """
        generation.waits = True
        try:
            while True:
                with self._changed:
                    while (token := generation.next()) is None and self._leader is not None:
                        self._changed.wait(_PATIENCE)
                    if token is not None:
                        return token
                    self._leader = generation
                self._step(params)
                self._resign(generation)
                params()
        finally:
            generation.waits = False
            self._resign(generation)

    def release(self) -> bool:
        """Frees the engine if no generation is open. Returns whether it did."""
        with self._changed:
            idle = self._leader is None and all(asked.ended for asked in self._open)
            released = idle and self._engine is not None
            if idle:
                self._drop()
                self._most_rows = self._all_rows
        return released

    def close(self) -> None:
        """Frees the engine, at once or after the step that another thread is in."""
        with self._changed:
            self._closed = True
            if self._leader is None:
                self._drop()

    def _resign(self, generation: Generation) -> None:
        with self._changed:
            if self._leader is generation:
                if self._closed:
                    self._drop()
                self._leader = None
            self._changed.notify_all()

    def _step(self, params: Callable[[], Params]) -> None:
        try:
            self._update(params)
            if self._engine is None:  # what was asked for does not fit
                return
            for token in self._engine.step():
                self._numbers[token.request].tokens.append(token)
        except BaseException as error:  # an interrupt, too: it may have come in the middle of anything
            free_locals(error)
            self._drop()
            params()  # if the model was closed meanwhile, that is the reason
            raise

    def _update(self, params: Callable[[], Params]) -> None:
        """Brings the engine up to date with what is asked for."""
        for number, asked in list(self._numbers.items()):
            # One with all its tokens would keep a slot from others until somebody takes them.
            if self._engine is not None and (asked.ended or asked.is_complete(self._max_length)):
                del self._numbers[number]
                self._engine.end(number)
                asked.number = None
        for asked in [each for each in self._open if each.ended]:
            self._open.remove(asked)
        still_open = list(self._open)
        if self._engine is None or not all(asked.fits for asked in still_open):
            still_open = self._fitted(still_open, params)
        if self._engine is None:
            return
        for asked in still_open:
            if asked.number is None and not asked.is_complete(self._max_length):
                drawn = [token.token_id for token in asked.tokens]
                rows = self._model.own.rows_of(asked.generation.rows)
                asked.number = self._engine.add(asked.request, rows=rows, drawn=drawn)
                asked.held = False
                self._numbers[asked.number] = asked
        for number, asked in self._numbers.items():
            held = not asked.generation.waits and len(asked.tokens) - asked.taken >= _AHEAD
            if held != asked.held:
                self._engine.hold(number, held)
                asked.held = held

    def _fitted(self, asked: list[_Asked], params: Callable[[], Params]) -> list[_Asked]:
        """Makes the engine large enough. Returns the requests that it has room for; the others get an error."""
        try:
            self._fit(asked, params)
        except CapacityError as error:
            late = [each for each in asked if not each.fits]
            if not late:
                raise
            for each in late:  # there was room for those before
                each.generation.error = error
                self._open.remove(each)
            asked = [each for each in asked if each.fits]
            self._fit(asked, params)
        for each in asked:
            each.fits = True
        return asked

    def _fit(self, asked: list[_Asked], params: Callable[[], Params]) -> None:
        """Makes the engine large enough for all generations, or as large as fits into memory, but at least for each by
        itself. An engine that exists is kept if no larger one fits."""
        rows = [generation.rows for generation in {each.generation for each in asked}]
        if not rows:
            return
        least = max(rows)
        size = max(least, min(self._max_batch or self._rows_for(sum(rows)), self._most_rows))
        if self._engine is not None:
            if self._engine.batch >= size:
                return
            self._engine.wait()  # a GPU frees an array once the steps that use it are done
        self._drop()
        while self._engine is None:
            try:
                self._engine = self._made(size, params())
            except CapacityError as error:
                free_locals(error)
                self._most_rows = self._whole(size // 2)
                if size == least:
                    raise
                size = max(least, self._most_rows)

    def policy(self, batch: int) -> Policy:
        """That of an engine of a number of rows."""
        policy = default_policy(self._model, slots=batch, reuse=True, exact=self._exact)
        if self._max_batch or (policy.packed and policy.smallest_rows == 1):
            return policy
        # Bits depend on the rows, or on whether they are few: a generation keeps its own number if the engine grows.
        return dataclasses.replace(policy, rows="asked", smallest_rows=1)

    def _made(self, batch: int, params: Params) -> Engine:
        """Makes an engine of `batch` rows. Raises `CapacityError` if it does not fit into memory."""
        policy = self.policy(batch)
        pages = pools(self._model, max_length=self._max_length, policy=policy, limit=self._memory_limit)
        with explained(self._model, batch=batch, max_length=self._max_length):
            return Engine(
                self._model,
                params,
                batch=batch,
                max_length=self._max_length,
                policy=policy,
                pages=pages,
                compiler=self._compiler,
            )

    def _drop(self) -> None:
        """Frees the engine."""
        self._engine = None
        self._numbers = {}
        for asked in self._open:
            asked.number = None


def generate(
    engine: SharedEngine,
    requests: Sequence[Request],
    detokenizer: Callable[[], Decoder] | None,
    *,
    max_length: int,
    params: Callable[[], Params],
) -> Generator[tuple[int, Chunk]]:
    """Yields (request number, chunk), token by token, until every request has ended.

    At most as many run at once as the generation has rows; the others follow. Closing the iterator ends those that are
    left.

    Args:
      requests: checked, with seeds.
      detokenizer: makes a new detokenizer for each request; None for token ids only.
      params: see `SharedEngine.take`.
    """
    waiting = list(enumerate(requests))[::-1]
    running: dict[int, Output] = {}
    generation = engine.begin(len(requests))
    try:
        while waiting or running:
            while waiting and len(running) < generation.rows:
                number, request = waiting.pop()
                fresh = detokenizer() if detokenizer is not None else None
                running[number] = Output(request, max_length=max_length, detokenizer=fresh)
                engine.add(generation, number, request)
            number, token = engine.take(generation, params)
            chunk = running[number].push(token)
            if chunk.completion is not None:
                generation.end(number)
                del running[number]
            yield number, chunk
    finally:
        generation.close()


def _power(count: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (count - 1).bit_length()
