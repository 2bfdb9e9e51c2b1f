"""Runs plans on the device."""

import dataclasses
import functools
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.engine import programs, sampling
from gptjax.engine.flat_params import AnyParams, FlatParams
from gptjax.engine.request import Request
from gptjax.engine.settings import Features, settings_of
from gptjax.models import registry
from gptjax.models.registry import Model
from gptjax.scheduling.plan import Copy, DecodeCall, Plan, PrefillCall
from gptjax.scheduling.policy import Policy, powers, smallest
from pallas_kernels.pages import TILE

_COPIES = 8  # pages of one call
_MOST_COMPILED = 16  # programs at a time; on a GPU, XLA tries out products for each


class Executor:
    """The device's side of an engine: pools, tables, and what each slot holds. Plans alone change them.

    Programs are dispatched, not waited for. Each has a few sizes; `warm_up` compiles them all.
    """

    def __init__(
        self,
        model: Model,
        params: AnyParams,
        *,
        policy: Policy,
        pages: Sequence[int],
        max_length: int,
        levels: Sequence[Features] = (),
    ):
        """Allocates the pools.

        Args:
          pages: of the pool of each kind of layers, in the order of `layers.cache.kinds`.
          levels: sets of features, each including the one before; the first that covers a call's requests is computed.
            By default, the features that any request so far has used. On a CPU, they are not needed: one program has
            all features, and skips what no row uses. On a GPU, the host would wait for the device at each branch.
        """
        self._model = model
        self._params = FlatParams.of(params)
        self._policy = policy
        self._pages, self._max_length = tuple(pages), max_length
        self._branches = jax.default_backend() == "cpu"
        self._levels = (Features.everything(),) if self._branches else levels
        self._features = Features()
        self._requests: list[Request | None] = [None] * policy.slots
        self._numbers = [0] * policy.slots
        self._settings: tuple[object, sampling.Sampling] | None  # of the last rows, and what these were
        self._call: Callable[..., Any] = _call
        self.reset()

    def reset(self) -> None:
        """Empty pools and slots, such as after a program failed. Those before are freed first."""
        self.__dict__.pop("_slots", None)
        self._settings = None
        cache = registry.create_pools(
            self._model, pages=self._pages, rows=self._policy.slots, max_length=self._max_length
        )
        self._tables = [np.zeros(table.shape, np.int32) for table in cache.tables]  # what the device has, too
        self._slots = programs.Slots(
            cache=cache,
            # A slot that was never filled draws -1 instead of a token.
            logits_BV=jnp.full((self._policy.slots, self._model.config.vocab_size), jnp.nan, jnp.float32),
            counts_BV=jnp.zeros((self._policy.slots, self._model.config.vocab_size), jnp.int32),
        )

    def run(self, plan: Plan, requests: Mapping[int, Request]) -> sampling.Sampled | None:
        """Dispatches a plan.

        Args:
          requests: those that join, by their numbers.

        Returns:
          What its decode call draws, a row of the call each, on the device; stacked if it has several steps.
        """
        for join in plan.joins:
            self._requests[join.slot] = request = requests[join.request]
            self._numbers[join.slot] = join.request
            self._features |= Features.of(request.params)
            for table in self._tables:
                table[join.slot] = 0
            if request.params.penalises:
                self._count(join.slot, request.prompt_ids, join.drawn)
        for entry in plan.tables:
            self._tables[entry.pool][entry.slot, entry.index] = entry.page
        if plan.joins or plan.tables:
            self._send_tables()
        for kind in range(len(self._tables)):
            self._copy(kind, [copy for copy in plan.copies if copy.pool == kind])
        for call in plan.prefill:
            self._prefill(call)
        return None if plan.decode is None else self._decode(plan.decode)

    def number(self, slot: int) -> int:
        """The request that took a slot last."""
        return self._numbers[slot]

    @property
    def result(self) -> jax.Array:
        """An array that is there when all plans so far have run, and that the next one does not use up."""
        return programs.marker(self._slots)

    def wait(self) -> None:
        """Waits until everything dispatched has run."""
        jax.block_until_ready(self._slots)

    def warm_up(self) -> None:
        """Compiles all programs, several at a time, and runs them without any rows."""
        slots = self._slots
        with _Compilation() as self._call:
            try:
                self._run_all()
            finally:
                self._slots, self._call = slots, _call
        for _ in range(2):  # the second time with arrays as compiled code returns them
            self._run_all()
            jax.block_until_ready(self.result)
        self.wait()

    def _run_all(self) -> None:
        """Runs a program of each size, without any rows."""
        policy = self._policy
        self._send_tables()
        for kind in range(len(self._tables)):
            self._copy(kind, [Copy(kind, 0, 0, 1)])
        self._count(policy.slots, (), ())  # the number after the last slot's: changes nothing
        for size in self._used_sizes():
            hidden_MD = self._run_prefill(PrefillCall(size, (), ()))
        for count in powers(1, self._most_ends):
            self._keep_logits(hidden_MD, [policy.slots] * count)
        for size in policy.row_sizes:
            for level in self._levels or [self._features]:
                settings = self._settings_of([None] * size, level)
                for num_steps in {1, policy.steps}:
                    self._run_decode(self._rows(DecodeCall(size, num_steps, ())), settings, num_steps)

    def _send_tables(self) -> None:
        # Copies: on a CPU, JAX may use NumPy's memory, and programs that read it may run later than the next change.
        tables = tuple(jax.device_put(table.copy()) for table in self._tables)
        self._slots = dataclasses.replace(self._slots, cache=dataclasses.replace(self._slots.cache, tables=tables))

    def _copy(self, kind: int, copies: Sequence[Copy]) -> None:
        for first in range(0, len(copies), _COPIES):
            some = copies[first : first + _COPIES]
            call = np.zeros(1 + 2 * _COPIES, np.int32)
            call[0] = len(some)
            call[1 : 1 + len(some)] = [copy.source for copy in some]
            call[1 + _COPIES : 1 + _COPIES + len(some)] = [copy.target for copy in some]
            self._slots = self._call(programs.copy_pages, self._slots, call, kind)

    def _count(self, slot: int, prompt_ids: Sequence[int], drawn: Sequence[int]) -> None:
        """Sets the counts that penalties need. The programs add the tokens that are drawn from now on."""
        counts_V = np.zeros(self._model.config.vocab_size, np.int32)
        counts_V[list(prompt_ids)] = 1
        np.add.at(counts_V, list(drawn), 2)
        self._slots = self._call(programs.set_counts, self._slots, np.int32(slot), counts_V)

    def _prefill(self, call: PrefillCall) -> None:
        hidden_MD = self._run_prefill(call)
        if slots := [piece.slot for piece in call.pieces if piece.ends]:
            size = smallest(powers(1, self._most_ends), len(slots))
            self._keep_logits(hidden_MD, slots + [self._policy.slots] * (size - len(slots)))

    def _run_prefill(self, call: PrefillCall) -> jax.Array:
        tiles = np.zeros((4, self._most_tiles(call.size)), np.int32)
        found = [
            (piece.slot, piece.start + ahead, min(TILE, piece.count - ahead), piece.position + ahead)
            for piece in call.pieces
            for ahead in range(0, piece.count, TILE)
        ]
        tiles[:, : len(found)] = np.asarray(found, np.int32).reshape(-1, 4).T
        tokens_T = np.zeros(call.size, np.int32)
        tokens_T[: len(call.tokens)] = call.tokens
        end_M = np.zeros(self._most_ends, np.int32)
        ends = [piece.start + piece.count - 1 for piece in call.pieces if piece.ends]
        end_M[: len(ends)] = ends
        numbers = np.concatenate((tokens_T, end_M, tiles.reshape(-1)))
        sizes = call.size, self._most_ends
        hidden_MD, self._slots = self._call(programs.prefill, self._model, self._params, self._slots, numbers, *sizes)
        return hidden_MD

    def _keep_logits(self, hidden_MD: jax.Array, slots: Sequence[int]) -> None:
        slot_M = np.asarray(slots, np.int32)
        self._slots = self._call(programs.keep_logits, self._model, self._params, self._slots, hidden_MD, slot_M)

    def _decode(self, call: DecodeCall) -> sampling.Sampled:
        requests: list[Request | None] = [None] * call.size
        for place, row in zip(self.places(call), call.rows, strict=True):
            requests[place] = self._requests[row.slot]
        key = tuple(requests), self._features
        if self._settings is None or self._settings[0] != key:  # mostly the same rows as before
            self._settings = key, self._settings_of(requests, self._needed(requests))
        return self._run_decode(self._rows(call), self._settings[1], call.steps)

    def places(self, call: DecodeCall) -> list[int]:
        """Where the programs compute each row of a call: if they compute all slots, where its slot is."""
        if call.size == self._policy.slots:
            return [row.slot for row in call.rows]
        return list(range(len(call.rows)))

    def _rows(self, call: DecodeCall) -> np.ndarray:
        """The numbers of a decode call, for the programs."""
        rows = np.zeros((call.size, programs.ROW_FIELDS + call.steps), np.int32)
        rows[:, 0] = -1
        for place, row in zip(self.places(call), call.rows, strict=True):
            given = len(row.given)
            rows[place, : programs.ROW_FIELDS] = row.slot, row.position, given, given + row.draws, row.feeds
            rows[place, programs.ROW_FIELDS : programs.ROW_FIELDS + given] = row.given
        return rows

    def _run_decode(self, rows: np.ndarray, settings: sampling.Sampling, num_steps: int) -> sampling.Sampled:
        sent = jax.device_put(rows)
        if num_steps == 1:
            # Two calls, so that the token can be read before the step is done.
            sampled = self._call(programs.sample, self._slots, sent, settings)
            drawn = sampled.token_B
            self._slots = self._call(programs.advance, self._model, self._params, self._slots, drawn, sent)
        else:
            steps = sent, settings, num_steps
            self._slots, sampled = self._call(programs.decode, self._model, self._params, self._slots, *steps)
        return sampled

    def _settings_of(self, requests: Sequence[Request | None], features: Features) -> sampling.Sampling:
        return settings_of(requests, self._model.config.vocab_size, features, branches=self._branches)

    def _needed(self, requests: Sequence[Request | None]) -> Features:
        """The parts of sampling to compute for some rows."""
        if not self._levels:
            return self._features
        each = {Features.of(request.params) for request in requests if request is not None}
        used = functools.reduce(operator.or_, each, Features())
        return next(level for level in self._levels if level | used == level)

    def _used_sizes(self) -> tuple[int, ...]:
        """The sizes of prefill calls that there can be: several prompts may fill a chunk, one has its own length."""
        sizes = self._policy.call_sizes
        longest = self._policy.chunk if self._policy.packed else min(self._policy.chunk, self._max_length)
        return sizes[: sizes.index(smallest(sizes, longest)) + 1]

    def _most_pieces(self, size: int) -> int:
        return min(self._policy.pieces, self._policy.slots, size) if self._policy.packed else 1

    def _most_tiles(self, size: int) -> int:
        """The tiles of a call: each piece may end with one that is not full."""
        return -(-size // TILE) + self._most_pieces(size) - 1

    @property
    def _most_ends(self) -> int:
        """The most prompts that end in a call, of any size, so that what follows it has the same shape."""
        return self._most_pieces(self._policy.chunk)


def _call(program: Callable[..., Any], *arguments: Any) -> Any:
    return program(*arguments)


class _Compilation:
    """Compiles programs instead of calling them, in threads, as XLA works without Python's lock."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(min(_MOST_COMPILED, os.cpu_count() or 1))
        self._compiled: list[Future[Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        """Waits for all programs. One that failed is left to the call, which compiles it alone, with all the memory."""
        if failed is None:
            wait(self._compiled)
        self._threads.shutdown(cancel_futures=True)

    def __call__(self, program: Any, *arguments: Any) -> Any:
        """The shapes and dtypes of what the call would return. A later call finds the program compiled."""
        lowered = program.lower(*arguments)
        self._compiled.append(self._threads.submit(lowered.compile))
        return lowered.out_info
