"""On a CPU, what a request gets depends on itself alone: not on the rows of a step, the most requests, what its prompt
is packed with and where it is cut, nor on whether its beginning was already there."""

import dataclasses
import random
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import config_from_json
from gptjax.engine.engine import Engine
from gptjax.engine.request import Request, SamplingParams
from gptjax.layers.cache import kinds
from gptjax.models import registry
from gptjax.scheduling.policy import Policy
from pallas_kernels import same_bits
from tests.engine import test_engine
from tests.fuzz import rounds
from tests.oracles import gpt_oss_ours, gpt_oss_random, llama_ours
from tests.shallow import shallow
from tests.thinned import thorough

MAX_LENGTH, VOCAB = 290, 101
# In nine rows, products are other ones than in eight.
CUT, WHOLE = (Policy(slots=9, chunk=chunk, pieces=3) for chunk in (64, 256))  # prompts
FEW_SIZES = dataclasses.replace(CUT, smallest_rows=8)  # of decode calls, and one row alone
PAGES = 29  # of each kind of layers, for both, so that they share the programs of their steps and of short calls
ALONE = Policy(slots=1, chunk=256, reuse=False)


def _gpt2():
    return test_engine.MODEL, test_engine.made_params()


def _llama():
    case = llama_ours.make_case()
    return case.model, case.params


def _gpt_oss():
    """Layers with and without a window of 128 positions; trained, so that tokens choose their experts unevenly.

    Of its vocabulary, only what the prompts are of: what draws tokens is then a program of all these models.
    """
    lm = shallow("gpt-oss-tales")
    whole, V = lm.config.vocab_size, VOCAB
    config = dataclasses.replace(lm.config, vocab_size=V)
    params = jax.tree.map(lambda x: x[tuple(slice(V if size == whole else None) for size in x.shape)], lm.params)
    return registry.build(config, dtype=lm.model.dtype), params


def _gpt_oss_unpacked():
    """Experts in float32. Windows of 9 positions, and a width that is not a multiple of 64."""
    checkpoint = gpt_oss_random.checkpoint(**gpt_oss_random.TWO_LAYERS)
    model = registry.build(config_from_json(checkpoint.config), dtype=jnp.float32)
    return model, gpt_oss_ours.params(checkpoint.dense)


def _in_fp8(name: str):
    model, params = MODELS[name]()
    return model.clone(cache_dtype="fp8"), params


MODELS = {"gpt2": _gpt2, "gpt-oss": _gpt_oss, "llama": _llama, "gpt-oss, unpacked": _gpt_oss_unpacked}
MODELS |= {f"{name}, keys and values in fp8": partial(_in_fp8, name) for name in ("gpt2", "gpt-oss")}


@pytest.fixture(scope="module")
def made(request):
    """A model and its weights."""
    return MODELS[request.param]()


def _requests() -> list[Request]:
    """Prompts of 1 to 280 tokens, some with a beginning in common, greedy and not."""
    rng = np.random.default_rng(0)
    beginning = rng.integers(0, VOCAB, 150).tolist()
    requests = []
    for number, (shared, own) in enumerate(
        [(0, 1), (0, 31), (0, 64), (0, 280), (150, 5), (150, 60), (130, 1), (7, 150)]  # alone, calls of few sizes
    ):
        ids = beginning[:shared] + rng.integers(0, VOCAB, own).tolist()
        params = SamplingParams(seed=number, temperature=number % 3 / 2, top_p=0.9 if number % 2 else 1.0)
        requests.append(Request(tuple(ids), 12, params))
    return requests


REQUESTS = _requests()


def _play(
    engine: Engine, rng: random.Random, count: int, requests: Sequence[Request] = REQUESTS
) -> list[tuple[int, list[tuple[int, float]]]]:
    """Requests that join at random, and leave at their end or before, with what each was given."""
    waiting = rng.choices(range(len(requests)), k=count)
    running: dict[int, tuple[int, list[tuple[int, float]], int]] = {}
    results = []
    while waiting or running:
        while waiting and engine.room and (not running or rng.random() < 0.6):
            which = waiting.pop()
            end = requests[which].room(MAX_LENGTH)
            running[engine.add(requests[which])] = which, [], rng.choice([end, rng.randint(1, end)])
        for token in engine.step():
            which, given, end = running[token.request]
            given.append((token.token_id, token.logprob))
            if len(given) == end:
                engine.end(token.request)
                results.append((which, given))
                del running[token.request]
    return results


@pytest.fixture(scope="module")
def alone(made) -> list[list[tuple[int, float]]]:
    """What each of REQUESTS gives with an engine for itself."""
    return _alone(Engine(*made, batch=1, max_length=MAX_LENGTH, policy=ALONE), REQUESTS)


def _alone(engine: Engine, requests: Sequence[Request]) -> list[list[tuple[int, float]]]:
    alone = []
    for request in requests:
        number = engine.add(request)
        given = []
        while len(given) < request.room(MAX_LENGTH):
            given += [(token.token_id, token.logprob) for token in engine.step()]
        engine.end(number)
        alone.append(given)
    return alone


@pytest.mark.skipif(not same_bits.holds(), reason="products on this CPU were not looked at")
@pytest.mark.parametrize(
    ("made", "policy", "count"),
    [
        ("gpt2", FEW_SIZES, 18),
        thorough("gpt2", WHOLE, 12),
        thorough("gpt-oss", CUT, 18),
        thorough("gpt-oss, unpacked", FEW_SIZES, 18),
        thorough("llama", FEW_SIZES, 18),
        thorough("gpt2, keys and values in fp8", CUT, 18),
        thorough("gpt-oss, keys and values in fp8", CUT, 18),
    ],
    indirect=["made"],
)
def test_a_request_gets_the_same_bits_under_any_load(made, alone, policy, count):
    assert all(token >= 0 for tokens in alone for token, _ in tokens)
    pages = [PAGES] * len(kinds(made[0].config.windows, MAX_LENGTH))
    engine = Engine(*made, batch=policy.slots, max_length=MAX_LENGTH, policy=policy, pages=pages)
    for seed in range(rounds(2)):
        for which, given in _play(engine, random.Random(seed), count):
            assert given == alone[which][: len(given)], (policy, seed, which)


@pytest.mark.slow
@pytest.mark.skipif(not same_bits.holds(), reason="products on this CPU were not looked at")
@pytest.mark.parametrize("name", ["gpt2-tales", "gpt-oss-tales"])
def test_a_thousand_requests_of_a_trained_model(name):
    """In as few pages as to be set aside at times."""
    lm, rng = shallow(name), np.random.default_rng(1)
    beginning = rng.integers(0, lm.config.vocab_size, 200).tolist()
    requests = []
    for number in range(24):
        own = rng.integers(0, lm.config.vocab_size, rng.integers(1, 40)).tolist()
        sampling = SamplingParams(seed=number, temperature=number % 3 / 2, top_p=0.9 if number % 2 else 1.0)
        requests.append(Request((*beginning[: number % 4 * 40], *own), 1 + number % 6, sampling))
    expected = _alone(Engine(lm.model, lm.params, batch=1, max_length=MAX_LENGTH, policy=ALONE), requests)
    pages = [PAGES] * len(kinds(lm.config.windows, MAX_LENGTH))
    policy = Policy(slots=32, chunk=256)
    engine = Engine(lm.model, lm.params, batch=32, max_length=MAX_LENGTH, policy=policy, pages=pages)
    for which, given in _play(engine, random.Random(1), 1000, requests):
        assert given == expected[which][: len(given)], which
