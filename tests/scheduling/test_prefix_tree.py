"""The tree of prefixes: what it matches, what it evicts, and in which order."""

import numpy as np
import pytest

from gptjax.scheduling.pool import Pool
from gptjax.scheduling.prefix_tree import Node, PrefixTree

PAGE = 4
WINDOW = 6


def _tree(windows: tuple[int | None, ...] = (None,), pages: int = 40, *, share_decoded: bool = False) -> PrefixTree:
    return PrefixTree([Pool(pages, window) for window in windows], PAGE, share_decoded=share_decoded)


def _ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("latin-1"), np.uint8).astype(np.int32)


def _put(tree: PrefixTree, text: str, prompt: int | None = None) -> list[Node]:
    """A sequence that was read, left all its pages in the tree, and dropped them, the last first."""
    ids, node, nodes = _ids(text), tree.root, []
    prompt = len(ids) if prompt is None else prompt
    for start in range(0, len(ids), PAGE):
        pages = [pool.take() for pool in tree._pools]
        assert all(pages)
        node = tree.insert(node, tree.key(ids[start : start + PAGE].tobytes(), start, prompt), pages)
        for pool, page, kept in zip(tree._pools, pages, node.pages, strict=True):
            pool.hold(kept)
            pool.drop(page)
        nodes.append(node)
    for node in reversed(nodes):
        for pool, page in zip(tree._pools, node.pages, strict=True):
            pool.drop(page)
    for pool in tree._pools:
        pool.check()
    return nodes


def _length(tree: PrefixTree, text: str, prompt: int | None = None, multiple: int = 1) -> int:
    ids = _ids(text)
    return tree.match(ids, len(ids) if prompt is None else prompt, len(ids), multiple).length


def test_the_longest_beginning_is_found_to_the_place():
    tree = _tree()
    _put(tree, "abcdefghij")
    for text, length in [
        ("abcdefgh", 8), ("abcdefghij", 10), ("abcdefghijklmn", 10), ("abcdefgX", 7), ("abcX", 3), ("abcd", 4),
        ("X", 0), ("", 0), ("efgh", 0),
    ]:  # fmt: skip
        assert _length(tree, text) == length


def test_a_tail_is_copied_from_the_child_with_most_in_common():
    tree = _tree()
    _put(tree, "abcdXXXX")
    nodes = _put(tree, "abcdefXX")
    _put(tree, "abcdeXXX")
    match = tree.match(_ids("abcdefgh"), 8, 8)
    assert (match.length, match.path, match.tail) == (6, (nodes[0],), nodes[1])


def test_of_thousands_with_the_same_prefix_only_those_that_go_on_alike_are_compared(monkeypatch):
    tree, compared, common = _tree(pages=2000), [], PrefixTree._common
    for number in range(900):
        _put(tree, "abcd" + chr(200 + number % 50) + f"{number:3}")
    monkeypatch.setattr(
        PrefixTree, "_common", lambda self, node, *a: (compared.append(node), common(self, node, *a))[1]
    )
    assert _length(tree, "abcd" + chr(207) + "  7X") == 8
    assert _length(tree, "abcd" + chr(207) + " XXX") == 6
    assert _length(tree, "abcdefgh") == 4
    assert len(compared) <= 2 * 900 // 50


def test_few_places_are_not_worth_a_copy():
    tree = PrefixTree([Pool(9)], 128)
    ids = np.arange(128, dtype=np.int32)
    tree.insert(tree.root, tree.key(ids.tobytes(), 0, 128), [tree._pools[0].take()])
    for common, length in [(15, 0), (16, 16), (127, 127)]:
        other = np.where(np.arange(128) < common, ids, -5).astype(np.int32)
        assert tree.match(other, 128, 128).length == length


def test_a_limit_and_a_multiple_shorten_the_match():
    tree = _tree()
    _put(tree, "abcdefghijkl")
    ids = _ids("abcdefghijkl")
    assert [tree.match(ids, 12, limit).length for limit in (12, 11, 8, 5, 0)] == [12, 11, 8, 5, 0]
    assert [_length(tree, "abcdefghijX", multiple=multiple) for multiple in (1, 2, 4, 8, 16)] == [10, 10, 8, 8, 0]


def test_what_decode_wrote_is_not_shared_as_a_prompt():
    """Prompt "abcdef"; decode wrote the rest."""
    tree = _tree()
    _put(tree, "abcdefghijkl", prompt=6)
    assert _length(tree, "abcdefghijkl") == 6
    assert _length(tree, "abcdefghijkl", prompt=6) == 12  # the same request, resumed
    assert _length(tree, "abcdefghijkl", prompt=5) == 5
    assert _length(tree, "abcdefghijkl", prompt=4) == 4


def test_what_prefill_wrote_is_not_shared_as_an_answer():
    tree = _tree()
    _put(tree, "abcdefghijkl")
    assert [_length(tree, "abcdefghijkl", prompt=prompt) for prompt in (12, 10, 8, 3, 0)] == [12, 10, 8, 3, 0]


def test_both_can_be_kept_side_by_side():
    tree = _tree()
    _put(tree, "abcdefgh")
    _put(tree, "abcdefgh", prompt=4)
    assert len(list(tree.nodes())) == 3
    assert _length(tree, "abcdefgh") == _length(tree, "abcdefgh", prompt=4) == 8


def test_all_is_shared_if_that_is_wanted():
    tree = _tree(share_decoded=True)
    _put(tree, "abcdefghijkl", prompt=6)
    assert [_length(tree, "abcdefghijkl", prompt=prompt) for prompt in (12, 6, 0)] == [12, 12, 12]


def test_a_page_that_is_there_is_not_added_again():
    tree = _tree()
    first, second = _put(tree, "abcdefgh"), _put(tree, "abcdefgh")
    assert first == second
    assert (tree._pools[0].idle, tree._pools[0].free) == (2, 37)


def test_leaves_go_first_those_unused_for_longest_before_others():
    tree = _tree()
    _put(tree, "abcdefgh")
    _put(tree, "abcdijkl")
    _put(tree, "mnop")
    _put(tree, "abcdefgh")  # used once more
    gone = []
    before = {node.tokens for node in tree.nodes()}
    while tree.evict(0):
        tree._pools[0].check()
        after = {node.tokens for node in tree.nodes()}
        gone += [np.frombuffer(each, np.int32).astype(np.uint8).tobytes().decode() for each in before - after]
        before = after
    assert gone == ["ijkl", "mnop", "efgh", "abcd"]


def test_pages_in_use_stay():
    tree = _tree()
    nodes = _put(tree, "abcdefgh")
    tree._pools[0].hold(nodes[0].pages[0])
    assert tree.evict(0) and not tree.evict(0)
    assert list(tree.nodes()) == [nodes[0]] and tree.has(nodes[0]) and not tree.has(nodes[1])


@pytest.mark.parametrize("window", range(1, 14))
def test_a_match_ends_where_the_window_is_still_held(window):
    """Against the definition: a sequence of 15 tokens, of which some pages in the window's pool are gone."""
    text = "abcdefghijklmno"
    for gone in range(1 << 4):
        tree = _tree((None, window))
        nodes = _put(tree, text)
        for index in range(4):
            if gone >> index & 1:
                tree._give_up(nodes[index], 1)
        held = [position for position in range(15) if not gone >> position // PAGE & 1]
        possible = [p for p in range(16) if all(q in held for q in range(max(0, p - window + 1), p))]
        # Inside a page, it is copied: both of its pages must be there, whatever the window.
        possible = [p for p in possible if p % PAGE == 0 or p - 1 in held]
        beyond_whole = [p for p in possible if p >= 12]
        best = max(beyond_whole) if beyond_whole else max(p for p in possible if p % PAGE == 0)
        assert _length(tree, text) == best, (window, gone)


def test_a_windows_page_can_go_alone_and_come_back():
    tree = _tree((None, WINDOW))
    _put(tree, "abcdefghijkl")
    assert tree.evict(1)  # the last page, which was dropped first
    assert (tree._pools[0].idle, tree._pools[1].idle) == (3, 2)
    assert _length(tree, "abcdefghijklm") == 8
    _put(tree, "abcdefghijkl")
    assert (tree._pools[0].idle, tree._pools[1].idle) == (3, 3)
    assert _length(tree, "abcdefghijklm") == 12


def test_without_a_full_pool_nodes_stay_for_those_after_them():
    tree = _tree((WINDOW,))
    nodes = _put(tree, "abcdefghijkl")
    tree._give_up(nodes[0], 0)
    assert _length(tree, "abcdefghijkl") == 12
    while tree.evict(0):
        pass
    assert list(tree.nodes()) == []
