"""What the `general.sampling` keys of a GGUF file mean. Source: llama.cpp, common/common.cpp."""

from pathlib import Path
from typing import Any

import pytest

from gptjax.checkpoints.text_files import GGUFText
from gptjax.config import GenerationDefaults, generation_defaults
from gptjax.errors import ConfigError


def defaults(**values: Any) -> GenerationDefaults:
    text = GGUFText(Path("model.gguf"), {f"general.sampling.{key}": value for key, value in values.items()})
    return generation_defaults(text.settings(), None, source=text.source, words=text.words)


def test_none_is_greedy() -> None:
    found = defaults()
    assert (found.temperature, found.repetition_penalty, found.faults) == (0.0, 1.0, ())


def test_all_of_them_in_the_decimals_that_were_meant() -> None:
    found = defaults(
        temp=0.699999988079071, top_k=40, top_p=0.8999999761581421, min_p=0.05000000074505806, penalty_repeat=1.5
    )
    found.check()
    assert (found.temperature, found.top_k, found.top_p, found.min_p) == (0.7, 40, 0.9, 0.05)
    assert found.repetition_penalty == 1.5


def test_a_temperature_of_0_is_greedy() -> None:
    found = defaults(temp=0.0, top_k=40)
    found.check()
    assert found.temperature == 0.0


@pytest.mark.parametrize(("last", "penalty"), [(-1, 1.5), (0, 1.0)])
def test_tokens_that_are_penalised(last: int, penalty: float) -> None:
    """All, or none."""
    found = defaults(penalty_repeat=1.5, penalty_last_n=last)
    found.check()
    assert found.repetition_penalty == penalty


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temp": "hot"}, "general.sampling.temp is 'hot'; expected a number above 0 and at most 100"),
        ({"temp": -1.0}, "general.sampling.temp is -1.0; expected a number above 0"),
        ({"temp": float("nan")}, "general.sampling.temp is nan; expected a number above 0"),
        ({"top_k": [40, 41]}, "general.sampling.top_k is [40, 41]; expected a whole number"),
        ({"top_p": 2.0}, "general.sampling.top_p is 2.0; expected a number from 0 to 1"),
        ({"min_p": True}, "general.sampling.min_p is True; expected a number from 0 to 1"),
        ({"penalty_repeat": 0.0}, "general.sampling.penalty_repeat is 0.0; expected a number from"),
        ({"penalty_repeat": 1.5, "penalty_last_n": 64}, "general.sampling.penalty_last_n: gptjax has no such setting"),
        ({"mirostat": 2, "mirostat_tau": 5.0}, "general.sampling.mirostat: gptjax has no such setting"),
        ({"xtc_probability": 0.5}, "general.sampling.xtc_probability: gptjax has no such setting"),
        ({"sequence": "temperature;top_k"}, "general.sampling.sequence: gptjax has no such setting"),
    ],
)
def test_what_cannot_be_followed_is_refused_when_something_is_generated(values: dict[str, Any], said: str) -> None:
    found = defaults(**values)
    with pytest.raises(ConfigError) as caught:
        found.check()
    assert said in str(caught.value) and str(caught.value).startswith("model.gguf has settings that cannot be followed")
    assert "--no-generation-config" in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"temp": 0.5, "mirostat": 0, "mirostat_tau": 5.0},
        {"temp": 0.5, "xtc_probability": 0.0, "xtc_threshold": 0.1},
        {"temp": 0.5, "penalty_last_n": 64},
        {"temp": 0.5, "penalty_last_n": 64, "penalty_repeat": 1.0},
    ],
)
def test_what_is_off_is_not_refused(values: dict[str, Any]) -> None:
    defaults(**values).check()


def test_a_request_may_have_its_own() -> None:
    found = defaults(temp="hot", mirostat=2)
    found.check(draws=False)
    with pytest.raises(ConfigError) as caught:
        found.check(["temperature"])
    assert "hot" not in str(caught.value)
