"""A plan while it is being made."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as AnySequence

from gptjax.scheduling.plan import Copy, Piece, PrefillCall, Row
from gptjax.scheduling.policy import Policy, smallest
from gptjax.scheduling.sequence import Sequence

_Read = tuple[Piece, tuple[int, ...]]  # what a plan reads of a prompt; it starts at 0 until its call is made


@dataclasses.dataclass
class Turn:
    """Who may have a row of a plan's decode call."""

    size: int | None  # of the call; 0: nothing has settled it yet; None: not limited
    chosen: list[Sequence]  # who is to have a row; the other rows are for those whose prompts end in this plan
    taken: Counter[int] = dataclasses.field(default_factory=Counter)  # rows of each shard, by these and by others

    def __post_init__(self) -> None:
        self.taken.update(sequence.shard for sequence in self.chosen)

    def admits(self, sequence: Sequence) -> bool:
        """Whether a sequence may have a row. The first one settles the size if nothing has."""
        if self.size is None or sequence in self.chosen:
            return True
        self.size = self.size or sequence.rows
        if sequence.rows != self.size or self.taken[sequence.shard] == self.size:
            return False
        self.taken[sequence.shard] += 1
        return True


def turns(active: AnySequence[Sequence], policy: Policy) -> Iterator[Turn]:
    """Whose turn it is to decode: who has waited for longest, and others who ask for as many rows.

    If they all need pages that older requests have, it is the turn of the next.

    Args:
      active: requests with a slot.
    """
    if policy.rows != "asked":
        yield Turn(None, [])
        return
    ready = [each for each in active if each.is_ready and not each.late]
    ready.sort(key=lambda sequence: (sequence.decoded, sequence.number))
    if not ready:
        yield Turn(0, [])
    while ready:
        size, taken, chosen = ready[0].rows, Counter[int](), []
        for each in ready:
            if each.rows == size and taken[each.shard] < size:
                taken[each.shard] += 1
                chosen.append(each)
        yield Turn(size, chosen)
        ready = [each for each in ready if each not in chosen and each.slot is not None]


@dataclasses.dataclass
class Part:
    """What a plan reads in one shard."""

    room: int  # prompt tokens that it still takes
    pieces: list[_Read] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Draft:
    """What a plan does so far."""

    parts: list[Part]  # of each shard
    turn: Turn
    copies: list[Copy] = dataclasses.field(default_factory=list)
    rows: list[tuple[Sequence, Row]] = dataclasses.field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be dispatched."""
        return not (self.copies or self.rows or any(part.pieces for part in self.parts))

    def calls(self, policy: Policy) -> tuple[PrefillCall, ...]:
        """All pieces in one call; or each in its own, together with pieces of other shards that take as large a one."""
        if policy.packed:
            most = max(sum(piece.count for piece, _ in part.pieces) for part in self.parts)
            together = [each for part in self.parts for each in part.pieces]
            return (_call(smallest(policy.call_sizes, most), together),) if together else ()
        calls: dict[tuple[int, int], list[_Read]] = {}
        for part in self.parts:
            alike: Counter[int] = Counter()
            for each in part.pieces:
                size = smallest(policy.call_sizes, each[0].count)
                calls.setdefault((size, alike[size]), []).append(each)
                alike[size] += 1
        return tuple(_call(size, pieces) for (size, _), pieces in calls.items())


def _call(size: int, pieces: list[_Read]) -> PrefillCall:
    tokens: list[int] = []
    placed = []
    for piece, ids in pieces:
        placed.append(dataclasses.replace(piece, start=len(tokens)))
        tokens += ids
    return PrefillCall(size, tuple(tokens), tuple(placed))
