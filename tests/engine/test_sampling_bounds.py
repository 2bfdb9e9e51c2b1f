"""The extremes that are allowed give what float64 gives; what float32 cannot hold is refused with its bound."""

import itertools
from typing import Any

import numpy as np
import pytest

import gptjax
from gptjax.config import GenerationDefaults
from gptjax.engine.options import make_request
from gptjax.errors import RequestError

PROMPT = [5429, 628, 258, 567]
TINY = [5e-324, 1e-320, 1e-45, 1e-38, 1e-30]
EXTREMES: dict[str, list[Any]] = {
    "repetition_penalty": [0.01, 1.0, 100],
    "presence_penalty": [-100, 1e-320, 100],
    "frequency_penalty": [-100, -1e-320, 100],
    "logit_bias": [{}, {7: 100, 300: -100}, {7: 1e-320}],
}


def wanted(lm: Any, count: int, options: dict[str, Any]) -> list[int]:
    """Greedy tokens by the definition of the options, in float64."""
    ids = list(PROMPT)
    for _ in range(count):
        logits_V = lm.logits(ids)[-1].astype(np.float64)
        for token in set(ids):
            factor = options.get("repetition_penalty", 1.0)
            logits_V[token] *= 1 / factor if logits_V[token] > 0 else factor
        for token in ids[len(PROMPT) :]:
            logits_V[token] -= options.get("frequency_penalty", 0)
        for token in set(ids[len(PROMPT) :]):
            logits_V[token] -= options.get("presence_penalty", 0)
        for token, bias in options.get("logit_bias", {}).items():
            logits_V[token] += bias
        ids.append(int(logits_V.argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("values", list(itertools.product(*EXTREMES.values()))[::5])
def test_extremes_are_as_in_float64(lm, values):
    options = dict(zip(EXTREMES, values, strict=True))
    made = lm.generate(PROMPT, max_tokens=3, ignore_eos=True, **options)
    assert made.error is None
    assert list(made.token_ids) == wanted(lm, 3, options)


@pytest.mark.parametrize("tiny", TINY)
def test_tiny_values_are_their_limits(lm, tiny):
    greedy = list(lm.generate(PROMPT, max_tokens=4, temperature=0).token_ids)
    for options in ({"temperature": tiny}, {"temperature": 1, "top_p": tiny}, {"temperature": tiny, "min_p": tiny}):
        assert list(lm.generate(PROMPT, max_tokens=4, seed=1, **options).token_ids) == greedy, options
    drawn = lm.generate(PROMPT, max_tokens=4, seed=1, temperature=1).token_ids
    assert lm.generate(PROMPT, max_tokens=4, seed=1, temperature=1, min_p=tiny).token_ids == drawn


@pytest.mark.parametrize(
    ("name", "values", "bound"),
    [
        (
            "repetition_penalty",
            [5e-324, 1e-320, 1e-38, 1e-10, 0.0099, 0, -1, 100.1, 1e38, 1e308, 10**400],
            "0.01 to 100",
        ),
        ("temperature", [100.1, 1e38, 1e308, float("inf"), -5e-324], "0 to 100"),
        ("presence_penalty", [100.1, -1e38, 1e308, 10**400], "-100 to 100"),
        ("frequency_penalty", [100.1, -1e38, 1e308, float("nan")], "-100 to 100"),
        ("min_p", [1.0001, -5e-324, 1e308], "0 to 1"),
        ("top_p", [1.0001, 0, -5e-324, 1e308], "above 0 and at most 1"),
        ("logit_bias", [{1: 100.1}, {1: -1e38}, {1: float("nan")}, {1: 1e308}, {1: 10**400}], "-100 to 100"),
        ("repetition_penalty", ["\x1b[31m" * 10**6, [1] * 10**6, {"k" * 10**6: 1}], "0.01 to 100"),
    ],
)
def test_what_is_out_of_bounds_is_refused_with_the_bound(name, values, bound):
    for value in values:
        request = make_request(PROMPT, {name: value}, GenerationDefaults(), ())
        with pytest.raises(RequestError, match=bound) as caught:
            request.check(vocab_size=8192, max_length=512)
        assert name in str(caught.value) and len(str(caught.value)) < 400 and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("option", ["ignore_eos", "special"])
@pytest.mark.parametrize("value", ["yes", 1, 0.0, []])
def test_flags_are_true_or_false(lm, option, value):
    with pytest.raises(gptjax.RequestError, match=f"{option} must be true or false"):
        lm.generate("A", max_tokens=1, **{option: value})
