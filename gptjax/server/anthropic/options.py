"""Thinking, effort and the answer's form, as Anthropic's API asks for them."""

import dataclasses
from typing import Final

from gptjax.errors import GptjaxError
from gptjax.server.errors import as_json, bad_request, of_gptjax
from gptjax.server.generation.shared_fields import MOST_TOKENS
from gptjax.server.http.fields import Fields
from gptjax.structured import Grammar
from gptjax.structured.wishes import described, read_response_format
from gptjax.text.chat_formats import ChatFormat, ChatOptions
from gptjax.text.harmony.messages import ResponseFormat

# By what clients say, the efforts that models know.
_EFFORTS: Final = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
_THINKING: Final = ("enabled", "adaptive", "disabled")
_DISPLAYS: Final = ("summarized", "omitted")


@dataclasses.dataclass(frozen=True)
class Thinking:
    """What a request says about the reasoning; by default, nothing."""

    wanted: bool | None = None  # None: as the model likes
    is_shown: bool = True  # or else a thinking block has only a signature

    @property
    def is_left_out(self) -> bool:
        """Whether the answer has no thinking blocks at all, even if the model thinks."""
        return self.wanted is False


def read_thinking(fields: Fields) -> Thinking:
    """`thinking`. Raises `ApiError`."""
    is_given, options = "thinking" in fields, fields.options("thinking")
    kind, display = options.take("type"), options.take("display")
    if is_given and kind not in _THINKING:
        raise bad_request(f"thinking.type is {as_json(kind)}; expected one of {', '.join(_THINKING)}")
    options.whole("budget_tokens", 1, MOST_TOKENS)  # a hint: no model here knows a budget
    options.finish(())
    if display is not None and display not in _DISPLAYS:
        raise bad_request(f"thinking.display is {as_json(display)}; expected one of {', '.join(_DISPLAYS)}")
    wanted = {"enabled": True, "disabled": False}.get(kind)
    return Thinking(wanted, is_shown=display != "omitted")


def read_output_config(fields: Fields) -> tuple[str | None, Grammar | None, ResponseFormat | None]:
    """The effort, what the text must be, and what to say of that. Raises `ApiError`."""
    options = fields.options("output_config")
    effort, form = _read_effort(options, "output_config"), options.take("format")
    options.finish(())
    try:
        return effort, read_response_format(form, "output_config.format"), described(form)
    except GptjaxError as error:
        raise of_gptjax(error) from None


def read_effort_of_turn(given: object, where: str) -> str | None:
    """The effort in the `output_config` of a message. Raises `ApiError`."""
    if not isinstance(given, dict | None):
        raise bad_request(f"{where} must be an object, found {as_json(given)}")
    options = Fields(given or {}, where)
    effort = _read_effort(options, where)
    options.finish(())
    return effort


def _read_effort(options: Fields, where: str) -> str | None:
    effort = options.take("effort")
    if effort is not None and (not isinstance(effort, str) or effort not in _EFFORTS):
        raise bad_request(f"{where}.effort is {as_json(effort)}; expected one of {', '.join(_EFFORTS)}")
    return None if effort is None else _EFFORTS[effort]


def options_of(chat_format: ChatFormat, thinking: Thinking, effort: str | None) -> ChatOptions:
    """What a chat format makes of the two: clients send them to any model, so one that it does not have is left out.

    A model that cannot be kept from thinking thinks little if it is asked not to.
    """
    has_switch = "enable_thinking" in chat_format.options
    if thinking.wanted is False and not has_switch:
        effort = "low"
    return ChatOptions(
        reasoning_effort=effort if "reasoning_effort" in chat_format.options else None,
        enable_thinking=thinking.wanted if has_switch else None,
    )
