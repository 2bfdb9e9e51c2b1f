"""Continuous batching on one compiled decode step: requests join and leave at any step, and rows are independent."""

import dataclasses
import itertools
from collections import deque
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.engine import sampling, steps
from gptjax.engine.flat_params import AnyParams, FlatParams
from gptjax.engine.prefixes import Prefixes
from gptjax.engine.request import Request
from gptjax.engine.settings import Features, settings_of
from gptjax.layers.cache import Tail
from gptjax.models.registry import Model

# With an H200, dispatching one step takes the host 0.55 ms for GPT-2 124M and 1.3 ms for gpt-oss-20b (each call passes
# hundreds of arrays), which is more than the device needs to compute it.
_STEPS_PER_DISPATCH = 8
_MOST_PROMPTS = 8  # short prompts read between two steps


@dataclasses.dataclass(frozen=True)
class Token:
    """One token that a slot produced."""

    slot: int
    token_id: int  # -1 if the model's logits were not finite
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), most likely first


@dataclasses.dataclass
class _Dispatched:
    """Steps dispatched in one call, whose tokens `Engine.step` has not all returned yet."""

    num_steps: int
    sampled: sampling.Sampled  # on the device; stacked if there are several steps
    rows: dict[int, int]  # by slot: those busy at dispatch and not released since, whose tokens are wanted
    on_host: deque[sampling.Sampled] | None = None  # one for each step left; None until read

    def read(self) -> deque[sampling.Sampled]:
        """Waits for the steps that are left."""
        if self.on_host is None:
            host = jax.device_get(self.sampled)
            self.on_host = deque([host] if self.num_steps == 1 else _unstacked(host))
        return self.on_host


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of a step: one for each busy slot, and empty ones up to a size that is compiled."""

    slots: list[int]
    slots_B: jax.Array  # int32: the same, then -1
    settings: sampling.Sampling


@dataclasses.dataclass
class _Filling:
    """A prompt being read into its slot."""

    slot: int
    request: Request
    tokens: np.ndarray  # int32 [T]
    cuts: deque[tuple[int, int, int]]  # start, tokens and bucket of the chunks left
    whole: int  # where the last whole chunk ends
    tail: Tail | None = None  # copied at that point
    logits_1V: jax.Array | None = None  # of the last chunk dispatched


class Engine:
    """A batch of `batch` slots. Not thread-safe: one engine belongs to one thread at a time.

    `admit` prefills a request into a free slot, `step` gives the busy slots their next tokens, `release` frees a slot.
    `begin` and `fill` do the work of `admit` one chunk of the prompt at a time, with steps of the other slots between.
    A slot that has filled its cache must be released; until then its tokens are -1.

    Steps are dispatched one at a time, or `steps_per_dispatch` at once on devices that compute a step faster than the
    host can dispatch it. Tokens and their order are bit-identical either way. The price of several steps at once is
    that the first token arrives with the last, and that all are computed even if a request ends early. So single steps
    are dispatched while a newcomer waits for its first token, and when no request wants at least half of them (known
    from `max_tokens` and `max_length`): at most half are knowingly wasted. A request that ends by itself wastes the
    rest of its dispatch, and the next one, which the device is already computing.
    """

    def __init__(
        self,
        model: Model,
        params: AnyParams,
        *,
        batch: int,
        max_length: int,
        steps_per_dispatch: int | None = None,
        chunk: int | None = None,
        row_sizes: Sequence[int] = (),
        levels: Sequence[Features] = (),
        reuse: bool = False,
    ):
        """Creates an engine with empty slots.

        Args:
          steps_per_dispatch: by default 1 on a CPU and 8 elsewhere.
          chunk: the most prompt tokens in one call: a power of two, by default `steps.chunk_of`. It affects the
            rounding of results.
          row_sizes: the numbers of rows that steps are compiled for; a step takes the smallest that holds the busy
            slots. They affect the rounding of results: those of a request that runs with few others may differ in
            their last bits from those of the same request among many. By default `batch` alone: every step computes
            all slots, and a request's bits do not depend on its company.
          levels: sets of features, each including the one before; the first that covers all current requests is
            computed. By default, the features that any request so far has used.
          reuse: continue from whole chunks of a prompt that a slot still holds, rather than read them again.
        """
        if steps_per_dispatch is None:
            steps_per_dispatch = 1 if jax.default_backend() == "cpu" else _STEPS_PER_DISPATCH
        if steps_per_dispatch < 1:
            raise ValueError(f"steps_per_dispatch must be at least 1, found {steps_per_dispatch}")
        chunk = steps.chunk_of(model) if chunk is None else chunk
        if chunk < 1 or chunk & (chunk - 1):
            raise ValueError(f"chunk must be a power of two, found {chunk}")
        sizes = sorted({batch, *row_sizes})
        if sizes[0] < 1 or sizes[-1] > batch:
            raise ValueError(f"row_sizes must be from 1 to the {batch} slots, found {', '.join(map(str, row_sizes))}")
        self.model = model
        self._params = FlatParams.of(params)
        self.max_length = max_length
        self.steps_per_dispatch = steps_per_dispatch
        self.chunk = chunk
        self._state = steps.init_state(model, batch=batch, max_length=max_length, chunk=chunk)
        self._row_sizes = sizes
        self._requests: list[Request | None] = [None] * batch
        self._filling: _Filling | None = None
        self._read = 0  # prompt tokens dispatched since the last steps, as `_cost` counts them
        self._prefixes = Prefixes(batch) if reuse else None
        self._wanted = [0] * batch  # steps that a slot's request still wants and that were not dispatched yet
        self._newcomers: set[int] = set()  # slots with no step dispatched yet
        self._dispatched: deque[_Dispatched] = deque()  # oldest first; each has slots whose tokens are wanted
        self._levels = levels
        self._features = Features()
        self._rows: _Rows | None = None  # of the next step; None after requests change

    @property
    def batch(self) -> int:
        """B: the number of slots."""
        return len(self._requests)

    @property
    def free_slots(self) -> list[int]:
        """The slots without a request."""
        filling = None if self._filling is None else self._filling.slot
        return [slot for slot, request in enumerate(self._requests) if request is None and slot != filling]

    @property
    def _idle(self) -> bool:
        return all(request is None for request in self._requests)

    def warm_up(self) -> None:
        """Compiles everything that requests may need at any of `levels`, by running it. All slots must be free."""
        if len(self.free_slots) < self.batch:
            raise ValueError("warm_up needs all slots to be free")
        longest = min(self.max_length, self.chunk)
        buckets = sorted({steps.chunks(length, self.chunk)[0][2] for length in range(1, longest + 1)})
        for _ in range(2):  # the second time with arrays as compiled code returns them
            for bucket in buckets:
                chunk = steps.padded(np.zeros(1, np.int32), 0, 0, 1, bucket)
                _, self._state = steps.prefill_chunk(self.model, self._params, self._state, chunk)
            if self._prefixes is not None:
                tail = steps.tail(self._state, np.asarray([0, 1], np.int32))
                self._state = steps.resume(self._state, np.asarray([0, 0, 1], np.int32), tail)
            for size, level in itertools.product(self._row_sizes, self._levels or [self._features]):
                rows = self._rows_of([], size, level)
                for num_steps in (1, self.steps_per_dispatch):
                    self._ask(rows, num_steps)
        self.wait()

    def best_slot(self, request: Request) -> int:
        """The free slot for a request: the one with the longest reusable prefix, else the least useful to keep."""
        free = self.free_slots
        return free[0] if self._prefixes is None else self._prefixes.least(free, request.prompt_ids)

    def admit(self, slot: int, request: Request) -> None:
        """Prefills a checked request with a seed into a free slot, in chunks that depend only on its length."""
        self.begin(slot, request)
        while not self.fill():
            pass

    def begin(self, slot: int, request: Request) -> int:
        """Reserves a free slot for a checked request with a seed; `fill` reads its prompt. One prompt at a time.

        Returns:
          The number of prompt tokens that need not be read because a slot still holds them.
        """
        if slot not in self.free_slots:
            raise ValueError(f"slot {slot} is busy")
        if self._filling is not None:
            raise ValueError(f"the prompt of slot {self._filling.slot} is still being read")
        tokens = np.asarray(request.prompt_ids, np.int32)
        if not len(tokens):
            raise ValueError("a sequence needs at least one token")
        found = None if self._prefixes is None else self._prefixes.find(request.prompt_ids)
        held, tail = 0, None
        if found is not None:
            source, held, tail = found[0], len(found[1].token_ids), found[1].tail
            self._state = steps.resume(self._state, np.asarray([slot, source, held], np.int32), tail)
        if self._prefixes is not None:
            self._prefixes.put(slot, (), None)  # what it held is overwritten
        cuts = deque(cut for cut in steps.chunks(len(tokens), self.chunk) if cut[0] >= held)
        self._filling = _Filling(slot, request, tokens, cuts, len(tokens) // self.chunk * self.chunk, tail)
        return held

    @property
    def fill_is_due(self) -> bool:
        """Whether a prompt is being read and its next part may be dispatched before more steps.

        Pending steps wait for at most one chunk's tokens: several short prompts, or one part of a long one.
        """
        if self._filling is None:
            return False
        return self._idle or not self._read or self._read + self._cost(self._filling.cuts[0]) <= self.chunk

    def _cost(self, cut: tuple[int, int, int]) -> int:
        """The tokens that a part counts as; even the shortest costs something."""
        return max(cut[2], self.chunk // _MOST_PROMPTS)

    def fill(self) -> bool:
        """Dispatches the next chunk of the prompt that was begun; the device runs it after the work under way.

        While no slot is busy, this stays at most one chunk ahead of the device, so that `release` has an effect.

        Returns:
          Whether it was the last chunk: the slot takes part in the next steps.
        """
        filling = self._filling
        if filling is None:
            raise ValueError("no prompt is being read")
        self._read += self._cost(filling.cuts[0])
        start, count, bucket = filling.cuts.popleft()
        chunk = steps.padded(filling.tokens, filling.slot, start, count, bucket)
        before = filling.logits_1V
        filling.logits_1V, self._state = steps.prefill_chunk(self.model, self._params, self._state, chunk)
        if self._prefixes is not None and start + count == filling.whole:
            filling.tail = steps.tail(self._state, np.asarray([filling.slot, filling.whole], np.int32))
        if before is not None and self._idle:
            jax.block_until_ready(before)
        if filling.cuts:
            return False
        self._join(filling)
        return True

    def _join(self, filling: _Filling) -> None:
        """Lets the slot whose prompt was read take part in the next steps."""
        slot, request = filling.slot, filling.request
        if self._prefixes is not None:
            self._prefixes.put(slot, request.prompt_ids[: filling.whole], filling.tail)
        self._filling = None
        self._requests[slot] = request
        self._wanted[slot] = request.room(self.max_length)
        self._newcomers.add(slot)
        self._features |= Features.of(request.params)
        self._rows = None

    def wait(self) -> None:
        """Waits until the device has finished everything dispatched, for measuring."""
        jax.block_until_ready(self._state)

    def release(self, slot: int) -> None:
        """Frees a slot. The next request overwrites its content, and tokens still on their way to it are dropped."""
        if self._filling is not None and self._filling.slot == slot:
            self._filling = None
            return
        self._requests[slot] = None
        self._wanted[slot] = 0
        self._newcomers.discard(slot)
        self._rows = None
        for dispatched in self._dispatched:
            dispatched.rows.pop(slot, None)
        self._dispatched = deque(each for each in self._dispatched if each.rows)

    def step(self) -> list[Token]:
        """The next token of every busy slot, except those admitted while steps were under way: their turn comes later.

        If any slot is busy, at least one gets a token. When this returns, the device is already working on the next
        steps.
        """
        if self._idle:
            return []
        if self._newcomers or not self._dispatched:
            self._dispatch()
        oldest = self._dispatched[0]
        # While its tokens are handed out, the device works on as many more steps. (A single step's token is read
        # while its `advance` is under way.)
        while max(self._wanted) > 0 and self._ahead < oldest.num_steps - 1:
            self._dispatch()
        left = oldest.read()
        sampled = left.popleft()
        if not left:
            self._dispatched.popleft()
        return [_token(sampled, row, slot) for slot, row in sorted(oldest.rows.items())]

    @property
    def _ahead(self) -> int:
        """Steps dispatched after the oldest dispatch."""
        return sum(each.num_steps for each in self._dispatched) - self._dispatched[0].num_steps

    def _dispatch(self) -> None:
        """Dispatches one step, or several at once."""
        if self._rows is None:
            busy = [slot for slot, request in enumerate(self._requests) if request is not None]
            size = next(size for size in self._row_sizes if size >= len(busy))
            self._rows = self._rows_of(busy, size, self._needed_features())
        rows = self._rows
        enough = 2 * max(self._wanted) >= self.steps_per_dispatch and not self._newcomers
        num_steps = self.steps_per_dispatch if enough else 1
        sampled = self._ask(rows, num_steps)
        self._dispatched.append(_Dispatched(num_steps, sampled, {slot: row for row, slot in enumerate(rows.slots)}))
        self._newcomers.clear()
        self._read = 0
        for slot in rows.slots:
            self._wanted[slot] -= num_steps

    def _rows_of(self, slots: list[int], size: int, features: Features) -> _Rows:
        """A step's rows for these busy slots."""
        empty = size - len(slots)
        requests = [*(self._requests[slot] for slot in slots), *[None] * empty]
        settings = settings_of(requests, self.model.config.vocab_size, features)
        # Via NumPy: JAX would compile a program of its own to convert a list.
        return _Rows(slots, jnp.asarray(np.asarray([*slots, *[-1] * empty], np.int32)), settings)

    def _ask(self, rows: _Rows, num_steps: int) -> sampling.Sampled:
        model, params = self.model, self._params
        if num_steps == 1:
            # Two calls, so that the token can be read before the step is done.
            sampled = steps.sample(self._state, rows.slots_B, rows.settings)
            self._state = steps.advance(model, params, self._state, sampled.token_B, rows.slots_B)
        else:
            self._state, sampled = steps.decode(model, params, self._state, rows.slots_B, rows.settings, num_steps)
        return sampled

    def _needed_features(self) -> Features:
        """The parts of sampling to compute for the current rows."""
        if not self._levels:
            return self._features
        used = Features()
        for request in self._requests:
            used |= Features() if request is None else Features.of(request.params)
        return next(level for level in self._levels if level | used == level)


def prefill(model: Model, params: AnyParams, state: steps.State, slot: int, tokens: np.ndarray) -> steps.State:
    """Fills a row of a state with a sequence, from position 0.

    Args:
      state: donated; it must be for chunks of `steps.chunk_of(model)`.
      tokens: int32 [T], 1 <= T <= max_length.
    """
    if not len(tokens):
        raise ValueError("a sequence needs at least one token")
    for _, _, chunk in steps.padded_chunks(tokens, steps.chunk_of(model), slot):
        _, state = steps.prefill_chunk(model, params, state, chunk)
    return state


def _unstacked(stacked: sampling.Sampled) -> list[sampling.Sampled]:
    leaves, tree = jax.tree.flatten(stacked)
    return [jax.tree.unflatten(tree, of_step) for of_step in zip(*leaves, strict=True)]


def _token(sampled: sampling.Sampled, row: int, slot: int) -> Token:
    top = zip(sampled.top_ids_BC[row].tolist(), sampled.top_logprobs_BC[row].tolist(), strict=True)
    return Token(slot, int(sampled.token_B[row]), float(sampled.logprob_B[row]), tuple(top))
