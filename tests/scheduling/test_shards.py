"""Requests over shards, each with slots and pages of its own: who joins which, and what they do in one call."""

import pytest

from gptjax.scheduling.policy import Policy
from tests.scheduling import naive_device
from tests.scheduling.harness import PAGE, Harness, prompt_of, rows_of, small, small_asked


def _shards(harness: Harness) -> dict[int, int]:
    """The shard of each running request, by its number."""
    return {sequence.number: sequence.shard for sequence in harness.scheduler._running}


def test_slots_are_dealt_evenly():
    harness = small(shards=2)
    numbers = [harness.add(prompt_of(5 + each, each), 20) for each in range(5)]
    plan = harness.plan()
    assert list(_shards(harness).values()) == [0, 1, 0, 1, 0]
    assert [join.slot for join in plan.joins] == [0, 4, 1, 5, 2]
    (call,) = plan.prefill
    assert call.size == 16 and len(call.tokens) == 5 + 6 + 7 + 8 + 9 - 5  # 16 for shard 0, whose prompts have 21
    assert plan.decode.size == 2 and len(plan.decode.rows) == 4
    harness.end(numbers[1])
    harness.end(numbers[3])
    harness.add(prompt_of(7, 2), 2)
    harness.plan()
    assert _shards(harness)[6] == 1
    harness.finish()
    harness.check_tokens()


def test_a_request_goes_where_its_beginning_is_unless_that_shard_has_much_to_do():
    """One that runs counts as a page, 4 tokens, to be read. 8 tokens are found in shard 0."""
    harness = small(shards=2)
    harness.add(prompt_of(9), 1)
    harness.finish()
    for expected in ([0], [0, 0], [0, 0, 0], [0, 0, 0, 1]):
        harness.add([*prompt_of(8), 2, 2], 20)
        harness.plan()
        assert list(_shards(harness).values()) == expected
        while harness.under_way:
            harness.receive()


def test_a_full_shard_sends_a_request_to_another_that_reads_all_of_it():
    harness = small(shards=2, slots=1)
    harness.add(prompt_of(9), 1)
    harness.finish()
    staying, moved = harness.add([*prompt_of(8), 1], 9), harness.add([*prompt_of(8), 2], 9)
    harness.plan()
    assert _shards(harness) == {staying: 0, moved: 1}
    assert [harness.scheduler.cached_tokens(each) for each in (staying, moved)] == [8, 0]
    harness.finish()
    harness.check_tokens()


def test_a_shard_without_pages_sets_aside_its_own_requests_only():
    """Each shard has 8 pages, so two requests of 20 positions do not fit."""
    harness = small(shards=2, slots=2, pages=9)
    numbers = [harness.add(prompt_of(5, each), 16) for each in range(4)]
    most = 0
    while harness.open:
        harness.plan()
        most = max(most, harness.waiting)
        shards = _shards(harness)
        assert numbers[0] not in harness.open or numbers[0] in shards
        assert numbers[1] not in harness.open or numbers[1] in shards  # the oldest of the other shard
        while harness.under_way:
            harness.receive()
    assert most == 2
    harness.check_tokens()


def test_a_held_request_makes_room_only_if_no_shard_has_any():
    harness = small(shards=2, slots=1)
    first = harness.add(prompt_of(5), 9)
    harness.plan()
    harness.hold(first, True)
    second = harness.add(prompt_of(5, 1), 9)
    harness.plan()
    assert _shards(harness) == {first: 0, second: 1}
    third = harness.add(prompt_of(5, 2), 9)
    harness.receive()
    harness.plan()
    assert _shards(harness) == {second: 1, third: 0}


def test_pieces_that_need_calls_of_one_size_share_a_call():
    policy = Policy.same_bits(slots=4, chunk=256, page=PAGE, shards=2)
    harness = Harness(policy, [200], [None], written=naive_device.by_size)
    for length in (16, 40, 100, 17, 39):  # in turns of the two shards
        harness.add(prompt_of(length, length), 3)
    plan = harness.plan()
    slots = [(call.size, [piece.slot for piece in call.pieces]) for call in plan.prefill]
    assert slots == [(32, [0, 5]), (128, [1]), (64, [2, 4])]
    harness.finish()
    harness.check_tokens()


def test_requests_that_ask_for_as_many_rows_have_a_turn_in_all_shards():
    harness = small_asked(shards=2)
    for rows in (2, 2, 2, 1, 2, 2):
        harness.add(prompt_of(5, rows), 6, rows=rows)
    seen = set()
    while harness.open:
        plan = harness.plan()
        if plan is not None and plan.decode is not None:
            seen.add((plan.decode.size, len(rows_of(plan))))
        while harness.under_way:
            harness.receive()
    assert (2, 4) in seen and (1, 1) in seen
    harness.check_tokens()


@pytest.mark.parametrize("shards", [0, -1])
def test_a_policy_has_a_shard(shards):
    with pytest.raises(ValueError, match="shards must be at least 1"):
        Policy(4, 16, shards=shards)
