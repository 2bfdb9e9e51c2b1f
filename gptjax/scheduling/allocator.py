"""Gives sequences the pages that they need, shares those that the tree has, and takes back what they leave."""

from collections.abc import Sequence as AnySequence

from gptjax.scheduling.plan import Copy
from gptjax.scheduling.policy import Policy
from gptjax.scheduling.pool import Pool
from gptjax.scheduling.prefix_tree import Match, PrefixTree
from gptjax.scheduling.sequence import Sequence


class Allocator:
    """The pools of one shard, the tree, and what sequences hold of them.

    While a plan is made, pages are only taken. They are dropped between plans (`settle`), or by a sequence that the
    plan has nothing to do for (`release`). So no page has two uses in one plan.
    """

    def __init__(self, pools: AnySequence[Pool], policy: Policy, first: int = 0):
        """With `first`, the number in plans of the first pool."""
        self.pools = pools
        self.first = first
        self.tree = PrefixTree(pools, policy.page, share_decoded=policy.share_decoded)
        self._policy = policy

    def refusal(self, prompt: int, most: int) -> str | None:
        """Why a request can never run, with the numbers; None if it can."""
        page = self._policy.page
        length = prompt + most - 1
        for pool in self.pools:
            needed = self._most_pages(pool, prompt, length)
            if needed > pool.size:
                return (
                    f"a prompt of {prompt} tokens with up to {most} more needs {needed} pages of {page} positions in "
                    f"the layers with {pool.name} attention, but the cache has {pool.size}: "
                    "ask for fewer tokens, or give the cache more memory"
                )
        return None

    def promised(self, running: AnySequence[Sequence]) -> list[int]:
        """The pages of each pool that running sequences soon take in addition to those that they hold."""
        return [
            sum(max(0, self._soon(pool, each) - _held(each, number)) for each in running)
            for number, pool in enumerate(self.pools)
        ]

    def has_room(self, sequence: Sequence, promised: AnySequence[int]) -> bool:
        """Whether a sequence can join and read its prompt. Others will take the `promised` pages of each pool."""
        shared = self._shared(sequence)
        for pool, others, has in zip(self.pools, promised, shared, strict=True):
            if pool.free + pool.idle - others < self._soon(pool, sequence) - has:
                return False
        return True

    def begin(self, sequence: Sequence) -> list[Copy]:
        """Shares what the tree has of a sequence that just took a slot, and settles where it continues."""
        tree, multiple = self.tree, self._policy.chunk_multiple
        sequence.begun = True
        sequence.node = tree.root if self._policy.reuse else None
        copies: list[Copy] | None = []
        if self._policy.reuse:
            match = self.match(sequence)
            copies = self._share(sequence, match)
            if copies is None:  # no room for a copy
                whole = len(match.path) * self._policy.page
                match = tree.match(sequence.tokens(0, whole), sequence.prompt, whole, multiple)
                copies = self._share(sequence, match)
        if sequence.cached is None:
            sequence.cached = min(sequence.position, sequence.prompt)
        return copies or []

    def match(self, sequence: Sequence) -> Match:
        """What the tree has of a sequence, at least one token of which must be computed."""
        limit = sequence.known - 1
        return self.tree.match(sequence.tokens(0, limit), sequence.prompt, limit, self._policy.chunk_multiple)

    def extend(self, sequence: Sequence, positions: int) -> int:
        """Takes pages for a sequence up to a number of positions, as far as there are any.

        Returns:
          The positions that its pages have room for.
        """
        tables = sequence.pages
        while (count := len(tables[0])) * self._policy.page < positions:
            taken = [self._take(number) for number in range(len(self.pools))]
            if not all(taken):
                for pool, page in zip(self.pools, taken, strict=True):
                    if page:
                        pool.drop(page)
                break
            for number, page in enumerate(taken):
                tables[number].append(page)
                sequence.changed.add((number, count))
        return count * self._policy.page

    def settle(self, sequence: Sequence) -> None:
        """What follows from the plans so far: puts whole pages of the prompt in the tree, and drops those not needed.

        A plan later than the ones that wrote a page may read it.
        """
        self._drop_sources(sequence)
        written = min(sequence.position, sequence.prompt)
        self._put(sequence, self._policy.reused(sequence.prompt, written) // self._policy.page)
        for number, pool in enumerate(self.pools):
            pages, first = sequence.pages[number], self._first(pool, sequence.position)
            for index in range(sequence.first[number], first):
                if pages[index]:
                    pool.drop(pages[index])
                    pages[index] = 0
                    sequence.changed.add((number, index))
            sequence.first[number] = max(first, sequence.first[number])

    def release(self, sequence: Sequence) -> None:
        """Takes back all pages of a sequence. The tree keeps those whose tokens are known."""
        self._drop_sources(sequence)
        if sequence.begun:
            self._leave(sequence)
        for index in reversed(range(len(sequence.pages[0]))):
            for pool, pages in zip(self.pools, sequence.pages, strict=True):
                if pages[index]:
                    pool.drop(pages[index])
        sequence.pages, sequence.first, sequence.changed = [], [], set()
        sequence.node, sequence.in_tree, sequence.position, sequence.begun = None, 0, 0, False

    def join(self, sequence: Sequence) -> None:
        """Gives a sequence empty tables."""
        sequence.pages = [[] for _ in self.pools]
        sequence.first = [0] * len(self.pools)

    def forget(self) -> None:
        """Empties the tree. No sequence may hold pages."""
        for number, pool in enumerate(self.pools):
            while self.tree.evict(number):
                pass
            assert pool.free == pool.size, "a page is held"

    def _leave(self, sequence: Sequence) -> None:
        """Puts all pages in the tree whose tokens are known, the last of them perhaps not full."""
        size = self._policy.page
        drawn = sequence.generated
        known = sequence.prompt + (drawn.index(-1) if -1 in drawn else len(drawn))
        length = self._policy.reused(sequence.prompt, min(sequence.position, known))
        self._put(sequence, length // size)
        if length > sequence.in_tree * size and sequence.in_tree == length // size:
            self._insert(sequence, length)
        if sequence.node is not None:
            self.tree.prune(sequence.node)  # without a full pool, its pages may all be behind the window

    def _put(self, sequence: Sequence, count: int) -> None:
        """Puts the first pages of a sequence in the tree."""
        while sequence.in_tree < count and sequence.node is not None:
            self._insert(sequence, (sequence.in_tree + 1) * self._policy.page)

    def _insert(self, sequence: Sequence, end: int) -> None:
        """Puts the next page in the tree, up to a position; or uses the one there, if the tree has one."""
        if sequence.node is None or not self.tree.has(sequence.node):
            sequence.node = None
            return
        index = sequence.in_tree
        start = index * self._policy.page
        key = self.tree.key(sequence.tokens(start, end).tobytes(), start, sequence.prompt)
        node = self.tree.insert(sequence.node, key, [pages[index] for pages in sequence.pages])
        for number, (pool, pages) in enumerate(zip(self.pools, sequence.pages, strict=True)):
            if pages[index] and pages[index] != node.pages[number]:
                pool.hold(node.pages[number])
                pool.drop(pages[index])
                pages[index] = node.pages[number]
                sequence.changed.add((number, index))
        sequence.node, sequence.in_tree = node, index + 1

    def _share(self, sequence: Sequence, match: Match) -> list[Copy] | None:
        """Puts a match's pages in a sequence's tables. Changes nothing and returns None if copies have no room."""
        size = self._policy.page
        sequence.sources = [] if match.tail is None else list(enumerate(match.tail.pages))
        for number, page in sequence.sources:
            self.pools[number].hold(page)
        for number, pool in enumerate(self.pools):
            first = self._first(pool, match.length)
            pages = [node.pages[number] if index >= first else 0 for index, node in enumerate(match.path)]
            for index in range(first, len(pages)):
                pool.hold(pages[index])
                sequence.changed.add((number, index))
            sequence.pages[number] = pages
            sequence.first[number] = first
        copies = []
        if match.tail is not None:
            index = len(match.path)
            if self.extend(sequence, match.length) < match.length:
                self._unshare(sequence)
                return None
            for number, source in sequence.sources:
                target, count = sequence.pages[number][index], match.length - index * size
                copies.append(Copy(self.first + number, source, target, count))
        sequence.position, sequence.in_tree = match.length, len(match.path)
        sequence.node = match.path[-1] if match.path else self.tree.root
        return copies

    def _unshare(self, sequence: Sequence) -> None:
        self._drop_sources(sequence)
        for index in reversed(range(len(sequence.pages[0]))):
            for pool, pages in zip(self.pools, sequence.pages, strict=True):
                if pages[index]:
                    pool.drop(pages[index])
        sequence.changed.clear()
        self.join(sequence)

    def _drop_sources(self, sequence: Sequence) -> None:
        for number, page in sequence.sources:
            self.pools[number].drop(page)
        sequence.sources = []

    def _take(self, number: int) -> int:
        """Takes a free page, or evicts one from the tree. Returns 0 if neither is possible."""
        pool = self.pools[number]
        while not (page := pool.take()):
            if not self.tree.evict(number):
                return 0
        return page

    def _most_pages(self, pool: Pool, prompt: int, length: int) -> int:
        """The most pages of a pool that a sequence ever holds at once."""
        policy = self._policy
        if pool.window is None:
            return policy.pages(length)
        # A plan that ends a prompt has one step.
        across = pool.window - 1 + max(min(policy.chunk, prompt) + 1, policy.steps)
        return min(policy.pages(length), policy.pages_across(across))

    def _soon(self, pool: Pool, sequence: Sequence) -> int:
        """The pages that a sequence needs to read its prompt and what it drew, and for the next decode call."""
        length = min(sequence.known + self._policy.steps, sequence.length)
        if pool.window is None or sequence.is_reading:
            return self._most_pages(pool, sequence.prompt, length)
        return min(self._policy.pages(length), self._policy.pages_across(pool.window - 1 + self._policy.steps))

    def _shared(self, sequence: Sequence) -> list[int]:
        """How many of these it would share with other sequences, of each pool. Idle pages count as room."""
        if not self._policy.reuse:
            return [0] * len(self.pools)
        match = self.match(sequence)
        shared = []
        for number, pool in enumerate(self.pools):
            pages = [node.pages[number] for node in match.path[self._first(pool, match.length) :]]
            shared.append(sum(not pool.is_idle(page) for page in pages))
        return shared

    def _first(self, pool: Pool, position: int) -> int:
        """The index of the first page that a position sees."""
        return 0 if pool.window is None else max(0, position - pool.window + 1) // self._policy.page


def _held(sequence: Sequence, pool: int) -> int:
    return sum(map(bool, sequence.pages[pool][sequence.first[pool] :]))
