"""Who waits, is held, set aside, resumed, or started anew; the naive device checks what that leads to."""

import pytest

from gptjax.scheduling.policy import Policy
from tests.scheduling import naive_device
from tests.scheduling.harness import Harness, prompt_of, rows_of, small, small_asked


def test_the_newest_is_set_aside_and_resumed_with_the_same_tokens():
    """Two grow to 7 pages each, and there are 9: what the newer one drew is given to decode again."""
    harness = small(10, slots=2, steps=2)
    first, second = harness.add(prompt_of(4), 25), harness.add(prompt_of(4, 1), 25)
    harness.finish(ahead=2)
    assert [*harness.done] == [first, second]
    assert harness.device.given > 0
    joins = [join.request for plan in harness.plans for join in plan.joins]
    assert joins[:2] == [first, second] and set(joins[2:]) == {second}
    harness.check_tokens()


def test_what_was_set_aside_and_not_evicted_goes_on_where_it_was():
    """Only the last page of a waiting request is evicted, if that is enough."""
    harness = small(7, slots=2)
    harness.add(prompt_of(4), 9), harness.add(prompt_of(11, 1), 6)
    harness.finish()
    resumed = [plan for plan in harness.plans if plan.joins][-1]
    assert not resumed.prefill and resumed.decode.rows[0].position >= 11
    harness.check_tokens()


def test_who_has_drawn_all_its_tokens_is_not_resumed():
    harness = small(8, slots=2)
    first, second = harness.add(prompt_of(4), 20), harness.add(prompt_of(8, 1), 4)
    harness.plan()
    while harness.running == 2 and harness.plan():
        pass  # nothing is received
    assert harness.waiting == 0 and {*harness.open} == {first, second}
    harness.finish()
    harness.check_tokens()


def test_none_passes_an_older_one_that_waits():
    harness = small(8, slots=3)
    harness.add(prompt_of(8), 8)
    harness.plan()
    long, short = harness.add(prompt_of(20, 1), 4), harness.add(prompt_of(1, 2), 1)
    harness.plan()
    assert (harness.running, harness.waiting) == (1, 2)
    harness.finish()
    assert [join.request for plan in harness.plans for join in plan.joins] == [1, long, short]
    harness.check_tokens()


def test_after_a_loss_all_are_resumed():
    harness = small(window=6, steps=2)
    for length in (5, 9, 30, 2, 3):
        harness.add(prompt_of(length, length), 9)
    for _ in range(3):
        harness.plan()
    harness.receive()
    harness.lose()
    assert harness.running == harness.in_flight == 0
    assert harness.waiting == 5
    harness.finish()
    harness.check_tokens()


def test_nothing_is_planned_for_a_held_request_and_what_is_under_way_is_received():
    harness = small()
    request = harness.add(prompt_of(6), 5)
    harness.plan()
    harness.hold(request, True)
    assert harness.plan() is None
    harness.receive()
    assert len(harness.open[request].tokens) == 1
    harness.hold(request, False)
    assert rows_of(harness.plan()) == [0]
    harness.finish()
    harness.check_tokens()


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_held_request_gives_its_slot_to_others_and_is_resumed_with_the_same_tokens(after):
    harness = small(slots=1)
    first = harness.add(prompt_of(30), 6)
    for _ in range(after):
        harness.plan()
    harness.hold(first, True)
    second = harness.add(prompt_of(9, 1), 4)
    while second in harness.open:
        plan = harness.plan()
        while harness.under_way and (plan is None or len(harness.under_way) > 1):
            harness.receive()
    assert harness.running == 0 and harness.waiting == 1
    harness.hold(first, False)
    harness.finish()
    harness.check_tokens()


def test_pages_are_taken_from_a_held_request_before_a_newer_one():
    harness = small(pages=1 + 7)
    held, older, newer = (harness.add(prompt_of(6, n), 9) for n in range(3))
    harness.plan()
    harness.hold(held, True)
    while {older, newer} & harness.open.keys():
        plan = harness.plan()
        assert newer not in harness.open or newer in {each.number for each in harness.scheduler._running}
        while harness.under_way and (plan is None or len(harness.under_way) > 1):
            harness.receive()
    harness.hold(held, False)
    harness.finish()
    harness.check_tokens()


def test_another_scheduler_goes_on_after_the_tokens_that_were_drawn():
    harness = small_asked()
    request = harness.add(prompt_of(10), 6, 2)
    for _ in range(3):
        harness.plan()
        harness.receive()
    assert len(harness.open[request].tokens) == 3
    harness.replace()
    harness.finish()
    harness.check_tokens()
    with pytest.raises(ValueError, match="one to draw"):
        harness.scheduler.add([1], 2, rows=1, drawn=[1, 2])


@pytest.mark.parametrize("pages", range(4, 10))
def test_who_cannot_take_its_turn_does_not_keep_others_from_theirs(pages):
    """The newest of four that share calls often waits for a page; the oldest, which has calls of its own, goes on."""
    policy = Policy.same_bits(slots=5, chunk=16, page=32, rows="asked")
    harness = Harness(policy, [1 + pages], [None], written=naive_device.by_size)
    oldest = harness.add(prompt_of(1), 100, 1)
    for number, length in enumerate((1, 3, 5, 16)):
        harness.add(prompt_of(length, number), 80, 4)
    waits = 0
    while oldest in harness.open:
        plan = harness.plan()
        waits = 0 if plan.decode is not None and plan.decode.size == 1 else waits + 1
        assert waits <= 4
        if harness.under_way:
            harness.receive()
    harness.finish()
    harness.check_tokens()
