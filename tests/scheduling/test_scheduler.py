"""The scheduler's decisions, one at a time; the naive device checks what they lead to."""

import pytest

from gptjax.errors import CapacityError
from gptjax.scheduling.plan import Copy, Plan
from gptjax.scheduling.policy import Policy
from gptjax.scheduling.pool import Pool
from gptjax.scheduling.scheduler import Scheduler
from tests.scheduling import naive_device
from tests.scheduling.harness import Harness

PAGE = 4


def _harness(pages=40, *, window=None, sliding=40, written=naive_device.by_path, **policy) -> Harness:
    policy = Policy(**{"slots": 4, "chunk": 16, "page": PAGE, **policy})
    pools = ([pages, sliding], [None, window]) if window else ([pages], [None])
    return Harness(policy, *pools, written=written)


def _prompt(length: int, first: int = 0) -> list[int]:
    return [(first + index * index) % 3 for index in range(length)]


def _read(plan: Plan | None) -> dict[int, int]:
    """Prompt tokens that a plan reads, by slot."""
    assert plan is not None
    return {piece.slot: piece.count for call in plan.prefill for piece in call.pieces}


def _rows(plan: Plan | None) -> list[int]:
    assert plan is not None and plan.decode is not None
    return [row.slot for row in plan.decode.rows]


def test_a_request_is_read_and_draws_in_the_same_plan():
    harness = _harness()
    harness.add(_prompt(6), 3)
    plan = harness.plan()
    assert _read(plan) == {0: 6} and plan.prefill[0].pieces[0].ends and plan.prefill[0].size == 16
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
    harness = _harness()
    for length in (40, 3, 2):
        harness.add(_prompt(length, length), 2)
    assert _read(harness.plan()) == {0: 11, 1: 3, 2: 2}
    harness.add(_prompt(30, 2), 2)
    assert _read(harness.plan()) == {0: 8, 3: 8}
    assert _read(harness.plan()) == {0: 8, 3: 8}
    harness.finish()
    harness.check_tokens()


def test_a_call_takes_a_limited_number_of_pieces():
    harness = _harness(pieces=3)
    for number in range(4):
        harness.add([number % 3], 2)
    assert [_read(harness.plan()) for _ in range(2)] == [{0: 1, 1: 1, 2: 1}, {3: 1}]
    harness.finish()
    harness.check_tokens()


def test_a_long_prompt_never_holds_running_streams_up_by_more_than_a_chunk():
    harness = _harness(slots=2, pages=90)
    harness.add(_prompt(3), 40)
    harness.plan()
    harness.add(_prompt(200, 1), 1)
    for _ in range(12):
        plan = harness.plan()
        assert sum(_read(plan).values()) <= 16 and 0 in _rows(plan)
    harness.finish()
    harness.check_tokens()


def test_calls_of_their_own_share_a_chunk():
    """Two small ones count as an eighth of a chunk each; a third of half a chunk fits, too."""
    harness = Harness(Policy.same_bits(slots=4, chunk=256, page=PAGE), [400], [None], written=naive_device.by_size)
    for length in (3, 2, 100, 90):
        harness.add(_prompt(length, length), 2)
    plan = harness.plan()
    assert [(call.size, len(call.pieces), call.pieces[0].start) for call in plan.prefill] == [
        (32, 1, 0), (32, 1, 0), (128, 1, 0),
    ]  # fmt: skip
    assert plan.decode.size == 4 and _rows(plan) == [0, 1, 2]
    harness.finish()
    harness.check_tokens()


@pytest.mark.parametrize(("requests", "size"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (9, 11)])
def test_the_smallest_size_that_holds_the_rows(requests, size):
    harness = _harness(slots=11, pages=100)
    for number in range(requests):
        harness.add([number % 3], 3)
    plan = harness.plan()
    assert plan.decode.size == size and _rows(plan) == list(range(requests))


def test_several_steps_only_if_nobody_waits_for_a_first_token():
    harness = _harness(steps=4, pages=60)
    harness.add(_prompt(3), 20)
    assert harness.plan().decode.steps == 1
    assert harness.plan().decode.steps == 4
    harness.add(_prompt(33, 1), 3)
    assert [harness.plan().decode.steps for _ in range(4)] == [1, 1, 1, 4]
    harness.finish()
    harness.check_tokens()


def test_several_steps_only_if_half_of_them_are_wanted():
    harness = _harness(steps=8)
    harness.add(_prompt(3), 12)
    assert [harness.plan().decode.steps for _ in range(5)] == [1, 8, 1, 1, 1]
    assert harness.plan() is None


def test_no_row_draws_more_than_its_request_wants():
    harness = _harness(steps=8)
    harness.add(_prompt(3), 20)
    harness.add(_prompt(4), 3)
    harness.plan()
    rows = harness.plan().decode.rows
    assert [(row.draws, row.feeds) for row in rows] == [(8, 8), (2, 1)]
    harness.finish()
    harness.check_tokens()


def test_a_page_is_taken_when_the_one_before_is_full():
    harness = _harness()
    harness.add(_prompt(PAGE - 1), 6)
    taken = []
    while plan := harness.plan():
        taken.append([entry.index for entry in plan.tables])
    # Positions 3 to 7 are fed; the sixth token is not.
    assert taken == [[0], [1], [], [], [], []]


def test_page_and_window_edges_together():
    """With a window of one page, the page before is dropped as soon as a page is full."""
    harness = _harness(window=PAGE)
    harness.add(_prompt(2 * PAGE), 2 * PAGE + 1)
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
    harness = _harness(6, window=window, sliding=1 + min(5, across), slots=3, chunk=8, steps=2)
    for _ in range(3):
        harness.add(_prompt(prompt), most)
    harness.finish()
    harness.check_tokens()
    with pytest.raises(CapacityError, match=r"needs 6 pages of 4 positions in the layers with full attention, .* 5:"):
        harness.add(_prompt(prompt), most + 1)
    assert harness.scheduler.waiting == harness.scheduler.running == 0


def test_a_window_that_does_not_fit_is_refused_with_the_numbers():
    scheduler = Scheduler(Policy(slots=1, chunk=8, page=PAGE), [Pool(100), Pool(4, 6)])
    with pytest.raises(CapacityError, match=r"a prompt of 20 tokens with up to 3 more needs 5 pages .* sliding .* 3:"):
        scheduler.add(_prompt(20), 3)
    scheduler.add(_prompt(8), 5)


@pytest.mark.parametrize(("prompt", "most"), [([], 1), ([1], 0)])
def test_requests_without_tokens_are_refused(prompt, most):
    with pytest.raises(ValueError, match="at least one token"):
        _harness().scheduler.add(prompt, most)


def test_a_prefix_under_way_is_waited_for_not_read_twice():
    """Forty tokens that four begin with: they are read once, in three chunks."""
    harness = _harness(slots=5, pages=100)
    system = _prompt(40)
    numbers = [harness.add([*system, number % 3, number // 3], 3) for number in range(4)]
    other = harness.add(_prompt(5, 1), 3)  # does not wait for them
    read = []
    while harness.open:
        plan = harness.plan()
        read.append({} if plan is None else _read(plan))
        if harness.under_way:
            harness.receive()
    assert read[0] == {0: 11, 4: 5}
    assert sum(sum(each.values()) for each in read) == 42 + 3 * 2 + 5
    assert [harness.done[number].cached for number in numbers] == [0, 40, 40, 40]
    assert harness.done[other].cached == 0
    harness.check_tokens()


def test_who_waits_reads_on_its_own_if_the_reader_leaves():
    harness = _harness(pages=100)
    first = harness.add(_prompt(60), 2)
    second = harness.add(_prompt(60), 2)
    harness.plan()
    assert _read(harness.plan()) == {0: 16}
    harness.end(first)
    assert _read(harness.plan()) == {1: 16}
    harness.finish()
    assert harness.done[second].cached == 32
    harness.check_tokens()


def test_a_cancelled_request_leaves_shared_pages_to_others():
    harness = _harness()
    first = harness.add(_prompt(12), 10)
    harness.plan()
    harness.add([*_prompt(12), 1], 10)
    harness.plan()
    shared = [sequence.pages[0][:3] for sequence in harness.scheduler._running]
    assert shared[0] == shared[1]
    harness.end(first)
    assert [harness.pools[0].holders(page) for page in shared[1]] == [2, 2, 2]  # the tree, and the second
    harness.add(_prompt(30, 1), 10)
    harness.finish()
    harness.check_tokens()


def test_late_tokens_of_a_cancelled_request_are_dropped():
    harness = _harness()
    first, second = harness.add(_prompt(4), 9), harness.add(_prompt(5, 1), 9)
    harness.plan()
    harness.plan()
    harness.end(first)
    harness.add(_prompt(7, 2), 9)  # takes its slot and its pages while its steps are under way
    assert [join.slot for join in harness.plan().joins] == [0]
    number, tokens = harness.under_way[0]
    assert len(tokens) == 2
    assert [drawn.request for drawn in harness.scheduler.receive(number, tokens)] == [second]
    harness.open[second].tokens += tokens[1]
    harness.under_way.popleft()
    harness.finish()
    harness.check_tokens()


def test_a_tail_is_shared_by_a_copy():
    harness = _harness()
    harness.add(_prompt(10), 1)
    harness.finish()
    number = harness.add([*_prompt(10), 2, 2, 2], 3)
    plan = harness.plan()
    assert [(copy.pool, copy.count) for copy in plan.copies] == [(0, 2)]
    copy = plan.copies[0]
    assert copy.source != copy.target and _read(plan) == {0: 3}
    assert harness.scheduler.cached_tokens(number) == 10
    assert harness.pools[0].holders(copy.source) == 2  # until the next plan, nobody may take it
    harness.plan()
    assert harness.pools[0].holders(copy.source) == 1
    harness.finish()
    harness.check_tokens()


def test_a_prompt_that_was_read_before_needs_its_last_token_only():
    harness = _harness(window=6)
    for _ in range(2):
        harness.add(_prompt(8), 2)
        harness.finish()
    assert [asked.cached for asked in harness.done.values()] == [0, 7]
    assert Copy in {type(copy) for plan in harness.plans for copy in plan.copies}
    harness.check_tokens()


def test_without_room_for_a_copy_whole_pages_are_shared():
    """The pool has 3 pages, which the first request left in the tree; a copy of the last needs a fourth."""
    harness = _harness(4)
    for _ in range(2):
        harness.add(_prompt(11), 2)
        harness.finish()
    assert [asked.cached for asked in harness.done.values()] == [0, 8]
    harness.check_tokens()


@pytest.mark.parametrize(("share_decoded", "cached"), [(False, 6), (True, 10)])
def test_a_conversations_next_turn(share_decoded, cached):
    written = naive_device.exact if share_decoded else naive_device.by_path
    harness = _harness(share_decoded=share_decoded, written=written)
    first = harness.add(_prompt(6), 5)
    harness.finish()
    asked = harness.done[first]
    second = harness.add([*asked.prompt, *asked.tokens, 1, 1], 3)
    harness.finish()
    assert harness.done[second].cached == cached  # the last token was drawn, but never fed
    harness.check_tokens()


def test_whole_chunks_only_are_reused_where_bits_depend_on_cuts():
    harness = Harness(Policy.same_bits(slots=2, chunk=8, page=PAGE), [60], [None], written=naive_device.by_size)
    for length in (15, 25, 25):
        harness.add(_prompt(length), 2)
        harness.finish()
    assert [asked.cached for asked in harness.done.values()] == [0, 8, 24]
    harness.check_tokens()


def test_the_newest_is_set_aside_and_resumed_with_the_same_tokens():
    """Two grow to 7 pages each, and there are 9: what the newer one drew is given to decode again."""
    harness = _harness(10, slots=2, steps=2)
    first, second = harness.add(_prompt(4), 25), harness.add(_prompt(4, 1), 25)
    harness.finish(ahead=2)
    assert [*harness.done] == [first, second]
    assert harness.device.given > 0
    joins = [join.request for plan in harness.plans for join in plan.joins]
    assert joins[:2] == [first, second] and set(joins[2:]) == {second}
    harness.check_tokens()


def test_what_was_set_aside_and_not_evicted_goes_on_where_it_was():
    """Only the last page of a waiting request is evicted, if that is enough."""
    harness = _harness(7, slots=2)
    harness.add(_prompt(4), 9), harness.add(_prompt(11, 1), 6)
    harness.finish()
    resumed = [plan for plan in harness.plans if plan.joins][-1]
    assert not resumed.prefill and resumed.decode.rows[0].position >= 11
    harness.check_tokens()


def test_who_has_drawn_all_its_tokens_is_not_resumed():
    harness = _harness(8, slots=2)
    first, second = harness.add(_prompt(4), 20), harness.add(_prompt(8, 1), 4)
    harness.plan()
    while harness.scheduler.running == 2 and harness.plan():
        pass  # nothing is received
    assert harness.scheduler.waiting == 0 and {*harness.open} == {first, second}
    harness.finish()
    harness.check_tokens()


def test_none_passes_an_older_one_that_waits():
    harness = _harness(8, slots=3)
    harness.add(_prompt(8), 8)
    harness.plan()
    big, small = harness.add(_prompt(20, 1), 4), harness.add(_prompt(1, 2), 1)
    harness.plan()
    assert (harness.scheduler.running, harness.scheduler.waiting) == (1, 2)
    harness.finish()
    assert [join.request for plan in harness.plans for join in plan.joins] == [1, big, small]
    harness.check_tokens()


def test_after_a_loss_all_are_resumed():
    harness = _harness(window=6, steps=2)
    for length in (5, 9, 30, 2, 3):
        harness.add(_prompt(length, length), 9)
    for _ in range(3):
        harness.plan()
    harness.receive()
    harness.lose()
    assert harness.scheduler.running == harness.scheduler.in_flight == 0
    assert harness.scheduler.waiting == 5
    harness.finish()
    harness.check_tokens()


def test_tokens_are_received_in_order_and_in_the_right_number():
    harness = _harness()
    harness.add(_prompt(3), 5)
    first, second = harness.plan(), harness.plan()
    with pytest.raises(ValueError, match=f"plan {second.number} is not the oldest"):
        harness.scheduler.receive(second.number, [[0]])
    with pytest.raises(ValueError, match="draws 1 tokens for request 1, found 2"):
        harness.scheduler.receive(first.number, [[0, 0]])


def test_pages_after_a_token_that_could_not_be_drawn_are_not_shared():
    harness = _harness()
    number = harness.add(_prompt(6), 20)
    for _ in range(8):
        harness.plan()
    for tokens in ([0], [1], [-1]):
        harness.scheduler.receive(harness.under_way.popleft()[0], [tokens])
    harness.open[number].tokens += [0, 1, -1]
    harness.scheduler.end(number)
    held = [node.tokens for node in harness.scheduler._allocator.tree.nodes()]
    assert sum(map(len, held)) == 4 * 8  # the prompt and two tokens


def test_prompts_can_be_read_without_steps_between():
    harness = _harness()
    for length in (20, 4):
        harness.add(_prompt(length, length), 3)
    assert not harness.scheduler.has_newcomers
    for read in ({0: 12, 1: 4}, {0: 8}):
        plan = harness.scheduler.plan(decode=False)
        assert _read(plan) == read and plan.decode is None
        harness.device.run(plan)
        assert harness.scheduler.has_newcomers
    assert harness.scheduler.plan(decode=False) is None
    assert _rows(harness.plan()) == [0, 1]
    assert not harness.scheduler.has_newcomers
    harness.finish()
    harness.check_tokens()


def test_tokens_of_requests_that_have_ended_may_be_left_out():
    harness = _harness()
    first, second = harness.add(_prompt(3), 5), harness.add(_prompt(3, 1), 5)
    plan = harness.plan()
    harness.scheduler.end(first)
    with pytest.raises(ValueError, match="draws 1 tokens for request 2, found 0"):
        harness.scheduler.receive(plan.number, [(), ()])
    harness.scheduler.end(second)
    plan = harness.scheduler.plan()
    assert plan is None


def test_an_idle_scheduler_plans_nothing():
    assert _harness().plan() is None


def test_nothing_is_planned_for_a_held_request_and_what_is_under_way_is_received():
    harness = _harness()
    request = harness.add(_prompt(6), 5)
    harness.plan()
    harness.hold(request, True)
    assert harness.plan() is None
    harness.receive()
    assert len(harness.open[request].tokens) == 1
    harness.hold(request, False)
    assert _rows(harness.plan()) == [0]
    harness.finish()
    harness.check_tokens()


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_held_request_gives_its_slot_to_others_and_is_resumed_with_the_same_tokens(after):
    harness = _harness(slots=1)
    first = harness.add(_prompt(30), 6)
    for _ in range(after):
        harness.plan()
    harness.hold(first, True)
    second = harness.add(_prompt(9, 1), 4)
    while second in harness.open:
        plan = harness.plan()
        while harness.under_way and (plan is None or len(harness.under_way) > 1):
            harness.receive()
    assert harness.scheduler.running == 0 and harness.scheduler.waiting == 1
    harness.hold(first, False)
    harness.finish()
    harness.check_tokens()


def test_pages_are_taken_from_a_held_request_before_a_newer_one():
    harness = _harness(pages=1 + 7)
    held, older, newer = (harness.add(_prompt(6, n), 9) for n in range(3))
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


def test_nobody_waits_for_a_prefix_that_a_held_request_reads():
    harness = _harness()
    first = harness.add(_prompt(40), 2)
    harness.plan()
    harness.hold(first, True)
    harness.add(_prompt(40), 2)
    assert _read(harness.plan()) == {1: 16}
    harness.hold(first, False)
    harness.finish()
    harness.check_tokens()


def test_who_waits_for_a_prefix_goes_on_if_its_reader_is_held():
    harness = _harness()
    first = harness.add(_prompt(60), 2)
    second = harness.add(_prompt(60), 2)
    assert _read(harness.plan()) == {0: 16}  # the second waits
    harness.hold(first, True)
    assert _read(harness.plan()) == {1: 16}
    harness.hold(first, False)
    assert second in harness.open
    harness.finish()
    harness.check_tokens()


def _asked(**policy) -> Harness:
    same = Policy.same_bits(slots=4, chunk=16, page=PAGE, rows="asked", **policy)
    return Harness(same, [40], [None], written=naive_device.by_size)


def test_decode_calls_have_the_rows_that_requests_ask_for():
    harness = _asked()
    for number, rows in enumerate((4, 1, 4, 1)):
        harness.add(_prompt(3, number), 9, rows)
    plans = []
    while (plan := harness.plan()) is not None:
        plans.append((plan.decode.size, _rows(plan)))
        harness.receive()
    # Who has waited for longest, and all that share its call. At first, one prompt is read in each plan.
    for start in range(4, 10):
        assert sorted(plans[start : start + 3]) == [(1, [1]), (1, [3]), (4, [0, 2])]
    harness.check_tokens()
    with pytest.raises(ValueError, match="3 were asked for"):
        harness.add([1], 1, 3)


def test_another_scheduler_goes_on_after_the_tokens_that_were_drawn():
    harness = _asked()
    request = harness.add(_prompt(10), 6, 2)
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
    oldest = harness.add(_prompt(1), 100, 1)
    for number, length in enumerate((1, 3, 5, 16)):
        harness.add(_prompt(length, number), 80, 4)
    waits = 0
    while oldest in harness.open:
        plan = harness.plan()
        waits = 0 if plan.decode is not None and plan.decode.size == 1 else waits + 1
        assert waits <= 4
        if harness.under_way:
            harness.receive()
    harness.finish()
    harness.check_tokens()
