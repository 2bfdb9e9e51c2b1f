"""What a model may write as a turn, and what is read of it."""

import itertools
import random
import re

import pytest

from gptjax.chat import ChatCompletion, chat_chunks
from gptjax.engine.output import Completion, Output, Timings, Usage
from gptjax.engine.request import Request, SamplingParams, Token
from gptjax.text import harmony
from gptjax.text.chat_formats import ToolCall
from gptjax.text.chat_formats.harmony import Harmony, HarmonyReader, offered_names
from tests.fuzz import rounds
from tests.text.harmony_material import TALES, USER, assembled, call

ASK = [USER]


@pytest.fixture
def tokenizer():
    return TALES


def read(tokenizer, text: str, *offered: str) -> tuple[HarmonyReader, str]:
    """A reader that has read a text with special tokens written out, and the answer."""
    reader = HarmonyReader(tokenizer, offered=frozenset(offered))
    return reader, "".join(map(reader.push, tokenizer.encode(text, special=True))) + reader.finish()


def completed(text: str = "", reasoning: str = "", calls: tuple[ToolCall, ...] = ()) -> ChatCompletion:
    whole = Completion(text, (), (), (), "stop", None, 0, Usage(1, 1), Timings(0, 0))
    return ChatCompletion(text, reasoning, calls, "stop", whole)


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


def called(reader: HarmonyReader) -> list[tuple[str, str]]:
    """The calls, after a look at their ids."""
    for found in reader.tool_calls:
        assert re.fullmatch("call_[0-9a-f]{24}", found.id)
    return [(found.name, found.arguments) for found in reader.tool_calls]


def test_tool_calls_come_back_as_they_are_rendered(tokenizer):
    message = {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "Hm.",
        "tool_calls": [call("weather", '{"city": "Paris"}', "call_2"), call("time", "{}", "call_3")],
    }
    before = [*ASK, {"role": "assistant", "tool_calls": [call("a"), call("b", call_id="2")]}]
    ids = harmony.render_messages(harmony.conversation([*before, message]), tokenizer, completion=False)
    reader = HarmonyReader(tokenizer)
    text = "".join(map(reader.push, ids[len(harmony.render(before, tokenizer)) :])) + reader.finish()
    assert (text, reader.reasoning) == ("I look.", "Hm.")
    assert called(reader) == [("weather", '{"city": "Paris"}'), ("time", "{}")]
    again = completed(text, reader.reasoning, reader.tool_calls).message
    for found, sent in zip(again["tool_calls"], message["tool_calls"], strict=True):
        assert {**found, "id": sent["id"]} == sent
    result = {"role": "tool", "tool_call_id": again["tool_calls"][1]["id"], "content": "noon"}
    assert harmony.render([*before, again, result], tokenizer)[: len(ids)] == ids


def test_ids_of_calls_are_like_no_others(tokenizer):
    """A client may trim its history, ask for several choices, and join conversations."""
    call_of_f = "<|channel|>commentary to=functions.f<|message|>{}<|call|>"
    readers = [read(tokenizer, call_of_f * 2)[0] for _ in range(100)]
    ids = [found.id for reader in readers for found in reader.tool_calls]
    assert len(set(ids)) == 200
    assert ids == [found.id for reader in readers for found in reader.tool_calls]


BASH = '{"cmd":"ls"}'


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.bash<|channel|>commentary<|message|>",  # vllm#31677
        "<|channel|>commentary to=functions.bash<|channel|>analysis<|message|>",
        "<|channel|>commentary to=functions.bash <|constrain|>json<|channel|>commentary<|message|>",
        "<|channel|>commentary to=assistant<|channel|>commentary to=functions.bash<|message|>",
        "<|channel|>commentary to=functions.bash<|message|><|channel|>commentary<|message|>",
        " to=functions.bash<|start|>assistant<|channel|>commentary<|message|>",
        "<|start|>assistant to=functions.bash<|start|>assistant<|channel|>commentary <|constrain|>json<|message|>",
        "<|channel|><|start|>assistant to=functions.bash<|channel|><|channel|>commentary<|message|>",
        "assistant to=functions.bash<|channel|>commentary<|message|>",
        "<|start|>assistantto=functions.bash<|channel|>commentary<|message|>",
        "<|start|>to=functions.bash<|channel|>commentary<|message|>",
        "<|channel|>commentaryto=functions.bash<|message|>",
        "<|channel|>commentary to= functions.bash<|message|>",
        "<|channel|>commentary to = functions.bash<|constrain|>json<|message|>",
        "<|channel|>commentary to=<|constrain|>functions.bash<|message|>",
        "<|channel|>commentary to=<|channel|>functions.bash<|message|>",
        "<|channel|>commentary to=functions.<|constrain|>bash<|message|>",
        "<|channel|>commentary TO=Functions.bash<|message|>",
        '<|channel|>commentary? to="functions.bash"<|message|>',
        "<|channel|>commentary to=functions.bash?<|message|>",
        "<|channel|>commentary <|constrain|>json to=functions.bash<|message|>",
        "<|constrain|>json to=functions.bash<|channel|>commentary<|message|>",
        "<|channel|>commentary functions.bash <|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.bash <|constrain|>json<|message|><|message|>",
        "<|channel|>commentary to=functions.bashjson<|message|>",
        "<|channel|>commentary to=bash <|constrain|>json<|message|>",
        "<|channel|>analysis to=bash code<|message|>",
        "<|channel|>final to=functions.bash<|message|>",
        "<|message|><|channel|>commentary to=functions.bash<|message|>",
        # Without <|message|>.
        "<|channel|>commentary to=functions.bash",
        "<|channel|>commentary to=functions.bash ",
        "<|channel|>commentary to=functions.bash json",
        "<|channel|>commentary to=functions.bash <|constrain|>json",
        " to=functions.bash<|channel|>commentary <|constrain|>json ",
    ],
)
@pytest.mark.parametrize("end", ["<|call|>", "<|end|>", ""])
def test_a_recipient_is_found_wherever_a_header_has_it(tokenizer, header, end):
    reader, text = read(tokenizer, header + BASH + end, "bash")
    assert (called(reader), text, reader.reasoning) == ([("bash", BASH)], "", "")


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary s<|message|>",
        "<|channel|>commentary s json<|message|>",
        "<|channel|>commentary json s<|message|>",
        "<|channel|>commentary s <|constrain|>json<|message|>",
        "<|channel|>final s<|message|>",
        " s<|channel|>commentary<|message|>",
        "<|start|>assistant s<|channel|>commentary json<|message|>",
        "<|channel|>commentary s<|channel|>commentary<|message|>",
        "<|channel|>commentary s<|start|>assistant<|channel|>commentary<|message|>",
        "<|channel|>commentary to=all s<|message|>",
        "<|channel|> s<|message|>",
    ],
)
def test_a_lone_word_is_a_recipient_if_it_was_offered(tokenizer, header):
    """openai-harmony takes it for one in any case."""
    reader, text = read(tokenizer, header + BASH + "<|call|>", "s")
    assert (called(reader), text, reader.reasoning) == ([("s", BASH)], "", "")
    reader, text = read(tokenizer, header.replace(" s", "") + BASH + "<|call|>", "s")
    assert (called(reader), text) == ([], BASH)


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary functions.s<|channel|>commentary<|message|>",
        "<|channel|>commentary functions.s json<|start|>assistant<|channel|>commentary<|message|>",
        "<|channel|>commentary 大 to=functions.s<|channel|>commentary<|message|>",
        "<|channel|>commentary 大 to=functions.s <|constrain|>json<|start|>assistant<|channel|>commentary<|message|>",
        "<|channel|>functions.s<|message|>",
        "<|channel|> functions.s<|channel|>final<|message|>",
        "<|channel|>commentary functions.s ",
        "<|channel|>commentary to=assistant functions.s<|message|>",
        "<|channel|>commentary to=functions.scommentary<|message|>",
        "<|channel|>commentary to=scode<|message|>",
        "<|start|>assistantcommentary to=functions.s<|message|>",
    ],
)
def test_a_recipient_without_its_mark_or_beside_another_is_found(tokenizer, header):
    reader, text = read(tokenizer, header + BASH + "<|call|>", "s")
    assert (called(reader), text, reader.reasoning) == ([("s", BASH)], "", "")


@pytest.mark.parametrize(("end", "names"), [("<|call|>", ["s"]), ("<|return|>", []), ("<|end|>", [])])
def test_a_header_that_ends_as_a_call_is_one_without_arguments(tokenizer, end, names):
    """The engine keeps the token that ends a turn from its reader."""
    reader, text = read(tokenizer, "<|channel|>commentary to=functions.s <|constrain|>json", "s")
    reader.ended_by(tokenizer.special_ids[end])
    assert (text, called(reader)) == ("", [(name, "{}") for name in names])


def test_channels_without_their_mark(tokenizer):
    """As of a model that glues the words of a header."""
    reader, text = read(
        tokenizer, "<|start|>assistantanalysis<|message|>Hm.<|end|><|start|>assistant final<|message|>Hi.<|return|>"
    )
    assert (text, reader.reasoning, reader.ended) == ("Hi.", "Hm.", False)


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("s", "s"),
        ("<|channel|>final functions.s is one", "functions.s is one"),
        ("<|channel|>final<|message|>s", "s"),
        ("<|channel|>final s is a tool<|return|>", "s is a tool"),
    ],
)
def test_an_answer_that_begins_with_a_tools_name_is_text(tokenizer, written, text):
    reader, said = read(tokenizer, written, "s")
    assert (called(reader), said) == ([], text)


@pytest.mark.parametrize("channel", ["analysis", "commentary", "final"])
@pytest.mark.parametrize(
    ("recipient", "offered", "name"),
    [
        ("functions.f", [], "f"),  # a client knows what to say of a name that it did not offer
        ("functions.f", ["g"], "f"),
        ("functions.user", [], "user"),
        ("functions.python", [], "python"),
        ("f", ["f"], "f"),
        ("math.sum", ["math.sum"], "math.sum"),
        ("python", ["python"], "python"),
        ("browser.search", ["browser.search"], "browser.search"),
        ("f", [], None),
        ("f", ["g"], None),
        ("user", ["user"], None),
        ("assistant", ["assistant"], None),
        ("all", ["all"], None),
        ("final", ["final"], None),
        ("python", ["f"], None),
        ("browser.search", ["python"], None),
        ("container.exec", ["python", "browser.search"], None),
        ("functions", ["f"], None),
    ],
)
def test_what_is_a_call(tokenizer, channel, recipient, offered, name):
    reader, text = read(tokenizer, f"<|channel|>{channel} to={recipient}<|message|>Hello.<|return|>", *offered)
    said = ("", "") if name else ("", "Hello.") if channel == "analysis" else ("Hello.", "")
    assert (called(reader), (text, reader.reasoning)) == ([(name, "Hello.")] if name else [], said)


def test_the_names_of_offered_tools():
    tools = [{"type": "function", "function": {"name": "f"}}, {"type": "python"}, {"type": "browser"}]
    assert offered_names(tools) == {"f", "python", "browser.search", "browser.open", "browser.find"}
    assert offered_names(tools[:1]) == {"f"}
    assert offered_names(None) == offered_names(()) == frozenset()


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_a_call_without_text_has_no_arguments(tokenizer, text):
    reader, _ = read(tokenizer, f"<|channel|>commentary to=functions.f<|message|>{text}<|call|>")
    assert called(reader) == [("f", "{}")]


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


def test_built_in_tools_keep_their_names(tokenizer):
    reader, text = read(tokenizer, "<|channel|>analysis to=python code<|message|>1 + 1<|call|>", "python")
    assert called(reader) == [("python", "1 + 1")]
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
    reader = HarmonyReader(tokenizer)
    assert "".join(map(reader.push, ids)) == ""
    assert reader.tool_calls == ()
    reader.finish()
    assert called(reader) == [("f", '{"a": ')]


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


def test_arguments_come_as_they_are_written(tokenizer):
    head = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
    between = "<|call|><|start|>assistant"
    reader = HarmonyReader(tokenizer, offered=frozenset("fg"))
    seen = []
    for token in tokenizer.encode(f'{head} {{"a": "b c d"}}{between}{head}  {between}', special=True):
        reader.push(token)
        seen.append(reader.take_calls())
    seen = [parts for parts in seen if parts]
    assert all(len(parts) == 1 for parts in seen)
    assert assembled(part for (part,) in seen) == [(each.id, "f", each.arguments) for each in reader.tool_calls]
    assert [each.arguments for each in reader.tool_calls] == [' {"a": "b c d"}', "{}"]
    assert sum(bool(part.arguments) for (part,) in seen) > 6  # token by token


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
