"""Runs plans on the device."""

import copy
import dataclasses
import functools
import itertools
import logging
import operator
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from gptjax.engine import numbers, programs, sampling
from gptjax.engine.compilation import Compilation, Later
from gptjax.engine.executables import Executables
from gptjax.engine.flat_params import AnyParams, FlatParams
from gptjax.engine.request import Request
from gptjax.engine.settings import Features, Words, settings_of, with_allowed
from gptjax.models import registry, shards
from gptjax.models.registry import Model
from gptjax.scheduling.plan import Copy, DecodeCall, Plan, PrefillCall
from gptjax.scheduling.policy import Policy, powers, smallest
from gptjax.sharding.hosts import put
from pallas_kernels.pages import TILE

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Sizes of programs, ascending; the larger ones can stand in for the smaller ones."""

    prefill: tuple[int, ...] = ()  # of calls in tokens
    ends: tuple[int, ...] = ()  # of `keep_logits`: prompts
    rows: tuple[int, ...] = ()  # of decode calls
    levels: tuple[int, ...] = ()  # of decode calls of the most rows; others have all levels

    def __or__(self, other: "_Sizes") -> "_Sizes":
        return _Sizes(*(tuple(sorted({*mine, *more})) for mine, more in zip(self._each(), other._each(), strict=True)))

    def largest(self) -> "_Sizes":
        """The largest of each."""
        return _Sizes(*(sizes[-1:] for sizes in self._each()))

    def _each(self) -> tuple[tuple[int, ...], ...]:
        return self.prefill, self.ends, self.rows, self.levels


class Executor:
    """The device's side of an engine: pools, tables, and what each slot holds. Plans alone change them.

    Programs are dispatched, not waited for. Each has a few sizes; `warm_up` compiles them all, or `warm_up_largest`
    those that can stand in for the others, which it compiles while plans run. On a mesh, both compile them all first.
    """

    most_losses = 2  # of the pools, one after another without a token between, after which an engine goes on

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
          levels: sets of features, of which the last includes all others; the first that covers a call's requests is
            computed. By default, the features that any request so far has used. On a CPU, there is one program: it has
            all features, and skips what no row uses. On a GPU, the host would wait for the device at each branch.
        """
        self._model = model
        self._params = FlatParams.of(params)
        self._by_row = model.own.sharding(model.own.by_row)  # where arrays with rows go; None: to the only device
        mesh = model.own.mesh
        several = isinstance(mesh, Mesh) and mesh.is_multi_process
        self._gathers = several and model.own.rows_parts > 1  # so that this process can read what others' rows draw
        self._policy = policy
        self._pages, self._max_length = tuple(pages), max_length
        self._branches = jax.default_backend() == "cpu"
        self._levels = (Features.everything(),) if self._branches else levels
        self._features = Features()
        self._requests: list[Request | None] = [None] * policy.all_slots
        self._numbers = [0] * policy.all_slots
        self._settings: tuple[object, sampling.Sampling] | None  # of the last rows, and what these were
        self._executables = Executables(self._params)
        self._call: Callable[..., Any] = self._executables
        self._later: Later | None = None  # compiles what `warm_up_largest` left
        self._compiled = self._all_sizes()  # those that calls may have
        self._adding = threading.Lock()  # held to add to them
        self.reset()

    def reset(self) -> None:
        """Empty pools and slots, such as after a program failed. Those before are freed first."""
        self.__dict__.pop("_slots", None)
        self._settings = None
        cache = registry.create_pools(
            self._model, pages=self._pages, rows=self._policy.all_slots, max_length=self._max_length
        )
        self._mailboxes = shards.mailboxes(self._model)  # empty ones, too
        if self._mailboxes is not None:
            cache = dataclasses.replace(cache, peers=self._mailboxes.peers)
        shape = self._policy.all_slots, self._model.config.vocab_size
        self._tables = [np.zeros(table.shape, np.int32) for table in cache.tables]  # what the device has, too
        self._slots = programs.Slots(
            cache=cache,
            # A slot that was never filled draws -1 instead of a token.
            logits_BV=jnp.full(shape, jnp.nan, jnp.float32, device=self._by_row),
            counts_BV=jnp.zeros(shape, jnp.int32, device=self._by_row),
            share=self._model.share,
        )

    def run(self, plan: Plan, requests: Mapping[int, Request], words_BW: Words = None) -> sampling.Sampled | None:
        """Dispatches a plan.

        Args:
          requests: those that join, by their numbers.
          words_BW: int32: the tokens that the rows of its decode call may draw, at their `places`; None: any.

        Returns:
          What its decode call draws, a row of the call each at its place, on the device; stacked if it has several
          steps.
        """
        kinds = len(self._tables)
        for join in plan.joins:
            self._requests[join.slot] = request = requests[join.request]
            self._numbers[join.slot] = join.request
            self._features |= Features.of_request(request)
            for table in self._tables:
                table[join.slot] = 0
            if request.params.penalises:
                self._count(join.slot, request.prompt_ids, join.drawn)
        for entry in plan.tables:
            self._tables[entry.pool % kinds][entry.slot, entry.index] = entry.page
        if plan.joins or plan.tables:
            self._send_tables()
        for kind in range(kinds) if plan.copies else ():
            pools = range(kind, kinds * self._policy.shards, kinds)
            self._copy(kind, [[copy for copy in plan.copies if copy.pool == pool] for pool in pools])
        for call in plan.prefill:
            self._prefill(call)
        return None if plan.decode is None else self._decode(plan.decode, words_BW)

    def number(self, slot: int) -> int:
        """The request that took a slot last."""
        return self._numbers[slot]

    @property
    def result(self) -> jax.Array:
        """An array that is there when all plans so far have run, and that the next one does not use up."""
        return self._marker()

    def is_busy(self) -> bool:
        """Whether the device still works on what was dispatched."""
        return not self._slots.logits_BV.is_ready()  # type: ignore[attr-defined, unused-ignore]

    def wait(self) -> None:
        """Waits until everything dispatched has run."""
        jax.block_until_ready(self._slots)

    def warm_up(self) -> None:
        """Compiles all programs, several at a time, and runs them without any rows."""
        self._warm_up(self._all_sizes())

    def warm_up_largest(self) -> None:
        """Does so with the largest programs, and compiles the others in threads until `stop_compiling`.

        Until these are there, `fitted` makes calls larger. If the policy wants the sizes of a request's calls to depend
        on nothing else, all programs are compiled now.
        """
        every, policy = self._all_sizes(), self._policy
        if not policy.packed or policy.rows != "needed" or self._by_row is not None:
            self.warm_up()
            return
        self._compiled = largest = every.largest()
        self._warm_up(largest)
        # Most requests need few features; then the smallest calls, of a single conversation, gain most.
        parts = [_Sizes(levels=every.levels[:-1])] if every.levels[:-1] else []
        parts += [_Sizes(rows=(size,)) for size in every.rows[:-1]]
        parts += [_Sizes(prefill=(size,)) for size in every.prefill[:-1]]
        parts += [_Sizes(ends=(size,)) for size in every.ends[:-1]]
        shadow = copy.copy(self)
        shadow._slots = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), self._slots)
        hidden_MD = jax.ShapeDtypeStruct((self._most_ends, self._model.config.width), self._model.dtype)

        def part(sizes: _Sizes) -> tuple[Callable[[Compilation], None], Callable[[], None]]:
            def lower(compilation: Compilation) -> None:
                shadow._call = shadow._ahead(compilation)
                for size in sizes.prefill:
                    shadow._run_prefill(PrefillCall(size, (), ()))
                for size in sizes.ends:
                    shadow._keep_logits(hidden_MD, [[]], size)
                if sizes.levels:
                    shadow._run_decodes(largest.rows, sizes.levels)
                shadow._run_decodes(sizes.rows, every.levels)

            def done() -> None:
                with self._adding:
                    self._compiled |= sizes

            return lower, done

        self._later = Later([part(sizes) for sizes in parts])

    def stop_compiling(self) -> None:
        """Leaves out what `warm_up_largest` has not compiled yet. Calls go on with what there is."""
        if self._later is not None:
            self._later.stop()

    def wait_until_compiled(self) -> bool:
        """Waits until all programs are compiled. Returns whether they are."""
        return self._later is None or self._later.wait()

    def fitted(self, plan: Plan) -> Plan:
        """The plan with larger calls in place of those that `warm_up_largest` has not compiled yet."""
        if self._later is None:
            return plan
        sizes, decode = self._compiled, plan.decode
        prefill = [dataclasses.replace(call, size=smallest(sizes.prefill, call.size)) for call in plan.prefill]
        if decode is not None:
            decode = dataclasses.replace(decode, size=smallest(sizes.rows, decode.size))
        return dataclasses.replace(plan, prefill=tuple(prefill), decode=decode)

    def _warm_up(self, sizes: _Sizes) -> None:
        times, slots = [time.monotonic()], self._slots
        with Compilation() as compilation:
            self._call = self._ahead(compilation)
            try:
                self._run_all(sizes)
                times.append(time.monotonic())
            finally:
                self._slots, self._call = slots, self._executables
        times.append(time.monotonic())
        try:
            for _ in range(2):  # the second time with arrays as compiled code returns them
                jax.block_until_ready(self._run_all(sizes))
            self.wait()
        except JaxRuntimeError as error:
            if not self._executables.forget():
                raise
            _log.warning("programs that were compiled before do not run, and are compiled again: %s", error)
            self.reset()
            self._warm_up(sizes)
            return
        times.append(time.monotonic())
        _, compiled, run = (after - before for before, after in itertools.pairwise(times))
        _log.info(
            "%d programs, %d of them compiled before: the others were traced in %.1f s and lowered in %.1f s, "
            "all were compiled or read after %.1f s more, and ran after %.1f s more",
            *(len(compilation.compiled), len(self._executables.found), *self._executables.seconds, compiled, run),
        )

    def _ahead(self, compilation: Compilation) -> Callable[..., Any]:
        """Compiles programs instead of calling them. Returns the shapes and dtypes of what the calls would return."""

        def call(program: Any, *arguments: Any) -> Any:
            shapes = compilation(self._executables.lower(program, *arguments))
            return shapes if self._by_row is None else programs.as_divided(shapes, self._slots, self._by_row)

        return call

    def _all_sizes(self) -> _Sizes:
        ends, levels = powers(1, self._most_ends), tuple(range(len(self._levels)))
        return _Sizes(self._used_sizes(), ends, self._policy.row_sizes, levels)

    def _run_all(self, sizes: _Sizes) -> jax.Array:
        """Runs all programs, with calls of these sizes, without any rows. Returns a `result`."""
        policy = self._policy
        self._send_tables()
        for kind in range(len(self._tables)):
            self._copy(kind, [[Copy(kind, 0, 0, 1)]] * policy.shards)
        self._count(policy.all_slots, (), ())  # the number after the last slot's: changes nothing
        for size in sizes.prefill:
            hidden_MD = self._run_prefill(PrefillCall(size, (), ()))
        for size in sizes.ends:
            self._keep_logits(hidden_MD, [[]] * policy.shards, size)
        self._run_decodes(sizes.rows, sizes.levels)
        return self._marker()

    def _marker(self) -> jax.Array:
        marker: jax.Array = self._call(programs.marker, self._slots)
        return marker

    def _run_decodes(self, row_sizes: tuple[int, ...], levels: tuple[int, ...]) -> None:
        for size in row_sizes:
            for level in [self._levels[level] for level in levels] or [self._features]:
                settings = self._settings_of([None] * self._policy.shards * size, level)
                once = level.constrains and level in self._levels[:-1]  # rows with a grammar have calls of one step
                for num_steps in {1} if once else {1, self._policy.steps}:
                    self._run_decode(DecodeCall(size, num_steps, ()), settings)

    def _send_tables(self) -> None:
        # Copies: on a CPU, JAX may use NumPy's memory, and programs that read it may run later than the next change.
        tables = tuple(put(table.copy(), self._by_row) for table in self._tables)
        self._slots = dataclasses.replace(self._slots, cache=dataclasses.replace(self._slots.cache, tables=tables))

    def _sent(self, array: np.ndarray) -> np.ndarray | jax.Array:
        """Numbers of all shards as an argument of a program."""
        return array if self._by_row is None else put(array, self._by_row)

    def _copy(self, kind: int, copies: Sequence[Sequence[Copy]]) -> None:
        """Copies pages of each shard."""
        for first in range(0, max(map(len, copies)), numbers.COPIES):
            some = numbers.of_copies([each[first : first + numbers.COPIES] for each in copies])
            self._slots = self._call(programs.copy_pages, self._slots, self._sent(some), kind)

    def _count(self, slot: int, prompt_ids: Sequence[int], drawn: Sequence[int]) -> None:
        """Sets the counts that penalties need. The programs add the tokens that are drawn from now on."""
        counts_V = np.zeros(self._model.config.vocab_size, np.int32)
        counts_V[list(prompt_ids)] = 1
        np.add.at(counts_V, list(drawn), 2)
        slot_1 = self._sent(numbers.of_slot(self._policy, slot))
        self._slots = self._call(programs.set_counts, self._slots, slot_1, counts_V)

    def _prefill(self, call: PrefillCall) -> None:
        hidden_MD = self._run_prefill(call)
        slots = numbers.ending(self._policy, call)
        if any(slots):
            self._keep_logits(hidden_MD, slots, smallest(self._compiled.ends, max(map(len, slots))))

    def _run_prefill(self, call: PrefillCall) -> jax.Array:
        most = {"ends": self._most_ends, "tiles": self._most_tiles(call.size)}
        sent = self._sent(numbers.of_prefill(self._policy, call, **most))
        sizes = call.size, self._most_ends
        hidden_MD, self._slots = self._call(programs.prefill, self._model, self._params, self._slots, sent, *sizes)
        return hidden_MD

    def _keep_logits(
        self, hidden_MD: jax.Array | jax.ShapeDtypeStruct, slots: Sequence[Sequence[int]], size: int
    ) -> None:
        slot_M = self._sent(numbers.of_ends(self._policy, slots, size))
        self._slots = self._call(programs.keep_logits, self._model, self._params, self._slots, hidden_MD, slot_M)

    def _decode(self, call: DecodeCall, words_BW: Words) -> sampling.Sampled:
        requests: list[Request | None] = [None] * (self._policy.shards * call.size)
        for place, row in zip(self.places(call), call.rows, strict=True):
            requests[place] = self._requests[row.slot]
        key = tuple(requests), self._features
        if self._settings is None or self._settings[0] != key:  # mostly the same rows as before
            self._settings = key, self._settings_of(requests, self._needed(requests))
        return self._run_decode(call, with_allowed(self._settings[1], words_BW, self._by_row))

    def places(self, call: DecodeCall) -> list[int]:
        """Where the results of a call have each of its rows."""
        return numbers.places(self._policy, call)

    def _run_decode(self, call: DecodeCall, settings: sampling.Sampling) -> sampling.Sampled:
        sent = put(numbers.of_rows(self._policy, call), self._by_row)
        if call.steps == 1:
            # Two calls, so that the token can be read before the step is done.
            sampled = self._call(programs.sample, self._slots, sent, settings)
            drawn = sampled.token_B
            self._slots = self._call(programs.advance, self._model, self._params, self._slots, drawn, sent)
        else:
            steps = sent, settings, call.steps
            self._slots, sampled = self._call(programs.decode, self._model, self._params, self._slots, *steps)
        return self._call(programs.gathered, self._model.own, sampled) if self._gathers else sampled

    def _settings_of(self, requests: Sequence[Request | None], features: Features) -> sampling.Sampling:
        return settings_of(
            requests, self._model.config.vocab_size, features, branches=self._branches, device=self._by_row
        )

    def _needed(self, requests: Sequence[Request | None]) -> Features:
        """The parts of sampling to compute for some rows."""
        if not self._levels:
            return self._features
        each = {Features.of_request(request) for request in requests if request is not None}
        used = functools.reduce(operator.or_, each, Features())
        levels = [self._levels[level] for level in self._compiled.levels]
        return next(level for level in levels if level | used == level)

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
