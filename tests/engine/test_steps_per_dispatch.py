"""Several steps a dispatch: the same bits as one by one, whoever joins and leaves meanwhile."""

import dataclasses
import random

import jax
import numpy as np
import pytest

from gptjax.config import config_from_json
from gptjax.engine import programs, steps
from gptjax.engine.engine import Engine
from gptjax.engine.flat_params import FlatParams
from gptjax.engine.free_of_load import is_free_of_load
from gptjax.engine.pools import default_policy
from gptjax.engine.request import Request, SamplingParams, Token
from gptjax.engine.settings import Features, settings_of
from gptjax.models import registry
from gptjax.scheduling.policy import Policy
from tests.compilations import compilations
from tests.engine import test_engine
from tests.engine.generated import generate
from tests.fuzz import rounds
from tests.oracles import gpt_oss_ours, gpt_oss_random
from tests.thinned import thorough

SLOTS, MAX_LENGTH, VOCAB = 3, 40, 101
# A dispatch; each number is a program of its own.
STEPS = [("gpt2", 8), thorough("gpt2", 3), thorough("gpt-oss", 8), thorough("gpt-oss", 1)]
ALL = {  # every kind of sampling: two sets of features in all, as each is a program to compile
    "temperature": 1.2,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.01,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.2,
    "logit_bias": {7: 2.0, 3: -100.0},
    "top_logprobs": 3,
}


def _gpt_oss():
    """Two layers, one of them a ring of 9 places."""
    checkpoint = gpt_oss_random.checkpoint(**gpt_oss_random.TWO_LAYERS)
    config = config_from_json({**checkpoint.config, "quantization_config": gpt_oss_random.QUANTIZATION})
    return registry.build(config), gpt_oss_ours.params(checkpoint.packed)


@pytest.fixture(scope="module", params=["gpt2", thorough("gpt-oss")])
def made(request):
    """A model and its weights. GPT-OSS takes three times as long to compile."""
    return _gpt2() if request.param == "gpt2" else _gpt_oss()


def _request(seed: int, length: int, max_tokens: int, **params) -> Request:
    ids = np.random.default_rng(seed).integers(0, VOCAB, length)
    return Request(tuple(ids.tolist()), max_tokens, SamplingParams(**{"seed": seed} | params))


REQUESTS = [
    _request(1, 5, 20),
    _request(2, 20, 3),
    _request(3, 33, 50),  # fills its row
    _request(4, 9, 25, **ALL),
    _request(5, 1, 12, **ALL | {"repetition_penalty": 1.0}),
    _request(6, 37, 50, **ALL),  # fills its row
    _request(7, 12, 1, **ALL | {"temperature": 0.0}),
]


def _engine(made, steps_per_dispatch: int) -> Engine:
    """One that computes all rows: `test_a_step_has_as_many_rows_as_are_busy` has one that does not."""
    policy = default_policy(made[0], slots=SLOTS, steps_per_dispatch=steps_per_dispatch)
    policy = dataclasses.replace(policy, smallest_rows=SLOTS)
    return Engine(*made, batch=SLOTS, max_length=MAX_LENGTH, policy=policy)


def _kept(token: Token, request: Request) -> tuple:
    top = token.top[: request.params.top_logprobs]  # others may have asked for more
    return token.token_id, token.logprob, top


def _given(engine: Engine, number: int, request: Request, count: int) -> list[tuple]:
    """The next tokens of a request that has the engine for itself."""
    given: list[tuple] = []
    while len(given) < count:
        tokens = engine.step()
        assert all(token.request == number for token in tokens)
        given += [_kept(token, request) for token in tokens]
    return given


def _alone(made, request: Request) -> list[tuple]:
    engine = _engine(made, 1)
    return _given(engine, engine.add(request), request, request.room(MAX_LENGTH))


def _play(engine: Engine, seed: int) -> list[tuple[Request, list[tuple]]]:
    """Requests that join and leave at random, some long before their end, with the tokens that each was given."""
    rng = random.Random(seed)
    waiting = rng.choices(REQUESTS, k=9)
    running, results = {}, []
    while waiting or running:
        for _ in range(engine.room):
            if waiting and (not running or rng.random() < 0.3):
                request = waiting.pop()
                end = request.room(MAX_LENGTH)
                running[engine.add(request)] = request, [], rng.choice([end, rng.randint(1, end)])
        tokens = engine.step()
        numbers = [token.request for token in tokens]
        assert numbers == sorted(set(numbers))
        assert set(numbers) <= set(running)
        for token in tokens:
            request, given, end = running[token.request]
            given.append(_kept(token, request))
            if len(given) == end:
                engine.end(token.request)
                results.append((request, given))
                del running[token.request]
        if running and rng.random() < 0.05:  # one that is no longer wanted, between two steps
            number = rng.choice(list(running))
            engine.end(number)
            results.append(running.pop(number)[:2])
    return results


@pytest.fixture(scope="module")
def alone(made) -> dict[int, list[tuple]]:
    """What each of REQUESTS gives by itself, one step at a time."""
    return {id(request): _alone(made, request) for request in REQUESTS}


@pytest.mark.parametrize(("made", "steps_per_dispatch"), STEPS, indirect=["made"])
def test_requests_that_come_and_go_get_the_bits_they_get_alone_one_step_at_a_time(made, alone, steps_per_dispatch):
    assert all(token >= 0 for tokens in alone.values() for token, _, _ in tokens)
    assert any(entry[2] for tokens in alone.values() for entry in tokens)
    for seed in range(rounds(12)):
        for request, given in _play(_engine(made, steps_per_dispatch), seed):
            assert given == alone[id(request)][: len(given)], (seed, request)


@pytest.mark.thorough
@pytest.mark.parametrize(("made", "num_steps"), [("gpt-oss", 8), ("gpt2", 3), ("gpt2", 1)], indirect=["made"])
def test_several_steps_leave_what_single_ones_leave(made, num_steps):
    model, params = made[0], FlatParams.of(made[1])
    settings = settings_of(REQUESTS[2:5], VOCAB, Features.of(REQUESTS[3].params))
    # The first row has two steps fewer than the call, the second is given two tokens, the third is padding.
    rows = np.zeros((SLOTS, programs.ROW_FIELDS + num_steps), np.int32)
    rows[0, : programs.ROW_FIELDS] = 0, 38, 0, num_steps, num_steps - 2
    rows[1, : programs.ROW_FIELDS] = 1, 9, min(2, num_steps), num_steps, num_steps
    rows[1, programs.ROW_FIELDS :][:2] = (7, 3)[:num_steps]
    rows[2, 0] = -1

    def filled() -> programs.Slots:
        state = steps.init_state(model, batch=SLOTS, max_length=MAX_LENGTH)
        for slot in range(SLOTS):
            tokens = np.arange(MAX_LENGTH - 2 if slot == 0 else 9, dtype=np.int32)
            state = steps.prefill(model, params, state, slot, tokens)
        return programs.Slots(state.cache, state.logits_BV, np.zeros((SLOTS, VOCAB), np.int32))

    single, expected = filled(), []
    for step in range(num_steps):
        of_step = rows[:, : programs.ROW_FIELDS + 1].copy()
        of_step[:, 1] += step
        of_step[:, 2:5] = np.clip(of_step[:, 2:5] - step, 0, 1)
        of_step[:, -1] = rows[:, programs.ROW_FIELDS + step]
        expected.append(jax.device_get(programs.sample(single, of_step, settings)))
        single = programs.advance(model, params, single, expected[-1].token_B, of_step)
    slots, stacked = programs.decode(model, params, filled(), rows, settings, num_steps)
    jax.tree.map(lambda given, *each: np.testing.assert_array_equal(given, np.stack(each)), stacked, *expected)
    jax.tree.map(np.testing.assert_array_equal, slots, single)


def _gpt2():
    return test_engine.MODEL, test_engine.made_params()


def test_logits_that_are_not_finite_end_a_row_in_mid_chunk_only():
    """As they do one step at a time: the tokens before them are sound, the other rows go on, the slot recovers."""
    poisoned = {**test_engine.made_params()}
    poisoned["position_embedding"] = poisoned["position_embedding"].at[25].set(np.nan)
    results = []
    for steps_per_dispatch in (1, 8):
        engine = _engine((test_engine.MODEL, poisoned), steps_per_dispatch)
        requests = [_request(1, 5, 10), _request(2, 20, 15), _request(3, 26, 5), _request(4, 3, 18)]
        done = {n: c.completion for n, c in generate(engine, requests, None) if c.completion is not None}
        results.append([dataclasses.replace(done[n], timings=None) for n in range(4)])
    assert results[0] == results[1]
    assert [row.finish_reason for row in results[0]] == ["length", "error", "error", "length"]
    assert [len(row.token_ids) for row in results[0]] == [10, 6, 0, 18]


def test_nothing_is_compiled_after_warm_up(made):
    _play(_engine(made, 8), 0)
    engine = _engine(made, 8)
    numbers = [engine.add(request) for request in REQUESTS[2:5]]
    engine.step()
    with compilations() as compiled:
        for _ in range(10):
            engine.step()
        for number in numbers:
            engine.end(number)
        for seed in range(3):
            _play(engine, seed)
        assert compiled == []


@pytest.mark.thorough  # numbers of rows, one step at a time: test_free_of_load.py
@pytest.mark.parametrize("steps_per_dispatch", [1, 8])
def test_a_step_has_as_many_rows_as_are_busy(monkeypatch, steps_per_dispatch):
    """Whoever comes and goes, a request gets the tokens that it gets alone; only the rounding may be another."""
    alone = {id(request): _alone(_gpt2(), request) for request in REQUESTS}
    # With these weights, changing each by half a unit in its last place changes log-probabilities by up to 0.006.
    tolerance = 0 if is_free_of_load(_gpt2()[0]) else 0.02
    sizes = []
    for name in ("advance", "decode"):
        original = getattr(programs, name)

        def counted(*arguments, original=original, name=name):
            rows = arguments[4 if name == "advance" else 3]
            sizes.append((len(rows), int((np.asarray(rows)[:, 0] >= 0).sum())))
            return original(*arguments)

        monkeypatch.setattr(programs, name, counted)
    policy = Policy(slots=SLOTS, chunk=64, steps=steps_per_dispatch, reuse=False)
    engine = Engine(*_gpt2(), batch=SLOTS, max_length=MAX_LENGTH, policy=policy)
    for seed in range(4):
        for request, given in _play(engine, seed):
            for token, expected in zip(given, alone[id(request)][: len(given)], strict=True):
                assert token[0] == expected[0]
                np.testing.assert_allclose(token[1], expected[1], rtol=0, atol=tolerance)
    assert {rows for rows, _ in sizes} == {1, 2, 3}
    assert all(rows == busy for rows, busy in sizes)
