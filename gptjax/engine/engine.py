"""Continuous batching: requests join and leave at any step, and none has an effect on another's tokens."""

import dataclasses
import traceback
from collections import deque
from collections.abc import Sequence

import jax
import numpy as np
from jax.errors import JaxRuntimeError

from gptjax.engine import sampling
from gptjax.engine.flat_params import AnyParams
from gptjax.engine.leading import executor_of
from gptjax.engine.pace import Pace
from gptjax.engine.pools import default_policy, most_pages, pool_kinds
from gptjax.engine.request import TOO_COMPLEX, Request, Token
from gptjax.engine.settings import Features, all_allowed
from gptjax.layers.cache import kinds
from gptjax.models.registry import Model
from gptjax.scheduling.plan import Plan
from gptjax.scheduling.policy import Policy
from gptjax.scheduling.pool import Pool
from gptjax.scheduling.scheduler import Scheduler
from gptjax.structured.masks import Masks
from gptjax.structured.matching import Compiler


@dataclasses.dataclass
class _Dispatched:
    """Steps dispatched in one call, whose tokens `Engine.step` has not all returned yet."""

    plan: Plan
    requests: tuple[int, ...]  # of its rows
    sampled: sampling.Sampled  # on the device; stacked if there are several steps
    on_host: deque[list[Token]] | None = None  # of each step left; None until read

    @property
    def num_steps(self) -> int:
        """The steps of the call."""
        assert self.plan.decode is not None
        return self.plan.decode.steps


class Engine:
    """Runs up to `batch` requests at once. Not thread-safe: one engine belongs to one thread at a time.

    `add` takes a request, `step` returns the next tokens of those that run, `end` forgets one. The scheduler decides
    what a step does, and the executor runs it: prompts are read in chunks between steps, in the order in which they
    came, and running requests wait for at most one chunk.

    Steps are dispatched one at a time, or `steps_per_dispatch` at once on devices that compute a step faster than the
    host can dispatch it. Tokens and their order are bit-identical either way. The price of several steps at once is
    that the first token arrives with the last, and that all are computed even if a request ends early. So single steps
    are dispatched while a newcomer waits for its first token, and when no request wants at least half of them (known
    from `max_tokens` and `max_length`): at most half are knowingly wasted. A request that ends by itself wastes the
    rest of its dispatch, and the next one, which the device is already computing.

    A program that fails on the device takes the pools with it, as they were donated to it. Then new ones are allocated,
    all open requests are read again, and they get the tokens that they would have got without the failure. If it fails
    again and again before any token is drawn, `step` raises the error.
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
        levels: Sequence[Features] = (),
        reuse: bool = False,
        policy: Policy | None = None,
        pages: Sequence[int] | None = None,
        compiler: Compiler | None = None,
    ):
        """Creates an engine without requests.

        Args:
          batch: the most requests that run at once; a multiple of the mesh's axis `data`, or rounded up to one.
          steps_per_dispatch: by default 1 on a CPU and 8 elsewhere.
          chunk: the most prompt tokens in one call: a power of two, by default `steps.chunk_of`. It affects the
            rounding of results.
          levels: see `Executor`.
          reuse: share the beginnings of prompts, in whole chunks, that pages still hold.
          policy: instead of `batch`, `steps_per_dispatch`, `chunk` and `reuse`. By default, a request gets the
            same bits in any company: see `default_policy`.
          pages: of the pool of each kind of layers on each device, with page 0, such as `pool_sizes.pools` finds to
            fit; by default enough for `batch` requests of `max_length`.
          compiler: of grammars; without one, no request may have any.
        """
        if policy is None:
            policy = default_policy(model, slots=batch, steps_per_dispatch=steps_per_dispatch, chunk=chunk, reuse=reuse)
        self.model = model
        self.max_length = max_length
        self.policy = policy
        windows = kinds(model.config.windows, max_length)
        self._pages = tuple(pages or most_pages(pool_kinds(model, max_length=max_length, policy=policy)))
        self._executor = executor_of(
            model, params, policy=policy, pages=self._pages, max_length=max_length, levels=levels
        )
        of_shard = list(zip(self._pages, windows, strict=True))
        pools = [Pool(count, window) for _ in range(policy.shards) for count, window in of_shard]
        self._scheduler = Scheduler(policy, pools)
        self._requests: dict[int, Request] = {}  # by number
        self._compiler = compiler
        self._masks = Masks(model.config.vocab_size)  # of those with a grammar
        self._pace = Pace()
        self._dispatched: deque[_Dispatched] = deque()  # oldest first
        self._has_new = False  # whether a request was added since the last plan
        self._undrawn: jax.Array | None = None  # a result of the last plan that drew nothing
        self.losses = 0  # how often the pools were lost
        self._losses_in_a_row = 0

    @property
    def batch(self) -> int:
        """B: the most requests that run at once."""
        return self.policy.all_slots

    @property
    def has_tokens(self) -> bool:
        """Whether `step` will return tokens that came with those before, so without waiting for the device."""
        return bool(self._dispatched and self._dispatched[0].on_host)

    @property
    def room(self) -> int:
        """How many more requests can be added before one has to wait."""
        return max(0, self.batch - len(self._requests))

    def warm_up(self) -> None:
        """Compiles everything that requests may need, by running it. No request may be open."""
        self._check_idle()
        self._executor.warm_up()

    def warm_up_largest(self) -> None:
        """Compiles what can stand in for all else, and that in threads until `stop_compiling`; see `Executor`."""
        self._check_idle()
        self._executor.warm_up_largest()

    def stop_compiling(self) -> None:
        """Leaves out what `warm_up_largest` has not compiled yet."""
        self._executor.stop_compiling()

    def wait_until_compiled(self) -> bool:
        """Waits until all programs are compiled; may be called by any thread. Returns whether they are."""
        return self._executor.wait_until_compiled()

    def add(self, request: Request, *, rows: int = 0, drawn: Sequence[int] = ()) -> int:
        """Takes a checked request with a seed. Returns its number; numbers ascend.

        Args:
          rows: see `Scheduler.add`.
          drawn: tokens that it drew in another engine. The next one is the one after these.

        Raises:
          CapacityError: it does not fit the pools even alone.
          RequestError: its grammar cannot be compiled.
        """
        matcher = None
        if request.grammar is not None:
            assert self._compiler is not None
            matcher = self._compiler.matcher(request.grammar, request.stop_ids, drawn)
        room = request.room(self.max_length)
        number = self._scheduler.add(request.prompt_ids, room, rows=rows, drawn=drawn, one_by_one=matcher is not None)
        self._requests[number] = request
        if matcher is not None:
            self._masks.add(number, matcher)
        self._has_new = True
        return number

    def cached_tokens(self, request: int) -> int:
        """How many tokens of an open request's prompt need not be read, as pages hold them; 0 before that is known."""
        return self._scheduler.cached_tokens(request)

    def hold(self, request: int, held: bool) -> None:
        """Sets whether an open request is held: then it gets no tokens but those under way, and nobody waits for it."""
        self._scheduler.hold(request, held)
        self._has_new |= not held

    def end(self, request: int) -> None:
        """Forgets an open request. Tokens still on their way to it are dropped."""
        del self._requests[request]
        self._masks.end(request)
        self._scheduler.end(request)

    def step(self) -> list[Token]:
        """The next tokens of running requests, at most one each, in the order in which the requests came.

        Returns nothing if prompts have to be read first, of which a part was dispatched then. When this returns tokens,
        the device is already working on what follows.

        Raises:
          JaxRuntimeError: the device failed, and failed again when what it lost was computed anew. The engine can only
            be used after `restart`.
        """
        while True:
            try:
                tokens = self._step()
            except JaxRuntimeError as error:
                failure = error
            else:
                self._losses_in_a_row = 0 if tokens else self._losses_in_a_row
                return tokens
            self._start_again(failure)

    @property
    def can_restart(self) -> bool:
        """Whether `restart` is of use; not with several processes, of which the others do not know what failed here."""
        return self._executor.most_losses > 0

    def restart(self) -> None:
        """Allocates new pools after `step` has raised. No request may be open.

        Raises:
          JaxRuntimeError: they cannot be had.
        """
        self._check_idle()
        self._undrawn = None
        self._dispatched.clear()
        self._scheduler.lost()
        self._executor.reset()
        self._losses_in_a_row = 0

    def read(self) -> None:
        """Reads the prompts of all requests that have room to run, without steps between, for measuring."""
        while self._dispatch(decode=False):
            pass

    def wait(self) -> None:
        """Waits until the device has finished everything dispatched, for measuring."""
        self._executor.wait()

    def _check_idle(self) -> None:
        if self._requests:
            raise ValueError("this needs all requests to have ended")

    def _step(self) -> list[Token]:
        self._drop_unwanted()
        if self._has_new or not self._dispatched:
            self._dispatch()
        # While the tokens of several steps are handed out, the device works on as many more. A single step's token is
        # read while its `advance` is under way, which is too short for the host to prepare a call that reads prompts.
        # So if there is more to read, that is dispatched first. A plan that draws nothing is the last: a long prompt
        # would have many.
        while self._dispatched and self._ahead < max(self._dispatched[0].num_steps - 1, self._scheduler.reads):
            before = len(self._dispatched)
            if not self._dispatch() or len(self._dispatched) == before:
                break
        if not self._dispatched:
            return []
        oldest = self._dispatched[0]
        if oldest.on_host is None:
            oldest.on_host = self._read(oldest)
        tokens = oldest.on_host.popleft() if oldest.on_host else []  # its requests may have ended
        if not oldest.on_host:
            self._dispatched.popleft()
        return [token for token in tokens if token.request in self._requests]

    def _start_again(self, failure: JaxRuntimeError) -> None:
        """Allocates new pools after a failure. Only tokens that were read before it are still handed out."""
        while True:
            self.losses += 1
            self._losses_in_a_row += 1
            if self._losses_in_a_row > self._executor.most_losses:
                failure.add_note(f"the device failed {self._losses_in_a_row} times in a row")
                raise failure
            free_locals(failure)
            self._undrawn = None
            self._dispatched = deque(each for each in self._dispatched if each.on_host)
            self._scheduler.lost()
            self._has_new = True
            try:
                self._executor.reset()
            except JaxRuntimeError as error:
                failure = error
            else:
                return

    @property
    def _ahead(self) -> int:
        """Steps dispatched after the oldest dispatch."""
        return sum(each.num_steps for each in self._dispatched) - self._dispatched[0].num_steps

    def _dispatch(self, *, decode: bool = True) -> bool:
        """Dispatches the next plan. Returns whether there was one."""
        self._has_new = False
        plan = self._plan(decode=decode)
        if plan is None:
            return False
        self._pace.begin()
        plan = self._executor.fitted(plan)
        sampled = self._executor.run(plan, self._requests, self._allowed(plan))
        self._pace.dispatched()
        if plan.draws:
            assert sampled is not None and plan.decode is not None
            requests = tuple(self._executor.number(row.slot) for row in plan.decode.rows)
            self._dispatched.append(_Dispatched(plan, requests, sampled))
        elif not self._dispatched:
            # Nobody waits for tokens: stay at most one such plan ahead of the device, so that `end` has an effect.
            before, self._undrawn = self._undrawn, self._executor.result
            if before is not None:
                jax.block_until_ready(before)
        return True

    def _plan(self, *, decode: bool) -> Plan | None:
        """The next plan: without rows whose masks are late, if the device would wait for them, and most others."""
        if not self._masks:
            return self._scheduler.plan(decode=decode)
        late = self._masks.late(
            self._scheduler.ready if decode else [],
            has_time=lambda: self._pace.has_time and self._executor.is_busy(),
        )
        return self._scheduler.plan(decode=decode, late=late)

    def _allowed(self, plan: Plan) -> np.ndarray | None:
        """The tokens that the rows of a plan may draw; None: any. Those drawn before it are known: see `Scheduler`."""
        if not self._masks or plan.decode is None:
            return None
        # The executor knows those that join only when it runs the plan.
        joining = {join.slot: join.request for join in plan.joins}
        constrained = []
        for place, row in zip(self._executor.places(plan.decode), plan.decode.rows, strict=True):
            request = joining.get(row.slot) or self._executor.number(row.slot)
            if request in self._masks and row.draws:
                constrained.append((place, request))
        if not constrained:
            return None
        words_BW = all_allowed(self.policy.shards * plan.decode.size, self.model.config.vocab_size)
        for place, request in constrained:
            words_BW[place] = self._masks.words(request)
        return words_BW

    def _read(self, dispatched: _Dispatched) -> deque[list[Token]]:
        """Waits for the tokens of a dispatch. Returns those of each step that drew any."""
        host, plan = jax.device_get(dispatched.sampled), dispatched.plan
        self._pace.read()
        assert plan.decode is not None
        # A column for each row, as lists: taking numbers out of arrays one by one costs more than all that follows.
        ids, logprobs = (np.atleast_2d(each).T.tolist() for each in (host.token_B, host.logprob_B))
        of_steps: list[list[Token]] = [[] for _ in range(plan.decode.steps)]
        rows = []
        for row, place, number in zip(
            plan.decode.rows, self._executor.places(plan.decode), dispatched.requests, strict=True
        ):
            rows.append((place, number, slice(len(row.given), len(row.given) + row.draws)))
        drawn = [ids[place][steps] for place, _, steps in rows]
        failed = self._masks.take((number, token_ids) for (_, number, _), token_ids in zip(rows, drawn, strict=True))
        for index, (place, number, steps) in enumerate(rows):
            if number in failed:
                drawn[index] = [TOO_COMPLEX] * len(drawn[index])
            request = self._requests.get(number)
            if request is None:  # it has ended
                continue
            tops = _tops(host, place, request.params.top_logprobs)[steps]
            for of_step, *token in zip(of_steps[steps], drawn[index], logprobs[place][steps], tops, strict=True):
                of_step.append(Token(number, *token))
        self._scheduler.receive(plan.number, drawn)
        return deque(filter(None, of_steps))

    def _drop_unwanted(self) -> None:
        """Forgets the oldest dispatches if all of their requests have ended, without waiting for them."""
        while self._dispatched and not any(each in self._requests for each in self._dispatched[0].requests):
            dropped = self._dispatched.popleft()
            if dropped.on_host is None:
                self._scheduler.receive(dropped.plan.number, [()] * len(dropped.requests))


def free_locals(error: BaseException | None) -> None:
    """Frees what the frames of an error's traceback hold, such as the arrays of calls that failed."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__  # JAX's own frames; a context would be of callers that handle another error


def _tops(sampled: sampling.Sampled, place: int, count: int) -> list[tuple[tuple[int, float], ...]]:
    """The most likely tokens of a row in each step."""
    num_steps = np.atleast_2d(sampled.token_B).shape[0]
    if not count:
        return [()] * num_steps
    ids_SC, logprobs_SC = (
        each.reshape(num_steps, -1, each.shape[-1])[:, place, :count].tolist()
        for each in (sampled.top_ids_BC, sampled.top_logprobs_BC)
    )
    return [tuple(zip(*each, strict=True)) for each in zip(ids_SC, logprobs_SC, strict=True)]
