"""Which tool a turn calls: wherever a header has the recipient, with or without its marks."""

import pytest

from gptjax.text import harmony
from gptjax.text.chat_formats.harmony import HarmonyReader, offered_names
from tests.text.harmony_material import TALES, USER, assembled, call, called, completed, read


@pytest.fixture
def tokenizer():
    return TALES


def test_tool_calls_come_back_as_they_are_rendered(tokenizer):
    message = {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "Hm.",
        "tool_calls": [call("weather", '{"city": "Paris"}', "call_2"), call("time", "{}", "call_3")],
    }
    before = [USER, {"role": "assistant", "tool_calls": [call("a"), call("b", call_id="2")]}]
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


def test_built_in_tools_keep_their_names(tokenizer):
    reader, text = read(tokenizer, "<|channel|>analysis to=python code<|message|>1 + 1<|call|>", "python")
    assert called(reader) == [("python", "1 + 1")]
    assert (text, reader.reasoning) == ("", "")


def test_a_call_that_was_cut_is_there_at_the_end(tokenizer):
    ids = tokenizer.encode('<|channel|>commentary to=functions.f<|message|>{"a": ', special=True)
    reader = HarmonyReader(tokenizer)
    assert "".join(map(reader.push, ids)) == ""
    assert reader.tool_calls == ()
    reader.finish()
    assert called(reader) == [("f", '{"a": ')]


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
