"""Who is read and decodes in which plan, and how pages are taken; the naive device checks what that leads to."""

import numpy as np
import pytest

from gptjax.errors import CapacityError
from gptjax.scheduling.policy import Policy
from gptjax.scheduling.pool import Pool
from gptjax.scheduling.scheduler import Scheduler
from tests.scheduling import naive_device
from tests.scheduling.harness import PAGE, Harness, prompt_of, read_by, rows_of, small, small_asked


def test_a_request_is_read_and_draws_in_the_same_plan():
    harness = small()
    harness.add(prompt_of(6), 3)
    plan = harness.plan()
    assert read_by(plan) == {0: 6} and plan.prefill[0].pieces[0].ends and plan.prefill[0].size == 16
    assert [(row.position, row.draws, row.feeds) for row in plan.decode.rows] == [(6, 1, 1)]
    assert plan.decode.size == plan.decode.steps == 1
    assert [(entry.index, entry.page) for entry in plan.tables] == [(0, 1), (1, 2)]
    assert harness.plan() is not None
    last = harness.plan()
    assert (last.decode.rows[0].draws, last.decode.rows[0].feeds) == (1, 0)  # the last token is not fed
    assert harness.plan() is None
    harness.finish()
    harness.check_tokens()


def test_prompts_share_a_call_and_a_long_one_leaves_half_of_it():
    harness = small()
    for length in (40, 3, 2):
        harness.add(prompt_of(length, length), 2)
    assert read_by(harness.plan()) == {0: 11, 1: 3, 2: 2}
    harness.add(prompt_of(30, 2), 2)
    assert read_by(harness.plan()) == {0: 8, 3: 8}
    assert read_by(harness.plan()) == {0: 8, 3: 8}
    harness.finish()
    harness.check_tokens()


def test_a_share_is_what_newer_prompts_leave_however_many_there_are(monkeypatch):
    """By its definition: the sum over all of them, at most half a chunk."""
    share, seen = Scheduler._share, []

    def checked(self, sequence, draft):
        newer = [each for each in self._running if each.number > sequence.number and not each.held]
        wanted = sum(max(0, each.prompt - each.position) for each in newer if each.awaited is None)
        expected = min(draft.room, max(self.policy.chunk // 2, draft.room - wanted))
        seen.append(share(self, sequence, draft))
        assert seen[-1] == expected
        return seen[-1]

    monkeypatch.setattr(Scheduler, "_share", checked)
    random = np.random.default_rng(0)
    for _ in range(20):
        scheduler = Scheduler(Policy(slots=12, chunk=64), [Pool(200)])
        for _ in range(12):
            scheduler.add(random.integers(0, 3, int(random.choice([3, 20, 40, 200]))).tolist(), 2)
        while (plan := scheduler.plan(decode=False)) is not None:
            assert plan.prefill
    assert len(set(seen)) > 20


def test_a_call_takes_a_limited_number_of_pieces():
    harness = small(pieces=3)
    for number in range(4):
        harness.add([number % 3], 2)
    assert [read_by(harness.plan()) for _ in range(2)] == [{0: 1, 1: 1, 2: 1}, {3: 1}]
    harness.finish()
    harness.check_tokens()


def test_a_long_prompt_never_holds_running_streams_up_by_more_than_a_chunk():
    harness = small(slots=2, pages=90)
    harness.add(prompt_of(3), 40)
    harness.plan()
    harness.add(prompt_of(200, 1), 1)
    for _ in range(12):
        plan = harness.plan()
        assert sum(read_by(plan).values()) <= 16 and 0 in rows_of(plan)
    harness.finish()
    harness.check_tokens()


def test_calls_of_their_own_share_a_chunk():
    """Two small ones count as an eighth of a chunk each; a third of half a chunk fits, too."""
    harness = Harness(Policy.same_bits(slots=4, chunk=256, page=PAGE), [400], [None], written=naive_device.by_size)
    for length in (3, 2, 100, 90):
        harness.add(prompt_of(length, length), 2)
    plan = harness.plan()
    assert [(call.size, len(call.pieces), call.pieces[0].start) for call in plan.prefill] == [
        (32, 1, 0), (32, 1, 0), (128, 1, 0),
    ]  # fmt: skip
    assert plan.decode.size == 4 and rows_of(plan) == [0, 1, 2]
    harness.finish()
    harness.check_tokens()


@pytest.mark.parametrize(("requests", "size"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (9, 11)])
def test_the_smallest_size_that_holds_the_rows(requests, size):
    harness = small(slots=11, pages=100)
    for number in range(requests):
        harness.add([number % 3], 3)
    plan = harness.plan()
    assert plan.decode.size == size and rows_of(plan) == list(range(requests))


def test_several_steps_only_if_nobody_waits_for_a_first_token():
    harness = small(steps=4, pages=60)
    harness.add(prompt_of(3), 20)
    assert harness.plan().decode.steps == 1
    assert harness.plan().decode.steps == 4
    harness.add(prompt_of(33, 1), 3)
    assert [harness.plan().decode.steps for _ in range(4)] == [1, 1, 1, 4]
    harness.finish()
    harness.check_tokens()


def test_several_steps_only_if_half_of_them_are_wanted():
    harness = small(steps=8)
    harness.add(prompt_of(3), 12)
    assert [harness.plan().decode.steps for _ in range(5)] == [1, 8, 1, 1, 1]
    assert harness.plan() is None


def test_no_row_draws_more_than_its_request_wants():
    harness = small(steps=8)
    harness.add(prompt_of(3), 20)
    harness.add(prompt_of(4), 3)
    harness.plan()
    rows = harness.plan().decode.rows
    assert [(row.draws, row.feeds) for row in rows] == [(8, 8), (2, 1)]
    harness.finish()
    harness.check_tokens()


def test_a_page_is_taken_when_the_one_before_is_full():
    harness = small()
    harness.add(prompt_of(PAGE - 1), 6)
    taken = []
    while plan := harness.plan():
        taken.append([entry.index for entry in plan.tables])
    # Positions 3 to 7 are fed; the sixth token is not.
    assert taken == [[0], [1], [], [], [], []]


def test_page_and_window_edges_together():
    """With a window of one page, the page before is dropped as soon as a page is full."""
    harness = small(window=PAGE)
    harness.add(prompt_of(2 * PAGE), 2 * PAGE + 1)
    held = []
    while harness.plan():
        sequence = harness.scheduler._running[0]
        held.append([sum(map(bool, pages)) for pages in sequence.pages])
    assert held[0] == [3, 3]  # 8 positions were read, and one was decoded
    # Position 9 sees from 6, position 10 from 7, position 11 from 8, which begins a page, and position 12 from 9.
    assert held[1:5] == [[3, 2], [3, 2], [3, 1], [4, 2]]
    harness.finish()
    harness.check_tokens()


@pytest.mark.parametrize(("prompt", "most"), [(1, 20), (20, 1), (9, 12), (16, 5)])
@pytest.mark.parametrize("window", [None, 4, 5])
def test_pools_of_barely_one_request(prompt, most, window):
    """It fits, one page fewer does not; a second one waits for it, or is set aside for it."""
    policy = Policy(slots=3, chunk=8, page=PAGE, steps=2)
    across = policy.pages_across((window or 1) - 1 + max(min(8, prompt) + 1, 2))
    harness = small(6, window=window, sliding=1 + min(5, across), slots=3, chunk=8, steps=2)
    for _ in range(3):
        harness.add(prompt_of(prompt), most)
    harness.finish()
    harness.check_tokens()
    with pytest.raises(CapacityError, match=r"needs 6 pages of 4 positions in the layers with full attention, .* 5:"):
        harness.add(prompt_of(prompt), most + 1)
    assert harness.waiting == harness.running == 0


def test_a_window_that_does_not_fit_is_refused_with_the_numbers():
    scheduler = Scheduler(Policy(slots=1, chunk=8, page=PAGE), [Pool(100), Pool(4, 6)])
    with pytest.raises(CapacityError, match=r"a prompt of 20 tokens with up to 3 more needs 5 pages .* sliding .* 3:"):
        scheduler.add(prompt_of(20), 3)
    scheduler.add(prompt_of(8), 5)


@pytest.mark.parametrize(("prompt", "most"), [([], 1), ([1], 0)])
def test_requests_without_tokens_are_refused(prompt, most):
    with pytest.raises(ValueError, match="at least one token"):
        small().scheduler.add(prompt, most)


def test_late_tokens_of_a_cancelled_request_are_dropped():
    harness = small()
    first, second = harness.add(prompt_of(4), 9), harness.add(prompt_of(5, 1), 9)
    harness.plan()
    harness.plan()
    harness.end(first)
    harness.add(prompt_of(7, 2), 9)  # takes its slot and its pages while its steps are under way
    assert [join.slot for join in harness.plan().joins] == [0]
    number, tokens = harness.under_way[0]
    assert len(tokens) == 2
    assert [drawn.request for drawn in harness.scheduler.receive(number, tokens)] == [second]
    harness.open[second].tokens += tokens[1]
    harness.under_way.popleft()
    harness.finish()
    harness.check_tokens()


def test_tokens_are_received_in_order_and_in_the_right_number():
    harness = small()
    harness.add(prompt_of(3), 5)
    first, second = harness.plan(), harness.plan()
    with pytest.raises(ValueError, match=f"plan {second.number} is not the oldest"):
        harness.scheduler.receive(second.number, [[0]])
    with pytest.raises(ValueError, match="draws 1 tokens for request 1, found 2"):
        harness.scheduler.receive(first.number, [[0, 0]])


def test_prompts_can_be_read_without_steps_between():
    harness = small(steps=2)
    for length in (20, 4):
        harness.add(prompt_of(length, length), 5)
    for read in ({0: 12, 1: 4}, {0: 8}):
        plan = harness.scheduler.plan(decode=False)
        assert read_by(plan) == read and plan.decode is None
        harness.device.run(plan)
    assert harness.scheduler.plan(decode=False) is None
    plans = [harness.plan() for _ in range(2)]
    assert [rows_of(plan) for plan in plans] == [[0, 1]] * 2
    assert [plan.decode.steps for plan in plans] == [1, 2]  # at first, both wait for their first token
    harness.finish()
    harness.check_tokens()


def test_tokens_of_requests_that_have_ended_may_be_left_out():
    harness = small()
    first, second = harness.add(prompt_of(3), 5), harness.add(prompt_of(3, 1), 5)
    plan = harness.plan()
    harness.scheduler.end(first)
    with pytest.raises(ValueError, match="draws 1 tokens for request 2, found 0"):
        harness.scheduler.receive(plan.number, [(), ()])
    harness.scheduler.end(second)
    plan = harness.scheduler.plan()
    assert plan is None


def test_an_idle_scheduler_plans_nothing():
    assert small().plan() is None


def test_decode_calls_have_the_rows_that_requests_ask_for():
    harness = small_asked()
    for number, rows in enumerate((4, 1, 4, 1)):
        harness.add(prompt_of(3, number), 9, rows)
    plans = []
    while (plan := harness.plan()) is not None:
        plans.append((plan.decode.size, rows_of(plan)))
        harness.receive()
    # Who has waited for longest, and all that share its call. At first, one prompt is read in each plan.
    for start in range(4, 10):
        assert sorted(plans[start : start + 3]) == [(1, [1]), (1, [3]), (4, [0, 2])]
    harness.check_tokens()
    with pytest.raises(ValueError, match="3 were asked for"):
        harness.add([1], 1, 3)
