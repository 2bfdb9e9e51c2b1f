"""Which pages of a pool are in use: numbers only; the pages themselves lie on the device."""

from collections import OrderedDict

PAGE = 128  # places of a page


class Pool:
    """The pages of one kind of layer, counted by how many hold them.

    A page is held by the tables of sequences and by the tree of prefixes. One that the tree alone holds is idle: it can
    be taken back when room is needed. Page 0 is never handed out; unused entries of a table point to it.

    Pages may be dropped while the device still works on steps that use them: programs run in the order in which they
    are dispatched, so whatever a later plan writes there comes after.
    """

    def __init__(self, pages: int, window: int | None = None):
        """A pool of which all pages are free.

        Args:
          pages: in all, with page 0.
          window: the positions that its layers see, including a query's own; None if they see all.
        """
        if pages < 2:
            raise ValueError(f"a pool needs at least 2 pages, found {pages}: the first is never used")
        if window is not None and window < 1:
            raise ValueError(f"a window must be at least 1, found {window}")
        self.window = window
        self._holders = [0] * pages
        self._free = list(range(pages - 1, 0, -1))  # taken from the end
        self._kept: set[int] = set()  # those that the tree holds
        self._idle: OrderedDict[int, None] = OrderedDict()  # the one idle for longest first

    @property
    def size(self) -> int:
        """The pages that can be in use at once."""
        return len(self._holders) - 1

    @property
    def free(self) -> int:
        """The pages that nobody holds."""
        return len(self._free)

    @property
    def idle(self) -> int:
        """The pages that only the tree holds."""
        return len(self._idle)

    @property
    def name(self) -> str:
        """The kind of its layers, for messages."""
        return "full" if self.window is None else "sliding"

    def holders(self, page: int) -> int:
        """How many hold a page."""
        return self._holders[page]

    def is_idle(self, page: int) -> bool:
        """Whether only the tree holds a page."""
        return page in self._idle

    def take(self) -> int:
        """Takes a free page, which is then held once. Returns 0 if no page is free."""
        if not self._free:
            return 0
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more holds a page in use."""
        if not self._holders[page]:
            raise ValueError(f"page {page} is free")
        self._holders[page] += 1
        self._idle.pop(page, None)

    def drop(self, page: int) -> None:
        """One fewer holds a page; the last one frees it."""
        if not self._holders[page]:
            raise ValueError(f"page {page} is free already")
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)
        elif self._holders[page] == 1 and page in self._kept:
            self._idle[page] = None

    def keep(self, page: int) -> None:
        """The tree holds a page that a sequence holds, too."""
        if page in self._kept:
            raise ValueError(f"page {page} is in the tree already")
        self.hold(page)
        self._kept.add(page)

    def give_up(self, page: int) -> None:
        """The tree no longer holds a page."""
        self._kept.remove(page)
        self._idle.pop(page, None)
        self.drop(page)

    def longest_idle(self) -> int:
        """The least recently used idle page; 0 if no page is idle."""
        return next(iter(self._idle), 0)

    def check(self) -> None:
        """Raises `AssertionError` unless all numbers agree. For tests: takes as long as there are pages."""
        used = {page for page, holders in enumerate(self._holders) if holders}
        assert min(self._holders) == 0 == self._holders[0], "page 0 is in use, or a page has a negative count"
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert used.isdisjoint(self._free) and len(used) + len(self._free) == self.size, "a page was lost"
        assert self._kept <= used, "the tree holds a free page"
        assert set(self._idle) == {page for page in self._kept if self._holders[page] == 1}, "a wrong page is idle"
