"""Masks that threads find: which are late, and whose they are."""

import threading

import numpy as np
import pytest

from gptjax.structured import Grammar, matching
from gptjax.structured.masks import Masks
from gptjax.structured.matching import MOST_AT_ONCE, Compiler, Matcher, words_of
from tests.structured.walks import compiler, tokenizer

ALWAYS, NEVER = (lambda: True), (lambda: False)


class Blocked:
    """A matcher that says what comes next when it is let go."""

    failure = None

    def __init__(self) -> None:
        self.begun, self.go, self.taken = threading.Event(), threading.Event(), []

    def take(self, token_id: int) -> None:
        self.taken.append(token_id)

    def fill(self, words_W: np.ndarray) -> None:
        self.begun.set()
        assert self.go.wait(60)
        words_W[:] = len(self.taken)


@pytest.fixture
def blocked():
    matcher = Blocked()
    yield matcher
    matcher.go.set()  # or its thread would keep this process


@pytest.fixture
def masks(monkeypatch) -> Masks:
    """With 4 threads on any machine."""
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    return Masks(96)


def test_each_request_has_its_own_mask():
    masks, text, letters = Masks(compiler().vocab_size), tokenizer(), "abcdefghi"
    for request, letter in enumerate(letters):
        masks.add(request, compiler().matcher(Grammar.of_regex(letter), text.eos_ids))
    for expected in ([text.encode(letter) for letter in letters], [list(text.eos_ids)] * len(letters)):
        assert masks.late(range(len(letters)), ALWAYS) == frozenset()
        for request, ids in enumerate(expected):
            bits = np.unpackbits(masks.words(request).view(np.uint8), bitorder="little")
            assert np.flatnonzero(bits).tolist() == ids
        if expected[0] != expected[1]:
            assert masks.take(enumerate(expected)) == frozenset()
    assert masks.take([(3, text.encode("d")), (99, [1])]) == {3}  # "dd" is not allowed, and 99 is not known


def test_a_mask_is_looked_for_as_soon_as_its_token_is_known(masks, blocked):
    masks.add(1, blocked)
    assert blocked.begun.wait(60)
    blocked.go.set()
    assert masks.late([1], NEVER) == frozenset()
    blocked.begun.clear()
    masks.take([(1, [5])])
    assert blocked.begun.wait(60)  # nobody has asked for it
    assert masks.late([1], NEVER) == frozenset()
    assert (masks.words(1) == 1).all()


def test_only_those_that_are_late_wait_and_not_before_there_is_no_time(masks, blocked):
    quick = Blocked()
    quick.go.set()
    masks.add(1, blocked)
    masks.add(2, quick)
    looks = iter([True, True, False])
    assert masks.late([1, 2], lambda: next(looks)) == {1}
    assert next(looks, None) is None
    assert (masks.words(2) == 0).all()
    assert masks.late([], NEVER) == {1}  # its prompt is still being read
    assert masks.late([1, 7], NEVER) == {1}  # 7 has no grammar
    threading.Timer(0.05, blocked.go.set).start()
    assert masks.late([1], NEVER) == frozenset()  # there is nobody else


def test_the_late_mask_of_a_request_that_has_ended_is_nobodys(masks, blocked):
    masks.add(1, blocked)
    assert blocked.begun.wait(60)
    masks.end(1)
    assert masks.late([1], NEVER) == frozenset()
    after = Blocked()
    masks.add(1, after)  # another's mask does not count as its own
    blocked.go.set()
    assert masks.late([1, 2], NEVER) == {1}
    after.go.set()
    assert masks.late([1], NEVER) == frozenset()


def test_what_a_thread_raises_is_raised_where_it_is_awaited(masks):
    class Failing(Blocked):
        def fill(self, words_W: np.ndarray) -> None:
            raise RuntimeError("a panic")

    masks.add(1, Failing())
    with pytest.raises(RuntimeError, match="a panic"):
        masks.late([1], NEVER)


def test_what_it_raises_for_a_request_that_has_ended_is_nobodys(masks):
    class Failing(Blocked):
        def fill(self, words_W: np.ndarray) -> None:
            super().fill(words_W)
            raise RuntimeError("a panic")

    failing, after = Failing(), Blocked()
    masks.add(1, failing)
    assert failing.begun.wait(60)
    masks.end(1)
    failing.go.set()
    after.go.set()
    masks.add(2, after)
    assert masks.late([2], ALWAYS) == frozenset()


def test_masks_have_a_bit_for_each_token_and_the_end(masks, blocked):
    blocked.go.set()
    masks.add(1, blocked)
    assert masks.late([1], NEVER) == frozenset()
    assert masks.words(1).shape == (words_of(96),) == (4,)


@pytest.mark.parametrize(("quick", "most"), [(60.0, MOST_AT_ONCE), (0.0, 1)])
def test_a_grammar_is_compiled_for_each_thread_that_may_use_it_at_once_if_that_is_quick(quick, most, monkeypatch):
    monkeypatch.setattr(matching, "_QUICK", quick)
    made = []
    compile_ = Compiler._compile
    monkeypatch.setattr(Compiler, "_compile", lambda self, grammar: made.append(grammar) or compile_(self, grammar))
    text, grammar = tokenizer(), Grammar.of_regex("a+")
    own = Compiler(text, text.vocab_size)

    def open_(count: int) -> list[Matcher]:
        """As when requests come together: all are prepared before the first is begun."""
        for _ in range(count):
            own.prepare(grammar)
        return [own.matcher(grammar, text.eos_ids) for _ in range(count)]

    for _ in range(3):
        open_(1)  # and it has ended
    assert len(made) == 1
    several = open_(3)
    assert len(made) == min(3, most)
    several += open_(30)
    assert len(made) == most
    del several
    open_(MOST_AT_ONCE)
    assert len(made) == most
