"""The parts of a harmony conversation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptjax.errors import RequestError
from gptjax.text.harmony.schema import check_schema

CHANNELS = ("analysis", "commentary", "final")
FUNCTIONS = "functions"
"""The namespace of the user's own functions, which are called in the commentary channel."""


@dataclass(frozen=True, slots=True)
class Function:
    """One function of a tool. Raises RequestError for an invalid schema."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    """JSON schema of the arguments; None for a function that takes none."""

    def __post_init__(self) -> None:
        if self.parameters is not None:
            if not isinstance(self.parameters, dict):
                kind = type(self.parameters).__name__
                raise RequestError(f"the parameters of {self.name} are {kind}; expected a JSON schema (an object)")
            check_schema(self.parameters, f"the parameters of {self.name}")


@dataclass(frozen=True, slots=True)
class Namespace:
    """A tool: functions under a common name, or (`python`) none; then calls use only the tool's name."""

    name: str
    description: str | None = None
    functions: tuple[Function, ...] = ()


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """The form of an answer."""

    name: str
    description: str
    schema: str
    """JSON."""


@dataclass(frozen=True, slots=True)
class SystemContent:
    """The parts of a system message. One that is None or empty is left out."""

    model_identity: str | None = "You are ChatGPT, a large language model trained by OpenAI."
    knowledge_cutoff: str | None = "2024-06"
    current_date: str | None = None
    """Like "2025-06-28"."""
    reasoning_effort: str | None = "medium"
    """Or "low" or "high"."""
    tools: tuple[Namespace, ...] = ()
    """Built-in tools; functions belong in the developer message."""
    channels: tuple[str, ...] = CHANNELS
    """Those the model may use."""


@dataclass(frozen=True, slots=True)
class DeveloperContent:
    """The parts of a developer message. One that is None or empty is left out."""

    instructions: str | None = None
    tools: tuple[Namespace, ...] = ()
    response_format: ResponseFormat | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message, with its header and text as in the token stream. `StreamParser` makes every content a string."""

    role: str
    content: str | SystemContent | DeveloperContent
    name: str | None = None
    """The author's name: a tool's, like "functions.get_weather", or that of one of several users."""
    channel: str | None = None
    recipient: str | None = None
    """The tool that the assistant calls, or "assistant"."""
    content_type: str | None = None
    """Like "code" or "<|constrain|>json", which begins with the special token."""
