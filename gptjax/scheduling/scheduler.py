"""Who runs in the next step: requests join, are read, decode, wait, are set aside and resumed, and leave."""

import bisect
import dataclasses
from collections import Counter, deque
from collections.abc import Sequence as AnySequence

import numpy as np

from gptjax.errors import CapacityError
from gptjax.scheduling.allocator import Allocator
from gptjax.scheduling.draft import Draft, Part, turns
from gptjax.scheduling.plan import DecodeCall, Join, Piece, Plan, Row, TableEntry
from gptjax.scheduling.policy import Policy, smallest
from gptjax.scheduling.pool import Pool
from gptjax.scheduling.sequence import Sequence, common


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Tokens of a request, in order."""

    request: int
    tokens: tuple[int, ...]


class Scheduler:
    """Makes plans for a device that runs them in order, and knows of it only what it drew.

    `plan` may be called again before the tokens of earlier plans have been received: the device has them, and which
    positions they take is known. Its pages are reserved when it is made. What a request still gets after its end is
    dropped; its pages can be used by later plans at once, since these run later.

    The oldest request always goes on: it can take the pages of all others. Newer ones wait, or are set aside, the
    newest first: they lose slot and pages, and later join again. Then their prompt is read again, and the tokens that
    they had drawn are given to decode again, as far as the tree has not kept the pages. So their results do not change.

    With several shards, all this is true of each by itself, except that requests wait for any. One joins where it has
    least to read, and few others run. It stays there until it ends or is set aside. A plan is for all shards: its calls
    are of the same sizes and steps in each.

    A request can be held: nothing is planned for it, and the others may take its slot and pages. "Oldest" and "newest"
    are then said of the others.

    Not thread-safe.
    """

    def __init__(self, policy: Policy, pools: AnySequence[Pool]):
        """A scheduler without requests.

        Args:
          pools: at least one, all of whose pages are free: of the layers that see everything, and of those with a
            window. Those of all shards, which are alike, one shard after another.
        """
        self.policy = policy
        count = len(pools) // policy.shards
        firsts = range(0, len(pools), count)
        self._allocators = [Allocator(pools[first : first + count], policy, first) for first in firsts]
        self._requests: dict[int, Sequence] = {}  # those that have not ended
        self._waiting: list[Sequence] = []  # without a slot; oldest first
        self._running: list[Sequence] = []  # with a slot; oldest first
        self._free_slots = [  # of each shard, taken from the end
            list(range(first + policy.slots - 1, first - 1, -1)) for first in range(0, policy.all_slots, policy.slots)
        ]
        self._in_flight: deque[tuple[int, list[tuple[Sequence, int]]]] = deque()  # plans that draw, and what for whom
        self._added = self._plans = 0

    def add(
        self,
        prompt_ids: AnySequence[int],
        max_tokens: int,
        *,
        rows: int = 0,
        drawn: AnySequence[int] = (),
        one_by_one: bool = False,
    ) -> int:
        """Takes a request. Returns its number; numbers ascend.

        Args:
          prompt_ids: at least one token.
          max_tokens: to draw at most: at least 1. The last one needs no place.
          rows: of its decode calls, if the policy lets requests ask for them: one of `Policy.row_sizes`.
          drawn: the first of these tokens, if another scheduler's device drew them.
          one_by_one: each token is to be planned only once those before it have been received.

        Raises:
          CapacityError: the pools are too small for it, even if it ran alone.
        """
        left = max_tokens - len(drawn)
        if not prompt_ids or left < 1:
            raise ValueError(f"a request has at least one token to read and one to draw, found {left} to draw")
        if self.policy.rows == "asked" and rows not in self.policy.row_sizes:
            raise ValueError(f"a decode call can have {self.policy.row_sizes} rows, but {rows} were asked for")
        if refusal := self._allocators[0].refusal(len(prompt_ids), max_tokens):
            raise CapacityError(refusal)
        self._added += 1
        sequence = Sequence(self._added, np.asarray(prompt_ids, np.int32), max_tokens, rows, one_by_one)
        sequence.generated.extend(drawn)
        sequence.planned = len(drawn)
        self._requests[sequence.number] = sequence
        self._waiting.append(sequence)
        return sequence.number

    def cached_tokens(self, request: int) -> int:
        """How many tokens of an open request's prompt were found in pages; 0 before it was looked up."""
        return self._requests[request].cached or 0

    def end(self, request: int) -> None:
        """Forgets a request: it has all its tokens, or nobody wants them any more."""
        sequence = self._requests.pop(request)
        sequence.ended = True
        if sequence.slot is not None:
            self._leave(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def hold(self, request: int, held: bool) -> None:
        """Sets whether an open request is held. What is under way for it goes on."""
        self._requests[request].held = held

    @property
    def reads(self) -> bool:
        """Whether there is more to read of prompts whose requests have a slot."""
        return any(sequence.is_reading and sequence.awaited is None for sequence in self._active)

    def receive(self, plan: int, tokens: AnySequence[AnySequence[int]]) -> list[Drawn]:
        """Takes what the oldest plan in flight drew.

        Args:
          plan: its number.
          tokens: of each row of its decode call, those drawn; negative if none could be. A request that draws one
            must end. Those of requests that have ended may be left out, as if they had drawn none.

        Returns:
          Those of requests that have not ended, in the order of the rows.
        """
        if not self._in_flight or self._in_flight[0][0] != plan:
            raise ValueError(f"plan {plan} is not the oldest in flight")
        wanted = []
        for (sequence, draws), drawn in zip(self._in_flight.popleft()[1], tokens, strict=True):
            if len(drawn) != draws and not sequence.ended:
                raise ValueError(f"plan {plan} draws {draws} tokens for request {sequence.number}, found {len(drawn)}")
            sequence.in_flight -= draws > 0
            if not sequence.ended and draws:
                sequence.generated.extend(map(int, drawn))
                wanted.append(Drawn(sequence.number, tuple(map(int, drawn))))
        return wanted

    def lost(self) -> None:
        """Starts anew after the device lost its pages: running requests will be resumed, plans in flight are void."""
        for sequence in reversed(list(self._running)):
            self._set_aside(sequence)
        self._in_flight.clear()
        for sequence in self._requests.values():
            sequence.planned, sequence.in_flight = len(sequence.generated), 0
            if not sequence.is_drawn and sequence not in self._waiting:
                bisect.insort(self._waiting, sequence, key=_age)
        for allocator in self._allocators:
            allocator.forget()

    @property
    def ready(self) -> list[int]:
        """Requests whose next tokens only wait to be planned, and for what they may be."""
        return [sequence.number for sequence in self._active if sequence.is_ready]

    def plan(self, *, decode: bool = True, late: frozenset[int] = frozenset()) -> Plan | None:
        """What to dispatch next; None if nothing can be done before tokens are received or requests added.

        Args:
          decode: whether requests decode; if not, prompts are read only.
          late: requests that do not decode: which tokens they may draw is not known yet.
        """
        for sequence in self._running:
            self._allocator(sequence).settle(sequence)
        self._join()
        active = self._active
        for index, sequence in enumerate(active):
            sequence.late = sequence.number in late
            if not sequence.begun:
                self._look_for_readers(sequence, active[:index])
        steps = self._steps()
        for turn in turns(self._active, self.policy):
            draft = Draft([Part(self.policy.chunk) for _ in self._allocators], turn)
            for sequence in self._active:
                if sequence.slot is not None:  # it was not set aside for the sake of an older one
                    self._advance(sequence, draft, steps if decode else 0)
            if not draft.is_empty:
                return self._finished(draft, steps)
        return None

    def _allocator(self, sequence: Sequence) -> Allocator:
        return self._allocators[sequence.shard]

    @property
    def _has_newcomers(self) -> bool:
        """Whether a request with a slot waits for its first token."""
        return any(sequence.is_reading or not sequence.planned for sequence in self._active)

    @property
    def _active(self) -> list[Sequence]:
        """Requests with a slot for which something may be planned; oldest first."""
        return [sequence for sequence in self._running if not sequence.held]

    def _join(self) -> None:
        """Gives free slots to those that wait, the oldest first. None passes an older one."""
        waiting = [each for each in self._waiting if not each.held]
        if not waiting or not (any(self._free_slots) or self._held()):
            return
        promised = [
            allocator.promised([each for each in self._active if each.shard == shard])
            for shard, allocator in enumerate(self._allocators)
        ]
        for sequence in waiting:
            # To be resumed, all its tokens must be known.
            if sequence.in_flight or not self._make_room(sequence, promised):
                return
            self._waiting.remove(sequence)
            shard, allocator = sequence.shard, self._allocator(sequence)
            sequence.slot = self._free_slots[shard].pop()
            allocator.join(sequence)
            bisect.insort(self._running, sequence, key=_age)
            added = allocator.promised([sequence])
            promised[shard] = [sum(pages) for pages in zip(promised[shard], added, strict=True)]

    def _make_room(self, sequence: Sequence, promised: AnySequence[AnySequence[int]]) -> bool:
        """Whether a request can join a shard, which it is then of: if need be after held ones, which are promised no
        pages, have been set aside."""
        shards = sorted(range(len(self._allocators)), key=lambda shard: self._reluctance(sequence, shard))
        for may_set_aside in (False, True) if self._held() else (False,):
            for shard in shards:
                sequence.shard = shard
                while not (has_room := self._has_room(sequence, promised[shard])) and may_set_aside:
                    if (victim := self._held(shard)) is None:
                        break
                    self._set_aside(victim)
                if has_room:
                    return True
        return False

    def _has_room(self, sequence: Sequence, promised: AnySequence[int]) -> bool:
        return bool(self._free_slots[sequence.shard]) and self._allocator(sequence).has_room(sequence, promised)

    def _reluctance(self, sequence: Sequence, shard: int) -> int:
        """What speaks against a shard: as tokens that a request reads there, each that runs there counts as a page."""
        if len(self._allocators) == 1:
            return 0
        running = sum(each.shard == shard for each in self._active)
        cached = self._allocators[shard].match(sequence).length if self.policy.reuse else 0
        return self.policy.page * running - cached

    def _held(self, shard: int | None = None) -> Sequence | None:
        """The newest held request that has a slot, if need be of one shard."""
        held = (sequence for sequence in reversed(self._running) if sequence.held)
        return next((sequence for sequence in held if shard is None or sequence.shard == shard), None)

    def _steps(self) -> int:
        """One, or several if nobody waits for a token and at least half of them are wanted."""
        most = max((sequence.steps_left for sequence in self._active), default=0)
        some_wait = self._has_newcomers or any(each.one_by_one and not each.is_drawn for each in self._active)
        return self.policy.steps if not some_wait and 2 * most >= self.policy.steps else 1

    def _advance(self, sequence: Sequence, draft: Draft, steps: int) -> None:
        """Plans what a running request does next; with 0 steps, it does not decode."""
        if not sequence.begun:
            if sequence.awaited is not None:
                return
            draft.copies += self._allocator(sequence).begin(sequence)
        if sequence.is_reading:
            self._read(sequence, draft)
        if steps and sequence.is_ready and not sequence.late and draft.turn.admits(sequence):
            self._decode(sequence, draft, steps)

    def _look_for_readers(self, sequence: Sequence, older_ones: AnySequence[Sequence]) -> None:
        """Lets a request wait if an older one reads whole pages that it begins with, too."""
        if not self.policy.reuse or (sequence.awaited is not None and self._is_awaited(*sequence.awaited)):
            return
        sequence.awaited = None
        unit = max(self.policy.page, self.policy.chunk_multiple)
        found = self._allocator(sequence).match(sequence).length
        next_T = sequence.prompt_T[found : found + unit]
        if len(next_T) < unit:
            return
        wanted = next_T.tobytes()
        for older in older_ones:
            if older.shard != sequence.shard or not older.is_reading:
                continue
            if older.prompt_T[found : found + unit].tobytes() != wanted:
                continue
            shared = min(common(older.prompt_T, sequence.prompt_T), sequence.known - 1)
            shared = self.policy.reused(older.prompt, shared) // unit * unit
            if shared >= found + unit and self._is_awaited(older, shared):
                sequence.awaited = older, shared
                return

    def _is_awaited(self, older: Sequence, shared: int) -> bool:
        progresses = older.slot is not None and older.is_reading and not older.held
        return progresses and older.in_tree * self.policy.page < shared

    def _read(self, sequence: Sequence, draft: Draft) -> None:
        """Plans the next piece of a prompt."""
        part = draft.parts[sequence.shard]
        if self.policy.packed and (part.room <= 0 or len(part.pieces) == self.policy.pieces):
            return
        left = sequence.prompt - sequence.position
        count = self.policy.piece(left, self._share(sequence, part))
        if not count:
            return
        room = self._reserve(sequence, sequence.position + count) - sequence.position
        if room < count:
            count = room - room % self.policy.chunk_multiple if self.policy.packed else 0
        if count <= 0:
            return
        ids = tuple(sequence.prompt_T[sequence.position : sequence.position + count].tolist())
        assert sequence.slot is not None
        part.pieces.append((Piece(sequence.slot, 0, count, sequence.position, count == left), ids))
        part.room -= count if self.policy.packed else self.policy.cost(count)
        sequence.position += count

    def _share(self, sequence: Sequence, part: Part) -> int:
        """The prompt tokens of a plan that a request may use: what newer ones leave, but at least half a chunk."""
        if not self.policy.packed:
            return part.room if part.pieces else 2 * self.policy.chunk  # the first piece has any cost
        least = self.policy.chunk // 2
        left = part.room
        for each in self._running[bisect.bisect_right(self._running, sequence.number, key=_age) :]:
            if left <= least:
                break  # with hundreds of prompts, looking at all of them for each would take long
            if each.shard == sequence.shard and each.awaited is None and not each.held:
                left -= max(0, each.prompt - each.position)
        return min(part.room, max(least, left))

    def _decode(self, sequence: Sequence, draft: Draft, steps: int) -> None:
        """Plans the next row of a request, with fewer steps if pages run out."""
        given, draws, feeds = sequence.row(steps)
        room = self._reserve(sequence, sequence.position + feeds) - sequence.position
        if room < feeds:
            given, draws, feeds = sequence.row(room)
        if not given and not draws:
            return
        assert sequence.slot is not None
        draft.rows.append((sequence, Row(sequence.slot, sequence.position, given, draws, feeds)))
        sequence.position += feeds
        sequence.planned += draws

    def _reserve(self, sequence: Sequence, positions: int) -> int:
        """Takes pages up to a number of positions, if need be from held requests, then newer ones. Returns the room."""
        while (room := self._allocator(sequence).extend(sequence, positions)) < positions:
            newest = next(each for each in reversed(self._running) if each.shard == sequence.shard)
            victim = self._held(sequence.shard) or newest
            if victim is sequence:
                break
            self._set_aside(victim)
        return room

    def _set_aside(self, sequence: Sequence) -> None:
        self._leave(sequence)
        if not sequence.is_drawn:
            bisect.insort(self._waiting, sequence, key=_age)

    def _leave(self, sequence: Sequence) -> None:
        """Takes slot and pages."""
        assert sequence.slot is not None
        self._allocator(sequence).release(sequence)
        self._running.remove(sequence)
        self._free_slots[sequence.shard].append(sequence.slot)
        sequence.slot, sequence.joined, sequence.awaited = None, False, None

    def _finished(self, draft: Draft, steps: int) -> Plan:
        joins, tables = self._changes()
        of_shards = Counter(sequence.shard for sequence, _ in draft.rows)
        size = draft.turn.size or smallest(self.policy.row_sizes, max(of_shards.values(), default=1))
        decode = DecodeCall(size, steps, tuple(row for _, row in draft.rows)) if draft.rows else None
        self._plans += 1
        plan = Plan(self._plans, joins, tables, tuple(draft.copies), draft.calls(self.policy), decode)
        # Who could not take its turn, for want of pages, lets others have theirs.
        for sequence in (*draft.turn.chosen, *(each for each, _ in draft.rows)):
            sequence.decoded = plan.number
        if plan.draws:
            self._in_flight.append((plan.number, [(sequence, row.draws) for sequence, row in draft.rows]))
            for sequence, row in draft.rows:
                sequence.in_flight += row.draws > 0
        return plan

    def _changes(self) -> tuple[tuple[Join, ...], tuple[TableEntry, ...]]:
        """What the device does not know yet of slots and tables."""
        joins, tables = [], []
        for sequence in self._running:
            assert sequence.slot is not None
            if not sequence.joined:
                joins.append(Join(sequence.slot, sequence.number, tuple(sequence.generated)))
                sequence.joined = True
            first = self._allocator(sequence).first
            for pool, index in sorted(sequence.changed):
                tables.append(TableEntry(first + pool, sequence.slot, index, sequence.pages[pool][index]))
            sequence.changed.clear()
        return tuple(joins), tuple(tables)


def _age(sequence: Sequence) -> int:
    return sequence.number
