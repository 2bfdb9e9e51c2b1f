"""A prompt's ids are looked at once, whoever checks them."""

import dataclasses

import numpy as np
import pytest

from gptjax.config import GenerationDefaults
from gptjax.engine import request as module
from gptjax.engine.options import make_request
from gptjax.engine.request import CheckedIds, Request, SamplingParams, check_prompt
from gptjax.errors import CapacityError, RequestError

LIMITS = {"vocab_size": 100, "max_length": 4}


class Other(int):
    """A whole number, but not of `int` itself."""


@pytest.mark.parametrize("ids", [[0], [5, 99, 1], (7, 7, 7, 7), [Other(3), 4]])
def test_checked_ids_are_the_ids(ids):
    checked = check_prompt(ids, **LIMITS)
    assert checked == tuple(ids) and hash(checked) == hash(tuple(ids))
    assert np.asarray(checked, np.int32) is checked.array_T
    assert checked.array_T.dtype == np.int32 and checked.array_T.tolist() == list(ids)
    assert np.asarray(checked, np.int64).tolist() == list(ids)
    assert not checked.array_T.flags.writeable
    assert check_prompt(checked, **LIMITS) is checked


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([1, 100], "100 at position 1"),
        ([1, -1], "-1 at position 1"),
        ([1, True], "True at position 1"),
        ([True], "True at position 0"),
        ([1, 2.0], "2.0 at position 1"),
        ([1, "2"], "'2' at position 1"),
        ([1, None], "None at position 1"),
        ([1, [2]], "[2] at position 1"),
        ([1, 2**63], f"{2**63} at position 1"),
        ([-1, 2**63], "-1 at position 0"),
        ([2**70], f"{2**70} at position 0"),
        ([Other(100)], "100 at position 0"),
        ([], "the prompt is empty"),
    ],
)
def test_what_is_no_token_is_named(ids, says):
    with pytest.raises(RequestError) as error:
        check_prompt(ids, **LIMITS)
    assert says in str(error.value)


def test_ids_are_checked_again_for_other_limits():
    checked = check_prompt([1, 2, 99, 3], **LIMITS)
    with pytest.raises(RequestError, match="99 at position 2"):
        check_prompt(checked, vocab_size=99, max_length=4)
    with pytest.raises(CapacityError, match="4 tokens, but max_length is 3"):
        check_prompt(checked, vocab_size=100, max_length=3)
    assert check_prompt(checked, vocab_size=200, max_length=9).limits == (200, 9)


def test_what_is_made_of_a_request_does_not_look_at_each_id_again(monkeypatch):
    checked = check_prompt([1, 2, 3], **LIMITS)
    request = make_request(checked, {"max_tokens": 2}, GenerationDefaults(), ())
    monkeypatch.setattr(module, "map", None, raising=False)  # what looks at each of the ids
    for each in (request, dataclasses.replace(request, max_tokens=3).with_seed()):
        assert isinstance(each.prompt_ids, CheckedIds)
        each.check(**LIMITS)
    with pytest.raises(TypeError):
        Request((1, 2, 3), 2, SamplingParams()).check(**LIMITS)
