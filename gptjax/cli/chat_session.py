"""`gptjax chat` without its terminal: lines in, pieces of text out."""

import dataclasses
import difflib
import json
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from gptjax.chat import ChatChunk, ChatCompletion
from gptjax.cli.common import EFFORTS
from gptjax.errors import CapacityError, GptjaxError, RequestError
from gptjax.language_model import LanguageModel
from gptjax.text.chat_formats import ChatOptions, check_options
from gptjax.text.writer import LONGEST

COMMANDS: Final = {
    "effort": ("low|medium|high", "how much to think before answering"),
    "system": ("TEXT", "sets instructions from the next message on; alone, shows them; - removes them"),
    "reasoning": ("show|hide", "shows or hides reasoning from now on; alone, shows the last turn's"),
    "reset": ("", "starts a new conversation with the same instructions and effort"),
    "save": ("FILE", "writes the conversation as JSON, in the form of OpenAI's chat API"),
    "raw": ("all", "shows what the model read and wrote since your last message, or all of it"),
    "stats": ("", "shows tokens and speed of the last turn"),
    "help": ("", "shows this"),
    "quit": ("", "ends the chat, as Ctrl-D does"),
}
_RAW_MESSAGES = 2  # the user's, and the beginning of the assistant's


@dataclasses.dataclass(frozen=True)
class Piece:
    """Something to show. Answers and reasoning come in parts; the other kinds come whole."""

    kind: Literal["answer", "reasoning", "thinking", "note", "aside"]  # "thinking" is shown until something follows
    text: str  # as the model wrote it: control characters and all


@dataclasses.dataclass
class Turn:
    """The reply to a message, as far as it came."""

    prompt_ids: list[int]
    began: float
    first: float = 0.0  # when the first token came
    latest: float = 0.0
    token_ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    reasoning_tokens: int = 0
    completion: ChatCompletion | None = None  # None if it was stopped early

    def add(self, chunk: ChatChunk) -> None:
        """Takes the next token."""
        self.latest = time.perf_counter()
        self.first = self.first or self.latest
        self.token_ids += [chunk.token_id] if chunk.token_id >= 0 else []
        self.text += chunk.text
        self.reasoning += chunk.reasoning
        self.reasoning_tokens += bool(chunk.reasoning)
        self.completion = chunk.completion

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message, for the conversation so far."""
        if self.completion is not None:
            return self.completion.message
        return {"role": "assistant", "content": self.text} | (
            {"reasoning_content": self.reasoning} if self.reasoning else {}
        )

    @property
    def positions(self) -> int:
        """Positions of the context in use; the last token needs none."""
        return len(self.prompt_ids) + max(len(self.token_ids) - 1, 0)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second after the first token."""
        seconds = self.latest - self.first
        return (len(self.token_ids) - 1) / seconds if seconds > 0 else 0.0


class Session:
    """A conversation with a model, and its settings. `over` is set once the user wants to end it."""

    def __init__(
        self,
        lm: LanguageModel,
        name: str,
        *,
        system: str | None = None,
        effort: str | None = None,
        enable_thinking: bool | None = None,
        show_reasoning: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """`name` is the model's; `options` are those of `LanguageModel.generate`.

        Raises:
          RequestError: the model's chat format has no `effort` or `enable_thinking`, and one is given.
        """
        self.messages: list[dict[str, Any]] = []  # the user's and the assistant's, alternating
        self.last: Turn | None = None
        self.system, self.show_reasoning = system or None, show_reasoning
        self.over = False
        self._lm, self._name = lm, name
        self._format = lm.chat_format
        self._how = ChatOptions(reasoning_effort=effort, enable_thinking=enable_thinking)
        check_options(self._format.name, self._format.options, self._how)
        if effort is None and "reasoning_effort" in self._format.options:
            self._how = dataclasses.replace(self._how, reasoning_effort="medium")
        self._options: dict[str, Any] = {"max_tokens": lm.max_length} | dict(options or {})

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """All messages, the instructions first."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.messages

    def handle(self, line: str) -> Generator[Piece, None, None]:
        """Runs a command, or asks the model. Raises `GptjaxError` on failure, with nothing changed."""
        line = line.strip()
        if line.startswith("/") and not line.startswith("//"):
            note = self._command(line)
            if note:
                yield Piece("note", note)
        elif line:
            yield from self.ask(line.removeprefix("/") if line.startswith("//") else line)

    def ask(self, text: str) -> Generator[Piece, None, None]:
        """One turn. A KeyboardInterrupt, raised or thrown in, ends it and keeps the partial answer.

        If it ends before the answer begins, or with an error, the message is dropped so that it can be sent again.
        """
        user = {"role": "user", "content": text}
        how: dict[str, Any] = {name: getattr(self._how, name) for name in ("reasoning_effort", "enable_thinking")}
        messages = [*self.conversation, user]
        ids = self._format.render(messages, self._lm.tokenizer, self._how, max_length=LONGEST)
        self._check_room(len(ids))
        turn = Turn(ids, began=time.perf_counter())
        try:
            for chunk in self._lm.stream_chat(messages, **how, **self._options):
                self.last = turn
                yield from self._stream(turn, chunk)
        except KeyboardInterrupt:
            self.messages += [user, turn.message] if turn.text else []
            yield Piece("note", f"Stopped; {'the partial answer stays' if turn.text else 'your message was dropped'}.")
            return
        assert turn.completion is not None  # the last chunk has it
        if turn.completion.completion.error is not None:
            raise GptjaxError(turn.completion.completion.error)
        self.messages += [user, turn.message]
        yield from self._end(turn, turn.completion)

    def _stream(self, turn: Turn, chunk: ChatChunk) -> Iterator[Piece]:
        begins, answers = not turn.reasoning, chunk.text and not turn.text
        turn.add(chunk)
        if chunk.reasoning and self.show_reasoning:
            yield Piece("reasoning", chunk.reasoning)
        elif chunk.reasoning and begins:
            yield Piece("thinking", "thinking...")
        if answers:
            yield from self._thought(turn)
        if chunk.text:
            yield Piece("answer", chunk.text)

    def _check_room(self, tokens: int) -> None:
        room, most = self._lm.max_length, self._lm.config.context_length
        if tokens > room:
            less = "start a new conversation with /reset" if self.messages else "shorten the message"
            more = f", or start with a larger --max-length (the model has {most} positions)" if most > room else ""
            raise CapacityError(
                f"with this message the conversation has {tokens} tokens, but there is room for {room}: {less}{more}"
            )

    def _thought(self, turn: Turn) -> Iterator[Piece]:
        if turn.reasoning_tokens and not self.show_reasoning:
            yield Piece("aside", f"thought for {turn.reasoning_tokens} tokens (/reasoning shows them)")

    def _end(self, turn: Turn, completion: ChatCompletion) -> Iterator[Piece]:
        if not turn.text:
            yield from self._thought(turn)
        for call in completion.tool_calls:
            yield Piece("note", f"The model called {call.name} with {call.arguments}; gptjax chat does not run tools.")
        if completion.finish_reason == "length":
            full = turn.positions >= self._lm.max_length
            why = "the context is full (/reset, --max-length)" if full else "--max-tokens was reached"
            yield Piece("note", f"Cut off{'' if turn.text else ' before the answer'}: {why}.")
        elif not turn.text and not completion.tool_calls:
            yield Piece("note", "The model ended its turn without an answer.")
        rate = f"{turn.tokens_per_second:.0f} tokens/s"
        yield Piece("aside", f"context {turn.positions} of {self._lm.max_length} tokens, {rate}")

    # Commands: each takes the text after its name, and returns what to show.

    def _command(self, line: str) -> str:
        name, _, argument = line.removeprefix("/").partition(" ")
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists all"
            raise RequestError(f"unknown command /{name}; {hint} (to send a message that begins with /, write //)")
        if argument and not COMMANDS[name][0]:
            raise RequestError(f"/{name} takes no argument, found {argument[:40]!r}; nothing was done")
        answer: str = getattr(self, f"_do_{name}")(argument.strip())
        return answer

    def _do_effort(self, effort: str) -> str:
        if "reasoning_effort" not in self._format.options:
            raise RequestError(f"the model's chat format, {self._format.name}, has no effort to set")
        if effort and effort not in EFFORTS:
            raise RequestError(f"unknown effort {effort!r}; choose one of {', '.join(EFFORTS)}")
        self._how = dataclasses.replace(self._how, reasoning_effort=effort or self._how.reasoning_effort)
        return f"The effort is {self._how.reasoning_effort}."

    def _do_system(self, text: str) -> str:
        if text:
            self.system = None if text == "-" else text
        return f"The instructions are: {self.system}" if self.system else "There are no instructions."

    def _do_reasoning(self, choice: str) -> str:
        if not choice:
            return self._last().reasoning or "There was no reasoning."
        if choice not in ("show", "hide"):
            raise RequestError(f"/reasoning takes show, hide, or nothing to show the last reasoning, found {choice!r}")
        self.show_reasoning = choice == "show"
        return f"Reasoning is {'shown' if self.show_reasoning else 'hidden'}."

    def _do_reset(self, _: str) -> str:
        dropped, self.messages, self.last = len(self.messages), [], None
        return f"New conversation; {dropped} messages forgotten."

    def _do_save(self, name: str) -> str:
        if not name:
            raise RequestError("name a file: /save story.json")
        if not self.messages:
            raise RequestError("there is nothing to save yet")
        effort = {"reasoning_effort": self._how.reasoning_effort} if self._how.reasoning_effort else {}
        conversation = {"model": self._name, **effort, "messages": self.conversation}
        try:
            path = Path(name).expanduser()
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps(conversation, indent=2, ensure_ascii=False) + "\n")
        except FileExistsError:
            raise RequestError(f"{name} already exists and was not overwritten; choose another name") from None
        except (OSError, RuntimeError, ValueError) as error:  # an unknown user's home, a NUL
            raise RequestError(f"{name} cannot be written ({getattr(error, 'strerror', None) or error})") from None
        return f"Wrote {len(self.conversation)} messages to {path}."

    def _do_raw(self, choice: str) -> str:
        if choice not in ("", "all"):
            raise RequestError(f"/raw takes all or nothing, found {choice!r}")
        turn, tokenizer = self._last(), self._lm.tokenizer
        begin = tokenizer.special_ids.get(self._format.begin or "")
        begins = [index for index, token in enumerate(turn.prompt_ids) if token == begin]
        cut = begins[-_RAW_MESSAGES] if begins and not choice else 0
        before = f"({cut} tokens before; /raw all shows them)\n" if cut else ""
        return before + tokenizer.decode([*turn.prompt_ids[cut:], *turn.token_ids], special=True)

    def _do_stats(self, _: str) -> str:
        turn, room = self._last(), self._lm.max_length
        return (
            f"prompt   {len(turn.prompt_ids)} tokens\n"
            f"output   {len(turn.token_ids)} tokens, {turn.reasoning_tokens} of them reasoning\n"
            f"context  {turn.positions} of {room} tokens ({turn.positions / room:.0%})\n"
            f"speed    first token after {turn.first - turn.began:.2f} s, then {turn.tokens_per_second:.1f} tokens/s"
        )

    def _do_help(self, _: str) -> str:
        rows = [(f"/{name} {takes}".strip(), about) for name, (takes, about) in COMMANDS.items()]
        rows += [
            ("Ctrl-C", "ends the turn and keeps the partial answer; pressed twice when idle, ends the chat"),
            ("\\", "at the end of a line: continues the message on the next line"),
        ]
        width = max(len(usage) for usage, _ in rows)
        return "\n".join(f"{usage:{width}}  {about}" for usage, about in rows)

    def _do_quit(self, _: str) -> str:
        self.over = True
        return ""

    def _last(self) -> Turn:
        if self.last is None:
            raise RequestError("there was no turn yet: say something first")
        return self.last
