"""Token ids back to messages: the format, what models make of it, and random streams."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest

from gptjax.errors import RequestError
from gptjax.text.harmony import Event, Message, StreamParser, parse, render_messages
from tests.fuzz import rounds
from tests.oracles import harmony_cases as cases
from tests.text.harmony_material import TALES, ids
from tests.thinned import thinned

JSON = "<|constrain|>json"


def says(text: str, channel: str | None = None) -> Message:
    return Message("assistant", text, channel=channel)


def calls(recipient: str, text: str = "{}", content_type: str | None = JSON, channel: str = "commentary") -> Message:
    return Message("assistant", text, None, channel, recipient, content_type)


def texts(events: list[Event]) -> list[str]:
    """What the events say, message by message, after checking that they are in order."""
    messages: list[list[Event]] = []
    for event in events:
        if event.index == len(messages):
            assert event.text == ""
            assert not event.ended
            messages.append([])
        else:
            assert event.index == len(messages) - 1
            assert event.text or event.ended
            assert not messages[-1][-1].ended
            assert replace(event, text="", ended=False) == messages[-1][0]
        messages[-1].append(event)
    assert all(message[-1].ended for message in messages)
    return ["".join(event.text for event in message) for message in messages]


def stream(token_ids: list[int]) -> tuple[list[Event], list[Message]]:
    parser = StreamParser(TALES)
    events = [event for token_id in token_ids for event in parser.push(token_id)] + parser.finish()
    assert texts(events) == [message.content for message in parser.messages]
    return events, parser.messages


WELL_FORMED = [
    (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi.<|return|>",
        [says("Hm.", "analysis"), says("Hi.", "final")],
    ),
    ("<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>", [calls("functions.f")]),
    ("<|channel|>commentary to=functions.f<|constrain|>json<|message|>{}<|call|>", [calls("functions.f")]),
    (" to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>", [calls("functions.f")]),
    (" to=functions.f<|channel|>commentary json<|message|>{}<|call|>", [calls("functions.f", content_type="json")]),
    ("<|channel|>analysis to=python code<|message|>1<|call|>", [calls("python", "1", "code", "analysis")]),
    ("<|channel|>commentary to=functions.f <|constrain|> json<|message|>{}<|call|>", [calls("functions.f")]),
    ("<|channel|>final <|constrain|>json<|message|>{}<|return|>", [replace(says("{}", "final"), content_type=JSON)]),
    ("assistant<|channel|>final<|message|>Hi.<|return|>", [says("Hi.", "final")]),
    ("<|start|>assistant<|channel|>final<|message|>Hi.<|return|>", [says("Hi.", "final")]),
    ("<|message|>Hi.<|end|>", [says("Hi.")]),
    ("<|channel|>final<|message|><|return|>", [says("", "final")]),
    ("<|channel|>final<|message|> \n<|return|>", [says(" \n", "final")]),
    (
        "<|start|>functions.f to=assistant<|channel|>commentary<|message|>1<|end|>",
        [Message("tool", "1", "functions.f", "commentary", "assistant")],
    ),
    (
        "<|start|>tool to=assistant<|channel|>commentary<|message|>1<|end|>",
        [Message("tool", "1", "tool", "commentary", "assistant")],
    ),
    ("<|start|>functions.f<|message|>1<|end|>", [Message("tool", "1", "functions.f")]),
    ("<|start|>user:ann<|message|>Hi.<|end|>", [Message("user", "Hi.", "ann")]),
    ("<|start|>system<|message|>Hi.<|end|>", [Message("system", "Hi.")]),
    ("", []),
]

MALFORMED = [
    # No header, or none that <|message|> ends.
    ("Once upon a time", [says("Once upon a time")]),
    ("I must refuse<|end|>", [says("I must refuse")]),
    ("<|channel|>analysis I must\nrefuse<|end|>", [says("I must\nrefuse", "analysis")]),
    ("<|channel|>I must refuse<|end|>", [says("I must refuse")]),
    ("<|channel|>commentary to=f <|constrain|>json{}<|call|>", [calls("f")]),
    ("<|start|>I must refuse<|end|>", [says("I must refuse")]),
    ("<|start|>assistant I must refuse<|end|>", [says("I must refuse")]),
    ("<|channel|>analysis Hm.<|channel|>final<|message|>Hi.", [says("Hm.", "analysis"), says("Hi.", "final")]),
    ("Hm.<|start|>assistant<|channel|>final<|message|>Hi.", [says("Hm."), says("Hi.", "final")]),
    # No end.
    ("<|channel|>final<|message|>cut sho", [says("cut sho", "final")]),
    (
        "<|channel|>analysis<|message|>Hm.<|start|>assistant<|channel|>final<|message|>Hi.",
        [says("Hm.", "analysis"), says("Hi.", "final")],
    ),
    (
        "<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>Hi.",
        [says("Hm.", "analysis"), says("Hi.", "final")],
    ),
    ("<|channel|>final<|message|>Hi.<|endoftext|>There.", [says("Hi.", "final"), says("There.")]),
    # No start.
    (
        "<|channel|>analysis<|message|>Hm.<|end|><|channel|>final<|message|>Hi.",
        [says("Hm.", "analysis"), says("Hi.", "final")],
    ),
    (
        "<|channel|>analysis<|message|>Hm.<|end|>assistant<|channel|>final<|message|>Hi.",
        [says("Hm.", "analysis"), says("Hi.", "final")],
    ),
    ("<|channel|>final<|message|>Hi.<|return|> And more.", [says("Hi.", "final"), says("And more.")]),
    # Headers that the end of the stream cuts short are not shown.
    ("<|channel|>ana", []),
    ("<|channel|>commentary to=functions.f <|constrain|>js", []),
    ("<|channel|>final<|message|>Hi.<|end|><|start|>assis", [says("Hi.", "final")]),
    ("<|start|>assistant<|end|><|end|><|return|>", []),
    ("<|channel|>final<|end|>", []),
    (" to=functions.f", []),
    ("<|channel|>final to=user<|return|>", []),
    # A call that has no text.
    ("<|channel|>commentary to=functions.f <|constrain|>json<|call|>", [calls("functions.f", "")]),
    ("<|channel|>commentary to=functions.f<|call|>", [calls("functions.f", "", None)]),
    # Odd headers.
    ("<|start|><|message|>Hi.<|end|>", [says("Hi.")]),
    ("<|channel|><|message|>Hi.<|end|>", [says("Hi.")]),
    ("<|channel|>commentaryjson<|message|>Hi.<|end|>", [says("Hi.", "commentaryjson")]),
    ("<|start|>to=functions.f<|channel|>commentary json<|message|>{}", [calls("functions.f", content_type="json")]),
    ("<|channel|>commentary 大 to=functions.f <|constrain|>json 大<|message|>{}<|call|>", [calls("functions.f")]),
    (
        "<|channel|>commentary to=functions.f <|constrain|>js<|constrain|>on<|message|>{}<|call|>",
        [calls("functions.f")],
    ),
    ("<|channel|><|channel|><|start|><|start|><|channel|>final<|message|>Hi.", [says("Hi.", "final")]),
    # Special tokens that mean nothing in a text.
    ("<|channel|>final<|message|>H<|message|>i<|constrain|>.<|startoftext|><|return|>", [says("Hi.", "final")]),
]


@pytest.mark.parametrize(("text", "messages"), WELL_FORMED + MALFORMED)
def test_streams(text: str, messages: list[Message]) -> None:
    assert stream(ids(text))[1] == parse(ids(text), TALES) == messages


@pytest.mark.parametrize(("text", "messages"), WELL_FORMED + MALFORMED)
def test_any_integers_will_do(text: str, messages: list[Message]) -> None:
    assert stream(list(np.array(ids(text), np.int32)))[1] == messages


@pytest.mark.parametrize("name", ["test_streamable_parser", "test_tool_response_parsing"])
def test_fixtures(name: str) -> None:
    search = '{"query": "current US president July 2025", "topn": 10, "source": "news"}'
    reply = Message("tool", '{"result": "https://openai.com/"}', "browser.search", "commentary", "assistant")
    messages = stream(ids(cases.read(name)))[1]
    assert messages[-1] == reply
    if name == "test_streamable_parser":
        assert messages[0].channel == "analysis"
        assert messages[1:] == [calls("browser.search", search, "code"), reply]


def test_events() -> None:
    text = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
    begun = Event(0, "assistant", "commentary", "functions.f", JSON, "")
    assert stream(ids(text))[0] == [
        begun,
        replace(begun, text="{"),
        replace(begun, text="}"),
        replace(begun, ended=True),
    ]


def test_text_comes_with_its_token() -> None:
    parser = StreamParser(TALES)
    for token_id in ids("<|channel|>final<|message|>"):
        parser.push(token_id)
    for piece in ("Once", " upon", " a", " time"):
        (token_id,) = TALES.encode(piece)
        assert [event.text for event in parser.push(token_id)] == [piece]


def test_never_half_a_character() -> None:
    text = "naïve 東京 👩‍👩‍👧"
    parser = StreamParser(TALES)
    said = []
    for token_id in ids(f"<|channel|>final<|message|>{text}<|return|>"):
        said += [event.text for event in parser.push(token_id)]
    assert "".join(said) == text
    assert len(ids(text)) > len([piece for piece in said if piece])
    first, second = TALES.encode("é")
    begin = ids("<|channel|>final<|message|>")
    assert stream([*begin, first, *ids("<|end|>"), *begin, second])[1] == [says("\ufffd", "final")] * 2
    assert stream([*begin, first])[1] == [says("\ufffd", "final")]
    assert stream([first, *ids("<|end|>"), second])[1] == [says("\ufffd")] * 2
    header = ids("<|channel|>final")
    assert stream([*header, first, *ids("<|message|>"), second])[1] == [says("\ufffd", "final\ufffd")]


def test_ids_that_no_token_has() -> None:
    text = [*ids("<|channel|>fi"), 10**6, *ids("nal<|message|>H"), 10**6, *ids("i."), 2**40]
    assert stream(text)[1] == [says("Hi.", "final")]
    for wrong in (-1, "a", 1.5):
        with pytest.raises(RequestError, match="token id"):
            StreamParser(TALES).push(wrong)  # type: ignore[arg-type]


def test_text_without_a_header_flows_before_its_end() -> None:
    text = "Once upon a time there was é " * 40
    parser = StreamParser(TALES)
    events = [event for token_id in ids(text) for event in parser.push(token_id)]
    assert "".join(event.text for event in events) == text
    assert len(events[1].text) < 600
    assert len(events) > 100
    parser.finish()
    assert parser.messages == [says(text)]


@pytest.mark.parametrize(
    "unit",
    thinned(["<|channel|>", "<|start|>", "<|constrain|>", "<|message|>", "<|end|>", " ", "x", " to=x"], "x", " "),
)
def test_long_streams_take_linear_time(unit: str) -> None:
    """Ten times the tokens: quadratic code takes a hundred times as long."""

    def seconds(count: int) -> float:
        tokens, took = ids(unit) * count, []
        for _ in range(3):
            start = time.thread_time()  # of the processor: others may keep the machine busy
            stream(tokens)
            stream(ids("<|channel|>final") + tokens)
            took.append(time.thread_time() - start)
        return min(took)

    assert seconds(30_000) < 30 * seconds(3_000)


@pytest.mark.fuzz
def test_random_streams() -> None:
    """Of a few tokens: nothing is an error, and events, messages and texts agree."""
    pick = random.Random(1)
    marks = list(TALES.special_ids.values())
    words = [
        token_id
        for word in ("assistant", "final", "analysis", " to=f", " json", "user", "é", " ")
        for token_id in ids(word)
    ]
    for _ in range(rounds(10_000)):
        tokens = pick.choices(marks, k=pick.randint(1, 7)) + pick.choices(words, k=pick.randint(0, 5))
        tokens += [pick.randrange(9000)]
        pick.shuffle(tokens)
        _, messages = stream(tokens)
        assert not any("<|" in str(message.content) for message in messages)


def test_round_trips() -> None:
    """What is rendered is what is parsed, and rendered again the same ids."""
    pick = random.Random(2)
    for _ in range(2000):
        messages = [cases.random_message(pick) for _ in range(pick.randint(0, 6))]
        rendered = render_messages(messages, TALES, drop_analysis=False, completion=pick.random() < 0.5)
        assert parse(rendered, TALES) == messages


def test_a_parser_can_go_on_after_the_end() -> None:
    parser = StreamParser(TALES)
    for turn in range(2):
        events = [event for token_id in ids("<|channel|>final<|message|>Hi.") for event in parser.push(token_id)]
        assert {event.index for event in events + parser.finish()} == {turn}
        assert parser.finish() == []
        assert parser.push(ids("<|channel|>")[0]) == parser.push(TALES.encode("é")[0]) == parser.finish() == []
    assert parser.messages == [says("Hi.", "final")] * 2
