"""`gptjax chat` as a program: its arguments and its streams."""

import io
import json
import re
import sys
from collections.abc import Callable

import pytest

from gptjax.cli import main
from tests.cli.chat_material import CTRL_C, SAID, THOUGHT, Scripted, Tty

# The program


@pytest.fixture
def scripted(monkeypatch) -> Callable[..., Scripted]:
    def give(*scripts: str) -> Scripted:
        model = Scripted(*scripts)
        monkeypatch.setattr(
            "gptjax.api.load_checkpoint", lambda checkpoint, **settings: setattr(model, "settings", settings) or model
        )
        return model

    return give


def test_a_message_is_answered_and_nothing_else(capsys, scripted):
    scripted(THOUGHT + SAID)
    assert main(["chat", "What then?"]) == 0
    assert capsys.readouterr() == ("It was night.\n", "")


@pytest.mark.parametrize("argv", [["chat"], ["chat", "-"]])
def test_standard_input_is_one_message(capsys, scripted, monkeypatch, argv):
    model = scripted(SAID)
    monkeypatch.setattr(sys, "stdin", io.StringIO("One line.\nAnother.\n"))
    assert (
        main([*argv, "--system", "S", "--effort", "high", "-n", "5", "-t", "0.5", "--top-k", "4", "--seed", "1"]) == 0
    )
    assert [message["content"] for message in model.asked[0]] == ["S", "One line.\nAnother."]
    assert model.options == {"temperature": 0.5, "top_k": 4, "seed": 1}
    assert model.effort == "high"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_standard_input_that_is_no_text(capsys, monkeypatch, errors):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"A\xff"), "utf-8", errors))
    assert main(["chat"]) == 1
    assert "standard input is not UTF-8" in capsys.readouterr().err


def test_json_is_the_whole_result(capsys, scripted):
    scripted('<|channel|>commentary to=functions.f<|message|>{"a": 1}<|call|>')
    assert main(["chat", "What then?", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["model"] == "gpt-oss-tales"
    assert result["messages"][0] == {"role": "user", "content": "What then?"}
    (call,) = result["tool_calls"]
    assert call == {"id": call["id"], "name": "f", "arguments": '{"a": 1}'}
    assert re.fullmatch("call_[0-9a-f]{24}", call["id"])
    assert (result["text"], result["reasoning"], result["finish_reason"]) == ("", "", "tool_calls")
    assert result["completion"]["usage"]["prompt_tokens"] > 50
    assert "does not run tools" in err


def test_control_c_in_a_single_turn_is_130(capsys, scripted):
    scripted("<|channel|>final<|message|>It was" + CTRL_C)
    assert main(["chat", "A"]) == 130
    assert capsys.readouterr() == ("It was\n", "\n")


@pytest.mark.parametrize(
    ("argv", "environment", "length"), [([], None, 8192), (["--max-length", "9"], None, 9), ([], "7", 7)]
)
def test_the_length_is_bounded_unless_it_is_given(scripted, monkeypatch, argv, environment, length):
    if environment is not None:
        monkeypatch.setenv("GPTJAX_MAX_LENGTH", environment)
    model = scripted(SAID)
    assert main(["chat", "A", *argv]) == 0
    others = dict.fromkeys(("dtype", "cache_dtype", "mesh", "packed", "tokenizer", "chat_format"))
    assert model.settings == {"max_length": length, "exact": False, **others}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["chat", ""], "the message is empty"),
        (["chat", "A", "-m", "/no/such/place"], "/no/such/place"),
        (["chat", "A", "--max-length", "0"], "--max-length must be a whole number"),
        (["chat", "A", "--max-length", "5"], "shorten the message, or start with a larger --max-length"),
        (["chat", "A", "--chat-format", "alpaca"], "unknown chat format 'alpaca'; choose one of harmony, chatml, "),
        (["chat", "A", "--chat-format", "chatml"], "lacks special tokens of the chat format chatml: <|im_start|>"),
        (["chat", "A", "--no-thinking"], "--no-thinking has no meaning in the chat format harmony"),
        (["chat", "A", "-m", "gpt2-tales"], 'gptjax generate "Once upon a time" -m gpt2-tales'),
    ],
)
def test_what_is_wrong_is_one_message_and_status_1(capsys, argv, says):
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("gptjax: ")) == ("", 1)
    assert says in err


def test_the_format_is_the_given_one(scripted):
    model = scripted(SAID)
    assert main(["chat", "A", "--chat-format", "harmony"]) == 0
    assert model.settings["chat_format"] == "harmony"


def test_json_needs_a_message(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Tty())
    assert main(["chat", "--json"]) == 1
    assert "--json needs a message" in capsys.readouterr().err


def test_an_unknown_effort_is_wrong_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["chat", "A", "--effort", "utmost"])
