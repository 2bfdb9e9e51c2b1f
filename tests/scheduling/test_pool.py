"""Pages are counted, and page 0 is never handed out."""

import pytest

from gptjax.scheduling.pool import Pool


def test_all_pages_but_the_first_can_be_taken():
    pool = Pool(5)
    assert {pool.take() for _ in range(4)} == {1, 2, 3, 4}
    assert pool.take() == 0
    pool.check()


def test_a_page_is_free_when_its_last_holder_drops_it():
    pool = Pool(2)
    page = pool.take()
    pool.hold(page)
    pool.drop(page)
    assert (pool.free, pool.holders(page)) == (0, 1)
    pool.drop(page)
    assert (pool.free, pool.holders(page)) == (1, 0)
    with pytest.raises(ValueError, match="free already"):
        pool.drop(page)
    with pytest.raises(ValueError, match="is free"):
        pool.hold(page)


def test_pages_that_only_the_tree_holds_are_idle_and_the_one_longest_so_is_first():
    pool = Pool(4)
    pages = [pool.take() for _ in range(3)]
    for page in pages:
        pool.keep(page)
    assert (pool.idle, pool.longest_idle()) == (0, 0)
    for page in (pages[1], pages[0], pages[2]):
        pool.drop(page)
    assert pool.idle == 3
    pool.hold(pages[1])  # it is used once more, and is then the last
    assert pool.longest_idle() == pages[0] and not pool.is_idle(pages[1])
    pool.drop(pages[1])
    for page in (pages[0], pages[2], pages[1]):
        assert pool.longest_idle() == page
        pool.give_up(page)
        pool.check()
    assert pool.free == 3


def test_the_tree_holds_a_page_once():
    pool = Pool(2)
    page = pool.take()
    pool.keep(page)
    with pytest.raises(ValueError, match="in the tree already"):
        pool.keep(page)


@pytest.mark.parametrize(("pages", "window"), [(1, None), (0, None), (5, 0)])
def test_a_pool_without_pages_or_window_is_refused(pages, window):
    with pytest.raises(ValueError, match="at least"):
        Pool(pages, window)
