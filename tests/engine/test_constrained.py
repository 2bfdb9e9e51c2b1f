"""Rows with a grammar: what they may draw, and that others do not notice."""

import dataclasses
import threading

import jax
import pytest

from gptjax.engine import executor
from gptjax.engine.engine import Engine
from gptjax.engine.output import Output
from gptjax.engine.pools import default_policy
from gptjax.engine.request import TOO_COMPLEX, Request, SamplingParams
from gptjax.engine.settings import Features
from gptjax.errors import RequestError
from gptjax.structured import Grammar
from gptjax.structured.matching import Compiler
from tests.compilations import compilations
from tests.engine.generated import generate
from tests.engine.test_engine import CONFIG, MODEL, made_params
from tests.structured.walks import CLOSING

END = 100


class Letters:
    """A vocabulary: some bytes, closing marks, pairs of letters, and the end."""

    def __init__(self) -> None:
        self.special_ids = {"<end>": END}

    def token_bytes(self, token_id: int) -> bytes:
        known = [*(bytes([byte]) for byte in b'{}[]":, \n0123456789-.eabcdfgn'), *CLOSING[3:5], b"ab", b"cd", b"{}"]
        return b"<end>" if token_id == END else known[token_id] if token_id < len(known) else b""

    longest_token = 4

    def encode(self, text: str, *, start: bool) -> list[int]:
        raise RequestError("there are no merges")


COMPILER = Compiler(Letters(), CONFIG.vocab_size)
SCHEMA = Grammar.of_json_schema(
    {
        "type": "array",
        "items": {"enum": ["abcd", "dab", 12, "cdcdab"]},
        "minItems": 2,
        "maxItems": 4,
    }
)
WORD = Grammar.of_regex("(ab|cd){3,10}")
FREE = [
    Request((1, 2, 3, 4, 5), 30, SamplingParams(temperature=0.8, seed=1)),
    Request((5, 6), 30, SamplingParams(seed=0)),
    Request(tuple(range(70)), 20, SamplingParams(temperature=1.2, top_p=0.9, seed=5, top_logprobs=3)),
    Request((9, 8, 7), 25, SamplingParams(temperature=1.0, repetition_penalty=1.2, logit_bias={3: 5.0}, seed=6)),
]
CONSTRAINED = [
    Request((1, 2, 3), 40, SamplingParams(temperature=1.5, seed=2), stop_ids=(END,), grammar=SCHEMA),
    Request((4, 4), 40, SamplingParams(seed=0), stop_ids=(END,), grammar=WORD),
    Request((6, 1), 40, SamplingParams(temperature=2.0, top_k=3, seed=9), stop_ids=(END,), grammar=SCHEMA),
    Request(
        (2, 1), 40, SamplingParams(temperature=1.0, frequency_penalty=0.5, seed=3), stop_ids=(END,), grammar=SCHEMA
    ),
]


def _engine(**shape) -> Engine:
    """By default, one of all rows: fewer programs to compile. Numbers of rows: test_free_of_load.py."""
    steps = shape.pop("steps_per_dispatch", None)
    policy = default_policy(MODEL, slots=4, chunk=64, steps_per_dispatch=steps)
    shape = {"policy": dataclasses.replace(policy, smallest_rows=4), "compiler": COMPILER} | shape
    return Engine(MODEL, made_params(), batch=4, max_length=120, **shape)


def _run(engine: Engine, requests: list[Request]) -> list[tuple]:
    done = {}
    for number, chunk in generate(engine, requests, None):
        if chunk.completion is not None:
            done[number] = chunk.completion
    return [(each.token_ids, each.logprobs, each.finish_reason) for _, each in sorted(done.items())]


def _text(token_ids) -> bytes:
    assert token_ids[-1] == END
    return b"".join(map(Letters().token_bytes, token_ids[:-1]))


@pytest.fixture(scope="module")
def alone() -> dict[int, tuple]:
    """What each request gets by itself, one step a dispatch."""
    engine = _engine(steps_per_dispatch=1)
    return {id(each): _run(engine, [each])[0] for each in [*FREE, *CONSTRAINED]}


@pytest.mark.parametrize("steps", [1, 4])
def test_all_get_the_bits_that_they_get_alone(alone, steps):
    mixed = [each for pair in zip(FREE, CONSTRAINED, strict=True) for each in pair]
    for requests in (mixed, mixed[::-1], FREE):
        assert _run(_engine(steps_per_dispatch=steps), requests) == [alone[id(each)] for each in requests]


def test_free_rows_are_not_changed_by_those_beside_them(alone):
    """Free rows of an engine whose programs know no grammars are the same."""
    without = _engine(compiler=None)
    assert _run(without, FREE) == [alone[id(each)] for each in FREE]


def test_what_is_drawn_fits(alone):
    for request in CONSTRAINED:
        token_ids, _, reason = alone[id(request)]
        assert reason == "stop"
        text = _text(token_ids)
        if request.grammar is WORD:
            assert set(text[i : i + 2] for i in range(0, len(text), 2)) <= {b"ab", b"cd"}
            assert len(text) >= 6
        else:
            assert text.startswith(b"[")
            assert text.endswith(b"]")


def test_logprobs_are_the_models_own(alone):
    """Those of a free request that is made to draw the same tokens."""
    request = CONSTRAINED[1]
    token_ids, logprobs, _ = alone[id(request)]
    prompt = request.prompt_ids
    for token_id, logprob in zip(token_ids[:3], logprobs[:3], strict=True):
        free = Request(prompt, 1, SamplingParams(top_logprobs=0, logit_bias={token_id: 100.0}, seed=0))
        ((drawn,), (free_logprob,), _) = _run(_engine(), [free])[0]
        assert drawn == token_id
        assert free_logprob == pytest.approx(logprob, abs=1e-4)
        prompt = (*prompt, token_id)


def test_a_request_goes_on_in_another_engine(alone):
    request = CONSTRAINED[0]
    token_ids, *_ = alone[id(request)]
    engine = _engine()
    number = engine.add(request, drawn=token_ids[:3])
    found = []
    while len(found) < len(token_ids) - 3:
        found += [token.token_id for token in engine.step() if token.request == number]
    assert tuple(found) == token_ids[3:]


def test_requests_go_on_when_the_pools_are_lost(alone, monkeypatch):
    engine, run, calls = _engine(steps_per_dispatch=4), executor.Executor.run, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) in (4, 9):
            raise jax.errors.JaxRuntimeError("the device is gone")
        return run(self, *arguments)

    monkeypatch.setattr(executor.Executor, "run", failing)
    requests = [FREE[0], CONSTRAINED[0], CONSTRAINED[1], FREE[2]]
    assert _run(engine, requests) == [alone[id(each)] for each in requests]
    assert engine.losses == 2


class _Held:
    """A matcher whose masks are found when it is let go."""

    def __init__(self, inner) -> None:
        self.inner, self.begun, self.go = inner, threading.Event(), threading.Event()

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def fill(self, words_W) -> None:
        self.begun.set()
        assert self.go.wait(60)
        self.inner.fill(words_W)


def test_only_the_row_whose_mask_is_late_waits(alone, monkeypatch):
    """Free rows go on. When the mask is there, its row gets what it gets alone; if it has ended, nobody notices."""
    held = []
    matcher_of = Compiler.matcher

    def holding(*arguments):
        held.append(_Held(matcher_of(*arguments)))
        return held[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Compiler, "matcher", holding)
        patch.setattr("os.cpu_count", lambda: 8)  # a thread for each mask
        engine = _engine(steps_per_dispatch=1)
        free, late, ended = (engine.add(each) for each in (FREE[0], CONSTRAINED[0], CONSTRAINED[1]))
        other = engine.add(FREE[1])
    drawn = {free: [], late: [], other: []}

    def step() -> None:
        for token in engine.step():
            drawn[token.request].append(token.token_id)
            if len(drawn[token.request]) == len(alone[id(asked[token.request])][0]):
                engine.end(token.request)

    asked = {free: FREE[0], late: CONSTRAINED[0], other: FREE[1]}
    assert all(each.begun.wait(60) for each in held)
    while len(drawn[free]) < 5 or len(drawn[other]) < 5:
        step()
    assert not drawn[late]
    engine.end(ended)
    for each in held:
        each.go.set()
    held[0].begun.clear()
    while not drawn[late]:
        step()
    assert held[0].begun.wait(60)  # the next mask is being looked for, though nobody has called `step`
    again = engine.add(CONSTRAINED[1])  # takes the slot of the one that ended
    asked[again], drawn[again] = CONSTRAINED[1], []
    while any(len(drawn[each]) < len(alone[id(asked[each])][0]) for each in asked):
        step()
    assert {each: tuple(drawn[each]) for each in asked} == {each: alone[id(asked[each])][0] for each in asked}


def test_nothing_is_compiled_after_warm_up():
    engine = _engine()
    engine.warm_up()
    with compilations() as compiled:
        _run(engine, [*FREE, *CONSTRAINED])
    assert compiled == []


@pytest.mark.thorough  # levels without grammars: test_prompts_in_parts.py
def test_on_a_gpu_there_are_levels_for_grammars(alone, monkeypatch):
    levels = (Features(draws=True), Features(draws=True, constrains=True), Features.everything())
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        engine = _engine(levels=levels, steps_per_dispatch=4)
        accumulating = _engine(steps_per_dispatch=4)
    engine.warm_up()
    used, needed = set(), engine._executor._needed

    def spied(requests):
        used.add(level := needed(requests))
        return level

    monkeypatch.setattr(engine._executor, "_needed", spied)
    with compilations() as compiled:
        for requests in (FREE[:1], [FREE[1], CONSTRAINED[0]], [*FREE, *CONSTRAINED]):
            assert [ids for ids, *_ in _run(engine, requests)] == [alone[id(request)][0] for request in requests]
    assert compiled == []
    assert used == set(levels)
    requests = [*FREE, *CONSTRAINED]
    assert [ids for ids, *_ in _run(accumulating, requests)] == [alone[id(request)][0] for request in requests]


def test_free_rows_get_several_steps_again_when_the_others_have_ended(monkeypatch):
    engine, sizes = _engine(steps_per_dispatch=4), []
    run = engine._executor.run

    def spied(plan, *more):
        sizes.extend([plan.decode.steps] if plan.decode else [])
        return run(plan, *more)

    monkeypatch.setattr(engine._executor, "run", spied)
    _run(engine, [dataclasses.replace(FREE[0], max_tokens=80), CONSTRAINED[1]])
    assert set(sizes) == {1, 4}
    assert sizes.index(4) > 3
    assert 1 not in sizes[sizes.index(4) : -2]


def test_a_grammar_that_fails_ends_the_request():
    engine = _engine()
    number = engine.add(CONSTRAINED[0])
    other = engine.add(FREE[0])
    engine._masks._texts[number].matcher.failure = "too many states"
    drawn = []
    while not any(token.request == number for token in drawn):
        drawn = engine.step()
    token = next(token for token in drawn if token.request == number)
    assert token.token_id == TOO_COMPLEX
    chunk = Output(CONSTRAINED[0], max_length=120, detokenizer=None).push(token)
    assert chunk.completion.finish_reason == "error"
    assert "grammar is too complex" in chunk.completion.error
    engine.end(number)
    engine.end(other)


def test_a_grammar_needs_an_end():
    request = dataclasses.replace(CONSTRAINED[0], stop_ids=(500,))
    with pytest.raises(RequestError, match="ends the text"):
        request.check(vocab_size=CONFIG.vocab_size, max_length=120)
