"""Requests over shards, each with slots and pages of its own: who joins which, and what they do in one call."""

import numpy as np
import pytest

from gptjax.scheduling.draft import turns
from gptjax.scheduling.policy import Policy
from gptjax.scheduling.sequence import Sequence
from tests.scheduling import naive_device
from tests.scheduling.harness import PAGE, Harness, prompt_of, read_by, rows_of, small, small_asked


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
    """Each shard has 8 pages. Two requests of 20 positions do not fit into them; two of 15 do, one of which is held."""
    harness = small(shards=2, slots=2, pages=9)
    long, short = [], []
    for each in range(2):
        long.append(harness.add(prompt_of(9, each), 12))
        short.append(harness.add(prompt_of(5, each), 11))
    harness.plan()
    assert _shards(harness) == {long[0]: 0, short[0]: 1, long[1]: 0, short[1]: 1}
    harness.receive()
    harness.hold(short[0], True)
    while long[1] in _shards(harness):
        harness.plan()
        while harness.under_way:
            harness.receive()
    assert set(_shards(harness)) == {long[0], *short}
    harness.plan()
    assert _shards(harness) == {long[0]: 0, short[1]: 1, long[1]: 1}  # in place of the one that is held
    harness.hold(short[0], False)
    harness.finish()
    harness.check_tokens()


def test_each_shard_reads_a_chunk():
    """Prompts that others read elsewhere take no part of it."""
    harness = small(shards=2, pages=100)
    harness.add(prompt_of(40), 2)
    harness.add(prompt_of(40, 1), 2)
    assert read_by(harness.plan()) == {0: 16, 4: 16}


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


def test_a_turn_is_that_of_those_who_have_waited_for_longest_in_each_shard():
    active = [
        Sequence(number, np.zeros(1, np.int32), 9, rows=rows, begun=True, position=1, slot=slot, shard=slot // 4)
        for number, rows, slot in [(1, 2, 0), (2, 2, 1), (3, 1, 4), (4, 2, 2), (5, 2, 5), (6, 2, 6)]
    ]
    policy = Policy.same_bits(slots=4, chunk=16, rows="asked")
    found = [(turn.size, [each.number for each in turn.chosen]) for turn in turns(active, policy)]
    assert found == [(2, [1, 2, 5, 6]), (1, [3]), (2, [4])]


@pytest.mark.parametrize("shards", [0, -1])
def test_a_policy_has_a_shard(shards):
    with pytest.raises(ValueError, match="shards must be at least 1"):
        Policy(4, 16, shards=shards)
