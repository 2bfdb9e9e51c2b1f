"""How prompts are cut, and which sizes programs have."""

import pytest

from gptjax.scheduling.policy import Policy, smallest


def test_sizes():
    assert Policy(slots=100, chunk=1024).row_sizes == (1, 2, 4, 8, 16, 32, 64, 100)
    assert Policy(slots=8, chunk=1024).row_sizes == (1, 2, 4, 8)
    assert Policy(slots=1, chunk=16).row_sizes == (1,)
    assert Policy(slots=100, chunk=1024, smallest_rows=16).row_sizes == (16, 32, 64, 100)
    assert Policy(slots=12, chunk=1024, smallest_rows=16).row_sizes == (12,)
    assert Policy(slots=100, chunk=1024, rows="all").row_sizes == (100,)
    assert Policy(slots=1, chunk=256).call_sizes == (32, 64, 128, 256)
    assert Policy(slots=1, chunk=16).call_sizes == (16,)
    assert Policy(slots=1, chunk=1024, smallest_call=256).call_sizes == (256, 512, 1024)
    assert [smallest((1, 2, 4, 7), count) for count in range(1, 8)] == [1, 2, 4, 4, 7, 7, 7]


@pytest.mark.parametrize(("length", "pieces"), [
    (1, [1]), (32, [32]), (512, [512]), (513, [512, 1]), (768, [512, 256]), (769, [769]), (1024, [1024]),
    (1025, [1024, 1]), (2600, [1024, 1024, 512, 40]),
])  # fmt: skip
def test_pieces_of_their_own_depend_on_the_length_alone(length, pieces):
    """A last chunk of which at least a quarter would be padding is cut in two."""
    policy, found = Policy.same_bits(slots=1, chunk=1024), []
    while length:
        found.append(policy.piece(length, 2048))
        length -= found[-1]
    assert found == pieces


def test_a_piece_of_its_own_is_not_cut_short():
    policy = Policy.same_bits(slots=1, chunk=1024)
    assert policy.piece(700, 1023) == 512  # in a call of 512
    assert policy.piece(800, 1023) == 0  # in a call of 1,024
    assert policy.piece(3, 128) == 3 and policy.piece(3, 127) == 0  # counts as an eighth of a chunk


def test_packed_pieces_end_at_multiples_or_with_the_prompt():
    policy = Policy(slots=1, chunk=1024, chunk_multiple=128)
    assert [policy.piece(left, 300) for left in (300, 301, 127, 2000)] == [300, 256, 127, 256]
    assert policy.piece(200, 100) == 0


def test_pages():
    policy = Policy(slots=1, chunk=8, page=4)
    assert [policy.pages(positions) for positions in (0, 1, 4, 5)] == [0, 1, 1, 2]
    for positions in range(1, 30):
        spans = [(start + positions - 1) // 4 - start // 4 + 1 for start in range(8)]
        assert policy.pages_across(positions) == max(spans)


@pytest.mark.parametrize("wrong", [
    {"chunk": 48}, {"chunk": 0}, {"slots": 0}, {"steps": 0}, {"page": 0}, {"chunk_multiple": 3}, {"pieces": 0},
    {"smallest_call": 0}, {"smallest_rows": 0},
])  # fmt: skip
def test_wrong_policies_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Policy(**{"slots": 2, "chunk": 64, **wrong})
