"""A tree of the beginnings whose keys and values are still in pages, shared by all sequences."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from gptjax.scheduling.pool import Pool

_ID = 4  # bytes of a token id
_LEAST_COPIED = 8  # a page is copied for the sake of at least 1/8 of its places


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    """One page of a beginning; its parent is the page before. A page that is not full has no children."""

    parent: "Node | None"
    tokens: bytes  # int32 ids
    prefilled: int  # how many of these prefill wrote; decode wrote the others
    pages: list[int]  # one of each pool; 0: not held any more
    # By their first token, as a prefix that many prompts share has thousands of children; then by their keys.
    children: "dict[bytes, dict[tuple[bytes, int], Node]]" = dataclasses.field(default_factory=dict)

    def child(self, key: tuple[bytes, int]) -> "Node | None":
        """The child of a key, if there is one."""
        return self.children.get(key[0][:_ID], {}).get(key)

    @property
    def key(self) -> tuple[bytes, int]:
        """What it is found by."""
        return self.tokens, self.prefilled


@dataclasses.dataclass(frozen=True)
class Match:
    """How much of a sequence the tree has."""

    length: int  # tokens
    path: tuple[Node, ...]  # whole pages
    tail: Node | None = None  # the node whose first `length % page` places are used, by copying its pages


class PrefixTree:
    """Beginnings of sequences, page by page, each with its page in every pool.

    Idle pages are evicted when a pool needs room, those unused for longest first. A node whose page in a pool without a
    window is evicted leaves the tree. A page in a pool with a window can go alone: then no sequence can continue from
    where it would be seen.

    Decode may round keys and values differently from prefill. So a sequence shares only pages in which each place was
    written as it would have written it: its prompt by prefill and what follows by decode. `share_decoded` removes this
    condition.
    """

    def __init__(self, pools: Sequence[Pool], page: int, *, share_decoded: bool = False):
        """An empty tree.

        Args:
          page: places of a page.
        """
        self._pools = pools
        self._page = page
        self._share_decoded = share_decoded
        self._nodes: list[dict[int, Node]] = [{} for _ in pools]  # by page, of each pool
        self.root = Node(None, b"", 0, [0] * len(pools))

    def match(self, tokens_T: np.ndarray, prompt: int, limit: int, multiple: int = 1) -> Match:
        """The longest beginning of a sequence from whose end it can be continued.

        Args:
          tokens_T: int32.
          prompt: how many of these are its prompt, written by prefill.
          limit: the most tokens to match.
          multiple: the length is a multiple of this.
        """
        path: list[Node] = []
        node, tokens = self.root, tokens_T[:limit].tobytes()
        while (end := (start := len(path) * self._page) + self._page) <= limit:
            found = node.child(self.key(tokens[start * _ID : end * _ID], start, prompt))
            if found is None:
                break
            path.append(node := found)
        return self._with_tail(node, path, tokens_T[:limit], prompt, multiple) or self._whole(path, multiple)

    def key(self, tokens: bytes, start: int, prompt: int) -> tuple[bytes, int]:
        """The key of a sequence's page.

        Args:
          tokens: its int32 ids.
          start: the position of the first.
          prompt: tokens of the sequence's prompt.
        """
        count = len(tokens) // _ID
        return tokens, count if self._share_decoded else min(max(prompt - start, 0), count)

    def insert(self, parent: Node, key: tuple[bytes, int], pages: Sequence[int]) -> Node:
        """Adds a page of a sequence, or finds it there.

        Args:
          pages: its page in each pool, which the sequence holds; 0 if it does not.

        Returns:
          The node. Its pages may be others than the given ones, of the same content.
        """
        node = parent.child(key)
        if node is None:
            node = Node(parent, *key, [0] * len(self._pools))
            parent.children.setdefault(key[0][:_ID], {})[key] = node
        for pool, (pages_of_pool, page) in enumerate(zip(self._nodes, pages, strict=True)):
            if page and not node.pages[pool]:
                self._pools[pool].keep(page)
                node.pages[pool] = page
                pages_of_pool[page] = node
        return node

    def evict(self, pool: int) -> bool:
        """Gives up the page of a pool that has been idle for longest. Returns whether there was one."""
        page = self._pools[pool].longest_idle()
        if not page:
            return False
        node = self._nodes[pool][page]
        if self._pools[pool].window is None:
            # A sequence holds the pages before each of its pages, too, and drops the last first. So the page that has
            # been idle for longest has no others after it.
            for each in range(len(self._pools)):
                self._give_up(node, each)
        else:
            self._give_up(node, pool)
        self.prune(node)
        return True

    def prune(self, node: Node) -> None:
        """Removes a node, and those before it, if they have neither pages nor others after them."""
        while (parent := node.parent) is not None and not node.children and not any(node.pages):
            alike = parent.children[node.tokens[:_ID]]
            del alike[node.key]
            if not alike:
                del parent.children[node.tokens[:_ID]]
            node.parent = None
            node = parent

    def has(self, node: Node) -> bool:
        """Whether a node is still in the tree."""
        return node is self.root or node.parent is not None

    def nodes(self) -> Iterator[Node]:
        """All nodes except the root, parents first."""
        left = [self.root]
        while left:
            node = left.pop()
            if node is not self.root:
                yield node
            for alike in node.children.values():
                left.extend(alike.values())

    def _give_up(self, node: Node, pool: int) -> None:
        if page := node.pages[pool]:
            node.pages[pool] = 0
            del self._nodes[pool][page]
            self._pools[pool].give_up(page)

    def _whole(self, path: list[Node], multiple: int) -> Match:
        for count in range(len(path), 0, -1):
            length = count * self._page
            if length % multiple == 0 and self._resumes(path[:count], length):
                return Match(length, tuple(path[:count]))
        return Match(0, ())

    def _with_tail(self, node: Node, path: list[Node], tokens: np.ndarray, prompt: int, multiple: int) -> Match | None:
        """The match that ends inside the page after a path, if one is worth copying."""
        start = len(path) * self._page
        wanted = tokens[start : start + self._page]
        best, most = None, max(1, self._page // _LEAST_COPIED) - 1
        alike = node.children.get(wanted[:1].tobytes(), {}) if len(wanted) > most else {}
        for child in alike.values():
            common = self._common(child, wanted, prompt - start)
            common -= (start + common) % multiple
            if common > most and self._resumes([*path, child], start + common):
                best, most = child, common
        return None if best is None else Match(start + most, tuple(path), best)

    def _common(self, node: Node, wanted: np.ndarray, prompt: int) -> int:
        """How many first places of a node are those of a page whose tokens up to `prompt` are written by prefill."""
        ids = np.frombuffer(node.tokens, np.int32)[: len(wanted)]
        differs = ids != wanted[: len(ids)]
        common = int(differs.argmax()) if differs.any() else len(ids)
        if self._share_decoded:
            return common
        prompt = max(prompt, 0)
        same = node.prefilled == min(prompt, len(node.tokens) // _ID)
        return common if same else min(common, node.prefilled, prompt)

    def _resumes(self, path: Sequence[Node], length: int) -> bool:
        """Whether all pages in the window of the position after a beginning are held."""
        for number, pool in enumerate(self._pools):
            if pool.window is None:
                continue  # a node always has its page there
            first = max(0, length - pool.window + 1) // self._page
            if not all(node.pages[number] for node in reversed(path[first:])):
                return False
        return True
