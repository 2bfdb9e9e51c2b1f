"""`LanguageModel` on the first layers of the demo; tests/test_loading.py and the models' own tests have all of it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax import CapacityError, RequestError
from gptjax.language_model import LanguageModel
from tests.compilations import compilations
from tests.shallow import shallow

PROMPT = "Once upon a time there was a king who had"


@pytest.fixture(scope="module")
def lm():
    """With one engine for all: that it grows otherwise is in tests/engine/test_shared_engine.py."""
    return shallow("gpt2-tales", max_batch=4)


def test_a_prompt_becomes_a_completion(lm):
    completion = lm.generate(PROMPT, max_tokens=20)
    assert completion.text == lm.tokenizer.decode(completion.token_ids)
    assert completion.finish_reason == "length"
    assert completion.usage.completion_tokens == len(completion.token_ids) == len(completion.logprobs) == 20
    assert completion.usage.prompt_tokens == len(lm.tokenizer.encode(PROMPT))
    assert completion.usage.total_tokens == 20 + completion.usage.prompt_tokens
    assert completion.timings.time_to_first_token > 0
    assert completion.timings.decode > 0
    assert all(logprob <= 0 for logprob in completion.logprobs)


def test_text_and_its_ids_are_the_same_prompt(lm):
    by_text = lm.generate(PROMPT, max_tokens=8)
    ids = lm.tokenizer.encode(PROMPT)
    for prompt in (
        ids,
        tuple(ids),
        np.asarray(ids),
        np.asarray(ids, np.uint16),
        jnp.asarray(ids),
        list(np.asarray(ids)),
    ):
        assert lm.generate(prompt, max_tokens=8).token_ids == by_text.token_ids


def test_a_list_gives_a_list_in_order_and_a_list_of_one_too(lm):
    prompts = ["The sea", PROMPT, "A", "He said that", "In the morning"]
    together = lm.generate(prompts, max_tokens=10)
    assert [c.token_ids for c in together] == [lm.generate(p, max_tokens=10).token_ids for p in prompts]
    assert lm.generate(["A"], max_tokens=10)[0].token_ids == together[2].token_ids
    mixed = lm.generate([[3, 4], np.asarray([5])], max_tokens=3)
    assert [c.usage.prompt_tokens for c in mixed] == [2, 1]


def test_a_stream_is_the_completion_in_pieces(lm):
    options = {"max_tokens": 30, "temperature": 0.9, "seed": 4}
    chunks = list(lm.stream(PROMPT, **options))
    whole = lm.generate(PROMPT, **options)
    assert "".join(chunk.text for chunk in chunks) == whole.text == chunks[-1].completion.text
    assert tuple(chunk.token_id for chunk in chunks) == whole.token_ids
    assert [chunk.finish_reason for chunk in chunks] == [None] * 29 + ["length"]


def test_a_stream_can_be_left_and_another_begun_beside_it(lm):
    first = lm.stream(PROMPT, max_tokens=50)
    begun = [chunk.token_id for chunk in itertools.islice(first, 5)]
    beside = lm.generate(PROMPT, max_tokens=50)
    rest = [chunk.token_id for chunk in first]
    assert tuple(begun + rest) == beside.token_ids
    left = lm.stream(PROMPT)
    next(left)
    left.close()


def test_arguments_are_checked_before_the_first_chunk(lm):
    with pytest.raises(RequestError, match="temperature"):
        lm.stream(PROMPT, temperature=-1)


def test_seeds_repeat_and_differ(lm):
    def draw(**options):
        return lm.generate(PROMPT, max_tokens=12, temperature=1.5, **options)

    assert draw(seed=1).token_ids == draw(seed=1).token_ids != draw(seed=2).token_ids
    unseeded = draw()
    assert unseeded.seed != draw().seed
    assert draw(seed=unseeded.seed).token_ids == unseeded.token_ids


def test_each_row_can_have_its_own_seed(lm):
    rows = lm.generate(["The"] * 5, max_tokens=8, temperature=1.5, seed=[5, 6, 5, 7, 8])  # as many as of the list above
    assert [row.seed for row in rows] == [5, 6, 5, 7, 8]
    assert rows[0].token_ids == rows[2].token_ids != rows[1].token_ids
    with pytest.raises(RequestError, match="2 seeds"):
        lm.generate(["The"] * 3, seed=[1, 2])


def test_numpy_scalars_are_numbers(lm):
    plain = lm.generate("The", max_tokens=5, temperature=0.5, seed=5, stop_ids=[3], logit_bias={7: 2.0})
    numpy = lm.generate(
        "The",
        max_tokens=np.int64(5),
        temperature=np.float32(0.5),
        seed=np.uint32(5),
        stop_ids=np.asarray([3]),
        logit_bias={np.int32(7): np.float64(2)},
    )
    assert plain.token_ids == numpy.token_ids


def test_a_top_p_too_small_for_float32_still_draws_the_best(lm):
    greedy = lm.generate(PROMPT, max_tokens=5)
    assert lm.generate(PROMPT, max_tokens=5, temperature=1, top_p=1e-50).token_ids == greedy.token_ids


def test_a_top_k_beyond_int32_keeps_all(lm):
    plain = lm.generate(PROMPT, max_tokens=5, temperature=1, seed=1)
    assert lm.generate(PROMPT, max_tokens=5, temperature=1, seed=1, top_k=2**40).token_ids == plain.token_ids


def test_stops_and_stop_ids(lm):
    whole = lm.generate(PROMPT, max_tokens=40)
    stop = whole.text[10:14]
    stopped = lm.generate(PROMPT, max_tokens=40, stop=stop)
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)]
    by_id = lm.generate(PROMPT, max_tokens=40, stop_ids=[whole.token_ids[5]])
    assert by_id.token_ids == whole.token_ids[: whole.token_ids.index(whole.token_ids[5]) + 1]
    assert by_id.finish_reason == "stop"
    assert lm.generate(PROMPT, max_tokens=3, logit_bias={0: 100.0}, stop_ids=0).token_ids == (0,)


def test_the_end_of_text_ends_unless_ignored(lm):
    eos = lm.eos_ids[0]
    assert eos == lm.tokenizer.special_ids["<|endoftext|>"]
    forced = {"logit_bias": {eos: 100.0}, "max_tokens": 3}
    ended = lm.generate(PROMPT, **forced)
    assert (ended.text, ended.token_ids, ended.finish_reason) == ("", (eos,), "stop")
    assert lm.generate(PROMPT, ignore_eos=True, **forced).token_ids == (eos,) * 3


def test_top_logprobs_hold_the_chosen_token_when_greedy(lm):
    completion = lm.generate(PROMPT, max_tokens=4, top_logprobs=5)
    for token, logprob, top in zip(completion.token_ids, completion.logprobs, completion.top_logprobs, strict=True):
        assert len(top) == 5
        assert next(iter(top.items())) == (token, logprob)
        assert list(top.values()) == sorted(top.values(), reverse=True)


def test_logits_are_those_that_generation_draws_from(lm):
    completion = lm.generate(PROMPT, max_tokens=6)
    ids = lm.tokenizer.encode(PROMPT)
    logits_TV = lm.logits([*ids, *completion.token_ids])
    assert logits_TV.shape == (len(ids) + 6, lm.config.vocab_size)
    assert logits_TV.dtype == np.float32
    assert tuple(logits_TV[len(ids) - 1 : -1].argmax(-1).tolist()) == completion.token_ids


def test_the_loop_in_ones_own_hands(lm):
    ids = lm.tokenizer.encode(PROMPT)
    state = lm.init_state(batch=1, max_length=128)
    logits_BV, state = lm.prefill(state, ids)
    np.testing.assert_allclose(logits_BV[0], lm.logits(ids)[-1], atol=1e-3)
    tokens = []
    for _ in range(8):
        token_B, state = lm.decode(state)
        tokens.append(int(token_B[0]))
    assert tuple(tokens) == lm.generate(PROMPT, max_tokens=8).token_ids
    assert logits_BV.shape == (1, lm.config.vocab_size)  # still there, though the state it came with was donated
    two = lm.init_state(batch=2, max_length=128)
    _, two = lm.prefill(two, [ids, ids[:3]])
    token_B, two = lm.decode(two, temperature=0.7, seed=42)
    assert token_B.shape == (2,)


def test_decode_works_under_jit(lm):
    @jax.jit
    def two(state):
        tokens = []
        for _ in range(2):
            token_B, state = lm.decode(state)
            tokens.append(token_B)
        return tokens

    _, state = lm.prefill(lm.init_state(max_length=128), lm.tokenizer.encode(PROMPT))
    assert tuple(int(t[0]) for t in two(state)) == lm.generate(PROMPT, max_tokens=2).token_ids


def test_decode_is_pure(lm):
    @jax.jit
    def one(state):
        return lm.decode(state, temperature=2.0)

    tokens = []
    for _ in range(2):
        _, state = lm.prefill(lm.init_state(max_length=128), [1, 2, 3])
        row = []
        for _ in range(6):
            token_B, state = one(state)
            row.append(int(token_B[0]))
        tokens.append(row)
    assert tokens[0] == tokens[1]
    assert len(set(tokens[0])) > 1


def test_bad_ids_for_one_row_lose_nothing(lm):
    state = lm.init_state(batch=2, max_length=128)
    with pytest.raises(RequestError, match="99999"):
        lm.prefill(state, [[1, 2], [99999]])
    with pytest.raises(RequestError, match="2 rows"):
        lm.prefill(state, [[1, 2]])
    logits_BV, _ = lm.prefill(state, [[1, 2], [3]])
    assert np.isfinite(logits_BV).all()


def test_a_state_that_was_never_filled_draws_no_token(lm):
    token_B, _ = lm.decode(lm.init_state(batch=2, max_length=128))
    assert token_B.tolist() == [-1, -1]


@pytest.mark.parametrize("batch", [0, -1, 1.5, True])
def test_a_state_needs_a_whole_number_of_rows(lm, batch):
    with pytest.raises(RequestError, match="batch"):
        lm.init_state(batch=batch)


def test_decoding_beyond_the_end_gives_minus_one(lm):
    _, state = lm.prefill(lm.init_state(max_length=4), [1, 2, 3])
    tokens = []
    for _ in range(4):
        token_B, state = lm.decode(state)
        tokens.append(int(token_B[0]))
    assert [token < 0 for token in tokens] == [False, False, True, True]


@pytest.mark.parametrize(
    ("prompt", "options", "error", "says"),
    [
        ([], {}, RequestError, "no prompt"),
        ("", {}, RequestError, "empty"),
        (["fine", ""], {}, RequestError, "empty"),
        ([[]], {}, RequestError, "empty"),
        ([1, 8192], {}, RequestError, "8192 at position 1"),
        ([-1], {}, RequestError, "-1 at position 0"),
        ([1.5], {}, RequestError, "1.5"),
        ([True, 2], {}, RequestError, "True"),
        (5, {}, RequestError, "int"),
        (None, {}, RequestError, "NoneType"),
        ([1] * 513, {}, CapacityError, "513 tokens.*512"),
        ("x", {"temperature": -0.1}, RequestError, "temperature"),
        ("x", {"temperature": float("nan")}, RequestError, "temperature"),
        ("x", {"temperature": "hot"}, RequestError, "temperature"),
        ("x", {"top_k": -1}, RequestError, "top_k"),
        ("x", {"top_k": 2.5}, RequestError, "top_k"),
        ("x", {"top_p": 0}, RequestError, "top_p"),
        ("x", {"top_p": 1.1}, RequestError, "top_p"),
        ("x", {"min_p": 2}, RequestError, "min_p"),
        ("x", {"repetition_penalty": 0}, RequestError, "repetition_penalty"),
        ("x", {"presence_penalty": float("inf")}, RequestError, "presence_penalty"),
        ("x", {"logit_bias": {9000: 1}}, RequestError, "9000"),
        ("x", {"logit_bias": {1: 1e9}}, RequestError, "logit_bias"),
        ("x", {"logit_bias": [1]}, RequestError, "logit_bias"),
        ("x", {"seed": -1}, RequestError, "seed"),
        ("x", {"seed": 2**32}, RequestError, "seed"),
        ("x", {"max_tokens": 0}, RequestError, "max_tokens"),
        ("x", {"max_tokens": True}, RequestError, "max_tokens"),
        (b"The king", {}, RequestError, "bytes"),
        ([b"The king"], {}, RequestError, "bytes"),
        ([[1, 2], 3], {}, RequestError, "int"),
        ("x", {"temperature": 10**400}, RequestError, "temperature"),
        ("x", {"logit_bias": {1: 10**400}}, RequestError, "logit_bias"),
        ("x", {"stop": ""}, RequestError, "stop"),
        ("x", {"stop_ids": "3"}, RequestError, "stop_ids"),
        ("x", {"stop_ids": [[1]]}, RequestError, "stop id"),
        ("x", {"stop_ids": True}, RequestError, "stop id"),
        ("x", {"stop": [""]}, RequestError, "stop"),
        ("x", {"stop": ["x"] * 17}, RequestError, "17"),
        ("x", {"stop": 3}, RequestError, "stop"),
        ("x", {"stop_ids": [-3]}, RequestError, "stop id"),
        ("x", {"top_logprobs": 21}, RequestError, "top_logprobs"),
        ("x", {"temprature": 1}, RequestError, "did you mean 'temperature'"),
        ("\ud800", {}, RequestError, "surrogate"),
    ],
)
def test_bad_requests_name_the_fault(lm, prompt, options, error, says):
    with pytest.raises(error, match=says):
        lm.generate(prompt, **options)


def test_the_edges_of_the_context(lm):
    assert lm.generate([1] * 512).usage.completion_tokens == 1
    past = lm.generate([1] * 510, max_tokens=1000, ignore_eos=True)
    assert (past.usage.completion_tokens, past.finish_reason) == (3, "length")
    assert lm.generate([1], max_tokens=1).usage.completion_tokens == 1
    assert lm.logits([1] * 512).shape[0] == 512


def test_nothing_is_compiled_after_the_first_calls():
    lm = shallow("gpt2-tales", max_batch=4)
    options = {"ignore_eos": True, "seed": 2}  # rows that end early would leave calls of other sizes
    lm.generate(["one", "two " * 40, "three " * 90], max_tokens=3, temperature=0.5, top_k=3, **options)
    lm.generate("x", max_tokens=2, **options)
    prompts = ["two", "of " * 70, "these " * 90, "and", "more"]  # calls of the sizes above
    with compilations() as compiled:
        lm.generate("another", max_tokens=5, **options)
        lm.generate(prompts, max_tokens=4, temperature=1.0, top_k=7, **options)
    assert compiled == []


def test_the_public_names_are_there_and_lazy():
    for name in gptjax.__all__:
        assert getattr(gptjax, name) is not None
    assert set(dir(gptjax)) == set(gptjax.__all__)
    assert gptjax.LanguageModel is LanguageModel
    with pytest.raises(AttributeError, match="nonsense"):
        _ = gptjax.nonsense
