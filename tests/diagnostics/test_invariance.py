"""`gptjax verify --invariance`: it finds bits that depend on other requests, and none where there are none."""

import dataclasses
import json

import pytest

from gptjax.cli import main
from gptjax.config import GenerationDefaults
from gptjax.diagnostics import invariance
from gptjax.diagnostics.invariance import trials
from gptjax.engine import free_of_load
from gptjax.engine.engine import Engine
from gptjax.errors import CheckpointError, GptjaxError, RequestError
from gptjax.language_model import LanguageModel
from gptjax.models import registry
from gptjax.models.params import Params
from gptjax.scheduling.scheduler import Scheduler
from pallas_kernels import same_bits
from tests.engine.test_engine import CONFIG
from tests.engine.test_engine import made_params as made_two_layers

MODEL = registry.build(dataclasses.replace(CONFIG, num_layers=1))  # compiles in half of the time


def made_params() -> Params:
    return {name: leaves for name, leaves in made_two_layers().items() if name != "block_1"}


needs_same_bits = pytest.mark.skipif(not same_bits.holds(), reason="products on this CPU were not looked at")


@pytest.fixture(autouse=True)
def _few_sizes(monkeypatch):
    """Calls of 256 tokens, not of all powers of two from 32 to 512: fewer programs to compile."""
    monkeypatch.setattr(invariance, "LENGTH", 256)
    monkeypatch.setattr(free_of_load, "_LEAST_CALL", 256)


def _made() -> LanguageModel:
    return LanguageModel(
        MODEL,
        made_params(),
        tokenizer=CheckpointError("there is no tokenizer"),
        defaults=GenerationDefaults(),
        max_length=MODEL.config.context_length,
    )


def _trials(**options):
    given = {"requests": 6, "max_batches": [1, 3]} | options
    return list(trials(MODEL, made_params(), **given))


@pytest.mark.thorough
@needs_same_bits
def test_requests_are_compared_alone_and_in_company_some_of_them_set_aside(monkeypatch):
    monkeypatch.setattr(invariance, "LENGTH", 640)  # long enough for the pool to run out
    set_aside, original = [], Scheduler._set_aside
    monkeypatch.setattr(Scheduler, "_set_aside", lambda *a: (set_aside.append(a), original(*a))[1])
    found = _trials(requests=12)
    assert [(trial.max_batch, trial.in_company) for trial in found] == [(1, True), (3, False), (3, True)]
    assert all(trial.requests == 12 and trial.tokens > 60 for trial in found)
    assert all((trial.different, trial.first, trial.largest) == (0, None, 0.0) for trial in found)
    assert set_aside


@needs_same_bits
@pytest.mark.parametrize(("at_least", "wrong"), [(3, [(3, False), (3, True)]), (2, [(3, True)])])
def test_other_bits_are_found(monkeypatch, at_least, wrong):
    """One planted where three requests can run, and one where two do."""
    original = Engine.step

    def step(engine):
        tokens = original(engine)
        running = engine.batch if at_least == 3 else len(engine._requests)
        if running < at_least:
            return tokens
        return [token._replace(logprob=token.logprob * (1 + 1e-6)) for token in tokens]

    monkeypatch.setattr(Engine, "step", step)
    found = _trials()
    differing = [(trial.max_batch, trial.in_company) for trial in found if trial.different]
    # In company at max_batch 3 is compared with alone at max_batch 3, which has the first fault, too.
    assert differing == wrong[: 1 if at_least == 3 else None]
    (trial,) = [trial for trial in found if trial.different]
    assert trial.first is not None and 0 < trial.largest < 1e-4


def test_logits_that_are_not_finite_are_no_equal_bits(monkeypatch):
    original = Engine.step
    monkeypatch.setattr(Engine, "step", lambda e: [t._replace(token_id=-1) for t in original(e)])
    with pytest.raises(GptjaxError, match="finite"):
        _trials()


@pytest.mark.parametrize("wrong", [{"requests": 0}, {"max_batches": []}, {"max_batches": [8, 0]}])
def test_numbers_that_make_no_trial(wrong):
    with pytest.raises(RequestError, match="at least 1"):
        _trials(**wrong)


def _command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("gptjax.api.load", lambda *_, **options: _made())
    status = main(["verify", "--invariance", "--requests", "4", "--max-batch", "3", *arguments])
    return status, capsys.readouterr().out


@needs_same_bits
def test_the_command_says_what_was_compared(monkeypatch, capsys):
    status, out = _command(monkeypatch, capsys)
    assert status == 0
    alone, company = out.splitlines()
    assert alone.startswith("same   max_batch 3, alone and at max_batch 1: 4 requests, ")
    assert company.startswith("same   max_batch 3, in company and alone: 4 requests, ")
    status, out = _command(monkeypatch, capsys, "--json")
    assert status == 0
    assert [json.loads(line)["in_company"] for line in out.splitlines()] == [False, True]


def test_the_command_fails_where_bits_differ(monkeypatch, capsys):
    original = Engine.step

    def step(engine):
        return [token._replace(logprob=token.logprob * engine.batch) for token in original(engine)]

    monkeypatch.setattr(Engine, "step", step)
    status, out = _command(monkeypatch, capsys)
    assert status == 1
    assert "OTHER  max_batch 3, alone and at max_batch 1: 4 requests, " in out
    assert "4 requests differ, from token 0 on; log-probabilities of the same token by up to " in out


def test_options_of_invariance_alone(capsys):
    assert main(["verify", "--requests", "3"]) == 1
    assert "--max-batch, --requests, --dtype and --cache-dtype are for --invariance" in capsys.readouterr().err
