"""The fields that completions and chat share: sampling, stops, streaming."""

import dataclasses
import re
from typing import Any, Final

from gptjax.engine.request import MAX_BIASES, MAX_STOP_IDS, MAX_STOP_LENGTH, MAX_STOPS
from gptjax.errors import GptjaxError
from gptjax.server.errors import as_json, bad_request, of_gptjax
from gptjax.server.http.fields import Fields, check_number, check_text
from gptjax.structured import Grammar
from gptjax.structured.wishes import GUIDED
from gptjax.structured.wishes import read_guided as grammar_of_guided
from gptjax.text.chat_formats import ChatFormat

# Fields of OpenAI's API that do not change an answer here.
WITHOUT_EFFECT: Final = frozenset(
    """client_metadata metadata prompt_cache_key prompt_cache_retention safety_identifier service_tier store user
    verbosity""".split()
)
MOST_CHOICES: Final = 128
MOST_TOKENS: Final = 1 << 31
_NEAREST: Final = {"minimal": "low", "xhigh": "high"}
_SEEDS: Final = 1 << 32
_MOST_TOKEN: Final = (1 << 31) - 1
_TOKEN_KEY: Final = re.compile(r"0|[1-9][0-9]{0,8}")


@dataclasses.dataclass(frozen=True)
class Stream:
    """Whether the answer is streamed, and whether it ends with the usage."""

    wanted: bool
    usage: bool


def read_stream(fields: Fields) -> Stream:
    """`stream` and `stream_options`."""
    wanted, has_options = fields.flag("stream"), "stream_options" in fields
    options = fields.options("stream_options")
    if has_options and not wanted:
        raise bad_request("stream_options requires stream: true", "stream_options")
    usage = options.flag("include_usage")
    options.flag("continuous_usage_stats")  # vLLM's; the usage comes at the end
    options.finish({"include_obfuscation"})
    return Stream(wanted, usage)


def read_thinking(fields: Fields) -> bool | None:
    """`enable_thinking` in `chat_template_kwargs`, which vLLM has; None if it is absent."""
    options = fields.options("chat_template_kwargs")
    wanted = options.flag("enable_thinking") if "enable_thinking" in options else None
    options.finish(())
    return wanted


def read_parallel(fields: Fields) -> bool:
    """`parallel_tool_calls`, true if it is absent."""
    return fields.flag("parallel_tool_calls") if "parallel_tool_calls" in fields else True


def read_effort(fields: Fields) -> str | None:
    """`reasoning_effort`, or `reasoning` with an `effort`; None if both are absent."""
    effort, other = fields.text("reasoning_effort"), read_reasoning(fields)
    if effort and other and effort != other:
        raise bad_request("reasoning_effort and reasoning.effort are different: give one of them", "reasoning_effort")
    return effort or other or None


def read_reasoning(fields: Fields) -> str | None:
    """`reasoning.effort`; None if it is absent. Summaries are a wish that is not met."""
    options = fields.options("reasoning")
    effort = options.text("effort")
    options.finish({"summary", "generate_summary"})
    return effort


def fitted(
    chat_format: ChatFormat, effort: str | None, thinking: bool | None, *, name: str = "reasoning_effort"
) -> tuple[str | None, bool | None]:
    """The effort, and whether to think, as a chat format has them.

    Of OpenAI's further efforts, "minimal" and "xhigh" are its least and most; "none" is not to think. What it does not
    have, it refuses itself.
    """
    if "reasoning_effort" in chat_format.options:
        if effort == "none":
            message = f"{name} is 'none', but this model always reasons: the least is 'low'"
            raise bad_request(message, name, "unsupported")
        return _NEAREST.get(effort, effort) if effort else None, thinking
    if effort == "none" and "enable_thinking" in chat_format.options:
        if thinking:
            raise bad_request(f"{name} is 'none', but enable_thinking is true: give one of them", name)
        return None, False
    return effort, thinking


def read_guided(fields: Fields) -> Grammar | None:
    """What the text must be, under the names that vLLM has for it."""
    given = {name: fields.take(name) for name in GUIDED if name in fields}
    try:
        return grammar_of_guided(given)
    except GptjaxError as error:
        raise of_gptjax(error) from None


def read_sampling(fields: Fields, *, stop: str = "stop") -> dict[str, Any]:
    """The given options of `make_request`; the checkpoint's defaults apply to the others. `stop` names that field."""
    options: dict[str, Any] = {
        "temperature": fields.number("temperature", 0, 100),
        "top_p": _above_zero(fields, "top_p", 1),
        "top_k": _top_k(fields),
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": _above_zero(fields, "repetition_penalty", 100),
        "presence_penalty": fields.number("presence_penalty", -100, 100),
        "frequency_penalty": fields.number("frequency_penalty", -100, 100),
        "logit_bias": _logit_bias(fields),
        "seed": _seed(fields),
        "stop": _stops(fields, stop),
        "stop_ids": _stop_ids(fields),
        "ignore_eos": fields.flag("ignore_eos"),
    }
    return {name: value for name, value in options.items() if value is not None}


def seed_of_choice(options: dict[str, Any], choice: int) -> dict[str, Any]:
    """The options for one of `n` choices: each gets its own seed, or all would be the same."""
    return options if "seed" not in options else options | {"seed": (options["seed"] + choice) % _SEEDS}


def _above_zero(fields: Fields, name: str, high: float) -> float | None:
    value = fields.number(name, 0, high)
    if value == 0:
        raise bad_request(f"{name} must be above 0", name)
    return value


def _top_k(fields: Fields) -> int | None:
    value = fields.whole("top_k", -1, _MOST_TOKEN)
    return 0 if value == -1 else value  # -1 is "all" to many clients


def _seed(fields: Fields) -> int | None:
    value = fields.whole("seed", -(1 << 63), (1 << 64) - 1)
    return None if value is None else value % _SEEDS


def _logit_bias(fields: Fields) -> dict[int, float] | None:
    name = "logit_bias"
    value = fields.take(name)
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise bad_request(f"{name} must be an object of at most {MAX_BIASES} token ids and numbers", name)
    found = {}
    for token, bias in value.items():
        if not _TOKEN_KEY.fullmatch(token):  # "01" would be a second "1"
            raise bad_request(f"{name} has the key {as_json(token)}, which is not a token id", name)
        found[int(token)] = check_number(bias, -100, 100, name)
    return found


def _stops(fields: Fields, name: str) -> list[str] | None:
    value = fields.take(name)
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise bad_request(f"{name} must be a string or a list of at most {MAX_STOPS} strings", name)
    for stop in stops:
        if not 0 < len(check_text(stop, name)) <= MAX_STOP_LENGTH:
            raise bad_request(f"a stop must have 1 to {MAX_STOP_LENGTH} characters, found {len(stop)}", name)
    return stops


def _stop_ids(fields: Fields) -> list[int] | None:
    name = "stop_token_ids"
    value = fields.take(name)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > MAX_STOP_IDS or not are_tokens(value):
        raise bad_request(f"{name} must be a list of at most {MAX_STOP_IDS} token ids", name)
    return value


def are_tokens(values: list[Any]) -> bool:
    """Whether all values are whole numbers that could be token ids. (A prompt has thousands: no loop in Python.)"""
    return set(map(type, values)) <= {int} and 0 <= min(values, default=0) <= max(values, default=0) <= _MOST_TOKEN
