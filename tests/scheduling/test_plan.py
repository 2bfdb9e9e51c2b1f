"""Plans are small values that survive being written and read."""

import dataclasses

import pytest

from gptjax.scheduling.plan import Copy, DecodeCall, Join, Piece, Plan, PrefillCall, Row, TableEntry

PLAN = Plan(
    number=7,
    joins=(Join(2, 31), Join(0, 4, (8, 9))),
    tables=(TableEntry(0, 2, 0, 5), TableEntry(1, 2, 0, 0)),
    copies=(Copy(0, 5, 6, 3),),
    prefill=(PrefillCall(32, (9, 8, 7), (Piece(2, 0, 1, 12, True), Piece(1, 1, 2, 0, False))),),
    decode=DecodeCall(4, 2, (Row(2, 13, (), 2, 1), Row(0, 3, (4, 5), 0, 2))),
)


@pytest.mark.parametrize("plan", [PLAN, dataclasses.replace(PLAN, decode=None), Plan(1, (), (), (), (), None)])
def test_json_round_trip(plan):
    again = Plan.from_json(plan.to_json())
    assert again == plan and hash(again) == hash(plan)


def test_json_is_a_list_of_the_fields():
    assert PLAN.to_json() == (
        "[7,[[2,31,[]],[0,4,[8,9]]],[[0,2,0,5],[1,2,0,0]],[[0,5,6,3]],[[32,[9,8,7],[[2,0,1,12,true],[1,1,2,0,false]]]],"
        "[4,2,[[2,13,[],2,1],[0,3,[4,5],0,2]]]]"
    )


def test_a_decode_step_of_many_long_rows_is_small():
    rows = tuple(Row(slot, 131_000 + slot, (), 8, 8) for slot in range(128))
    assert len(Plan(10**6, (), (), (), (), DecodeCall(128, 8, rows)).to_json()) < 128 * 40


def test_draws():
    assert PLAN.draws
    assert not dataclasses.replace(PLAN, decode=None).draws
    assert not dataclasses.replace(PLAN, decode=DecodeCall(1, 2, (Row(0, 3, (4, 5), 0, 2),))).draws
