"""What a scheduler may do, and how it divides prompts into calls."""

import dataclasses
from typing import Literal, Self

from gptjax.scheduling.pool import PAGE

Rows = Literal["all", "needed", "asked"]
_MOST_CALLS = 8  # calls between two decode steps count as at least 1/8 of a chunk each


@dataclasses.dataclass(frozen=True)
class Policy:
    """The limits and choices of a scheduler."""

    slots: int  # the most requests that run at once; as all that follows, of each shard
    chunk: int  # the most prompt tokens between two decode calls: a power of two
    steps: int = 1  # decode steps of one call, if no request waits for a token
    page: int = PAGE
    smallest_call: int = 32  # tokens: shorter calls are padded
    smallest_rows: int = 1  # of a decode call
    chunk_multiple: int = 1  # prompts are cut, and beginnings reused, only at multiples of this
    packed: bool = True  # pieces of several prompts share a call
    pieces: int = 32  # the most of a call
    # How many a decode call computes: "asked" is as many as its requests ask for, all of them the same number.
    rows: Rows = "needed"
    share_decoded: bool = False  # see `PrefixTree`
    reuse: bool = True  # keep what requests leave behind in the tree
    shards: int = 1  # parts of a device that run the same calls, each with slots and pages of its own

    @classmethod
    def same_bits(
        cls,
        *,
        slots: int,
        chunk: int,
        steps: int = 1,
        page: int = PAGE,
        rows: Rows = "all",
        shards: int = 1,
    ) -> Self:
        """For programs whose rounding depends on their sizes: a request's sizes do not depend on other requests.

        Each piece of a prompt has a call of its own, only whole chunks are reused, and decode computes all rows, or as
        many as a request asks for; or as many as are needed, if only prompts depend on sizes.
        """
        return cls(slots, chunk, steps, page, chunk_multiple=chunk, packed=False, rows=rows, shards=shards)

    def __post_init__(self) -> None:
        sizes = "slots", "chunk", "steps", "page", "smallest_call", "smallest_rows", "chunk_multiple", "pieces"
        for name in (*sizes, "shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.chunk & (self.chunk - 1):
            raise ValueError(f"chunk must be a power of two, found {self.chunk}")
        if self.chunk % self.chunk_multiple:
            raise ValueError(f"chunk ({self.chunk}) must be a multiple of chunk_multiple ({self.chunk_multiple})")

    @property
    def all_slots(self) -> int:
        """Those of all shards, numbered shard by shard."""
        return self.shards * self.slots

    @property
    def call_sizes(self) -> tuple[int, ...]:
        """The sizes of prefill calls, in tokens: powers of two up to the chunk."""
        return powers(min(self.smallest_call, self.chunk), self.chunk)

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """The sizes of decode calls, in rows: `smallest_rows` and its doubles below the slots, and these."""
        return (self.slots,) if self.rows == "all" else powers(min(self.smallest_rows, self.slots), self.slots)

    def shard(self, slot: int) -> int:
        """The shard that a slot belongs to."""
        return slot // self.slots

    def pages(self, positions: int) -> int:
        """How many pages hold this many positions from 0."""
        return -(-positions // self.page)

    def pages_across(self, positions: int) -> int:
        """The most pages that this many positions in a row can lie in."""
        return (positions + self.page - 2) // self.page + 1

    def reused(self, prompt: int, length: int) -> int:
        """How many first tokens of a sequence others may reuse.

        Args:
          prompt: tokens of its prompt.
          length: tokens in pages.
        """
        whole = prompt - prompt % self.chunk_multiple
        return length if self.packed or whole == prompt else min(length, whole)

    def piece(self, left: int, share: int) -> int:
        """How many tokens to read next of a prompt; 0 if its share of the call is too small.

        Args:
          left: tokens not read yet, which begin at a place where the prompt may be cut.
          share: the tokens that the call has room for.
        """
        if not self.packed:
            count = self._alone(left)
            return count if self.cost(count) <= share else 0
        return left if left <= share else share - share % self.chunk_multiple

    def cost(self, count: int) -> int:
        """The tokens that a call of its own counts as, of a chunk between two decode calls."""
        return max(smallest(self.call_sizes, count), self.chunk // _MOST_CALLS)

    def _alone(self, left: int) -> int:
        """A whole chunk, or the rest; half a chunk if at least a quarter of the last call would be padding."""
        half = max(self.chunk // 2, self.call_sizes[0])
        return half if half < left <= self.chunk * 3 // 4 else min(left, self.chunk)


def smallest(sizes: tuple[int, ...], count: int) -> int:
    """The smallest of ascending sizes that holds `count`."""
    return next(size for size in sizes if size >= count)


def powers(first: int, last: int) -> tuple[int, ...]:
    """The first size and its doubles that are less than the last, and this."""
    sizes = [first]
    while sizes[-1] * 2 < last:
        sizes.append(sizes[-1] * 2)
    return tuple(dict.fromkeys((*sizes, last)))
