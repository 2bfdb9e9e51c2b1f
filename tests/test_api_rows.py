"""Rows of a `LanguageModel`: the same bits in any company, by programs that `make full` optimises as users' are."""

import pytest

from tests.shallow import shallow
from tests.test_api import PROMPT
from tests.thinned import thinned


def test_more_prompts_than_rows():
    lm = shallow("gpt2-tales", max_batch=4)  # an engine of the test below
    prompts = [PROMPT[: 3 + n] for n in range(7)]
    together = lm.generate(prompts, max_tokens=5, temperature=1.0, seed=5)
    for prompt, completion in zip(prompts, together, strict=True):
        alone = lm.generate(prompt, max_tokens=5, temperature=1.0, seed=5)
        assert (alone.token_ids, alone.logprobs) == (completion.token_ids, completion.logprobs)


@pytest.mark.parametrize("dtype", thinned(["float32", "bfloat16"], "float32"))
def test_rows_are_the_same_to_the_bit_in_any_company(dtype):
    lm = shallow("gpt2-tales", dtype, max_batch=4)
    requests = [
        ("The sea", {}),
        (PROMPT * 9, {"temperature": 1.0, "seed": 3}),
        ("A", {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 9}),
        ("He said", {"repetition_penalty": 1.3, "logit_bias": {5: -3.0}, "top_logprobs": 4}),
    ]
    rows = [lm._request(prompt, {"max_tokens": 16, **options}) for prompt, options in requests]

    def run(rows):
        done = {number: chunk.completion for number, chunk in lm._run(rows) if chunk.completion is not None}
        return [(done[n].token_ids, done[n].logprobs, done[n].top_logprobs) for n in range(len(rows))]

    together = run(rows)
    assert run(rows[::-1]) == together[::-1]
    assert [run([row])[0] for row in rows] == together
