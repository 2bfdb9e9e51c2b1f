"""`gptjax chat` at a terminal: colours, control characters, and what is typed."""

import argparse
import io
import sys
from types import SimpleNamespace

import pytest

from gptjax.cli import chat
from gptjax.cli.chat_session import Session
from gptjax.errors import CapacityError, RequestError
from tests.cli.chat_material import CTRL_C, SAID, Tty, session


@pytest.fixture
def colours(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def shown(out: io.StringIO, *pieces: tuple[str, str]) -> str:
    terminal = chat.Terminal(out)
    for piece in pieces:
        terminal.show(*piece)
    terminal.end_line()
    return out.getvalue()


TURN = [
    ("reasoning", "Let"),
    ("reasoning", " me."),
    ("answer", "It"),
    ("answer", " was."),
    ("aside", "done"),
    ("note", ""),
]


def test_reasoning_is_dimmed_on_a_terminal_only(colours, monkeypatch):
    dimmed = "\x1b[2mLet\x1b[0m\x1b[2m me.\x1b[0m\n\nIt was.\n\x1b[2mdone\x1b[0m\n\n"
    plain = "(thinking) Let me.\n\nIt was.\ndone\n\n"
    assert shown(Tty(), *TURN) == dimmed
    assert shown(io.StringIO(), *TURN) == plain
    for name, value in (("TERM", "dumb"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
        assert shown(Tty(), *TURN) == plain


def test_thinking_is_shown_for_as_long_as_it_lasts(colours):
    turn = [("thinking", "thinking..."), ("aside", "thought for 3 tokens"), ("answer", "It")]
    expected = "\x1b[2mthinking...\x1b[0m\r\x1b[K\x1b[2mthought for 3 tokens\x1b[0m\nIt\n"
    assert shown(Tty(), *turn) == expected
    assert shown(io.StringIO(), *turn) == "thought for 3 tokens\nIt\n"


@pytest.mark.parametrize("kind", ["answer", "reasoning", "note", "aside"])
def test_no_control_character_of_a_model_reaches_the_terminal(colours, kind):
    evil = "".join(map(chr, [*range(32), *range(127, 160)]))
    out = shown(Tty(), (kind, f"a{evil}b👩‍👧"))
    own = out.replace("\x1b[2m", "", 1).replace("\x1b[0m", "", 1)
    assert {character for character in own if ord(character) < 32 or 127 <= ord(character) < 160} == {"\t", "\n"}
    assert "␛" in out
    assert "👩‍👧" in out


def talk_with(monkeypatch, capsys, talk: Session, *lines: str | type[BaseException]) -> tuple[str, str]:
    """Runs the loop with what is typed; it must end with the last of it."""
    typed = iter(lines)
    drafts = []

    def read(_: str) -> str:
        drafts[:] = [""]
        line = next(typed)
        if isinstance(line, str) and not line.startswith("draft:"):
            return line
        drafts[:] = [line.removeprefix("draft:") if isinstance(line, str) else ""]
        raise KeyboardInterrupt if isinstance(line, str) else line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setitem(sys.modules, "readline", SimpleNamespace(get_line_buffer=lambda: drafts[0]))
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-length")
    chat._talk(talk, chat.Terminal(sys.stdout), parser)
    assert list(typed) == []
    return capsys.readouterr()


def test_errors_are_told_and_the_chat_goes_on(monkeypatch, capsys):
    talk = session(CapacityError("no room: max_length is 9"), "<|channel|>final<|message|>It was" + CTRL_C, SAID)
    out, err = talk_with(monkeypatch, capsys, talk, "A", "/nonsense", "B", "two \\", "lines", "", EOFError)
    assert err.splitlines()[0] == "gptjax: no room: --max-length is 9"
    assert "gptjax: unknown command /nonsense" in err
    assert "It was\nStopped; the partial answer stays.\nIt was night.\n" in out
    assert talk.messages[-2]["content"] == "two \nlines"


@pytest.mark.parametrize("line", ["/reset now", "/quit x", "/stats all"])
def test_a_command_that_takes_nothing_does_nothing_with_more(line):
    talk = session(SAID)
    list(talk.handle("A"))
    with pytest.raises(RequestError, match="takes no argument"):
        list(talk.handle(line))
    assert talk.messages and not talk.over


def test_control_c_while_the_terminal_writes_ends_the_turn():
    class Interrupted(chat.Terminal):
        def show(self, kind: str, text: str) -> None:
            super().show(kind, text)
            if text == " was":
                raise KeyboardInterrupt

    talk, out = session(SAID), io.StringIO()
    chat._show_all(talk.handle("A"), Interrupted(out))
    assert out.getvalue() == "It was\nStopped; the partial answer stays.\n"
    assert talk.messages[1]["content"] == "It was"


def test_control_c_at_the_prompt_twice_ends_the_chat(monkeypatch, capsys):
    hint = "(Ctrl-C again, Ctrl-D or /quit ends the chat)"
    control_c = KeyboardInterrupt
    out, _ = talk_with(
        monkeypatch, capsys, session(), control_c, "/effort", control_c, "draft:ha", control_c, control_c
    )
    assert out.count(hint) == 3
    talk_with(monkeypatch, capsys, session(), "/quit")
