"""Turns of a conversation: `lm.chat` and `lm.stream_chat`."""

import datetime
import itertools
from collections import Counter

import pytest

import gptjax
from gptjax import CapacityError, RequestError
from gptjax.text import harmony, load_tokenizer
from gptjax.text.chat_formats import ChatOptions
from gptjax.text.chat_formats.harmony import Harmony

PASSAGE = "In the morning the old king went down to the sea."
ASK = [{"role": "user", "content": PASSAGE}]
GREEDY = {"temperature": 0, "max_tokens": 60}


@pytest.fixture(scope="module")
def tales():
    """The small trained GPT-OSS, in float32."""
    return gptjax.load("gpt-oss-tales", dtype="float32", max_length=512)


@pytest.fixture(scope="module")
def tokenizer(demo):
    return load_tokenizer(demo.parent / "gpt-oss-tales")


def test_a_turn_has_reasoning_and_an_answer(tales):
    turn = tales.chat(ASK, **GREEDY)
    messages = harmony.parse(turn.completion.token_ids, tales.tokenizer)
    assert [message.channel for message in messages] == ["analysis", "final"]
    assert [turn.reasoning, turn.text] == [message.content for message in messages]
    assert turn.reasoning.startswith("The user gives a passage")
    assert turn.tool_calls == ()
    assert turn.completion.text == turn.text
    assert turn.completion.usage.prompt_tokens == len(harmony.render(ASK, tales.tokenizer, current_date=today()))
    assert turn.completion.usage.completion_tokens == len(turn.completion.token_ids)


def today() -> str:
    return datetime.date.today().isoformat()


def test_a_turn_ends_as_the_checkpoint_says_and_repeats_by_its_seed(tales):
    turn = tales.chat(ASK, reasoning_effort="low", seed=4, max_tokens=300)
    assert turn.finish_reason == "stop"
    assert tales.tokenizer.decode(turn.completion.token_ids[-1:], special=True) == "<|return|>"
    for seed in (4, 5):
        again = tales.chat(ASK, reasoning_effort="low", seed=seed, max_tokens=40)
        assert (again.completion.token_ids == turn.completion.token_ids[:40]) == (seed == 4)


def test_a_stream_is_the_turn_in_pieces(tales):
    turn = tales.chat(ASK, seed=2, max_tokens=60)
    chunks = list(tales.stream_chat(ASK, seed=2, max_tokens=60))
    assert "".join(chunk.text for chunk in chunks) == turn.text
    assert "".join(chunk.reasoning for chunk in chunks) == turn.reasoning
    assert tuple(chunk.token_id for chunk in chunks) == turn.completion.token_ids
    assert [chunk.completion is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert not any("\ufffd" in chunk.text + chunk.reasoning for chunk in chunks)
    assert not any("<|" in chunk.text + chunk.reasoning for chunk in chunks)


@pytest.mark.parametrize(("effort", "temperature"), [("low", None), ("medium", 0), ("high", None)])
def test_the_model_does_not_repeat_one_token(tales, effort, temperature):
    turn = tales.chat(ASK, reasoning_effort=effort, temperature=temperature, seed=7, max_tokens=80)
    ids = turn.completion.token_ids
    assert len(ids) > 20
    assert max(len(list(run)) for _, run in itertools.groupby(ids)) < 4  # "had had" is English
    assert Counter(ids).most_common(1)[0][1] < len(ids) / 4
    assert turn.text


def test_the_conversation_goes_on_with_the_message(tales):
    first = tales.chat(ASK, temperature=0, max_tokens=50)
    assert first.text
    messages = [*ASK, first.message, {"role": "user", "content": "And then?"}]
    again = tales.chat(messages, reasoning_effort="low", seed=1, max_tokens=40)
    assert again.text
    assert again.completion.usage.prompt_tokens > first.completion.usage.prompt_tokens
    written = tales.tokenizer.decode(harmony.render(messages, tales.tokenizer), special=True)
    assert f"<|channel|>final<|message|>{first.text}<|end|><|start|>user<|message|>And then?<|end|>" in written


def test_stop_is_looked_for_in_the_answer_only(tales):
    whole = tales.chat(ASK, **GREEDY)
    word = next(word for word in (" the", " and", " a", "I") if word in whole.text and word in whole.reasoning)
    stopped = tales.chat(ASK, stop=word, **GREEDY)
    assert stopped.reasoning == whole.reasoning
    assert stopped.text == whole.text[: whole.text.index(word)]
    assert stopped.finish_reason == "stop"
    chunks = list(tales.stream_chat(ASK, stop=word, **GREEDY))
    assert "".join(chunk.text for chunk in chunks) == stopped.text


def test_a_turn_can_be_cut_short(tales):
    turn = tales.chat(ASK, temperature=0, max_tokens=16)
    assert turn.reasoning.startswith("The user")
    assert (turn.finish_reason, turn.text) == ("length", "")
    assert turn.message == {"role": "assistant", "content": None, "reasoning_content": turn.reasoning}
    harmony.render([*ASK, turn.message, *ASK], tales.tokenizer)


@pytest.mark.parametrize(
    ("messages", "options", "error", "says"),
    [
        ([], {}, RequestError, "no message"),
        ([{"role": "king", "content": "Hi"}], {}, RequestError, "'king'"),
        ([{"role": "user"}], {}, RequestError, "content is missing"),
        ([{"role": "user", "content": "\ud800"}], {}, RequestError, "surrogate"),
        ("Hi", {}, RequestError, "messages"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], {}, RequestError, r"messages\[0\] has 'tool_calls'"),
        ([{"role": "user", "content": "x", "tool_calls": "abc"}], {}, RequestError, r"messages\[0\] has 'tool_calls'"),
        ([{"role": "system", "content": "x", "tool_calls": 5}], {}, RequestError, r"messages\[0\] has 'tool_calls'"),
        (ASK, {"reasoning_effort": "utmost"}, RequestError, "low, medium, high"),
        (ASK, {"current_date": "tomorrow"}, RequestError, "2025-06-28"),
        (ASK, {"tools": [{"type": "hammer"}]}, RequestError, "'hammer'"),
        (ASK, {"temprature": 1}, RequestError, "'temperature'"),
        (ASK, {"max_tokens": 0}, RequestError, "max_tokens"),
        ([{"role": "user", "content": PASSAGE * 60}], {}, CapacityError, "max_length is 512"),
    ],
)
def test_what_is_wrong_is_said_when_the_call_is_made(tales, messages, options, error, says):
    with pytest.raises(error, match=says):
        tales.stream_chat(messages, **options)
    with pytest.raises(error, match=says):
        tales.chat(messages, **options)


@pytest.mark.thorough
def test_a_tokenizer_without_harmony_cannot_chat_but_generates(lm):
    with pytest.raises(RequestError, match=r"lacks harmony's special tokens <\|start\|>"):
        lm.chat(ASK)
    assert lm.generate(PASSAGE, max_tokens=2).text


def test_the_model_is_told_the_date(tokenizer):
    def text(date):
        given = ChatOptions(reasoning_effort="low", current_date=date)
        return tokenizer.decode(Harmony().render(ASK, tokenizer, given), special=True)

    assert f"Current date: {today()}" in text("today")
    assert "Current date: 2025-06-28" in text("2025-06-28")
    assert "Current date" not in text(None)
    assert "Reasoning: low" in text(None)


def test_what_ends_a_turn(tokenizer):
    assert tokenizer.decode(Harmony().stop_ids(tokenizer), special=True) == "<|return|><|call|><|endoftext|>"
