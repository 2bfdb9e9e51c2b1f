"""What requests share of their prompts, and who waits for a prefix; the naive device checks what that leads to."""

import pytest

from gptjax.scheduling.plan import Copy
from gptjax.scheduling.policy import Policy
from tests.scheduling import naive_device
from tests.scheduling.harness import PAGE, Harness, prompt_of, read_by, small


def test_a_prefix_under_way_is_waited_for_not_read_twice():
    """Forty tokens that four begin with: they are read once, in three chunks."""
    harness = small(slots=5, pages=100)
    system = prompt_of(40)
    numbers = [harness.add([*system, number % 3, number // 3], 3) for number in range(4)]
    other = harness.add(prompt_of(5, 1), 3)  # does not wait for them
    read = []
    while harness.open:
        plan = harness.plan()
        read.append({} if plan is None else read_by(plan))
        if harness.under_way:
            harness.receive()
    assert read[0] == {0: 11, 4: 5}
    assert sum(sum(each.values()) for each in read) == 42 + 3 * 2 + 5
    assert [harness.done[number].cached for number in numbers] == [0, 40, 40, 40]
    assert harness.done[other].cached == 0
    harness.check_tokens()


def test_who_waits_reads_on_its_own_if_the_reader_leaves():
    harness = small(pages=100)
    first = harness.add(prompt_of(60), 2)
    second = harness.add(prompt_of(60), 2)
    harness.plan()
    assert read_by(harness.plan()) == {0: 16}
    harness.end(first)
    assert read_by(harness.plan()) == {1: 16}
    harness.finish()
    assert harness.done[second].cached == 32
    harness.check_tokens()


def test_a_cancelled_request_leaves_shared_pages_to_others():
    harness = small()
    first = harness.add(prompt_of(12), 10)
    harness.plan()
    harness.add([*prompt_of(12), 1], 10)
    harness.plan()
    shared = [sequence.pages[0][:3] for sequence in harness.scheduler._running]
    assert shared[0] == shared[1]
    harness.end(first)
    assert [harness.pools[0].holders(page) for page in shared[1]] == [2, 2, 2]  # the tree, and the second
    harness.add(prompt_of(30, 1), 10)
    harness.finish()
    harness.check_tokens()


def test_a_tail_is_shared_by_a_copy():
    harness = small()
    harness.add(prompt_of(10), 1)
    harness.finish()
    number = harness.add([*prompt_of(10), 2, 2, 2], 3)
    plan = harness.plan()
    assert [(copy.pool, copy.count) for copy in plan.copies] == [(0, 2)]
    copy = plan.copies[0]
    assert copy.source != copy.target and read_by(plan) == {0: 3}
    assert harness.scheduler.cached_tokens(number) == 10
    assert harness.pools[0].holders(copy.source) == 2  # until the next plan, nobody may take it
    harness.plan()
    assert harness.pools[0].holders(copy.source) == 1
    harness.finish()
    harness.check_tokens()


def test_a_prompt_that_was_read_before_needs_its_last_token_only():
    harness = small(window=6)
    for _ in range(2):
        harness.add(prompt_of(8), 2)
        harness.finish()
    assert [asked.cached for asked in harness.done.values()] == [0, 7]
    assert Copy in {type(copy) for plan in harness.plans for copy in plan.copies}
    harness.check_tokens()


def test_without_room_for_a_copy_whole_pages_are_shared():
    """The pool has 3 pages, which the first request left in the tree; a copy of the last needs a fourth."""
    harness = small(4)
    for _ in range(2):
        harness.add(prompt_of(11), 2)
        harness.finish()
    assert [asked.cached for asked in harness.done.values()] == [0, 8]
    harness.check_tokens()


@pytest.mark.parametrize(("share_decoded", "cached"), [(False, 6), (True, 10)])
def test_a_conversations_next_turn(share_decoded, cached):
    written = naive_device.exact if share_decoded else naive_device.by_path
    harness = small(share_decoded=share_decoded, written=written)
    first = harness.add(prompt_of(6), 5)
    harness.finish()
    asked = harness.done[first]
    second = harness.add([*asked.prompt, *asked.tokens, 1, 1], 3)
    harness.finish()
    assert harness.done[second].cached == cached  # the last token was drawn, but never fed
    harness.check_tokens()


def test_whole_chunks_only_are_reused_where_bits_depend_on_cuts():
    harness = Harness(Policy.same_bits(slots=2, chunk=8, page=PAGE), [60], [None], written=naive_device.by_size)
    for length in (15, 25, 25):
        harness.add(prompt_of(length), 2)
        harness.finish()
    assert [asked.cached for asked in harness.done.values()] == [0, 8, 24]
    harness.check_tokens()


def test_pages_after_a_token_that_could_not_be_drawn_are_not_shared():
    harness = small()
    number = harness.add(prompt_of(6), 20)
    for _ in range(8):
        harness.plan()
    for tokens in ([0], [1], [-1]):
        harness.scheduler.receive(harness.under_way.popleft()[0], [tokens])
    harness.open[number].tokens += [0, 1, -1]
    harness.scheduler.end(number)
    held = [node.tokens for node in harness.scheduler._allocators[0].tree.nodes()]
    assert sum(map(len, held)) == 4 * 8  # the prompt and two tokens


def test_nobody_waits_for_a_prefix_that_a_held_request_reads():
    harness = small()
    first = harness.add(prompt_of(40), 2)
    harness.plan()
    harness.hold(first, True)
    harness.add(prompt_of(40), 2)
    assert read_by(harness.plan()) == {1: 16}
    harness.hold(first, False)
    harness.finish()
    harness.check_tokens()


def test_who_waits_for_a_prefix_goes_on_if_its_reader_is_held():
    harness = small()
    first = harness.add(prompt_of(60), 2)
    second = harness.add(prompt_of(60), 2)
    assert read_by(harness.plan()) == {0: 16}  # the second waits
    harness.hold(first, True)
    assert read_by(harness.plan()) == {1: 16}
    harness.hold(first, False)
    assert second in harness.open
    harness.finish()
    harness.check_tokens()
