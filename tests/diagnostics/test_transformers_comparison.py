"""What `gptjax compare` makes of a router's near ties. (tests/oracle/test_compare.py runs transformers, too.)"""

import numpy as np

from gptjax.diagnostics.transformers_comparison import Row, other_experts


def router(ours, theirs, tolerance=0.06):
    return Row("block_0/moe/router", np.array(ours), np.array(theirs), tolerance)


def test_a_near_tie_that_rounding_decides():
    row = router([[3.0, 2.0, 1.99], [1.0, 2.0, 3.0]], [[3.0, 1.99, 2.0], [1.0, 2.0, 3.0]])
    assert other_experts(row, top=2) == [0]
    assert other_experts(row, top=1) == other_experts(row, top=3) == []


def test_the_order_of_the_same_experts_is_no_matter():
    assert other_experts(router([[3.0, 2.99, 1.0]], [[2.99, 3.0, 1.0]]), top=2) == []


def test_a_router_that_differs_is_no_tie():
    for ours in ([[3.0, 1.0, 2.0]], [[3.0, np.nan, 2.0]]):
        assert other_experts(router(ours, [[3.0, 2.0, 1.0]]), top=2) == []


def test_tokens_left_out_are_not_compared():
    ours, theirs = np.array([[1.0, 2.0], [9.0, 9.0]]), np.array([[1.0, 2.5], [0.0, 0.0]])
    assert Row("block_0/moe", ours, theirs, 0.3).difference == 9.0
    row = Row("block_0/moe", ours, theirs, 0.3, left_out=(1,))
    assert row.difference == 0.5
    assert row.agrees
    assert not Row("block_0/moe", ours, theirs, 0.1, left_out=(1,)).agrees
    assert not Row("block_0/moe", ours, theirs, 0.3, left_out=(0, 1)).agrees  # nothing was compared
