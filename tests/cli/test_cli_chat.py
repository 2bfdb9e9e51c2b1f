"""`gptjax chat`: what a line does (with a model that says what it is told), the terminal, and the whole program."""

import contextlib
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptjax.chat import ChatChunk, TurnReader, chat_chunks, prompt, stop_ids
from gptjax.cli import chat, main
from gptjax.cli.chat_session import COMMANDS, Piece, Session
from gptjax.engine.engine import Token
from gptjax.engine.output import Chunk, Output
from gptjax.engine.request import Request, SamplingParams
from gptjax.errors import CapacityError, GptjaxError, RequestError
from gptjax.text import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TALES = load_tokenizer(ROOT / "gptjax" / "demo" / "gpt-oss-tales")
CTRL_C, NOT_FINITE = "\x03", "\x15"  # in a script: what happens there
THOUGHT = "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant"
SAID = "<|channel|>final<|message|>It was night.<|return|>"


class Scripted:
    """Stands in for a `LanguageModel`: its turns are scripts, and go through the engine's output and the reader."""

    tokenizer = TALES
    config = SimpleNamespace(context_length=131072)

    def __init__(self, *scripts: str | GptjaxError, max_length: int = 1000) -> None:
        self.max_length = max_length
        self.scripts = list(scripts)
        self.asked: list[list[dict]] = []

    def stream_chat(self, messages, *, reasoning_effort, current_date, max_tokens, **options) -> Iterator[ChatChunk]:
        self.asked.append(messages)
        self.effort, self.options = reasoning_effort, options
        script = self.scripts.pop(0)
        if isinstance(script, GptjaxError):
            raise script
        ids = prompt(messages, TALES, tools=(), reasoning_effort=reasoning_effort, current_date=current_date)
        request = Request(tuple(ids), max_tokens, SamplingParams(seed=0), stop_ids(TALES))
        reader = TurnReader(TALES)
        output = Output(request, max_length=self.max_length, detokenizer=reader)
        return chat_chunks(self._chunks(output, script), reader)

    def _chunks(self, output: Output, script: str) -> Iterator[Chunk]:
        for token in self._tokens(script):
            chunk = output.push(token)
            yield chunk
            if chunk.completion is not None:
                return
        raise AssertionError("the script does not end")

    def _tokens(self, script: str) -> Iterator[Token]:
        for part in re.split(f"([{CTRL_C}{NOT_FINITE}])", script):
            if part == CTRL_C:
                raise KeyboardInterrupt
            for token in [-1] if part == NOT_FINITE else TALES.encode(part, special=True):
                yield Token(0, token, 0.0, ())


def session(*scripts: str | GptjaxError, max_length: int = 1000, **settings) -> Session:
    return Session(Scripted(*scripts, max_length=max_length), "tales", **settings)  # type: ignore[arg-type]


def texts(pieces: Iterator[Piece]) -> list[tuple[str, str]]:
    """The kinds and texts, with the parts of one text joined."""
    found: list[tuple[str, str]] = []
    for piece in pieces:
        if found and found[-1][0] == piece.kind in ("answer", "reasoning"):
            found[-1] = (piece.kind, found[-1][1] + piece.text)
        else:
            found.append((piece.kind, piece.text))
    return found


def say(talk: Session, line: str) -> str:
    """What a command answers."""
    [(kind, text)] = texts(talk.handle(line))
    assert kind == "note"
    return text


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


# The terminal


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


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
    chat._talk(talk, chat.Terminal(sys.stdout))
    assert list(typed) == []
    return capsys.readouterr()


def test_errors_are_told_and_the_chat_goes_on(monkeypatch, capsys):
    talk = session(CapacityError("no room"), "<|channel|>final<|message|>It was" + CTRL_C, SAID)
    out, err = talk_with(monkeypatch, capsys, talk, "A", "/nonsense", "B", "two \\", "lines", "", EOFError)
    assert err.splitlines()[0] == "gptjax: no room"
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
    ("argv", "environment", "length"), [([], None, 8192), (["--max-length", "9"], None, 9), ([], "7", None)]
)
def test_the_length_is_bounded_unless_it_is_given(scripted, monkeypatch, argv, environment, length):
    if environment is not None:
        monkeypatch.setenv("GPTJAX_MAX_LENGTH", environment)
    model = scripted(SAID)
    assert main(["chat", "A", *argv]) == 0
    assert model.settings == {"dtype": None, "max_length": length, "tokenizer": None}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["chat", ""], "the message is empty"),
        (["chat", "A", "-m", "/no/such/place"], "/no/such/place"),
        (["chat", "A", "--max-length", "0"], "max_length"),
        (["chat", "A", "--max-length", "5"], "shorten the message, or start with a larger --max-length"),
        (["chat", "A", "-m", "gpt2-tales"], 'gptjax generate "Once upon a time" -m gpt2-tales'),
    ],
)
def test_what_is_wrong_is_one_message_and_status_1(capsys, argv, says):
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("gptjax: ")) == ("", 1)
    assert says in err


def test_json_needs_a_message(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Tty())
    assert main(["chat", "--json"]) == 1
    assert "--json needs a message" in capsys.readouterr().err


def test_an_unknown_effort_is_wrong_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["chat", "A", "--effort", "utmost"])


class Typist:
    """The program in a terminal of its own, where Ctrl-C is a key."""

    def __init__(self, *argv: str) -> None:
        self._end, terminal = os.openpty()
        # The session's leader makes the terminal its own. Forking this process, with JAX's threads, is not safe.
        code = (
            "import fcntl, runpy, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            "runpy.run_module('gptjax', run_name='__main__', alter_sys=True)"
        )
        environment = {**os.environ, "TERM": "xterm", "GPTJAX_NO_PROGRESS": "1"}
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *argv],
            **dict.fromkeys(("stdin", "stdout", "stderr"), terminal),
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        os.close(terminal)
        self._seen = b""

    def __enter__(self) -> "Typist":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)

    def until(self, text: str, seconds: float = 120) -> str:
        """What is shown, up to and with a text."""
        end = time.monotonic() + seconds
        while text.encode() not in self._seen:
            assert time.monotonic() < end, f"no {text!r} in {self._seen!r}"
            assert self.process.poll() is None, f"ended: {self._seen!r}"
            if select.select([self._end], [], [], 0.2)[0]:
                self._seen += os.read(self._end, 4096)
        before, found, self._seen = self._seen.partition(text.encode())
        return (before + found).decode()

    def type(self, keys: str) -> None:
        time.sleep(0.2)  # a key in the moment before the line editor waits is seen with the next one
        os.write(self._end, keys.encode())


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where the tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("lost", [True, False])
def test_an_interrupt_ends_the_turn_even_where_its_exception_is_lost(lost, interruptible):
    """As in JAX's callback of the garbage collector, where Python ignores exceptions."""
    told = []

    def pieces() -> Iterator[Piece]:
        try:
            yield Piece("answer", "one")
            with contextlib.suppress(KeyboardInterrupt) if lost else contextlib.nullcontext():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            for word in (" two", " three"):
                yield Piece("answer", word)
        except KeyboardInterrupt:
            told.append(True)
            yield Piece("note", "Stopped.")

    out = io.StringIO()
    chat._show_all(pieces(), chat.Terminal(out))
    assert told == [True]
    assert out.getvalue().splitlines() == ["one", "Stopped."]
    with pytest.raises(KeyboardInterrupt):  # outside of a turn all is as it was
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_the_program_in_a_terminal(interruptible):  # whose children do not ignore Ctrl-C either
    # The most likely tale has no end, so that there is time to stop it.
    with Typist("chat", "--temperature", "0", "--max-length", "4096", "--hide-reasoning") as typist:
        assert "gpt-oss-tales, with room for 4096 tokens" in typist.until("\n> ")
        typist.type("In the morning the old king went down to the sea.\n")
        assert "\x1b[2mthinking...\x1b[0m" in typist.until("thought for")
        typist.type("\x03")
        assert "Stopped; the partial answer stays." in typist.until("\n> ")
        typist.type("/stats\n")
        assert "tokens/s" in typist.until("\n> ")
        typist.type("\x03")
        typist.until("Ctrl-C again")
        typist.until("> ")
        typist.type("/effort low\n")
        typist.until("The effort is low.")
        typist.until("> ")
        typist.type("\x04")
        assert typist.process.wait(30) == 0
