"""Prompts that are read chunk by chunk between steps, and from what pages still hold: the bits are the same."""

import dataclasses

import numpy as np
import pytest

from gptjax.engine import programs
from gptjax.engine.engine import Engine
from gptjax.engine.pools import default_policy
from gptjax.engine.request import Request, SamplingParams
from gptjax.engine.settings import Features
from gptjax.errors import CapacityError
from gptjax.scheduling.policy import Policy
from tests.compilations import compilations
from tests.engine.test_steps_per_dispatch import made  # noqa: F401 (a fixture)
from tests.thinned import thinned, thorough

SLOTS, MAX_LENGTH, CHUNK, VOCAB = 3, 300, 8, 101  # the second model has a window of 9 positions
# As many as any of these engines would have by default: pools of one size, so that engines share their programs.
PAGES = {"windowed": 16, "whole": 11}


def _engine(
    made,  # noqa: F811
    *,
    chunk: int = CHUNK,
    max_length: int = MAX_LENGTH,
    steps_per_dispatch: int | None = None,
    reuse: bool = False,
    **options,
) -> Engine:
    """One of all rows, if no policy is given: fewer programs to compile."""
    pages = [PAGES["whole"]] if len(set(made[0].config.windows)) == 1 else [*PAGES.values()]
    policy = default_policy(made[0], slots=SLOTS, chunk=chunk, steps_per_dispatch=steps_per_dispatch, reuse=reuse)
    policy = dataclasses.replace(policy, smallest_rows=SLOTS)
    return Engine(*made, batch=SLOTS, max_length=max_length, **{"pages": pages, "policy": policy} | options)


def _request(seed: int, length: int, max_tokens: int = 12, *, prompt=None) -> Request:
    ids = np.random.default_rng(seed).integers(0, VOCAB, length).tolist() if prompt is None else prompt
    return Request(tuple(ids), max_tokens, SamplingParams(seed=seed, temperature=1.0))


BESIDE = Request((1, 2, 3), 290, SamplingParams(seed=1))


def _tokens(engine: Engine, *numbers: int, count: int = 12) -> list[list[tuple]]:
    """The next tokens of some requests, while the others get theirs. Ends them."""
    given: dict[int, list[tuple]] = {number: [] for number in numbers}
    for _ in range(5000):
        for token in engine.step():
            if token.request in given:
                given[token.request].append((token.token_id, token.logprob))
                if len(given[token.request]) == count:
                    engine.end(token.request)
        if all(len(tokens) == count for tokens in given.values()):
            return list(given.values())
    raise AssertionError("no more tokens come")


def _tokens_and_cached(engine: Engine, request: Request) -> tuple[list[tuple], int]:
    """All tokens of a request but the last, and how much of its prompt was not read."""
    number = engine.add(dataclasses.replace(request, max_tokens=request.max_tokens + 1))
    given, cached = [], 0
    while len(given) < request.max_tokens:
        given += [(token.token_id, token.logprob) for token in engine.step() if token.request == number]
        cached = engine.cached_tokens(number)
    engine.end(number)
    return given, cached


def _alone(made, request: Request, **options) -> list[tuple]:  # noqa: F811
    engine = _engine(made, **options)
    return _tokens(engine, engine.add(request), count=request.max_tokens)[0]


@pytest.fixture
def happened(monkeypatch) -> list[str]:
    """The programs that run, by their first letters: prefill, advance, decode."""
    names: list[str] = []
    for name in ("prefill", "advance", "decode"):
        original = getattr(programs, name)
        monkeypatch.setattr(
            programs, name, lambda *a, name=name, f=original: (names.append(name[0]), f(*a))[1]
        )  # fmt: skip
    return names


@pytest.mark.parametrize("steps_per_dispatch", thinned([1, 8], 8))
def test_a_prompt_that_is_read_between_steps_gives_the_bits_it_gives_alone(made, steps_per_dispatch):  # noqa: F811
    engine = _engine(made, steps_per_dispatch=steps_per_dispatch)
    engine.add(BESIDE)
    engine.step()
    for request in (_request(1, 37), _request(2, 8), _request(3, 9)):
        number = engine.add(request)
        assert engine.room == 1
        assert _tokens(engine, number) == [_alone(made, request)]
        assert engine.cached_tokens(1) == 0


def test_between_two_chunks_of_a_prompt_there_is_a_step_of_those_that_run(made, happened):  # noqa: F811
    engine = _engine(made, steps_per_dispatch=8)
    number = engine.add(_request(1, 30))
    while not engine.step():
        pass
    assert "".join(happened) == "ppppa"  # nobody is kept waiting
    happened.clear()
    second = engine.add(_request(2, 30))
    _tokens(engine, second)
    assert "".join(happened).count("p") == 4 and "pp" not in "".join(happened)
    engine.end(number)


def test_short_prompts_are_read_together_up_to_a_chunk(made, happened):  # noqa: F811
    engine = _engine(made, policy=Policy.same_bits(slots=3, chunk=64))
    engine.add(BESIDE)
    engine.step()
    happened.clear()
    for number in (1, 2):
        engine.add(_request(number, 5))  # each counts as its call, of 32 tokens
    engine.step()
    assert "".join(happened) == "ppa"


@pytest.mark.parametrize("chunks", range(4))
def test_a_prompt_may_be_given_up_after_any_chunk(made, chunks):  # noqa: F811
    engine = _engine(made, reuse=True)
    given_up = engine.add(_request(1, 30))
    for _ in range(chunks):
        assert engine.step() == []
    engine.end(given_up)
    assert engine.room == 3
    assert engine.step() == []
    request = _request(1, 31)
    number = engine.add(request)
    assert _tokens(engine, number) == [_alone(made, request)]


@pytest.mark.thorough
def test_a_prompt_whose_rest_is_cut_in_two_gives_the_bits_it_gives_alone(made):  # noqa: F811
    sizes = {"policy": Policy.same_bits(slots=3, chunk=64), "max_length": 260}
    engine = _engine(made, **sizes)
    engine.add(BESIDE)
    first = _request(1, 104)  # 64, 32 and 8
    (drawn,) = _tokens(engine, engine.add(first))
    assert drawn == _alone(made, first, **sizes)
    request = _request(2, 0, prompt=[*first.prompt_ids, *(token for token, _ in drawn), *range(60)])  # 176: 128, 48
    assert _tokens_and_cached(engine, request) == (_alone(made, request, **sizes), 64)


def test_a_chunk_is_a_power_of_two(made):  # noqa: F811
    with pytest.raises(ValueError, match="a power of two, found 48"):
        _engine(made, chunk=48)


@pytest.mark.parametrize("made", ["gpt-oss", thorough("gpt2")], indirect=True)  # a window, which is outgrown here
def test_a_longer_prompt_goes_on_from_what_pages_hold_as_often_as_wanted(made):  # noqa: F811
    engine = _engine(made, reuse=True)
    first = _request(1, 20)
    (drawn,) = _tokens(engine, engine.add(first))  # beyond the window's size
    for length, held in ((30, 16), (18, 16), (25, 24)):
        request = _request(2, 0, prompt=[*first.prompt_ids, *(token for token, _ in drawn)][:length])
        assert _tokens_and_cached(engine, request) == (_alone(made, request), held)


@pytest.mark.parametrize("place", [1, 15])
def test_a_prompt_that_is_another_within_what_pages_hold_is_read_from_its_beginning(made, place):  # noqa: F811
    engine = _engine(made, reuse=True)
    first = _request(1, 20)  # of which 16 are held
    _tokens(engine, engine.add(first))
    other = [*first.prompt_ids]
    other[place] = (other[place] + 1) % VOCAB
    request = _request(2, 0, prompt=other)
    assert _tokens_and_cached(engine, request) == (_alone(made, request), 0)  # a copy is not worth 8 tokens


def test_a_system_prompt_is_read_once(made, happened):  # noqa: F811
    """Whole pages of 128 positions, in one chunk; the others wait for it."""
    policy = Policy.same_bits(slots=3, chunk=128)
    engine = _engine(made, policy=policy)
    system = _request(9, 256).prompt_ids
    requests = [_request(n, 0, prompt=[*system, n, n]) for n in range(3)]
    numbers = [engine.add(request) for request in requests]
    given = _tokens(engine, *numbers)
    assert happened.count("p") == 2 + 3
    for request, tokens in zip(requests, given, strict=True):
        assert tokens == _alone(made, request, policy=policy)


def test_a_pool_that_is_too_small_for_all_sets_the_newest_aside(made):  # noqa: F811
    """Three requests of three pages each, where there are pages for four: the bits are as alone."""
    pages = [5] * len(set(made[0].config.windows))
    requests = [_request(n, 120, 160) for n in range(3)]
    engine = _engine(made, reuse=True, chunk=64, pages=pages)
    numbers = [engine.add(request) for request in requests]
    given = _tokens(engine, *numbers, count=160)
    for request, tokens in zip(requests, given, strict=True):
        assert tokens == _alone(made, request, chunk=64)
    with pytest.raises(CapacityError, match=r"needs 3 pages of 128 positions .* but the cache has 2"):
        _engine(made, pages=[3] * len(pages)).add(requests[0])


@pytest.mark.thorough
@pytest.mark.parametrize("made", ["gpt-oss"], indirect=True)  # GPT-2's such rows are in test_steps_per_dispatch.py
def test_packed_prompts_and_rows_by_need_give_the_same_tokens(made):  # noqa: F811
    """Their sizes change with the load, so log-probabilities may differ by rounding."""
    policy = Policy(slots=4, chunk=64, steps=4)
    engine = _engine(made, policy=policy, pages=None)
    requests = [_request(n, length, 20) for n, length in enumerate((5, 150, 1, 33, 90, 64, 7, 200))]
    numbers = [engine.add(request) for request in requests]
    given = _tokens(engine, *numbers, count=20)
    for request, tokens in zip(requests, given, strict=True):
        expected = _alone(made, request, chunk=64)
        assert [token for token, _ in tokens] == [token for token, _ in expected]
        np.testing.assert_allclose([logprob for _, logprob in tokens], [logprob for _, logprob in expected], atol=1e-4)


def test_warm_up_needs_all_requests_to_have_ended(made):  # noqa: F811
    engine = _engine(made)
    engine.add(BESIDE)
    with pytest.raises(ValueError, match="all requests to have ended"):
        engine.warm_up()


@pytest.mark.parametrize(
    ("made", "on_cpu"), [("gpt2", True), ("gpt2", False), thorough("gpt-oss", True)], indirect=["made"]
)
def test_what_no_row_uses_is_skipped_or_is_another_program(made, monkeypatch, on_cpu):  # noqa: F811
    """On a CPU by branches of the one program, elsewhere by the level that the requests of the moment need."""
    levels = (Features(draws=True), Features.everything())
    monkeypatch.setattr("gptjax.engine.executor.jax.default_backend", lambda: "cpu" if on_cpu else "gpu")
    engine = _engine(made, levels=levels, steps_per_dispatch=1)
    engine.warm_up()
    used, original = [], programs.sample
    monkeypatch.setattr(programs, "sample", lambda *a: (used.append(a[2]), original(*a))[1])
    greedy = Request((1, 2), 12, SamplingParams(seed=1))
    every = SamplingParams(1.0, 40, 0.9, 0.01, 1.1, 0.2, 0.3, {5: 2.0}, seed=1, top_logprobs=3)
    full = Request((1, 2), 12, every)
    expected = [_alone(made, request) for request in (greedy, _request(1, 5), full)]
    with compilations() as compiled:
        for index in (0, 1, 2, 0):
            request = (greedy, _request(1, 5), full)[index]
            used.clear()
            number = engine.add(request)
            assert _tokens(engine, number) == [expected[index]]
            forms = {(each.branches, each.bias is not None) for each in used[:12]}
            assert forms == {(True, True) if on_cpu else (False, index == 2)}
        assert compiled == []
