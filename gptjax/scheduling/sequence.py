"""A request as the scheduler sees it: its tokens, and where its keys and values are."""

import dataclasses

import numpy as np

from gptjax.scheduling.prefix_tree import Node


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request from its arrival to its end.

    Token i that it generates belongs at position `prompt + i`. The host plans ahead of the tokens that it knows:
    `planned` of them are drawn in plans so far, of which `len(generated)` have been received.
    """

    number: int
    prompt_T: np.ndarray  # int32
    most: int  # tokens to generate at most; the last one is not fed
    rows: int = 0  # of the decode calls that it is in, if the policy lets requests ask for them
    one_by_one: bool = False  # each token is planned only once those before it have been received
    generated: list[int] = dataclasses.field(default_factory=list)
    planned: int = 0
    in_flight: int = 0  # plans that draw for it, of which nothing was received yet
    held: bool = False  # nothing is planned for it
    late: bool = False  # which token it may draw next is not known yet
    decoded: int = 0  # the last plan with a row of it, or in which it was its turn
    ended: bool = False
    cached: int | None = None  # prompt tokens that it did not need to read; None before that is known

    # While it has a slot:
    slot: int | None = None
    shard: int = 0  # that its slot belongs to
    joined: bool = False  # whether a plan says that it has the slot
    begun: bool = False  # whether its position is settled: what it shares has been looked up
    position: int = 0  # the next to be fed
    pages: list[list[int]] = dataclasses.field(default_factory=list)  # of each pool, by position // page; 0: not held
    changed: set[tuple[int, int]] = dataclasses.field(default_factory=set)  # (pool, index) that no plan has said yet
    first: list[int] = dataclasses.field(default_factory=list)  # of each pool: the first index that may be held
    node: Node | None = None  # the last of its pages that is in the tree; None: no more go there
    in_tree: int = 0  # its first pages that are in the tree
    sources: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # (pool, page) the last plan copied from
    awaited: "tuple[Sequence, int] | None" = None  # who reads the same beginning, and how many tokens of it

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_T)

    @property
    def length(self) -> int:
        """The most positions that are ever fed."""
        return self.prompt + self.most - 1

    @property
    def known(self) -> int:
        """Tokens known to the host."""
        return self.prompt + len(self.generated)

    @property
    def is_reading(self) -> bool:
        """Whether some of its prompt has not been planned yet."""
        return not self.begun or self.position < self.prompt

    @property
    def steps_left(self) -> int:
        """Decode steps that it still wants: tokens to be fed again, and those to be drawn."""
        fed = max(0, self.position - self.prompt)
        return 0 if self.is_drawn else self.most - min(fed, self.planned)

    @property
    def is_drawn(self) -> bool:
        """Whether all its tokens are drawn in plans so far."""
        return self.planned == self.most

    @property
    def is_ready(self) -> bool:
        """Whether its prompt is read, and its next token does not wait for one that has not been received."""
        return not (self.is_reading or self.is_drawn or (self.one_by_one and self.in_flight))

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Known tokens from one position to another, int32."""
        if end <= self.prompt:
            return self.prompt_T[start:end]
        later = np.asarray(self.generated[max(0, start - self.prompt) : end - self.prompt], np.int32)
        return np.concatenate((self.prompt_T[start:], later))

    def row(self, steps: int) -> tuple[tuple[int, ...], int, int]:
        """What it does in the next decode steps: tokens given, draws, and how many are fed."""
        fed = self.position - self.prompt
        given = tuple(self.generated[fed : min(self.planned, fed + steps)])
        draws = min(steps - len(given), self.most - self.planned)
        feeds = len(given) + draws - (draws > 0 and self.planned + draws == self.most)
        return given, draws, feeds


def common(first_T: np.ndarray, second_T: np.ndarray) -> int:
    """How many tokens two sequences begin with together."""
    length = min(len(first_T), len(second_T))
    differs_T = first_T[:length] != second_T[:length]
    return int(differs_T.argmax()) if differs_T.any() else length
