"""What a model may write as a turn, and what is read of it."""

import itertools
import random

import pytest

from gptjax.chat import chat_chunks
from gptjax.engine.output import Output
from gptjax.engine.request import Request, SamplingParams, Token
from gptjax.text import harmony
from gptjax.text.chat_formats.harmony import Harmony, HarmonyReader, offered_names
from tests.fuzz import rounds
from tests.text.harmony_material import TALES, USER, assembled, called, completed, read

ASK = [USER]


@pytest.fixture
def tokenizer():
    return TALES


def test_no_character_is_broken(tokenizer):
    thought, said = "naïve 🜂 思考 ", "👩‍👩‍👧 ſtrange — 𝔘𝔫𝔦 é"
    text = (
        f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant<|channel|>final<|message|>{said}<|return|>"
    )
    reader = HarmonyReader(tokenizer)
    answer, reasoning = [], []
    for token in tokenizer.encode(text, special=True):
        answer.append(reader.push(token))
        reasoning.append(reader.take_reasoning())
    assert ("".join(answer), "".join(reasoning)) == (said, thought)
    assert not any("\ufffd" in piece for piece in answer + reasoning)


def test_bytes_that_never_become_a_character_are_marked(tokenizer):
    half = tokenizer.encode("𝔘")[:-1]
    assert len(half) > 0
    reader = HarmonyReader(tokenizer)
    pieces = [reader.push(token) for token in [*tokenizer.encode("<|channel|>final<|message|>A", special=True), *half]]
    assert "".join(pieces) == "A"
    assert reader.finish() == "\ufffd"


def test_channels_without_their_mark(tokenizer):
    """As of a model that glues the words of a header."""
    reader, text = read(
        tokenizer, "<|start|>assistantanalysis<|message|>Hm.<|end|><|start|>assistant final<|message|>Hi.<|return|>"
    )
    assert (text, reader.reasoning, reader.ended) == ("Hi.", "Hm.", False)


@pytest.mark.parametrize(
    "author", ["user", "user:ann", "system", "developer", "functions.f", "functions.f to=assistant", "USER"]
)
def test_the_word_of_another_ends_the_turn(tokenizer, author):
    turn = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>A<|end|>"
    more = "<|start|>assistant to=functions.g<|channel|>commentary<|message|>{}<|call|>"
    reader, text = read(tokenizer, f"{turn}<|start|>{author}<|message|>And now?<|end|>{turn}{more}")
    assert (text, reader.reasoning, reader.tool_calls) == ("A", "Hm.", ())
    assert reader.ended
    assert not read(tokenizer, turn)[0].ended


def test_the_word_of_another_ends_generation(tokenizer):
    ids = tokenizer.encode("<|channel|>final<|message|>A<|end|><|start|>user<|message|>And B?<|end|>", special=True)
    request = Request((1,), 100, SamplingParams(seed=0), Harmony().stop_ids(tokenizer))
    reader = HarmonyReader(tokenizer)
    output = Output(request, max_length=200, detokenizer=reader)
    chunks = []
    for token in ids:
        chunks += chat_chunks([output.push(Token(0, token, 0.0, ()))], reader)
        if chunks[-1].completion is not None:
            break
    turn = chunks[-1].completion
    assert (turn.text, turn.finish_reason) == ("A", "stop")
    assert len(chunks) < len(ids)


def test_where_the_answer_comes_from(tokenizer):
    reader = HarmonyReader(tokenizer)
    phases = []
    for token in tokenizer.encode(
        "<|channel|>commentary<|message|>Now<|end|><|start|>assistant<|channel|>final<|message|>Here<|end|>",
        special=True,
    ):
        if reader.push(token):
            phases.append(reader.phase)
    assert list(dict.fromkeys(phases)) == ["commentary", "final_answer"]


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


def test_a_word_glued_to_the_channel_shows_no_reasoning(tokenizer):
    reader, text = read(
        tokenizer, "<|channel|>analysisjson<|message|>Hm.<|end|><|channel|>commentary?<|message|>A<|end|>"
    )
    assert (text, reader.reasoning) == ("A", "Hm.")


def test_text_without_channels_is_the_answer(tokenizer):
    assert read(tokenizer, "Just this.")[1] == "Just this."


def test_an_empty_turn_is_a_message_to_go_on_with(tokenizer):
    message = completed().message
    assert message == {"role": "assistant", "content": ""}
    harmony.render([*ASK, message, *ASK], tokenizer)


def test_an_answer_of_reasoning_only_comes_back_without_it(tokenizer):
    """Clients drop what they do not know, and some the nulls."""
    message = completed(reasoning="Hm.").message
    assert message == {"role": "assistant", "content": None, "reasoning_content": "Hm."}
    for sent in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        assert harmony.render([*ASK, sent, *ASK], tokenizer) == harmony.render([*ASK, *ASK], tokenizer)


OFFERED = [{"type": "function", "function": {"name": "f"}}, {"type": "python"}]
READERS = [
    (HarmonyReader, {"offered": offered_names(OFFERED)}),
    (harmony.StreamParser, {"names": offered_names(OFFERED)}),
]


@pytest.mark.fuzz
def test_any_turn_can_be_gone_on_with(tokenizer):
    pick = random.Random(3)
    marks = list(tokenizer.special_ids.values())
    heads = [
        tokenizer.encode(text, special=True)
        for text in (
            "<|channel|>analysis<|message|>",
            "<|channel|>final<|message|>",
            "<|channel|>commentary to=functions.f <|constrain|>json<|message|>",
            "<|start|>assistant to=python<|channel|>analysis code<|message|>",
            "<|start|>user<|message|>",
            " to=",
            "functions.",
            "f",
            "{}",
        )
    ]
    for _ in range(rounds(1000)):
        ids: list[int] = []
        for _ in range(pick.randint(0, 8)):
            ids += pick.choice([pick.choice(heads), [pick.choice(marks)], [pick.randrange(8300)]])
        reader, parser = (each(tokenizer, **names) for each, names in READERS)
        text, parts = "", []
        for token in ids:
            text += reader.push(token)
            parts += reader.take_calls()
            parser.push(token)
        text += reader.finish()
        parser.finish()
        # What is a call, by the whole messages.
        mine = itertools.takewhile(lambda message: message.role == "assistant", parser.messages)
        calls = [(name, message.content) for message in mine if (name := reader._tool(message.recipient)) is not None]
        assert called(reader) == [(name, written if written.strip() else "{}") for name, written in calls]
        found = [(each.id, each.name, each.arguments) for each in reader.tool_calls]
        assert assembled([*parts, *reader.take_calls()]) == found
        message = completed(text, reader.reasoning, reader.tool_calls).message
        results = [{"role": "tool", "tool_call_id": found.id, "content": "1"} for found in reader.tool_calls]
        assert harmony.render([*ASK, message, *results, *ASK], tokenizer, OFFERED)
