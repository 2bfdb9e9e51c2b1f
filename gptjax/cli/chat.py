"""`gptjax chat`: the terminal side; `chat_session` handles each line."""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, TextIO

from gptjax.cli.common import (
    DEFAULT_CHAT_MODEL,
    EFFORTS,
    add_cache_dtype,
    add_chat_format,
    add_command,
    add_dtype,
    add_hosts,
    add_mesh,
    add_overrides,
    add_packed,
    add_tokenizer,
    followed,
    joined,
    mesh,
    overrides,
    packed,
    read_stdin,
)
from gptjax.cli.wording import in_options
from gptjax.errors import GptjaxError, RequestError
from gptjax.support.quoting import clean

if TYPE_CHECKING:
    from gptjax.chat import ChatCompletion
    from gptjax.cli.chat_session import Piece, Session
    from gptjax.language_model import LanguageModel

DEFAULT_LENGTH: Final = 8192
_DIM, _PLAIN, _ERASE_LINE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"


def add(commands: Any) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "chat",
        run,
        summary="chat with a model that was trained to chat, such as GPT-OSS or SmolLM2",
        epilog="""Given a message, or standard input from a pipe (all of it one message), answers once and exits. Output
to a pipe omits the reasoning. Control characters that the model writes are shown as visible symbols; --json has
everything verbatim. In a chat, /help lists the commands.

examples:
  gptjax chat
  gptjax chat "The old man opened the door, and" --effort low
  gptjax chat -m smollm2
  gptjax chat -m openai/gpt-oss-20b --system "Answer in one sentence."
  gptjax chat --json < question.txt > answer.json""",
    )
    parser.add_argument("message", nargs="?", help="answer this and exit; - or a pipe reads it from standard input")
    parser.add_argument(
        "-m",
        "--model",
        default=DEFAULT_CHAT_MODEL,
        help=f"a demo, a directory, a GGUF file, smollm2 or a Hub id (default: {DEFAULT_CHAT_MODEL})",
    )
    add_dtype(parser)
    add_cache_dtype(parser)
    add_packed(parser)
    add_mesh(parser)
    add_hosts(parser)
    add_tokenizer(parser)
    add_chat_format(parser)
    add_overrides(parser)
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help=f"tokens per conversation (default: $GPTJAX_MAX_LENGTH, else the model's, up to {DEFAULT_LENGTH})",
    )
    parser.add_argument("--effort", choices=EFFORTS, help="how much GPT-OSS thinks (default: medium)")
    parser.add_argument("--no-thinking", action="store_true", help="answer without thinking first (Qwen3)")
    parser.add_argument("--system", metavar="TEXT", help="instructions for the model")
    parser.add_argument("--hide-reasoning", action="store_true", help="show only how long the model thought")
    parser.add_argument(
        "-n", "--max-tokens", type=int, metavar="N", help="tokens per turn, at most (default: as many as fit)"
    )
    parser.add_argument("-t", "--temperature", type=float, metavar="T", help="0 always takes the most likely token")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the smallest set of tokens whose probability reaches P"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="makes a conversation repeatable, on the same date")
    parser.add_argument("--json", action="store_true", help="with a message: print the whole result as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    with joined(args) as follows:
        if follows:
            lm = _load(args)
            return followed(lm.model, lm.params)
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    message = args.message
    if message == "-" or (message is None and not sys.stdin.isatty()):
        message = read_stdin()
    if message is not None and not message.strip():
        raise RequestError('the message is empty; try: gptjax chat "The old man opened the door, and"')
    if message is None and args.json:
        raise RequestError("--json needs a message, as an argument or on standard input")
    lm = _load(args)

    from gptjax.cli.chat_session import Session

    names = ("max_tokens", "temperature", "top_k", "top_p", "seed")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    session = Session(
        lm,
        args.model,
        system=args.system,
        effort=args.effort,
        enable_thinking=False if args.no_thinking else None,
        show_reasoning=not args.hide_reasoning,
        options=options,
    )
    terminal = Terminal(sys.stdout)
    if message is None:
        terminal.show("note", _greeting(lm, args.model))
        _talk(session, terminal, args.parser)
        return 0
    completion = _answer(session, message, None if args.json else terminal)
    if args.json:
        result = {"model": args.model, "messages": session.conversation} | dataclasses.asdict(completion)
        print(json.dumps(result, allow_nan=False))
    return 0


def _load(args: argparse.Namespace) -> "LanguageModel":
    from gptjax.api import load_checkpoint
    from gptjax.checkpoints.checkpoint import open_checkpoint
    from gptjax.engine import limits

    checkpoint = open_checkpoint(args.model, **overrides(args))
    # GPT-OSS has room for 131072 tokens; few conversations are worth a cache of that size.
    length = limits.positions(checkpoint.config, args.max_length, default=DEFAULT_LENGTH)
    lm = load_checkpoint(
        checkpoint,
        dtype=args.dtype,
        cache_dtype=args.cache_dtype,
        max_length=length,
        exact=False,  # a turn should begin soon, and a conversation repeats all the same
        packed=packed(args),
        mesh=mesh(args),
        tokenizer=args.tokenizer,
        chat_format=args.chat_format,
    )
    try:
        _ = lm.chat_format
    except RequestError as error:
        raise RequestError(
            f'{args.model} cannot chat: {error}; to continue a text instead: gptjax generate "Once upon a time" '
            f"-m {args.model}"
        ) from None
    return lm


def _greeting(lm: "LanguageModel", name: str) -> str:
    lines = [
        f"{name}, with room for {lm.max_length} tokens. /help lists commands; Ctrl-C ends a turn, Ctrl-D the chat."
    ]
    if name == DEFAULT_CHAT_MODEL:
        lines.append("This small demo only continues stories: write the beginning of one. -m chooses another model.")
    return "\n".join(lines)


def _answer(session: "Session", message: str, terminal: "Terminal | None") -> "ChatCompletion":
    """A single turn. Notes go to standard error: standard output is for the answer."""
    shown = ("answer", "reasoning", "thinking") if terminal is not None and terminal.is_one else ("answer",)
    completion: ChatCompletion | None = None
    try:
        for piece in session.ask(message):
            completion = session.last.completion if session.last is not None else None
            if piece.kind == "note":
                if completion is None:
                    raise KeyboardInterrupt  # it ended the turn, and must end the program
                if terminal is not None:
                    terminal.end_line()
                print(f"gptjax: {clean(piece.text)}", file=sys.stderr)
            elif terminal is not None and piece.kind in shown:
                terminal.show(piece.kind, piece.text)
    finally:
        if terminal is not None:
            terminal.end_line()
    assert completion is not None  # the last piece comes after it
    return completion


def _talk(session: "Session", terminal: "Terminal", parser: argparse.ArgumentParser) -> None:
    with contextlib.suppress(ImportError):  # absent on Windows; without it, the terminal itself edits lines
        import readline  # noqa: F401
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    warned = False
    while not session.over:
        try:
            line = _read_line()
            warned = False
            _show_all(session.handle(line), terminal)
        except EOFError:
            terminal.show("note", "")
            return
        except KeyboardInterrupt:
            terminal.show("note", "")  # the cursor is after a draft, or ^C
            if warned and not _draft():
                return
            warned = not _draft()
            if warned:
                terminal.show("aside", "(Ctrl-C again, Ctrl-D or /quit ends the chat)")
        except GptjaxError as error:
            terminal.end_line()
            print(f"gptjax: {in_options(str(error), parser)}", file=sys.stderr, flush=True)


def _read_line() -> str:
    line = input("> ")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input(". ")
    return line


def _draft() -> str:
    """The text of the line that Ctrl-C discarded."""
    readline = sys.modules.get("readline")
    return readline.get_line_buffer() if readline is not None else ""


def _show_all(pieces: "Generator[Piece, None, None]", terminal: "Terminal") -> None:
    with _remembered_interrupts() as interrupts:
        piece = next(pieces, None)
        while piece is not None:
            try:
                # An interrupt that led to no note was lost on its way.
                if interrupts and piece.kind != "note":
                    raise KeyboardInterrupt
                terminal.show(piece.kind, piece.text)
                piece = next(pieces, None)
            except KeyboardInterrupt:  # while the piece was shown: hand it to the turn
                interrupts.clear()
                piece = pieces.throw(KeyboardInterrupt)


@contextlib.contextmanager
def _remembered_interrupts() -> Iterator[list[int]]:
    """Lets Ctrl-C work as usual, and yields a list of those that came.

    A KeyboardInterrupt is lost if Python is ignoring exceptions, as in JAX's garbage-collection callback.
    """
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.default_int_handler(number, frame)

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield came
        return
    signal.signal(signal.SIGINT, remember)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Terminal:
    """Shows pieces on a stream. Escape sequences are sent only to a terminal, and only if NO_COLOR is not set."""

    def __init__(self, out: TextIO) -> None:
        self.is_one = out.isatty()
        self._escapes = self.is_one and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._out = out
        self._kind = "note"  # of the last piece
        self._open = False  # whether its line is unfinished

    def show(self, kind: str, text: str) -> None:
        """Shows a piece, or the next part of the last one, cleaned."""
        if kind == "thinking" and not self._escapes:
            return
        whole = kind in ("note", "aside")
        if whole or kind != self._kind:
            self.end_line()
            if self._kind == "reasoning" and kind == "answer":
                self._out.write("\n")
            if kind == "reasoning" and not self._escapes:
                self._out.write("(thinking) ")
        text = clean(text)
        dim = self._escapes and kind not in ("answer", "note")
        self._out.write(f"{_DIM}{text}{_PLAIN}" if dim else text)
        self._open, self._kind = not text.endswith("\n"), kind
        if whole:
            self.end_line()
        self._out.flush()

    def end_line(self) -> None:
        """Ends the open line, if there is one; a "thinking" line is erased."""
        if self._open:
            self._out.write(_ERASE_LINE if self._kind == "thinking" else "\n")
            self._out.flush()
            self._open = False
