"""Several steps a dispatch: what the device is asked for, and when; few steps in vain."""

import jax
import pytest

from gptjax.engine import programs
from gptjax.engine.engine import Engine
from gptjax.scheduling.policy import Policy
from tests.engine.generated import generate
from tests.engine.test_steps_per_dispatch import (
    MAX_LENGTH,
    REQUESTS,
    SLOTS,
    _alone,
    _engine,
    _given,
    _gpt2,
    _request,
)


class Asked:
    """Counts what an engine asks of the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.chunks: list[int] = []  # the steps of each dispatch
        self._count(monkeypatch, "decode", lambda arguments: arguments[-1])
        self._count(monkeypatch, "advance", lambda _: 1)

    def _count(self, monkeypatch, name, num_steps) -> None:
        original = getattr(programs, name)

        def counted(*arguments):
            if not isinstance(arguments[2].logits_BV, jax.core.Tracer):  # not while another step is traced
                self.chunks.append(num_steps(arguments))
            return original(*arguments)

        monkeypatch.setattr(programs, name, counted)


@pytest.fixture
def asked(monkeypatch):
    """What engines ask of the device from here on."""
    return Asked(monkeypatch)


def test_what_is_known_to_be_of_no_use_is_at_most_half_a_chunk(asked):
    expected = {1: [1], 3: [1, 1, 1], 4: [1, 1, 1, 1], 5: [1, 8], 9: [1, 8], 12: [1, 8, 1, 1, 1], 17: [1, 8, 8]}
    for max_tokens in range(1, 32):
        asked.chunks.clear()
        (*_, (_, last)) = generate(_engine(_gpt2(), 8), [_request(1, 5, max_tokens)], None)
        assert len(last.completion.token_ids) == max_tokens
        assert asked.chunks == expected.get(max_tokens, asked.chunks)
        assert max_tokens <= sum(asked.chunks) <= max_tokens + 4
    asked.chunks.clear()
    list(generate(_engine(_gpt2(), 8), [_request(1, 36, 1000)], None))  # the context holds five tokens more
    assert asked.chunks == [1, 8]


def test_one_step_a_dispatch_is_one_step_a_token(asked):
    engine = Engine(*_gpt2(), batch=SLOTS, max_length=MAX_LENGTH)
    if jax.default_backend() == "cpu":  # the default
        assert engine.policy.steps == 1
    engine = _engine(_gpt2(), 1)
    engine.add(REQUESTS[0])
    for number in range(1, 15):
        engine.step()
        assert asked.chunks == [1] * number


def test_the_device_is_a_chunk_ahead_and_no_more(asked):
    engine = _engine(_gpt2(), 8)
    engine.add(_request(1, 1, 1000))
    engine.step()
    assert asked.chunks == [1]  # the first token does not wait for others
    for returned in range(2, 30):
        engine.step()
        engine.wait()  # tokens that the device has done are kept
        left = 8 - (returned - 1) % 8 if (returned - 1) % 8 else 0  # of the chunk that was read
        # At most as many as the context has room for.
        assert min(40, left + 8) <= sum(asked.chunks) - returned <= left + 8


def test_it_is_known_which_tokens_are_there_without_waiting(monkeypatch):
    engine, reads = _engine(_gpt2(), 8), []
    read = Engine._read
    monkeypatch.setattr(Engine, "_read", lambda *a: (reads.append(1), read(*a))[1])
    assert not engine.has_tokens
    first = engine.add(_request(1, 1, 30))
    for returned in range(1, 26):
        waits, before = not engine.has_tokens, len(reads)
        assert [token.request for token in engine.step()] == [first]
        assert len(reads) - before == waits
        assert engine.has_tokens == (returned % 8 != 1)
    engine.end(first)
    assert engine.step() == [] and not engine.has_tokens


def test_a_newcomer_gets_its_first_token_by_itself_after_what_was_under_way(asked):
    engine = _engine(_gpt2(), 8)
    first = engine.add(_request(1, 1, 1000))
    for _ in range(4):
        engine.step()
    assert asked.chunks == [1, 8, 8]
    second = engine.add(REQUESTS[1])
    engine.step()
    assert asked.chunks == [1, 8, 8, 1]  # asked for at once
    steps_after = [[token.request for token in engine.step()] for _ in range(14)]
    assert steps_after == [[first]] * 12 + [[first, second]] * 2
    asked.chunks.clear()
    engine.end(first)  # the one that is left has a token to come, which the device was asked for
    assert [token.request for token in engine.step()] == [second]
    assert asked.chunks == []


def test_nothing_is_left_of_the_request_before_even_if_it_is_the_same(asked):
    engine = _engine(_gpt2(), 8)
    expected = _alone(_gpt2(), REQUESTS[0])
    for returned in (3, 1, 9, 12):  # left within chunks and at their ends
        number = engine.add(REQUESTS[0])
        assert _given(engine, number, REQUESTS[0], returned) == expected[:returned]
        engine.end(number)
        asked.chunks.clear()
        assert engine.step() == []  # nobody is there
        assert asked.chunks == []


def test_closing_the_iterator_leaves_nothing_behind():
    engine = _engine(_gpt2(), 8)
    chunks = generate(engine, REQUESTS[:3], None)
    for _ in range(7):
        next(chunks)
    chunks.close()
    assert engine.room == 3
    ((_, first), *_) = generate(engine, [REQUESTS[0]], None)
    assert first.token_id == _alone(_gpt2(), REQUESTS[0])[0][0]


def test_tokens_that_are_there_do_not_wait_until_a_long_prompt_is_dispatched(monkeypatch):
    """Nor does who shares its beginning, and it can still be cancelled."""
    engine = Engine(*_gpt2(), batch=2, max_length=MAX_LENGTH, policy=Policy(slots=2, chunk=4, steps=8))
    running = engine.add(_request(1, 3, 9))
    given = 0
    while given < 2:  # the second comes with all that follow
        given += len(engine.step())
    dispatched, original = [], programs.prefill
    monkeypatch.setattr(programs, "prefill", lambda *a: (dispatched.append(1), original(*a))[1])
    engine.add(_request(2, 36, 1))
    for step in range(1, 8):
        tokens = engine.step()
        assert [token.request for token in tokens] == [running]
        assert len(dispatched) <= step + 1
    engine.end(running)
    while not engine.step():
        pass
    assert len(dispatched) == 9


def test_while_prompts_are_read_the_device_has_the_next_plan_before_its_tokens_are_waited_for(asked, monkeypatch):
    """Or it would be idle while the host hands out tokens, makes a plan and dispatches it."""
    engine = Engine(*_gpt2(), batch=3, max_length=MAX_LENGTH, policy=Policy(slots=3, chunk=8, steps=8))
    numbers = [engine.add(_request(seed, 8, 6)) for seed in range(3)]
    ahead, original = [], Engine._read

    def read(engine, dispatched):
        ahead.append(sum(asked.chunks) - len(ahead) - 1)
        return original(engine, dispatched)

    monkeypatch.setattr(Engine, "_read", read)
    got = [[token.request for token in engine.step()] for _ in range(3)]
    assert got == [[], numbers[:2], numbers]
    assert ahead == [1, 0]  # after the last prompt there are only steps, whose tokens are read early enough


def test_a_dispatch_is_of_one_step_at_least():
    with pytest.raises(ValueError, match="at least 1, found 0"):
        _engine(_gpt2(), 0)
