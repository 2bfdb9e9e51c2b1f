"""A plan while it is being made."""

import dataclasses
import itertools

from gptjax.scheduling.plan import Copy, Piece, PrefillCall, Row
from gptjax.scheduling.policy import Policy, smallest
from gptjax.scheduling.sequence import Sequence


@dataclasses.dataclass
class Turn:
    """Who may have a row of a plan's decode call."""

    size: int | None  # of the call; 0: nothing has settled it yet; None: not limited
    chosen: list[Sequence]  # who is to have a row; the other rows are for those whose prompts end in this plan
    others: int = 0  # that have got a row

    def admits(self, sequence: Sequence) -> bool:
        """Whether a sequence may have a row. The first one settles the size if nothing has."""
        if self.size is None or sequence in self.chosen:
            return True
        self.size = self.size or sequence.rows
        if sequence.rows != self.size or len(self.chosen) + self.others == self.size:
            return False
        self.others += 1
        return True


@dataclasses.dataclass
class Draft:
    """What a plan does so far."""

    room: int  # prompt tokens that it still takes
    turn: Turn
    copies: list[Copy] = dataclasses.field(default_factory=list)
    pieces: list[tuple[Piece, tuple[int, ...]]] = dataclasses.field(default_factory=list)
    rows: list[tuple[Sequence, Row]] = dataclasses.field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be dispatched."""
        return not (self.copies or self.pieces or self.rows)

    def calls(self, policy: Policy) -> tuple[PrefillCall, ...]:
        """All pieces in one call, or each in its own."""
        if not self.pieces:
            return ()
        groups = [self.pieces] if policy.packed else [[each] for each in self.pieces]
        return tuple(_call(group, policy) for group in groups)


def _call(pieces: list[tuple[Piece, tuple[int, ...]]], policy: Policy) -> PrefillCall:
    tokens = tuple(itertools.chain.from_iterable(ids for _, ids in pieces))
    first = pieces[0][0].start
    moved = tuple(dataclasses.replace(piece, start=piece.start - first) for piece, _ in pieces)
    return PrefillCall(smallest(policy.call_sizes, len(tokens)), tokens, moved)
