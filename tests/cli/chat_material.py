"""A model that says what it is told, and conversations with it."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from gptjax.chat import ChatChunk, chat_chunks
from gptjax.cli.chat_session import Piece, Session
from gptjax.engine.output import Chunk, Output
from gptjax.engine.request import Request, SamplingParams, Token
from gptjax.errors import GptjaxError
from gptjax.text import Tokenizer, load_tokenizer
from gptjax.text.chat_formats import FORMATS, ChatFormat, ChatOptions

ROOT = Path(__file__).resolve().parents[2]
TALES = load_tokenizer(ROOT / "gptjax" / "demo" / "gpt-oss-tales")
HARMONY = FORMATS["harmony"]
CTRL_C, NOT_FINITE = "\x03", "\x15"  # in a script: what happens there
THOUGHT = "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant"
SAID = "<|channel|>final<|message|>It was night.<|return|>"


class Scripted:
    """Stands in for a `LanguageModel`: its turns are scripts, and go through the engine's output and the reader."""

    config = SimpleNamespace(context_length=131072)

    def __init__(
        self,
        *scripts: str | GptjaxError,
        max_length: int = 1000,
        tokenizer: Tokenizer = TALES,
        chat_format: ChatFormat = HARMONY,
    ) -> None:
        self.max_length = max_length
        self.tokenizer, self.chat_format = tokenizer, chat_format
        self.scripts = list(scripts)
        self.asked: list[list[dict]] = []

    def stream_chat(self, messages, *, reasoning_effort, enable_thinking, max_tokens, **options) -> Iterator[ChatChunk]:
        self.asked.append(messages)
        self.effort, self.thinking, self.options = reasoning_effort, enable_thinking, options
        script = self.scripts.pop(0)
        if isinstance(script, GptjaxError):
            raise script
        how = ChatOptions(reasoning_effort=reasoning_effort, enable_thinking=enable_thinking)
        ids = self.chat_format.render(messages, self.tokenizer, how, max_length=self.max_length)
        request = Request(tuple(ids), max_tokens, SamplingParams(seed=0), self.chat_format.stop_ids(self.tokenizer))
        reader = self.chat_format.reader(self.tokenizer, how)
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
            for token in [-1] if part == NOT_FINITE else self.tokenizer.encode(part, special=True):
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


# The terminal


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True
