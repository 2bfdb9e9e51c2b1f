"""The interface of all chat formats."""

import dataclasses
import datetime
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from gptjax.errors import RequestError
from gptjax.support.quoting import quoted
from gptjax.text.fields import read_date
from gptjax.text.harmony.messages import ResponseFormat
from gptjax.text.tokenizer import Tokenizer

DEFAULT: Final = "default"
TODAY: Final = "today"
_OF_NO_PROMPT: Final = ("response_format", "parallel_tool_calls")  # options that every format has


@dataclasses.dataclass(frozen=True, slots=True)
class ChatOptions:
    """The options of a turn. A format that has no use for one refuses it, unless it has its default.

    `response_format` is an exception: it is what a grammar sees to, and only some formats also tell the model. So is
    `parallel_tool_calls`, which only readers look at.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    """Functions in the form of OpenAI's chat API; harmony also has built-in ones."""
    reasoning_effort: str | None = None
    """ "low", "medium" or "high"; None is the format's default."""
    current_date: str | None = DEFAULT
    """Like "2025-06-28", or "today"; "default" is what the format's template does; None gives the model no date."""
    enable_thinking: bool | None = None
    """Whether the model thinks before it answers; None is the format's default."""
    response_format: ResponseFormat | None = None
    """The form that the answer is to have."""
    parallel_tool_calls: bool = True
    """Whether a turn may have several calls. If not, it ends with the first."""


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call that the model asks for."""

    id: str  # "call_" and 24 random hexadecimal digits, unique across conversations
    name: str  # a function's, or "python", "browser.search" and the like for harmony's built-in tools
    arguments: str  # JSON; in harmony as the model wrote it, so possibly malformed; "{}" if it wrote none

    def to_json(self) -> dict[str, Any]:
        """The call in the form of OpenAI's chat API."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclasses.dataclass(frozen=True, slots=True)
class CallPart:
    """What was added to a tool call while the model writes it."""

    index: int  # which call of the turn
    id: str
    name: str
    arguments: str  # the added text; the parts of a call make up its arguments
    begins: bool  # whether it is the first part


class TurnReader(Protocol):
    """Splits the tokens of one turn into answer, reasoning and tool calls; a detokenizer for the engine."""

    @property
    def ended(self) -> bool:
        """Whether the turn is over because the model began another role's message."""

    @property
    def phase(self) -> str:
        """Of the answer's text so far: "commentary" if its last message precedes calls, else "final_answer"."""

    @property
    def dropped(self) -> int:
        """How many characters of text were neither answer nor reasoning so far: tags and the text of calls."""

    def push(self, token_id: int, /) -> str:
        """Returns the answer text that became certain with this token."""

    def finish(self) -> str:
        """Returns the rest of the answer text."""

    def ended_by(self, token_id: int, /) -> None:
        """Call after `finish`, with the turn's last token."""

    def take_reasoning(self) -> str:
        """Returns the reasoning added since it was last called."""

    def take_calls(self) -> tuple[CallPart, ...]:
        """Returns what was added to tool calls since it was last called, a part for each call."""

    @property
    def reasoning(self) -> str:
        """All reasoning so far."""

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The complete calls; after `finish`, also one that the end of the turn cut short, if it can be read."""


class ChatFormat(Protocol):
    """How a family of models writes conversations. Immutable; any number of threads may share one."""

    @property
    def name(self) -> str:
        """Its name for `chat_format` and `--chat-format`."""

    @property
    def options(self) -> frozenset[str]:
        """The names of the `ChatOptions` that it has."""

    @property
    def begin(self) -> str | None:
        """The special token that every message begins with, if there is one."""

    @property
    def one_message_a_turn(self) -> bool:
        """Whether the reasoning, text and calls of a turn are one message."""

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises `RequestError` if the tokenizer lacks special tokens of this format."""

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The tokens that end a turn, as far as the tokenizer has them."""

    def render(
        self, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, options: ChatOptions, *, max_length: int
    ) -> list[int]:
        """The token ids to generate the assistant's next turn from.

        Text in messages is encoded as plain text, so it never turns into special tokens.

        Args:
          messages: as in OpenAI's chat API; text only.
          max_length: the most tokens. A longer prompt is refused before it is complete.

        Raises:
          RequestError: a message, a tool or an option is invalid or has no place in this format, or the tokenizer lacks
            its special tokens.
          CapacityError: more than `max_length` tokens.
        """

    def reader(self, tokenizer: Tokenizer, options: ChatOptions) -> TurnReader:
        """A reader of the turn that follows `render` with the same options, which it does not check again."""


def new_call_id() -> str:
    """A call id like no other, since clients may join conversations."""
    return f"call_{secrets.token_hex(12)}"


def date_of(options: ChatOptions) -> datetime.date | None:
    """The date that the options ask for, if it is one. Raises `RequestError` if it should be one and is not."""
    if options.current_date is None or options.current_date == DEFAULT:
        return None
    return datetime.date.today() if options.current_date == TODAY else read_date(options.current_date)


def check_options(name: str, known: frozenset[str], options: ChatOptions) -> None:
    """Raises `RequestError` for an option that the format `name` does not have, unless it has its default."""
    defaults = ChatOptions()
    for field in dataclasses.fields(options):
        given = getattr(options, field.name)
        neutral = not given if field.name == "tools" else given in (None, getattr(defaults, field.name))
        if field.name not in known and not neutral and field.name not in _OF_NO_PROMPT:
            raise RequestError(f"{field.name} has no meaning in the chat format {name}: leave it out")
    if options.enable_thinking not in (None, True, False):
        raise RequestError(f"enable_thinking is {quoted(options.enable_thinking)}; expected True or False")
