"""Prompts that are read chunk by chunk between steps, and from what a slot still holds: the bits are the same."""

import numpy as np
import pytest

from gptjax.engine.engine import Engine
from gptjax.engine.request import Request, SamplingParams
from gptjax.engine.settings import Features
from tests.engine.test_steps_per_dispatch import made  # noqa: F401 (a fixture)
from tests.thinned import thinned

SLOTS, MAX_LENGTH, CHUNK, VOCAB = 3, 60, 8, 101  # the second model's rings have 9 places


def _engine(made, *, chunk: int = CHUNK, max_length: int = MAX_LENGTH, **options) -> Engine:  # noqa: F811
    return Engine(*made, batch=SLOTS, max_length=max_length, chunk=chunk, **options)


def _request(seed: int, length: int, *, prompt=None) -> Request:
    ids = np.random.default_rng(seed).integers(0, VOCAB, length).tolist() if prompt is None else prompt
    return Request(tuple(ids), 12, SamplingParams(seed=seed, temperature=1.0))


def _tokens(engine: Engine, slot: int, count: int = 12) -> list[tuple]:
    """The next tokens of a slot, while the others get theirs."""
    given = []
    while len(given) < count:
        given += [(token.token_id, token.logprob) for token in engine.step() if token.slot == slot]
    return given


def _alone(made, request: Request, **options) -> list[tuple]:  # noqa: F811
    engine = _engine(made, **options)
    engine.admit(0, request)
    return _tokens(engine, 0)


def _read(engine: Engine) -> int:
    """Reads the prompt that was begun, between steps. Returns the number of its chunks."""
    chunks = 0
    while engine.fill_is_due or engine.step():
        if engine.fill_is_due:
            chunks += 1
            if engine.fill():
                break
    return chunks


@pytest.mark.parametrize("steps_per_dispatch", thinned([1, 8], 8))
def test_a_prompt_that_is_read_between_steps_gives_the_bits_it_gives_alone(made, steps_per_dispatch):  # noqa: F811
    engine = _engine(made, steps_per_dispatch=steps_per_dispatch)
    beside = Request((1, 2, 3), 1000, SamplingParams(seed=1))
    engine.admit(0, beside)
    engine.step()
    for request in (_request(1, 37), _request(2, 8), _request(3, 9)):
        assert engine.begin(1, request) == 0
        assert engine.free_slots == [2]
        assert _read(engine) == -(-len(request.prompt_ids) // CHUNK)
        assert _tokens(engine, 1) == _alone(made, request)
        engine.release(1)


def test_two_chunks_of_a_prompt_never_follow_each_other_while_a_slot_is_busy(made):  # noqa: F811
    engine = _engine(made, steps_per_dispatch=8)
    engine.begin(0, _request(1, 30))
    while engine.fill_is_due and not engine.fill():
        pass  # nobody is kept waiting
    assert engine.free_slots == [1, 2]
    engine.begin(1, _request(2, 30))
    due = []
    for _ in range(4):
        while not engine.fill_is_due:
            engine.step()
        engine.fill()
        due.append(engine.fill_is_due)
    assert due == [False] * 4


def test_short_prompts_are_read_together_up_to_a_chunk(made):  # noqa: F811
    engine = Engine(*made, batch=SLOTS, max_length=MAX_LENGTH, chunk=64)
    engine.admit(0, _request(1, 5))
    engine.step()
    for slot in (1, 2):  # each counts as its bucket, 32
        engine.begin(slot, _request(slot, 5))
        assert engine.fill_is_due and engine.fill()
    engine.release(2)
    engine.begin(2, _request(3, 5))
    assert not engine.fill_is_due
    while not engine.fill_is_due:
        engine.step()
    assert engine.fill()


@pytest.mark.parametrize("chunks", range(4))
def test_a_prompt_may_be_given_up_after_any_chunk(made, chunks):  # noqa: F811
    engine = _engine(made, reuse=True)
    engine.begin(1, _request(1, 30))
    for _ in range(chunks):
        assert not engine.fill()
    engine.release(1)
    assert engine.free_slots == [0, 1, 2]
    assert engine.step() == []
    request = _request(1, 31)
    assert engine.begin(1, request) == 0  # what was given up is held by no slot
    _read(engine)
    assert _tokens(engine, 1) == _alone(made, request)


@pytest.mark.thorough
def test_a_prompt_whose_rest_is_cut_in_two_gives_the_bits_it_gives_alone(made):  # noqa: F811
    sizes = {"chunk": 64, "max_length": 240}
    engine = _engine(made, reuse=True, **sizes)
    engine.admit(0, Request((1, 2, 3), 1000, SamplingParams(seed=1)))
    first = _request(1, 104)  # 64, 32 and 8
    assert engine.begin(1, first) == 0
    assert _read(engine) == 3
    drawn = _tokens(engine, 1)
    assert drawn == _alone(made, first, **sizes)
    request = _request(2, 0, prompt=[*first.prompt_ids, *(token for token, _ in drawn), *range(60)])  # 176: 128, 48
    assert engine.begin(2, request) == 64
    assert _read(engine) == 3
    assert _tokens(engine, 2) == _alone(made, request, **sizes)


def test_a_chunk_is_a_power_of_two(made):  # noqa: F811
    with pytest.raises(ValueError, match="a power of two, found 48"):
        _engine(made, chunk=48)


def test_a_longer_prompt_goes_on_from_a_slot_as_often_as_wanted(made):  # noqa: F811
    engine = _engine(made, reuse=True)
    first = _request(1, 20)
    engine.admit(0, first)
    drawn = _tokens(engine, 0)  # beyond the ring's size
    for slot, length, held in ((1, 30, 16), (2, 18, 16), (2, 25, 24)):  # the last from slot 1
        request = _request(slot, 0, prompt=[*first.prompt_ids, *(token for token, _ in drawn)][:length])
        assert engine.begin(slot, request) == held
        _read(engine)
        assert _tokens(engine, slot) == _alone(made, request)
        engine.release(slot)


@pytest.mark.parametrize("place", [1, 15])
def test_a_prompt_that_is_another_within_what_a_slot_holds_is_read_from_its_beginning(made, place):  # noqa: F811
    engine = _engine(made, reuse=True)
    first = _request(1, 20)  # of which 16 are held
    engine.admit(0, first)
    other = [*first.prompt_ids]
    other[place] = (other[place] + 1) % VOCAB
    request = _request(2, 0, prompt=other)
    assert engine.begin(1, request) == 0
    _read(engine)
    assert _tokens(engine, 1) == _alone(made, request)


def test_the_slot_to_take_is_that_of_the_conversation_else_the_one_missed_least(made):  # noqa: F811
    engine = _engine(made, reuse=True)
    first, second, third = (_request(seed, 20) for seed in (1, 2, 3))
    assert engine.best_slot(first) == 0
    engine.admit(0, first)
    engine.release(0)
    assert engine.best_slot(_request(1, 30)) == 0
    assert engine.best_slot(second) == 1
    for slot, request in ((1, second), (2, third)):
        engine.admit(slot, request)
        engine.release(slot)
    assert engine.best_slot(_request(4, 20)) == 0  # the oldest
    assert engine.best_slot(_request(3, 21)) == 2
    engine.admit(2, _request(5, 4))  # it holds no whole chunk
    engine.release(2)
    assert engine.best_slot(_request(4, 20)) == 2
    assert _engine(made).best_slot(first) == 0


def test_one_prompt_is_read_at_a_time_into_a_free_slot(made):  # noqa: F811
    engine = _engine(made)
    with pytest.raises(ValueError, match="no prompt is being read"):
        engine.fill()
    engine.begin(0, _request(1, 20))
    with pytest.raises(ValueError, match="slot 0 is busy"):
        engine.begin(0, _request(2, 20))
    with pytest.raises(ValueError, match="the prompt of slot 0 is still being read"):
        engine.begin(1, _request(2, 20))
    with pytest.raises(ValueError, match="all slots to be free"):
        engine.warm_up()


def test_levels_compute_what_the_requests_of_the_moment_need(made):  # noqa: F811
    levels = (Features(), Features(draws=True), Features(True, True, True, True, 20))
    engine = _engine(made, levels=levels)
    engine.warm_up()
    greedy = Request((1, 2), 12, SamplingParams(seed=1))
    full = Request((1, 2), 12, SamplingParams(seed=1, temperature=1.0, top_p=0.9))
    expected = [(greedy, levels[0]), (_request(1, 5), levels[1]), (full, levels[2]), (greedy, levels[0])]
    for request, level in expected:
        engine.admit(0, request)
        assert engine._needed_features() == level
        assert _tokens(engine, 0) == _alone(made, request)
        engine.release(0)
