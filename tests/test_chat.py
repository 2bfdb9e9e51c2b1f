"""Turns of a conversation: `lm.chat`, `lm.stream_chat`, and what they are made of."""

import datetime
import itertools
from collections import Counter

import pytest

import gptjax
from gptjax import CapacityError, RequestError
from gptjax.chat import ChatCompletion, ToolCall, TurnReader, call_ids, prompt, stop_ids
from gptjax.engine.output import Completion, Timings, Usage
from gptjax.text import harmony, load_tokenizer

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


def read(tokenizer, text: str) -> tuple[TurnReader, str]:
    """A reader that has read a text with special tokens written out, and the answer."""
    reader = TurnReader(tokenizer)
    return reader, "".join(map(reader.push, tokenizer.encode(text, special=True))) + reader.finish()


def completed(text: str = "", reasoning: str = "", calls: tuple[ToolCall, ...] = ()) -> ChatCompletion:
    whole = Completion(text, (), (), (), "stop", None, 0, Usage(1, 1), Timings(0, 0))
    return ChatCompletion(text, reasoning, calls, "stop", whole)


# The model


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
        ([], {}, RequestError, "role user"),
        ([{"role": "system", "content": "Hi"}], {}, RequestError, "role user"),
        ([{"role": "king", "content": "Hi"}], {}, RequestError, "'king'"),
        ([{"role": "user"}], {}, RequestError, "content is missing"),
        ([{"role": "user", "content": "\ud800"}], {}, RequestError, "surrogate"),
        ("Hi", {}, RequestError, "messages"),
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


def test_a_tokenizer_without_harmony_cannot_chat_but_generates(lm):
    with pytest.raises(RequestError, match=r"lacks harmony's special tokens <\|start\|>"):
        lm.chat(ASK)
    assert lm.generate(PASSAGE, max_tokens=2).text


def test_the_model_is_told_the_date(tokenizer):
    def text(date):
        given = {"tools": (), "reasoning_effort": "low", "current_date": date}
        return tokenizer.decode(prompt(ASK, tokenizer, **given), special=True)

    assert f"Current date: {today()}" in text("today")
    assert "Current date: 2025-06-28" in text("2025-06-28")
    assert "Current date" not in text(None)
    assert "Reasoning: low" in text(None)


# What a model may write


def test_no_character_is_broken(tokenizer):
    thought, said = "naïve 🜂 思考 ", "👩‍👩‍👧 ſtrange — 𝔘𝔫𝔦 é"
    text = (
        f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant<|channel|>final<|message|>{said}<|return|>"
    )
    reader = TurnReader(tokenizer)
    answer, reasoning = [], []
    for token in tokenizer.encode(text, special=True):
        answer.append(reader.push(token))
        reasoning.append(reader.take_reasoning())
    assert ("".join(answer), "".join(reasoning)) == (said, thought)
    assert not any("\ufffd" in piece for piece in answer + reasoning)


def test_bytes_that_never_become_a_character_are_marked(tokenizer):
    half = tokenizer.encode("𝔘")[:-1]
    assert len(half) > 0
    reader = TurnReader(tokenizer)
    pieces = [reader.push(token) for token in [*tokenizer.encode("<|channel|>final<|message|>A", special=True), *half]]
    assert "".join(pieces) == "A"
    assert reader.finish() == "\ufffd"


def call(name: str, arguments: str = "{}", number: int = 0) -> dict:
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_tool_calls_come_back_as_they_are_rendered(tokenizer):
    message = {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "Hm.",
        "tool_calls": [call("weather", '{"city": "Paris"}', 2), call("time", "{}", 3)],
    }
    before = [*ASK, {"role": "assistant", "tool_calls": [call("a"), call("b", number=1)]}]
    ids = harmony.render_messages(harmony.conversation([*before, message]), tokenizer, completion=False)
    reader = TurnReader(tokenizer, used_ids=call_ids(before))
    text = "".join(map(reader.push, ids[len(harmony.render(before, tokenizer)) :])) + reader.finish()
    assert (text, reader.reasoning) == ("I look.", "Hm.")
    assert reader.tool_calls == (
        ToolCall("call_2", "weather", '{"city": "Paris"}'),
        ToolCall("call_3", "time", "{}"),
    )
    assert completed(text, reader.reasoning, reader.tool_calls).message == message
    result = {"role": "tool", "tool_call_id": "call_3", "content": "noon"}
    assert harmony.render([*before, message, result], tokenizer)[: len(ids)] == ids


def test_built_in_tools_keep_their_names(tokenizer):
    reader, text = read(tokenizer, "<|channel|>analysis to=python code<|message|>1 + 1<|call|>")
    assert reader.tool_calls == (ToolCall("call_0", "python", "1 + 1"),)
    assert (text, reader.reasoning) == ("", "")


def test_messages_of_a_channel_are_kept_apart(tokenizer):
    reader, text = read(
        tokenizer,
        "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>commentary<|message|>Now.<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Two.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Here.<|return|>",
    )
    assert reader.reasoning == "One.\n\nTwo."
    assert text == "Now.\n\nHere."
    assert reader.take_reasoning() == reader.reasoning
    assert reader.take_reasoning() == ""


@pytest.mark.parametrize("recipient", ["all", "functions.", "functions.a/b", "<b>", "to=to=x"])
def test_what_is_for_no_tool_is_text_and_the_conversation_goes_on(tokenizer, recipient):
    reader, text = read(tokenizer, f"<|channel|>commentary to={recipient}<|message|>Hi.<|end|>")
    assert (text, reader.tool_calls) == ("Hi.", ())
    harmony.render([*ASK, completed(text).message, *ASK], tokenizer)


def test_what_a_model_takes_for_a_result_is_not_shown(tokenizer):
    stream = "<|start|>functions.f to=assistant<|channel|>commentary<|message|>42<|end|>"
    reader, text = read(tokenizer, f"<|channel|>final<|message|>A<|end|>{stream}")
    assert (text, reader.tool_calls) == ("A", ())


def test_a_call_that_was_cut_is_there_at_the_end(tokenizer):
    ids = tokenizer.encode('<|channel|>commentary to=functions.f<|message|>{"a": ', special=True)
    reader = TurnReader(tokenizer)
    assert "".join(map(reader.push, ids)) == ""
    assert reader.tool_calls == ()
    reader.finish()
    assert reader.tool_calls == (ToolCall("call_0", "f", '{"a": '),)


def test_text_without_channels_is_the_answer(tokenizer):
    assert read(tokenizer, "Just this.")[1] == "Just this."


def test_an_empty_turn_is_a_message_to_go_on_with(tokenizer):
    message = completed().message
    assert message == {"role": "assistant", "content": ""}
    harmony.render([*ASK, message, *ASK], tokenizer)


def test_what_ends_a_turn(tokenizer):
    assert tokenizer.decode(stop_ids(tokenizer), special=True) == "<|return|><|call|><|endoftext|>"
