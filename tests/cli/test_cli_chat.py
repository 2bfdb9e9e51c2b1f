"""`gptjax chat`: what a line does, with a model that says what it is told."""

import json
import re

import pytest

from gptjax.cli.chat_session import COMMANDS, Piece
from gptjax.errors import CapacityError, GptjaxError, RequestError
from tests.cli.chat_material import CTRL_C, NOT_FINITE, SAID, TALES, THOUGHT, say, session, texts

# A turn


def test_a_turn_shows_reasoning_answer_and_figures():
    talk = session(THOUGHT + SAID)
    reasoning, answer, figures = texts(talk.handle("What then?"))
    assert reasoning == ("reasoning", "Let me see.")
    assert answer == ("answer", "It was night.")
    assert re.fullmatch(r"context \d+ of 1000 tokens, \d+ tokens/s", figures[1])
    assert figures[0] == "aside"
    assert talk.messages == [
        {"role": "user", "content": "What then?"},
        {"role": "assistant", "content": "It was night.", "reasoning_content": "Let me see."},
    ]


def test_the_next_turn_has_all_before_it():
    talk = session(SAID, SAID, system="Be brief.", effort="low", options={"seed": 3})
    list(talk.handle("One"))
    list(talk.handle("//two"))
    model = talk._lm
    assert [message["content"] for message in model.asked[1]] == ["Be brief.", "One", "It was night.", "/two"]
    assert (model.effort, model.options) == ("low", {"seed": 3})


def test_hidden_reasoning_is_one_line_and_can_be_looked_at():
    talk = session(THOUGHT + SAID, THOUGHT + SAID, THOUGHT, show_reasoning=False)
    kinds = texts(talk.handle("What then?"))
    count = len(TALES.encode("Let me see."))
    assert kinds[:3] == [
        ("thinking", "thinking..."),
        ("aside", f"thought for {count} tokens (/reasoning shows them)"),
        ("answer", "It was night."),
    ]
    assert say(talk, "/reasoning") == "Let me see."
    assert say(talk, "/reasoning show") == "Reasoning is shown."
    assert texts(talk.handle("Again"))[0] == ("reasoning", "Let me see.")


@pytest.mark.parametrize("line", ["", "   ", "\n"])
def test_an_empty_line_is_nothing(line):
    assert list(session().handle(line)) == []


def test_a_turn_that_is_cut_says_why():
    talk = session(THOUGHT + SAID, SAID, options={"max_tokens": 8})
    assert ("note", "Cut off before the answer: --max-tokens was reached.") in texts(talk.handle("A"))
    assert ("note", "Cut off: --max-tokens was reached.") in texts(talk.handle("A"))
    assert [message["content"] for message in talk.messages] == ["A", None, "A", talk.last.text]
    talk = session("<|channel|>final<|message|>" + "It was night. " * 100, max_length=200)
    pieces = texts(talk.handle("A"))
    assert pieces[-2] == ("note", "Cut off: the context is full (/reset, --max-length).")
    assert pieces[-1][1].startswith("context 200 of 200 tokens")
    with pytest.raises(CapacityError, match=r"has \d+ tokens, but there is room for 200: .*/reset.*--max-length"):
        list(talk.handle("And then?"))
    assert len(talk.messages) == 2
    say(talk, "/reset")
    assert talk.messages == []
    with pytest.raises(CapacityError, match="shorten the message"):
        list(talk.handle("long " * 300))


def test_a_turn_without_an_answer_says_so():
    talk = session("<|return|>", SAID)
    assert texts(talk.handle("A"))[0] == ("note", "The model ended its turn without an answer.")
    assert texts(talk.handle("B"))[0] == ("answer", "It was night.")


def test_a_tool_call_is_shown_and_the_conversation_goes_on():
    talk = session('<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>', SAID)
    [note, _] = texts(talk.handle("A"))
    assert note == ("note", 'The model called f with {"a": 1}; gptjax chat does not run tools.')
    assert talk.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert texts(talk.handle("B"))[0] == ("answer", "It was night.")


@pytest.mark.parametrize("script", [CapacityError("out of memory"), "<|channel|>final<|message|>It" + NOT_FINITE])
def test_an_error_leaves_the_conversation_as_it_was(script):
    talk = session(SAID, script, SAID)
    list(talk.handle("A"))
    before = list(talk.messages)
    with pytest.raises(GptjaxError, match=r"out of memory|not finite"):
        list(talk.handle("B"))
    assert talk.messages == before
    assert texts(talk.handle("B"))[0] == ("answer", "It was night.")


def test_control_c_keeps_what_was_said():
    talk = session(THOUGHT + "<|channel|>final<|message|>It was" + CTRL_C + " night.", SAID)
    pieces = texts(talk.handle("A"))
    assert pieces[-1] == ("note", "Stopped; the partial answer stays.")
    assert talk.messages[1] == {"role": "assistant", "content": "It was", "reasoning_content": "Let me see."}
    assert "tokens" in say(talk, "/stats")
    assert texts(talk.handle("B"))[0] == ("answer", "It was night.")


def test_control_c_before_the_answer_takes_the_message_back():
    talk = session(THOUGHT + CTRL_C + SAID, CTRL_C)
    for line in ("A", "B"):
        assert texts(talk.handle(line))[-1] == ("note", "Stopped; your message was dropped.")
        assert talk.messages == []


def test_control_c_while_a_piece_is_shown():
    talk = session(SAID)
    pieces = talk.handle("A")
    assert next(pieces) == Piece("answer", "It")
    assert pieces.throw(KeyboardInterrupt).kind == "note"
    assert list(pieces) == []
    assert talk.messages[1]["content"] == "It"


# Commands


def test_effort_and_system_count_from_the_next_turn():
    talk = session(SAID)
    assert say(talk, "/effort") == "The effort is medium."
    assert say(talk, "/effort high") == "The effort is high."
    assert say(talk, "/system") == "There are no instructions."
    assert say(talk, "/system Be brief.") == "The instructions are: Be brief."
    list(talk.handle("A"))
    assert talk._lm.effort == "high"
    assert talk._lm.asked[0][0] == {"role": "system", "content": "Be brief."}
    assert say(talk, "/system -") == "There are no instructions."


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/efort low", "did you mean /effort?"),
        ("/xyz", "/help lists all"),
        ("/effort utmost", "low, medium, high"),
        ("/reasoning maybe", "takes show, hide, or nothing"),
        ("/raw some", "takes all"),
        ("/reasoning", "no turn yet"),
        ("/raw", "no turn yet"),
        ("/stats", "no turn yet"),
        ("/save", "name a file"),
        ("/save talk.json", "nothing to save"),
    ],
)
def test_a_wrong_command_says_what_is_right(line, says):
    with pytest.raises(RequestError, match=re.escape(says)):
        list(session().handle(line))


def test_raw_shows_special_tokens():
    talk = session(THOUGHT + SAID)
    list(talk.handle("A <|end|>"))
    raw = say(talk, "/raw")
    assert raw.endswith(f"<|start|>user<|message|>A <|end|><|end|><|start|>assistant{THOUGHT}{SAID}")
    assert re.match(r"\(\d+ tokens before; /raw all shows them\)\n", raw)
    assert say(talk, "/raw all").startswith("<|start|>system<|message|>You are ChatGPT")


def test_stats_tell_tokens_and_speed():
    talk = session(THOUGHT + SAID)
    list(talk.handle("A"))
    stats = say(talk, "/stats")
    count = len(TALES.encode(THOUGHT + SAID, special=True))
    assert f"output   {count} tokens, {len(TALES.encode('Let me see.'))} of them reasoning" in stats
    assert re.search(r"context  \d+ of 1000 tokens \(\d+%\)", stats)
    assert "tokens/s" in stats


def test_save_writes_a_request_and_never_over_a_file(tmp_path):
    talk = session(SAID, SAID, system="Be brief.")
    list(talk.handle("Ein Märchen"))
    file = tmp_path / "a talk.json"
    assert say(talk, f"/save {file}") == f"Wrote 3 messages to {file}."
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert saved == {"model": "tales", "reasoning_effort": "medium", "messages": talk.conversation}
    assert "Märchen" in file.read_text(encoding="utf-8")
    list(talk.handle("And then?"))
    for name, says in (
        (file, "already exists and was not overwritten"),
        (tmp_path / "none" / "x", "No such file"),
        ("\0", "null"),
    ):
        with pytest.raises(RequestError, match=says):
            list(talk.handle(f"/save {name}"))
    assert json.loads(file.read_text(encoding="utf-8")) == saved


def test_help_lists_all_commands_and_quit_ends():
    talk = session()
    assert all(f"/{name}" in say(talk, "/help") for name in COMMANDS)
    assert not talk.over
    assert list(talk.handle("/quit")) == []
    assert talk.over
